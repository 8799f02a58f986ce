"""The floor under every time: bytes over read bandwidth or FLOPs over GEMM peak, the larger of the two. Both ceilings are
measured in the same run."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .cases import Model

READ_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}  # more than any cache holds, and than a launch takes
GEMM_SIZE = {"cuda": 8192, "cpu": 2048}


class Ceilings(NamedTuple):
    """read: bytes/s; gemm: FLOP/s in `gemm_dtype`."""

    read: float
    gemm: float
    gemm_dtype: str


class Work(NamedTuple):
    bytes: int
    flops: int

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that no implementation can beat."""
        return max(self.bytes / ceilings.read, self.flops / ceilings.gemm)

    def bound(self, ceilings: Ceilings) -> str:
        return "memory" if self.bytes / ceilings.read >= self.flops / ceilings.gemm else "arithmetic"


def work(op: str, model: Model, tokens: int, top_k: int, unique: float, dtype) -> Work:
    """What `op` ("route", "experts" or "layer") has to read and to compute. Weights only for experts and layer, as they are
    stored (`dtype`), with their scales: the activations are a few hundred kB."""
    if op == "route":
        return Work(tokens * (4 * model.num_experts + 8 * top_k), 0)
    bytes_read = unique * model.expert_bytes(dtype)
    flops = 6 * model.hidden * model.intermediate * tokens * top_k
    if op == "layer":
        bytes_read += model.shared_bytes(dtype)
        flops += 6 * model.hidden * model.shared * tokens
    return Work(round(bytes_read), flops)


def measure_ceilings(device: str, dtype) -> Ceilings:
    """The best of several tries: a ceiling is what the machine can do, not what it usually does."""
    # A CPU without bf16 instructions computes in fp32, as our kernels do there.
    gemms = {str(kind).removeprefix("torch."): _gemm(device, kind) for kind in {dtype, torch.float32}}
    if device == "cuda":  # fp32 there means tensor cores' tf32 or no tensor cores at all: not this dtype's peak
        gemms = {str(dtype).removeprefix("torch."): gemms[str(dtype).removeprefix("torch.")]}
    best = max(gemms, key=gemms.get)
    return Ceilings(_read(device), gemms[best], best)


def best(one: dict, other: dict) -> dict:
    """The higher ceilings of two measurements."""
    higher = max(one, other, key=lambda ceilings: ceilings["gemm"])
    return dict(higher, read=max(one["read"], other["read"]))


def _read(device: str) -> float:
    data = torch.randn(1 << 18, device=device).repeat(READ_BYTES[device] >> 20)
    return data.numel() * 4 / _best(lambda: data.sum(), device, 15, "read bandwidth")


def _gemm(device: str, dtype) -> float:
    size = GEMM_SIZE[device]
    if device == "cpu" and dtype != torch.float32:
        size //= 4  # without instructions for it a larger one takes minutes
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    name = f"GEMM peak, {str(dtype).removeprefix('torch.')}"
    return 2 * size**3 / _best(lambda: F.linear(a, b), device, 10, name)


def _best(function, device: str, tries: int, label: str) -> float:
    times = []
    function()
    for _ in tqdm(range(tries), desc=label, leave=False, disable=None):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
