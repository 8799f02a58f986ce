"""The torch library "dmoe": schemas, and the backends that can fill an op's outputs.

An op (router.py, experts.py, layer.py) validates, allocates its outputs with the allocator that its fake kernel
uses too, and hands them to a backend. A backend writes into them and does nothing else.

    reference   plain torch, any device and dtype
    cpp         csrc/cpu through the extension module; CPU
    triton      triton_kernels; CUDA and ROCm, and the CPU under TRITON_INTERPRET=1
    cuda        csrc/cuda through the extension module; CUDA

`DMOE_BACKEND` = auto | reference | cpp | triton | cuda chooses; auto takes the fastest that can serve the tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import torch

from . import reference
from .routing import AGGREGATES, SCORES, SELECTS, BlockRouting, RoutingResult

ROUTING = (
    "int num_experts, int top_k, int block_size, int n_group, int topk_group, str score, str aggregate, str select, "
    "float top_p, int min_experts, int? max_experts, int? capacity, int? union_k, bool norm_topk_prob, "
    "float routed_scaling_factor"
)

lib = torch.library.Library("dmoe", "DEF")

# What C++ and CUDA implement under their dispatch keys; `ints` and `floats` are `packed_routing`.
lib.define(
    "_block_route_out(Tensor logits, Tensor? expert_bias, Tensor? block_offsets, int seq_len, int[] ints, "
    "float[] floats, Tensor(a!) topk_ids, Tensor(b!) topk_weights, Tensor(c!) coreset_ids, "
    "Tensor(d!) coreset_sizes) -> ()"
)
lib.define("_gate_out(Tensor x, Tensor gate_weight, Tensor(a!) logits) -> ()")
lib.define(
    "_moe_experts_out(Tensor x, Tensor w13, Tensor w2, Tensor? shared_w13, Tensor? shared_w2, Tensor topk_ids, "
    "Tensor topk_weights, Tensor(a!) y) -> ()"
)
# CUDA only: the router from x on, and the experts of few tokens. `schedule` int32 and `workspace` uint8 are scratch;
# `scheduled` says that `schedule` comes from the router. The router fetches from w13 ahead, it does not read it.
lib.define(
    "_gate_route_out(Tensor x, Tensor gate_weight, Tensor? expert_bias, Tensor? block_offsets, int seq_len, int[] ints, "
    "float[] floats, Tensor(a!) logits, Tensor(b!) topk_ids, Tensor(c!) topk_weights, Tensor(d!) coreset_ids, "
    "Tensor(e!) coreset_sizes, Tensor(f!)? schedule, Tensor? w13) -> ()"
)
lib.define(
    "_block_dense_out(Tensor x, Tensor w13, Tensor w2, Tensor? shared_w13, Tensor? shared_w2, Tensor topk_ids, "
    "Tensor topk_weights, Tensor(a!) schedule, Tensor(b!) workspace, bool scheduled, Tensor(c!) y) -> ()"
)

try:
    from . import _C
except ImportError as error:  # the torch reference serves
    _C = None
    WHY_NO_C = (
        f"does not load: {error}"
        if list(Path(__file__).parent.glob("_C.*"))
        else ("was not built when the package was installed, for want of a C++ compiler or of torch (pip -v says)")
    )


def define(schema: str, impl, fake, setup_context, backward) -> None:
    """Registers dmoe::`schema` with its implementation, its fake kernel and its gradient."""
    name = "dmoe::" + schema[: schema.index("(")]
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=lib)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=lib)


def contiguous(*tensors):
    """What a backend may take for granted of everything but weights. None passes."""
    return (tensor if tensor is None else tensor.contiguous() for tensor in tensors)


@functools.lru_cache(maxsize=1024)
def unpack_routing(args: tuple) -> BlockRouting:
    return BlockRouting(*args)


@functools.lru_cache(maxsize=1024)
def packed_routing(routing: BlockRouting) -> tuple[list[int], list[float]]:
    """The settings as csrc/routing.h reads them."""
    ints = [
        routing.top_k,
        routing.block_size,
        routing.n_group,
        routing.topk_group,
        SCORES.index(routing.score),
        AGGREGATES.index(routing.aggregate),
        SELECTS.index(routing.select),
        routing.min_experts,
        routing.max_experts or routing.num_experts,
        routing.capacity or 0,
        routing.union_k or 0,
        int(routing.norm_topk_prob),
    ]
    return ints, [routing.top_p, routing.routed_scaling_factor]


class Reference:
    """The contract itself, for what no kernel covers."""

    @staticmethod
    def block_route(logits, expert_bias, block_offsets, seq_len, routing, out: RoutingResult) -> None:
        rows = logits.view(-1, seq_len, logits.shape[1]) if seq_len else logits
        for written, value in zip(
            out, reference.block_route(rows, expert_bias, routing=routing, block_offsets=block_offsets)
        ):
            written.copy_(value)

    @staticmethod
    def moe_experts(x, w13, w2, topk_ids, topk_weights, y) -> None:
        y.copy_(reference.moe_experts(x, w13, w2, topk_ids, topk_weights))

    @staticmethod
    def block_moe(x, gate_weight, expert_bias, weights, block_offsets, seq_len, routing, y, out, router_logits) -> None:
        rows = x.view(-1, seq_len, x.shape[1]) if seq_len else x
        value, routed, logits = reference.block_moe(
            rows, gate_weight, expert_bias, *weights, routing=routing, block_offsets=block_offsets
        )
        y.copy_(value.view(x.shape))
        router_logits.copy_(logits)
        for written, value in zip(out, routed):
            written.copy_(value)


class Cpp:
    """csrc/cpu."""

    @staticmethod
    def block_route(logits, expert_bias, block_offsets, seq_len, routing, out: RoutingResult) -> None:
        torch.ops.dmoe._block_route_out(logits, expert_bias, block_offsets, seq_len, *packed_routing(routing), *out)

    @staticmethod
    def moe_experts(x, w13, w2, topk_ids, topk_weights, y) -> None:
        torch.ops.dmoe._moe_experts_out(x, w13, w2, None, None, topk_ids, topk_weights, y)

    @staticmethod
    def block_moe(x, gate_weight, expert_bias, weights, block_offsets, seq_len, routing, y, out, router_logits) -> None:
        torch.ops.dmoe._gate_out(x, gate_weight, router_logits)
        Cpp.block_route(router_logits, expert_bias, block_offsets, seq_len, routing, out)
        torch.ops.dmoe._moe_experts_out(x, *weights, out.topk_ids, out.topk_weights, y)


class Triton:
    """triton_kernels, imported at the first call: that takes a second, and a CPU has no use for it."""

    @staticmethod
    def block_route(*args) -> None:
        _triton_backend().block_route(*args)

    @staticmethod
    def moe_experts(*args) -> None:
        _triton_backend().moe_experts(*args)

    @staticmethod
    def block_moe(*args) -> None:
        _triton_backend().block_moe(*args)


@functools.cache
def _triton_backend():
    from .triton_kernels.backend import Triton

    return Triton


def _why_no_triton() -> str | None:
    if not _has_triton():
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not _triton_interprets():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for checks)"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


class Cuda:
    """csrc/cuda, in two launches: router and experts.

    What the host rules refuse (csrc/cuda/router.h and experts.h: float32 experts, more than 64 tokens through experts,
    sizes that do not divide into its tiles) goes to Triton, or to the reference where that is missing.
    """

    @staticmethod
    def block_route(logits, expert_bias, block_offsets, seq_len, routing, out: RoutingResult) -> None:
        if _C.cuda_router_refuses(routing.num_experts, routing.top_k, routing.block_size, 0):
            _without_cuda().block_route(logits, expert_bias, block_offsets, seq_len, routing, out)
        else:
            Cpp.block_route(logits, expert_bias, block_offsets, seq_len, routing, out)

    @staticmethod
    def moe_experts(x, w13, w2, topk_ids, topk_weights, y) -> None:
        if _cuda_experts_refuse(x, w13, w2, None):
            _without_cuda().moe_experts(x, w13, w2, topk_ids, topk_weights, y)
        else:
            schedule = _cuda_schedule(x, w13)
            Cuda._experts(x, (w13, w2, None, None), topk_ids, topk_weights, schedule, False, y)

    @staticmethod
    def block_moe(x, gate_weight, expert_bias, weights, block_offsets, seq_len, routing, y, out, router_logits) -> None:
        w13, w2, _, shared_w2 = weights
        if (
            _C.cuda_router_refuses(routing.num_experts, routing.top_k, routing.block_size, x.shape[1])
            or _cuda_experts_refuse(x, w13, w2, shared_w2)
            or gate_weight.dtype == torch.float64
        ):
            _without_cuda().block_moe(
                x, gate_weight, expert_bias, weights, block_offsets, seq_len, routing, y, out, router_logits
            )
            return
        schedule = _cuda_schedule(x, w13)
        torch.ops.dmoe._gate_route_out(
            x,
            gate_weight,
            expert_bias,
            block_offsets,
            seq_len,
            *packed_routing(routing),
            router_logits,
            *out,
            schedule,
            w13,
        )
        Cuda._experts(x, weights, out.topk_ids, out.topk_weights, schedule, True, y)

    @staticmethod
    def _experts(x, weights, topk_ids, topk_weights, schedule, scheduled: bool, y) -> None:
        w13, w2, _, shared_w2 = weights
        shared = 0 if shared_w2 is None else shared_w2.shape[1]
        size = _C.cuda_workspace_bytes(*x.shape, w2.shape[2], shared, w13.shape[0], topk_ids.shape[1])
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        torch.ops.dmoe._block_dense_out(x, *weights, topk_ids, topk_weights, schedule, workspace, scheduled, y)


def _cuda_experts_refuse(x, w13, w2, shared_w2) -> str | None:
    if not _is_hopper(x.device):
        return "a GPU that is not Hopper"
    shared = 0 if shared_w2 is None else shared_w2.shape[1]
    return _C.cuda_experts_refuses(*x.shape, w2.shape[2], shared, w13.shape[0], x.element_size())


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _cuda_schedule(x, w13) -> torch.Tensor:
    return torch.empty(_C.cuda_schedule_words(w13.shape[0]), dtype=torch.int32, device=x.device)


def _without_cuda():
    return Triton if _has_triton() else Reference


@functools.cache
def _why_no_cuda(device: torch.device | None = None) -> str | None:
    """Without a device: what this installation lacks."""
    if _C is None:
        return f"the extension module {WHY_NO_C}"
    if not _C.cuda_architectures:
        return _C.why_no_cuda
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    # Machine code of sm_80 runs on every 8.x, that of sm_90a on 9.0 alone.
    if device is not None and torch.cuda.get_device_capability(device)[0] not in (8, 9):
        return f"its kernels are built for sm {_C.cuda_architectures}"
    return None


BACKENDS = {"reference": Reference, "cpp": Cpp, "triton": Triton, "cuda": Cuda}


def missing() -> dict[str, str]:
    """Why each backend that this installation lacks is missing, by name."""
    reasons = {}
    if _C is None:
        reasons["cpp"] = f"the extension module {WHY_NO_C}"
    if _why_no_cuda():
        reasons["cuda"] = _why_no_cuda()
    if _why_no_triton():
        reasons["triton"] = _why_no_triton()
    return reasons


def backend(x: torch.Tensor):
    """The backend that serves tensors like x, under DMOE_BACKEND."""
    wanted = os.environ.get("DMOE_BACKEND", "auto")
    if wanted == "reference" or x.dtype == torch.float64:
        return Reference
    if wanted == "auto" and x.device.type == "cuda":
        if _why_no_cuda(x.device) is None:
            return Cuda
        return Triton if _has_triton() else Reference
    if wanted == "auto":
        return Cpp if x.device.type == "cpu" and _C is not None else Reference
    if wanted not in BACKENDS:
        raise ValueError(f"DMOE_BACKEND must be auto or one of {', '.join(BACKENDS)}, got {wanted!r}")
    if wanted in missing():
        raise ValueError(f"DMOE_BACKEND={wanted}: {missing()[wanted]}")
    if wanted == "cpp" and x.device.type != "cpu":
        raise ValueError(f"DMOE_BACKEND=cpp serves CPU tensors, got {x.device}")
    if wanted == "cuda" and (x.device.type != "cuda" or _why_no_cuda(x.device)):
        why = f": {_why_no_cuda(x.device)}" if x.device.type == "cuda" else ""
        raise ValueError(
            f"DMOE_BACKEND=cuda serves tensors of an NVIDIA GPU of compute capability 8.x or 9.0, got {x.device}{why}"
        )
    if wanted == "triton" and x.device.type != ("cpu" if _triton_interprets() else "cuda"):
        raise ValueError(
            f"DMOE_BACKEND=triton serves GPU tensors, and only the CPU's under TRITON_INTERPRET=1: got {x.device}"
        )
    return BACKENDS[wanted]
