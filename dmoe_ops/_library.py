"""The torch library "dmoe": how its ops are declared, and how the settings of a block travel through a schema."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from torch.autograd import forward_ad

from .routing import AGGREGATES, PACKED_FLOATS, PACKED_INTS, SCORES, SELECTS, BlockRouting

SCHEMA_TYPES = {"int": "int", "int | None": "int?", "float": "float", "str": "str", "bool": "bool"}
FIELDS = [f"{SCHEMA_TYPES[str(field.type)]} {field.name}" for field in dataclasses.fields(BlockRouting)]
ROUTING: str = ", ".join(FIELDS[:-2])
# `BlockRouting.pool_args`, and what a call says of its blocks: at the end of a schema, where ops of 0.1 had nothing.
SHARING: str = f"{FIELDS[-2]}=None, {FIELDS[-1]}='block', Tensor? domain_offsets=None, Tensor? given_coresets=None"
N_ROUTING: int = len(FIELDS) - 2


class Library(torch.library.Library):
    """A library whose ops refuse the derivatives that torch would get wrong, where every call with a gradient passes."""

    def impl(self, op_name, fn, dispatch_key="", **kwargs):
        if dispatch_key == "Autograd":
            fn = _with_plain_backward(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **kwargs)


def _with_plain_backward(op_name: str, kernel):
    """Without a formula, a forward-mode derivative would be zero; under torch.func's gradients torch would speak of a
    missing setup_context."""

    @functools.wraps(kernel)
    def run(keyset, *args):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(
                f"{op_name} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize): use its backward"
            )
        if (
            torch._C._are_functorch_transforms_active()
            and torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in tensors)
        ):
            raise NotImplementedError(
                f"{op_name} is not differentiable by torch.func (grad, vjp, jacrev): use torch.autograd.grad or backward"
            )
        return kernel(keyset, *args)

    return run


lib: Library = Library("dmoe", "DEF")


def why_no_c(error: ImportError, package: Path = Path(__file__).parent) -> str:
    """Why the extension module is not there: what the build left in the package (setup.py), or why it doesn't load."""
    if list(package.glob("_C.*")):
        return f"does not load: {error}"
    kept = package / "_why_no_c.txt"
    why = kept.read_text().strip() if kept.exists() else "this folder was not installed (pip install .)"
    return f"was not built: {why}"


# What C++ and CUDA implement under their dispatch keys; `ints` and `floats` are `packed_routing`.
lib.define(
    "_block_route_out(Tensor logits, Tensor? expert_bias, Tensor? block_offsets, int seq_len, int[] ints, "
    "float[] floats, Tensor(a!) topk_ids, Tensor(b!) topk_weights, Tensor(c!) coreset_ids, "
    "Tensor(d!) coreset_sizes, Tensor? domain_offsets=None, int pool_capacity=0, bool choose_in_pool=False, "
    "Tensor? given_coresets=None) -> ()"
)
lib.define("_gate_out(Tensor x, Tensor gate_weight, Tensor(a!) logits) -> ()")
# The arguments from w13 to activation are `formats.ExpertWeights`, which says what they hold. With a carry [T, H] in float32
# it is one wave of a call (`reference.all_experts`): experts begin to end - 1, and y is written by the last wave alone.
lib.define(
    "_moe_experts_out(Tensor x, Tensor w13, Tensor w2, Tensor? shared_w13, Tensor? shared_w2, Tensor? w13_scale, "
    "Tensor? w2_scale, Tensor? shared_w13_scale, Tensor? shared_w2_scale, bool quantize_activations, "
    "Tensor? expert_map, str activation, Tensor topk_ids, Tensor topk_weights, Tensor(a!) y, Tensor(b!)? carry=None, "
    "int begin=0, int end=0) -> ()"
)
# What a decoder layer does beside its products (decoder.py).
lib.define(
    "_add_rms_norm_out(Tensor x, Tensor delta, Tensor weight, float eps, Tensor(a!) normed, Tensor(b!) sum) -> ()"
)
lib.define(
    "_qk_norm_rope_out(Tensor qkv, Tensor? q_weight, Tensor? k_weight, float eps, Tensor cos, Tensor sin, Tensor? rows, "
    "Tensor past, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) query) -> ()"
)
lib.define("_greedy_out(Tensor logits, Tensor(a!) token, Tensor(b!) probability) -> ()")
# CUDA only: the router from x on, and the experts of few tokens. `schedule` int32 and `workspace` uint8 are scratch;
# `scheduled` says that `schedule` comes from the router; it leaves out what the map says is elsewhere.
lib.define(
    "_gate_route_out(Tensor x, Tensor gate_weight, Tensor? expert_bias, Tensor? block_offsets, int seq_len, int[] ints, "
    "float[] floats, Tensor(a!) logits, Tensor(b!) topk_ids, Tensor(c!) topk_weights, Tensor(d!) coreset_ids, "
    "Tensor(e!) coreset_sizes, Tensor(f!)? schedule, Tensor? expert_map=None) -> ()"
)
lib.define(
    "_block_dense_out(Tensor x, Tensor w13, Tensor w2, Tensor? shared_w13, Tensor? shared_w2, Tensor? w13_scale, "
    "Tensor? w2_scale, Tensor? shared_w13_scale, Tensor? shared_w2_scale, Tensor? expert_map, str activation, "
    "Tensor topk_ids, Tensor topk_weights, Tensor(a!) schedule, Tensor(b!) workspace, bool scheduled, Tensor(c!) y) -> ()"
)

try:
    from . import _C  # type: ignore[attr-defined]  # compiled

    WHY_NO_C = None
except ImportError as error:  # the torch reference serves
    _C = None
    WHY_NO_C = why_no_c(error)


def nobody_listens(*tensors) -> bool:
    """Whether an op called with these tensors (None passes) would go straight to its implementation, which may then be
    called without the dispatcher: that takes longer than all of the rest. Everything that would see the call, or change
    its arguments, says no: a gradient, a mode (FakeTensor, functorch, torch.jit.trace, __torch_function__), a subclass,
    autocast, the profiler, torch.compile, and a tensor that is anything but dense on the CPU or on CUDA."""
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() not in QUIET
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    graded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or torch._C._dispatch_keys(tensor).raw_repr() not in PLAIN
            or (graded and tensor.requires_grad)
        ):
            return False
    return True


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


# What the dispatcher adds to a call's keys where there is no mode; then in inference mode, whose tensors have less, too.
QUIET = {_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")}
PLAIN = {
    _keys(backend, f"Autocast{backend}", *more)
    for backend in ("CPU", "CUDA")
    for more in (("ADInplaceOrView", f"Autograd{backend}"), ())
}


def define(schema: str, impl, fake, setup_context, backward) -> None:
    """Registers dmoe::`schema` with its implementation, its fake kernel and its gradient."""
    name = "dmoe::" + schema[: schema.index("(")]
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    implement(name, impl, fake)
    torch.library.register_autograd(name, without_autocast(backward), setup_context=setup_context, lib=lib)


def implement(name: str, impl, fake) -> None:
    lib.impl(name, without_autocast(impl), "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=lib)


def without_autocast(function):
    """An op computes in the dtypes of its arguments; autocast would reach the torch ops inside of it."""

    @functools.wraps(function)
    def run(*args):
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def once_differentiable(backward):
    """Refuses a gradient that is to be differentiated again: what the experts' kernels give has no gradient of its own."""

    @functools.wraps(backward)
    def run(*args):
        if torch.is_grad_enabled():  # in a backward, only under create_graph
            raise RuntimeError("the experts are differentiable once, got create_graph=True")
        return backward(*args)

    return run


def contiguous(*tensors):
    """Makes non-weight arguments contiguous; None passes through."""
    return (tensor if tensor is None else tensor.contiguous() for tensor in tensors)


@functools.lru_cache(maxsize=1024)
def unpack_routing(args: tuple, pool_args: tuple = ()) -> BlockRouting:
    return BlockRouting(*args, *pool_args)


def unpack_sharing(args: tuple) -> tuple[tuple, torch.Tensor | None, torch.Tensor | None]:
    """(pool_args, domain_offsets, coreset_ids) from what an op gets for `SHARING`: torch leaves out trailing defaults."""
    pool_capacity, choose, domain_offsets, coreset_ids = args + (None, "block", None, None)[len(args) :]
    return (pool_capacity, choose), domain_offsets, coreset_ids


@functools.lru_cache(maxsize=1024)
def packed_routing(routing: BlockRouting) -> tuple[list[int], list[float]]:
    """The settings as csrc/routing.h reads them, in the order of `PACKED_INTS` and `PACKED_FLOATS`."""
    values = vars(routing) | dict(
        score=SCORES.index(routing.score),
        aggregate=AGGREGATES.index(routing.aggregate),
        select=SELECTS.index(routing.select),
        max_experts=routing.max_experts or routing.num_experts,
        capacity=routing.capacity or 0,
        union_k=routing.union_k or 0,
    )
    return [int(values[name]) for name in PACKED_INTS], [values[name] for name in PACKED_FLOATS]
