"""The members of a sparse MoE block in Hugging Face's code: where its weights are, and what can be taken over.

LLaDA2's block has a gate with a selection bias, those in the shape of Qwen3-MoE (SDAR, LLaDA-MoE) have none. Experts are a
list of modules, or stacked: as gate_proj, up_proj and down_proj (dFactory), or gate_up_proj and down_proj (transformers 5).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from . import _checks
from .routing import BlockRouting


def give(owner: Any, name: str, held, at: tuple, trained: bool) -> None:
    """Lets a parameter be (a part of) what a layer holds; `trained`: the requires_grad that the layer began with."""
    own = getattr(owner, name)
    if own is held:
        return
    moved = own.dtype != held.dtype or own.device != held.device
    data = held.data[at].contiguous()
    own.grad = None if moved or held.grad is not None else own.grad
    try:
        own.data = data
    except RuntimeError:  # of another kind of device
        own = nn.Parameter(data, own.requires_grad)
        setattr(owner, name, own)
    if held.grad is not None:
        own.grad = held.grad[at].contiguous()
    if held.requires_grad != trained:
        own.requires_grad_(held.requires_grad)


def first_weight(module: Any) -> torch.Tensor:
    """gate_proj of the first expert [I, H], or of all [E, I, H], where it stands alone, else gate_up_proj [E, 2I, H]."""
    experts: Any = module.experts
    if isinstance(module.experts, nn.ModuleList):
        return experts[0].gate_proj.weight
    return experts.gate_up_proj if is_fused(module) else experts.gate_proj


def is_fused(module: Any) -> bool:
    """Whether gate_proj and up_proj are stacked as one tensor."""
    return isinstance(getattr(module.experts, "gate_up_proj", None), torch.Tensor)


def intermediate_size(module: Any) -> int:
    return first_weight(module).shape[-2] // (2 if is_fused(module) else 1)


def places(module: Any) -> list[tuple[Any, str, str, tuple]]:
    """Where the matrices of a block go: (owner, its attribute, the weight of `BlockMoE`, the part of that)."""

    def split(owners, names, stacked, intermediate, at):
        parts = (slice(intermediate), slice(intermediate, None))
        wide, narrow = stacked
        spots = [(wide, (*at, parts[0])), (wide, (*at, parts[1])), (narrow, at)]
        return [(owner, name, *spot) for owner, name, spot in zip(owners, names, spots)]

    def mlp(owner, stacked, at):
        owners = (owner.gate_proj, owner.up_proj, owner.down_proj)
        return split(owners, 3 * ("weight",), stacked, owner.gate_proj.weight.shape[0], at)

    experts, routed = module.experts, ("w13", "w2")
    if isinstance(experts, nn.ModuleList):
        places = [place for i, expert in enumerate(experts) for place in mlp(expert, routed, (i,))]
    elif is_fused(module):
        places = [(experts, name, stacked, (slice(None),)) for name, stacked in zip(FUSED, routed)]
    else:
        places = split(3 * (experts,), PROJECTIONS, routed, intermediate_size(module), (slice(None),))
    if getattr(module, "shared_experts", None) is not None:
        places += mlp(module.shared_experts, ("shared_w13", "shared_w2"), ())
    return places


def taken_parameters(module: Any) -> list[torch.Tensor]:
    """The parameters that `BlockMoE.from_hf` moves into stacked weights."""
    return [getattr(owner, name) for owner, name, _, _ in places(module)]


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")


def is_moe_block(module: Any) -> bool:
    """Whether a module has a gate and experts in one of the forms above."""
    gate, experts = getattr(module, "gate", None), getattr(module, "experts", None)
    if not isinstance(getattr(gate, "weight", None), torch.Tensor):
        return False
    if isinstance(experts, nn.ModuleList):
        return len(experts) > 0 and all(hasattr(experts[0], name) for name in PROJECTIONS)
    held = [
        all(isinstance(getattr(experts, name, None), torch.Tensor) for name in form) for form in (PROJECTIONS, FUSED)
    ]
    return any(held)


def expert_bias(module: Any) -> torch.Tensor | None:
    """What LLaDA2's gate adds to the scores before it selects."""
    return getattr(module.gate, "expert_bias", None)


def num_experts(module: Any) -> int:
    experts = module.experts
    return len(experts) if isinstance(experts, nn.ModuleList) else experts.down_proj.shape[0]


# Of transformers' names those that the ops compute.
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# Classes of activations, for blocks that keep no config.
ACTIVATION_CLASSES: dict[str, Literal["silu", "gelu_tanh"]] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def activation_of(module: Any) -> Literal["silu", "gelu_tanh"]:
    """From the config of the block or of its experts, or from the act_fn of an expert; silu where nothing says it."""
    experts = module.experts
    for owner in (module, experts):
        for name in ("hidden_act", "hidden_activation"):
            activation = getattr(getattr(owner, "config", None), name, None)
            if activation is not None and activation not in ACTIVATIONS:
                raise ValueError(f"config.{name} must be silu or gelu_pytorch_tanh, got {activation!r}")
            if activation is not None:
                return ACTIVATIONS[activation]
    owner = experts[0] if isinstance(experts, nn.ModuleList) else experts
    act_fn = getattr(owner, "act_fn", None)
    if act_fn is None or act_fn is F.silu:
        return "silu"
    if type(act_fn).__name__ not in ACTIVATION_CLASSES:
        raise ValueError(f"experts.act_fn must be SiLU or GELU (tanh), got {type(act_fn).__name__}")
    return ACTIVATION_CLASSES[type(act_fn).__name__]


def difference(experts: Any) -> str | None:
    """What a module of stacked experts of transformers does that our ops don't, in words behind "it"."""
    gate = getattr(type(experts), "_apply_gate", None)
    for differs, what in (
        (not getattr(experts, "has_gate", True), "has no gate"),
        (getattr(experts, "has_bias", False), "has biases"),
        (getattr(experts, "is_transposed", False), "holds its weights transposed"),
        (not getattr(experts, "is_concatenated", True), "interleaves gate and up"),
        (getattr(experts, "has_post_expert_norm", False), "has a norm behind each expert"),
        (getattr(gate, "__name__", "_default_apply_gate") != "_default_apply_gate", "has a gate of its own"),
    ):
        if differs:
            return what
    return None


def check(module: Any, routing: BlockRouting) -> None:
    """Raises ValueError, naming the member, unless `BlockMoE.from_hf` can take over every weight of the module."""
    if not is_moe_block(module):
        raise ValueError(
            "module must have the members of a sparse MoE block (gate.weight; experts[i].gate_proj, up_proj, down_proj, or "
            f"stacked experts.gate_up_proj, down_proj), got {type(module).__name__}"
        )
    activation_of(module)
    listed = isinstance(module.experts, nn.ModuleList)
    name = "experts[0].gate_proj.weight" if listed else f"experts.{FUSED[0] if is_fused(module) else PROJECTIONS[0]}"
    first = first_weight(module)
    if first.dim() != (2 if listed else 3) or first.dtype not in _checks.WEIGHT_DTYPES or first.device.type == "meta":
        raise ValueError(
            f"{name} must be a loaded float {'matrix' if listed else 'tensor [E, I, H]'}, got {list(first.shape)} "
            f"{first.dtype} on {first.device}"
        )
    if num_experts(module) != routing.num_experts:
        raise ValueError(f"experts must be num_experts={routing.num_experts}, got {num_experts(module)}")
    intermediate, hidden = intermediate_size(module), first.shape[-1]
    _checks.tensor("gate.weight", module.gate.weight, [routing.num_experts, hidden], _checks.WEIGHT_DTYPES)
    if expert_bias(module) is not None:
        _checks.tensor("gate.expert_bias", module.gate.expert_bias, [routing.num_experts], _checks.WEIGHT_DTYPES)
    if not listed and (what := difference(module.experts)):
        raise ValueError(f"experts must be gated, in this layout and without biases: it {what}")
    if listed:
        for i, expert in enumerate(module.experts):
            _check_mlp(f"experts[{i}]", expert, first, intermediate)
    else:
        wide, narrow = [intermediate, hidden], [hidden, intermediate]
        shapes = dict(gate_proj=wide, up_proj=wide, down_proj=narrow)
        if is_fused(module):
            shapes = dict(gate_up_proj=[2 * intermediate, hidden], down_proj=narrow)
        for projection, shape in shapes.items():
            weight = getattr(module.experts, projection)
            shape = [routing.num_experts, *shape]
            _checks.tensor(f"experts.{projection}", weight, shape, (first.dtype,), first.device)
    if getattr(module, "shared_experts", None) is not None:
        gate_proj = getattr(module.shared_experts, "gate_proj", None)
        shared: Any = getattr(gate_proj, "weight", None)
        _checks.tensor("shared_experts.gate_proj.weight", shared, ["I_shared", hidden])
        _check_mlp("shared_experts", module.shared_experts, first, shared.shape[0])
    check_own([module])
    _check_nothing_else(module)


def _check_nothing_else(module: Any) -> None:
    """Raises ValueError for a parameter, or a buffer of a value per expert, that is not taken over: the block computes
    more."""
    taken = {id(weight) for weight in (module.gate.weight, expert_bias(module), *taken_parameters(module))}
    per_expert = [(name, value) for name, value in module.named_buffers() if value.shape == (num_experts(module),)]
    held = [*module.named_parameters(), *per_expert]
    for name, value in held:
        if id(value) not in taken:
            raise ValueError(f"module must have no weights but those of its gate and experts, got {name}")


def check_own(modules) -> None:
    """Raises ValueError where a parameter has more than one place: stacked, the places would come apart."""
    parameters = [parameter for module in modules for parameter in taken_parameters(module)]
    if len({id(parameter) for parameter in parameters}) != len(parameters):
        raise ValueError("experts must each have weights of their own, got a parameter that occurs twice")


def _check_mlp(name: str, mlp: Any, like, intermediate: int) -> None:
    hidden = like.shape[-1]
    shapes = dict(gate_proj=[intermediate, hidden], up_proj=[intermediate, hidden], down_proj=[hidden, intermediate])
    for projection, shape in shapes.items():
        linear: Any = getattr(mlp, projection, None)
        weight = getattr(linear, "weight", None)
        _checks.tensor(f"{name}.{projection}.weight", weight, shape, (like.dtype,), like.device)
        if getattr(linear, "bias", None) is not None:
            raise ValueError(f"{name}.{projection} must have no bias, got one of shape {list(linear.bias.shape)}")
