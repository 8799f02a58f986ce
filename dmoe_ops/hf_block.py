"""The members of LLaDA2's sparse MoE block in Hugging Face's code: where its weights are, and what can be taken over."""

from __future__ import annotations

from typing import Any, Literal

import torch
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
    """gate_proj of the first expert [I, H], or of all [E, I, H]."""
    experts: Any = module.experts
    listed = isinstance(module.experts, nn.ModuleList)
    return experts[0].gate_proj.weight if listed else experts.gate_proj


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
    else:
        intermediate = experts.gate_proj.shape[1]
        places = split(3 * (experts,), PROJECTIONS, routed, intermediate, (slice(None),))
    if getattr(module, "shared_experts", None) is not None:
        places += mlp(module.shared_experts, ("shared_w13", "shared_w2"), ())
    return places


def taken_parameters(module: Any) -> list[torch.Tensor]:
    """The parameters that `BlockMoE.from_hf` moves into stacked weights."""
    return [getattr(owner, name) for owner, name, _, _ in places(module)]


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def is_moe_block(module: Any) -> bool:
    """Whether a module has the members of LLaDA2's sparse MoE block."""
    gate, experts = getattr(module, "gate", None), getattr(module, "experts", None)
    if not all(isinstance(getattr(gate, name, None), torch.Tensor) for name in ("weight", "expert_bias")):
        return False
    if isinstance(experts, nn.ModuleList):
        return len(experts) > 0 and all(hasattr(experts[0], name) for name in PROJECTIONS)
    return all(isinstance(getattr(experts, name, None), torch.Tensor) for name in PROJECTIONS)


def num_experts(module: Any) -> int:
    experts = module.experts
    return len(experts) if isinstance(experts, nn.ModuleList) else experts.gate_proj.shape[0]


# Of transformers' names those that the ops compute.
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation_of(module: Any) -> Literal["silu", "gelu_tanh"]:
    activation = getattr(getattr(module, "config", None), "hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"config.hidden_act must be silu or gelu_pytorch_tanh, got {activation!r}")
    return ACTIVATIONS[activation]


def check(module: Any, routing: BlockRouting) -> None:
    """Raises ValueError, naming the member, unless `BlockMoE.from_hf` can take over every weight of the module."""
    if not is_moe_block(module):
        raise ValueError(
            "module must have the members of LLaDA2's sparse MoE block (gate.weight, gate.expert_bias, "
            f"experts[i].gate_proj, up_proj, down_proj), got {type(module).__name__}"
        )
    activation_of(module)
    listed = isinstance(module.experts, nn.ModuleList)
    first, name = first_weight(module), "experts[0].gate_proj.weight" if listed else "experts.gate_proj"
    if first.dim() != (2 if listed else 3) or first.dtype not in _checks.WEIGHT_DTYPES or first.device.type == "meta":
        raise ValueError(
            f"{name} must be a loaded float {'matrix' if listed else 'tensor [E, I, H]'}, got {list(first.shape)} "
            f"{first.dtype} on {first.device}"
        )
    if num_experts(module) != routing.num_experts:
        raise ValueError(f"experts must be num_experts={routing.num_experts}, got {num_experts(module)}")
    intermediate, hidden = first.shape[-2:]
    _checks.tensor("gate.weight", module.gate.weight, [routing.num_experts, hidden], _checks.WEIGHT_DTYPES)
    _checks.tensor("gate.expert_bias", module.gate.expert_bias, [routing.num_experts], _checks.WEIGHT_DTYPES)
    if listed:
        for i, expert in enumerate(module.experts):
            _check_mlp(f"experts[{i}]", expert, first, intermediate)
    else:
        shapes = dict(
            gate_proj=[intermediate, hidden], up_proj=[intermediate, hidden], down_proj=[hidden, intermediate]
        )
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
