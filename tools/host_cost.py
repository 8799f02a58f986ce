"""What a call costs the Python side: microseconds until its kernels are launched, with the launches stubbed.

    python tools/host_cost.py [--backend triton cuda cpp] [--tokens 32] [--mode no_grad inference grad] [--json FILE]

No GPU is needed. Tensors of the CPU stand for a GPU's. Triton compiles its kernels for an H100, and its whole launch path
runs, but for the call into the driver. The ops of csrc/cuda get kernels in C++ that do nothing. The CPU's own kernels run
on a tiny layer. Each figure is a median over rounds in which all of them take turns, as the machine's speed drifts.

"forward" is `BlockMoE.forward`; of it, "module" is spent around `block_moe`, "op" on checks, the dispatcher and outputs,
and "backend" on scratch, arguments and launches. `moe_experts` and `block_route` are whole calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import torch

from dmoe_ops import BlockMoE, BlockRouting, _backends, block_moe, block_route, moe_experts, router
from dmoe_ops._call import LayerCall
from dmoe_ops.formats import ExpertWeights

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
ROUNDS, CALLS = 20, 50


# ---- stand-ins for a GPU ----


class Gpu:
    """A driver of Triton that has an H100, on which a launch calls `launch` with what the driver in C would get."""

    launch = staticmethod(lambda *args: None)

    def __init__(self):
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher

        self.target, self.launcher_cls, self.utils = GPUTarget("cuda", 90, 32), CudaLauncher, self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return dict(max_shared_mem=227 << 10)

    def load_binary(self, name, kernel, shared, device):
        return name, name, 32, 0, 1024  # module, function, registers, spills, threads

    def allocate_default_profile_scratch(self, *args):
        return None


@contextlib.contextmanager
def triton_backend():
    """DMOE_BACKEND=triton serves tensors of the CPU as if they were on an H100. Gives the driver."""
    from dmoe_ops.triton_kernels import backend, launch, tiles
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    device, gpu = torch.device("cuda", 0), Gpu()
    table = tiles.for_name("H100", 227 << 10, 132)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, DMOE_BACKEND="triton", TRITON_INTERPRET="1"))
        for owner, name, value in (
            # Triton 3.6 compiles the launcher's part in C; later ones have it in their driver.
            (
                nvidia,
                "compile_module_from_src",
                lambda **_: types.SimpleNamespace(launch=lambda *args: gpu.launch(*args)),
            ),
            (nvidia, "library_dirs", list),
            (tiles, "for_device", lambda _: table),
            (backend, "has_pdl", lambda _: True),
            (backend, "has_fp8", lambda _: True),
            (launch, "on", lambda _: torch.cuda.device(device)),
            (torch.cuda, "_exchange_device", lambda _: 0),
            (torch.cuda, "_maybe_exchange_device", lambda _: 0),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        driver.set_active(gpu)
        yield gpu


STUB = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <string>
#include <vector>
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
void gate_route(const Tensor, const Tensor, const Maybe, const Maybe, int64_t, const std::vector<int64_t>,
                const std::vector<double>, Tensor, Tensor, Tensor, Tensor, Tensor, Maybe, const Maybe) {}
void dense(const Tensor, const Tensor, const Tensor, const Maybe, const Maybe, const Maybe, const Maybe, const Maybe,
           const Maybe, const Maybe, const std::string, const Tensor, const Tensor, Tensor, Tensor, bool, Tensor) {}
STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("_gate_route_out", TORCH_BOX(&gate_route));
  m.impl("_block_dense_out", TORCH_BOX(&dense));
}
"""


@contextlib.contextmanager
def cuda_backend():
    """DMOE_BACKEND=cuda serves tensors of the CPU, by kernels in C++ that do nothing."""
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stub.cpp"), Path(folder, "stub.so")
        source.write_text(STUB)
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        flags += [f"-I{path}" for path in cpp_extension.include_paths()]
        torch_cpu = next(Path(path, "libtorch_cpu.so") for path in cpp_extension.library_paths())
        subprocess.run(["c++", *flags, source, torch_cpu, "-o", library], check=True)
        torch.ops.load_library(str(library))
    with (
        mock.patch.dict(os.environ, DMOE_BACKEND="cuda"),
        mock.patch.object(_backends.Cuda, "unavailable_reason", lambda _: None),
        mock.patch.object(_backends, "_has_cuda_experts", lambda _: True),
    ):
        yield


def cpp_backend():
    return mock.patch.dict(os.environ, DMOE_BACKEND="cpp")


BACKENDS = {"triton": triton_backend, "cuda": cuda_backend, "cpp": cpp_backend}


# ---- what is timed ----


def calls(backend: str, tokens: int) -> dict:
    """What is timed, by name: functions without arguments."""
    if backend == "cpp":
        hidden, intermediate = 16, 16
        routing = BlockRouting(num_experts=8, top_k=2, n_group=1, topk_group=1, min_experts=2)
    else:  # LLaDA2.0-mini, whose memory nobody touches
        hidden, intermediate, routing = 2048, 512, BlockRouting()
    layer = BlockMoE(hidden, intermediate, routing, shared_intermediate_size=intermediate, dtype=torch.bfloat16)
    if backend == "cpp":
        for weight in layer.parameters():
            torch.nn.init.normal_(weight)
    x = torch.zeros(1, tokens, hidden, dtype=torch.bfloat16)
    weights = [layer.gate_weight, layer.expert_bias, layer.w13, layer.w2, layer.shared_w13, layer.shared_w2]
    rows, out = x[0], router.allocate_routing(tokens, tokens, None, routing, x)
    logits, y, experts = torch.zeros(tokens, routing.num_experts), torch.empty_like(rows), ExpertWeights(*weights[2:])
    ids, scale = torch.zeros_like(out.topk_ids), torch.zeros_like(out.topk_weights)
    call = LayerCall(rows, *weights[:2], experts, None, tokens, routing, y, out, logits)
    chosen = _backends.backend(x)
    timed = {
        "forward": lambda: layer(x),
        "block_moe": lambda: block_moe(x, *weights, routing=routing),
        "backend": lambda: chosen.block_moe(call),
        "moe_experts": lambda: moe_experts(rows, layer.w13, layer.w2, ids, scale),
        "block_route": lambda: block_route(logits, layer.expert_bias, routing=routing),
    }
    if backend == "cuda":  # it has no stub, but a kernel for the CPU
        del timed["block_route"]
    return timed


def medians(functions: dict, mode) -> dict:
    """Microseconds of each function, in the order of their names."""
    samples = {name: [] for name in functions}
    with mode():
        for round_ in range(ROUNDS + 1):
            for name, function in functions.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    function()
                if round_:  # the first one compiles
                    samples[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
    return {name: statistics.median(values) for name, values in samples.items()}


def rows(backends: list[str], tokens: list[int], modes: list[str]) -> list[dict]:
    found = []
    for backend in backends:
        with BACKENDS[backend]():
            for count in tokens:
                for mode in modes:
                    us = medians(calls(backend, count), MODES[mode])
                    us["module"], us["op"] = us["forward"] - us["block_moe"], us["block_moe"] - us["backend"]
                    found.append(dict(backend=backend, tokens=count, mode=mode, us=us))
    return found


COLUMNS = ("forward", "module", "op", "backend", "moe_experts", "block_route")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[32])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json")
    args = parser.parse_args()
    found = rows(args.backend, args.tokens, args.mode)
    print("| backend | tokens | mode | " + " | ".join(COLUMNS) + " |")
    print("|---" * (3 + len(COLUMNS)) + "|")
    for row in found:
        figures = " | ".join(f"{row['us'][name]:.0f}" if name in row["us"] else "" for name in COLUMNS)
        print(f"| {row['backend']} | {row['tokens']} | {row['mode']} | {figures} |")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
