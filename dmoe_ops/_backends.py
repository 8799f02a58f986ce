"""The backends: each fills the outputs of the ops, which an op has validated and allocated, and does nothing else.

`route` is the first half of `block_moe` and returns the second as a function (x, weights, y, waves=None): the map of the
weights may be another by then. Both halves together leave the bits of `block_moe`.

`DMOE_BACKEND` = auto | reference | cpp | triton | cuda chooses; auto takes the first of `AUTO` that can serve the
tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F

from . import reference
from ._call import LayerCall
from ._library import _C, WHY_NO_C, packed_routing
from .formats import ExpertWeights
from .routing import RoutingResult


def _route_logits(backend, call: LayerCall):
    """The rest of `route` where the router logits are there already."""
    backend.block_route(
        call.router_logits, call.expert_bias, call.block_offsets, call.seq_len, call.routing, call.routed,
        call.domain_offsets, call.coreset_ids,
    )  # fmt: skip
    return functools.partial(_experts, backend, call.routed)


def _experts(backend, out: RoutingResult, x, weights: ExpertWeights, y, waves=None) -> None:
    """What `route` returns on the CPU: fills y, by one call or by one for each wave (begin, end) of experts."""
    if waves is None:
        return backend.moe_experts(x, weights, out.topk_ids, out.topk_weights, y)
    carry = torch.empty_like(x, dtype=out.topk_weights.dtype)
    for begin, end in waves:
        backend.moe_experts(x, weights, out.topk_ids, out.topk_weights, y, carry, begin, end)


class Reference:
    """plain torch: the contract itself, on any device"""

    @staticmethod
    def unavailable_reason(device) -> str | None:
        return None

    @staticmethod
    def block_route(logits, expert_bias, block_offsets, seq_len, routing, out: RoutingResult, *shared) -> None:
        rows = logits.view(-1, seq_len, logits.shape[1]) if seq_len else logits
        given = dict(zip(("domain_offsets", "coreset_ids"), shared))
        result = reference.block_route(rows, expert_bias, routing=routing, block_offsets=block_offsets, **given)
        for written, value in zip(out, result):
            written.copy_(value)

    @staticmethod
    def moe_experts(x, weights: ExpertWeights, topk_ids, topk_weights, y, carry=None, begin=0, end=None) -> None:
        so_far = carry if begin else None
        total = reference.all_experts(x.to(topk_weights.dtype), weights, topk_ids, topk_weights, so_far, begin, end)
        (y if end in (None, weights.experts) else carry).copy_(total)

    moe_experts_backward = staticmethod(reference.moe_experts_backward)

    @staticmethod
    def route(call: LayerCall):
        dtype = call.router_logits.dtype
        call.router_logits.copy_(F.linear(call.x.to(dtype), call.gate_weight.to(dtype)))
        return _route_logits(Reference, call)

    @staticmethod
    def block_moe(call: LayerCall) -> None:
        Reference.route(call)(call.x, call.weights, call.y)

    @staticmethod
    def add_rms_norm(x, delta, weight, eps, normed, total) -> None:
        for written, value in zip((normed, total), reference.add_rms_norm(x, delta, weight, eps)):
            written.copy_(value)

    @staticmethod
    def qk_norm_rope(*args) -> None:
        args[-1].copy_(reference.qk_norm_rope(*args[:-1]))

    @staticmethod
    def block_attention(*args) -> None:
        args[-1].copy_(reference.block_attention(*args[:-1]))

    @staticmethod
    def count_step(*args) -> None:
        args[-1].copy_(reference.count_step(*args[:-1]))

    @staticmethod
    def unmask(*args) -> None:
        args[-1].copy_(reference.unmask(*args[:-1]))

    @staticmethod
    def greedy(logits, token, probability) -> None:
        for written, value in zip((token, probability), reference.greedy(logits)):
            written.copy_(value)


class Cpp:
    """csrc/cpu, on the CPU"""

    @staticmethod
    def unavailable_reason(device) -> str | None:
        if _C is None:
            return f"the extension module {WHY_NO_C}"
        if device is not None and device.type != "cpu":
            return f"it serves CPU tensors, got {device}"
        return None

    @staticmethod
    def block_route(
        logits, expert_bias, block_offsets, seq_len, routing, out: RoutingResult, domain_offsets=None, coreset_ids=None
    ) -> None:
        call: tuple = (logits, expert_bias, block_offsets, seq_len, *packed_routing(routing), *out)
        if domain_offsets is not None or coreset_ids is not None:
            call += domain_offsets, routing.pool_capacity or 0, routing.choose == "pool", coreset_ids
        torch.ops.dmoe._block_route_out(*call)

    @staticmethod
    def moe_experts(x, weights: ExpertWeights, topk_ids, topk_weights, y, *wave) -> None:
        torch.ops.dmoe._moe_experts_out(x, *weights, topk_ids, topk_weights, y, *wave)

    moe_experts_backward = staticmethod(reference.moe_experts_backward)  # its products are torch's own, and fast

    @staticmethod
    def route(call: LayerCall):
        torch.ops.dmoe._gate_out(call.x, call.gate_weight, call.router_logits)
        return _route_logits(Cpp, call)

    @staticmethod
    def block_moe(call: LayerCall) -> None:
        Cpp.route(call)(call.x, call.weights, call.y)

    @staticmethod
    def add_rms_norm(*args) -> None:
        torch.ops.dmoe._add_rms_norm_out(*args)

    @staticmethod
    def qk_norm_rope(*args) -> None:
        torch.ops.dmoe._qk_norm_rope_out(*args)

    # Torch's own are fast on a CPU.
    block_attention = Reference.block_attention
    count_step = Reference.count_step
    unmask = Reference.unmask

    @staticmethod
    def greedy(*args) -> None:
        torch.ops.dmoe._greedy_out(*args)


class Triton:
    """triton_kernels, on GPUs; weights plain, fp8, int8 or int4

    What it doesn't take, int8 activations, goes to the reference.
    """

    @staticmethod
    def unavailable_reason(device) -> str | None:
        if not _has_triton():
            return "the package triton is not installed"
        if device is None and not torch.cuda.is_available() and not _triton_interprets():
            return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for checks)"
        if device is not None and device.type != ("cpu" if _triton_interprets() else "cuda"):
            return f"it serves GPU tensors, and only the CPU's under TRITON_INTERPRET=1, got {device}"
        return None

    @staticmethod
    def block_route(*args) -> None:
        _triton_backend().block_route(*args)

    @staticmethod
    def moe_experts(x, weights: ExpertWeights, *args) -> None:
        if Triton._takes(weights):
            _triton_backend().moe_experts(x, weights, *args)
        else:
            Reference.moe_experts(x, weights, *args)

    @staticmethod
    def moe_experts_backward(d_y, x, weights: ExpertWeights, *args) -> None:
        _triton_backend().moe_experts_backward(d_y, x, weights, *args)

    @staticmethod
    def route(call: LayerCall):
        return (_triton_backend() if Triton._takes(call.weights) else Reference).route(call)

    @staticmethod
    def block_moe(call: LayerCall) -> None:
        (_triton_backend() if Triton._takes(call.weights) else Reference).block_moe(call)

    @staticmethod
    def _takes(weights: ExpertWeights) -> bool:
        return not weights.quantize_activations

    @staticmethod
    def add_rms_norm(*args) -> None:
        _triton_backend().add_rms_norm(*args)

    @staticmethod
    def qk_norm_rope(*args) -> None:
        _triton_backend().qk_norm_rope(*args)

    @staticmethod
    def block_attention(*args) -> None:
        _triton_backend().block_attention(*args)

    @staticmethod
    def count_step(*args) -> None:
        _triton_backend().count_step(*args)

    @staticmethod
    def unmask(*args) -> None:
        _triton_backend().unmask(*args)

    @staticmethod
    def greedy(*args) -> None:
        _triton_backend().greedy(*args)


@functools.cache
def _triton_backend():  # imported at the first call: that takes a second, and a CPU has no use for it
    from .triton_kernels.backend import Triton

    return Triton


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


class Cuda:
    """csrc/cuda, on NVIDIA GPUs of compute capability 8.x, 9.0, 10.x and 12.x

    Two launches: router and experts, whose weights are plain or fp8. What the host rules refuse (csrc/cuda/router.h and
    experts.h: float32 experts, more than 64 tokens through experts, sizes that do not divide into its tiles) goes to
    Triton, or to the reference where that is missing; so does every gradient, int8 and int4.
    """

    @staticmethod
    def unavailable_reason(device) -> str | None:
        return _cuda_unavailable_reason(device)

    @staticmethod
    def block_route(logits, expert_bias, block_offsets, seq_len, routing, out: RoutingResult, *shared) -> None:
        # Every block by itself, and its coreset its own: what this router knows.
        alone = all(each is None for each in shared)
        if not alone or _C.cuda_router_refuses(routing.num_experts, routing.top_k, routing.block_size, 0):
            _without_cuda().block_route(logits, expert_bias, block_offsets, seq_len, routing, out, *shared)
        else:
            Cpp.block_route(logits, expert_bias, block_offsets, seq_len, routing, out)

    @staticmethod
    def moe_experts(x, weights: ExpertWeights, topk_ids, topk_weights, y) -> None:
        if _cuda_experts_refuse(x, weights, topk_ids.shape[1]):
            _without_cuda().moe_experts(x, weights, topk_ids, topk_weights, y)
        else:
            schedule = _cuda_schedule(x, weights.experts)
            Cuda._experts(x, weights, topk_ids, topk_weights, schedule, False, y)

    @staticmethod
    def moe_experts_backward(*args) -> None:
        _without_cuda().moe_experts_backward(*args)

    @staticmethod
    def route(call: LayerCall):
        if Cuda._refuses(call):
            return _without_cuda().route(call)
        schedule = Cuda._route(call, None)

        def experts(x, weights, y, waves=None) -> None:
            if waves is not None:
                raise ValueError("waves must be None: the CUDA kernel needs all experts of a call at once")
            Cuda._experts(x, weights, call.routed.topk_ids, call.routed.topk_weights, schedule, True, y)

        return experts

    @staticmethod
    def block_moe(call: LayerCall) -> None:
        if Cuda._refuses(call):
            _without_cuda().block_moe(call)
            return
        schedule = Cuda._route(call, call.weights.expert_map)
        Cuda._experts(call.x, call.weights, call.routed.topk_ids, call.routed.topk_weights, schedule, True, call.y)

    @staticmethod
    def _refuses(call: LayerCall) -> bool:
        routing = call.routing
        return bool(
            call.domain_offsets is not None
            or call.coreset_ids is not None
            or _C.cuda_router_refuses(routing.num_experts, routing.top_k, routing.block_size, call.x.shape[1])
            or _cuda_experts_refuse(call.x, call.weights, routing.top_k)
            or call.gate_weight.dtype == torch.float64
        )

    @staticmethod
    def _route(call: LayerCall, expert_map) -> torch.Tensor:
        """The schedule of the experts that the map says are here."""
        schedule = _cuda_schedule(call.x, call.routing.num_experts)
        inputs = (call.x, call.gate_weight, call.expert_bias, call.block_offsets, call.seq_len)
        packed = packed_routing(call.routing)
        torch.ops.dmoe._gate_route_out(*inputs, *packed, call.router_logits, *call.routed, schedule, expert_map)
        return schedule

    @staticmethod
    def _experts(x, weights, topk_ids, topk_weights, schedule, scheduled: bool, y) -> None:
        sizes = _intermediate_sizes(weights)
        size = _C.cuda_workspace_bytes(*x.shape, *sizes, weights.experts, topk_ids.shape[1])
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        torch.ops.dmoe._block_dense_out(
            x, *weights.tensors(), weights.activation, topk_ids, topk_weights, schedule, workspace, scheduled, y
        )

    @staticmethod
    def add_rms_norm(*args) -> None:
        _without_cuda().add_rms_norm(*args)

    @staticmethod
    def qk_norm_rope(*args) -> None:
        _without_cuda().qk_norm_rope(*args)

    @staticmethod
    def block_attention(*args) -> None:
        _without_cuda().block_attention(*args)

    @staticmethod
    def count_step(*args) -> None:
        _without_cuda().count_step(*args)

    @staticmethod
    def unmask(*args) -> None:
        _without_cuda().unmask(*args)

    @staticmethod
    def greedy(*args) -> None:
        _without_cuda().greedy(*args)


def _cuda_experts_refuse(x, weights: ExpertWeights, top_k: int) -> str | None:
    fp8, shared = weights.w13.dtype == torch.float8_e4m3fn, weights.shared_w13
    plain_or_alike = shared is None or shared.dtype == x.dtype or (fp8 and shared.dtype == weights.w13.dtype)
    if (weights.quantized and not fp8) or not plain_or_alike:
        return "weights in int8 or int4, or in different formats"
    if not _has_cuda_experts(x.device):
        return "a GPU without bulk copies, or with less than 227 KB of shared memory per thread block"
    sizes = _intermediate_sizes(weights)
    return _C.cuda_experts_refuses(*x.shape, *sizes, weights.experts, top_k, x.element_size(), fp8)


def _intermediate_sizes(weights: ExpertWeights) -> tuple[int, int]:
    """Of the routed experts and of the shared one, 0 without one."""
    return weights.w2.shape[2], 0 if weights.shared_w2 is None else weights.shared_w2.shape[1]


@functools.cache
def _has_cuda_experts(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _cuda_schedule(x, experts: int) -> torch.Tensor:
    return torch.empty(_C.cuda_schedule_words(experts), dtype=torch.int32, device=x.device)


def _without_cuda():
    return Triton if _has_triton() else Reference


@functools.cache
def _cuda_unavailable_reason(device: torch.device | None) -> str | None:
    if _C is None:
        return f"the extension module {WHY_NO_C}"
    if not _C.cuda_architectures:
        return _C.why_no_cuda
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    if device is None:
        return None
    # Machine code of sm_80 runs on every 8.x, that of sm_90a on 9.0 alone, of sm_100 and sm_120 on every 10.x and 12.x.
    majors = {int(arch.rstrip("a")) // 10 for arch in _C.cuda_architectures.split()}
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in majors:
        return f"it is built for GPUs of sm {_C.cuda_architectures}, got {device}"
    return None


# On an H200 a step under dMoE takes 6 % less by Cuda, under token routing 15 % more (gpu-check step, 26c8a4d; its router is
# compiled for dMoE's settings). Triton serves every GPU and format, so it comes first; DMOE_BACKEND=cuda asks for the other.
AUTO: tuple[Any, ...] = (Cpp, Triton, Cuda, Reference)

BACKENDS: dict[str, Any] = {"reference": Reference, "cpp": Cpp, "triton": Triton, "cuda": Cuda}


def missing() -> dict[str, str]:
    """Why each backend that this installation lacks is missing, by name."""
    return {name: why for name, backend in BACKENDS.items() if (why := backend.unavailable_reason(None))}


def backend(x: torch.Tensor):
    """The backend that serves tensors like x, under DMOE_BACKEND. Raises ValueError when the one that is asked for can't."""
    wanted = os.environ.get("DMOE_BACKEND", "auto")
    if wanted != "auto" and wanted not in BACKENDS:
        raise ValueError(f"DMOE_BACKEND must be auto or one of {', '.join(BACKENDS)}, got {wanted!r}")
    if x.dtype == torch.float64:  # for gradcheck; no kernel takes it
        return Reference
    if wanted == "auto":
        return next(each for each in AUTO if each.unavailable_reason(x.device) is None)
    if why := BACKENDS[wanted].unavailable_reason(x.device):
        raise ValueError(f"DMOE_BACKEND={wanted}: {why}")
    return BACKENDS[wanted]


def name_for(device: str) -> str:
    """Name of the backend that serves the tensors of a device."""
    chosen = backend(torch.empty(0, device=device))
    return next(name for name, each in BACKENDS.items() if each is chosen)
