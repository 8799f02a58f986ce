"""Block routing inside a Hugging Face model: `patch` replaces every sparse MoE block, `undo` puts it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import hf_block
from ..hf_block import check_own, first_weight, is_moe_block, num_experts
from ..layer import BlockMoE
from ..models.config import OWN, own_policy, trained_for
from ..routing import POLICIES, BlockRouting


class PatchedMoE(BlockMoE):
    """A `BlockMoE` that returns what the block in its place did. returns: "y", "y, None", "y, logits" or
    "y, (logits, ids)"; flat: whether logits and ids are [T, ..] rather than [bsz, seq, ..]."""

    returns: str = "y, (logits, ids)"
    flat: bool = False

    def forward(self, hidden_states, block_offsets=None):
        y, routed = super().forward(hidden_states, block_offsets)
        if self.flat:
            routed = tuple(value.flatten(0, -2) for value in routed)
        if self.returns == "y":
            return y
        return y, {"y, None": None, "y, logits": routed[0]}.get(self.returns, routed)


class PatchHandle:
    """What `patch` changed. layers: the replacements by name; routing: theirs. A context manager undoes on leaving."""

    def __init__(self, model: nn.Module, layers: dict[str, BlockMoE], originals: dict[str, nn.Module]):
        self.layers = layers
        self._model = model
        self._originals = originals

    @property
    def routing(self) -> BlockRouting:
        return next(iter(self.layers.values())).routing

    def undo(self) -> None:
        """Puts the original modules back, with what the layers hold now: the weights bit for bit, in the dtype and on the
        device that they have been moved to, with their gradients. A second call does nothing.

        Raises ValueError, before anything is changed, where a layer is no longer in its place or holds no weights.
        """
        for name, module in self._originals.items():
            try:
                there = self._model.get_submodule(name)
            except AttributeError:
                there = None
            if there is not self.layers[name]:
                raise ValueError(f"{name} must still be the layer that patch put there, got {type(there).__name__}")
            try:
                self.layers[name].check_give_back(module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for name in _first_places(self._originals):
            self.layers[name].give_back(self._originals[name])
        for name, module in self._originals.items():
            self._model.set_submodule(name, module)
        self._originals = {}

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.undo()


def patch(model: nn.Module, policy: str = OWN, **overrides) -> PatchHandle:
    """Replaces the forward of every sparse MoE block of `model`, LLaDA2's or in the shape of Qwen3-MoE, by block routing
    under `policy`.

    policy: "own" is the one that the weights were trained for, as model.config says (core_threshold, expert_capacity);
    where it says nothing dmoe for LLaDA2's blocks, which have a selection bias, and token for others.
    A block is found by its members (see `BlockMoE.from_hf`), never by its class. Experts, top-k, groups and
    scaling are read from each block; `overrides` are fields of `BlockRouting` and win over both. The patched block returns
    what the original does: y, (y, router_logits) or (y, (router_logits, topk_ids)), found out by running the original once
    on zeros (LLaDA2's, the last, where it has no forward). A block that occurs twice in the model is one layer in both
    places. Weights are held once; the peak is one layer above the model.
    Save a model's weights after `undo`: while patched they carry the names of `BlockMoE`.

    Blocks of tokens are cut every `block_size` (model.config's, or 32, unless given) from the first token of each forward:
    it has to be the model's `block_length`, or a part of it, and forwards have to begin with a block.

    Raises ValueError, before anything is changed, when no block is found or one can't be taken over, and when the model's
    rotary embedding holds values that no such embedding has: the released class under transformers 5 leaves them
    uninitialised.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    if policy not in (OWN, *POLICIES):
        raise ValueError(f"policy must be one of {OWN}, {', '.join(POLICIES)}, got {policy!r}")
    named = model.named_modules(remove_duplicate=False)
    originals = {name: module for name, module in named if name and is_moe_block(module)}
    if not originals:
        again = " (it is patched already)" if any(isinstance(m, BlockMoE) for m in model.modules()) else ""
        raise ValueError(f"model must contain sparse MoE blocks, got {type(model).__name__} without any{again}")
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model.config.quantization_config must be null, got {config.quantization_config!r:.200}")
    check_rotary(model)
    found = {}
    for name in _first_places(originals):
        module = originals[name]
        try:
            routing = routing_of(module, policy, config, **overrides)
            hf_block.check(module, routing)
            found[id(module)] = routing, returned_by(module)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    check_own([originals[name] for name in _first_places(originals)])
    layers, made = {}, {}
    for name, module in originals.items():
        if id(module) not in made:
            routing, (returns, flat) = found[id(module)]
            layer: Any = PatchedMoE.from_hf(module, routing)
            made[id(module)] = layer
            layer.returns, layer.flat = returns, flat
        layers[name] = made[id(module)]
        model.set_submodule(name, layers[name])
    return PatchHandle(model, layers, originals)


def _first_places(originals: dict[str, nn.Module]) -> list[str]:
    """A name of every module: one may occur twice."""
    return list({id(module): name for name, module in reversed(originals.items())}.values())


@torch.no_grad()
def returned_by(block: nn.Module) -> tuple[str, bool]:
    """What a block's forward returns, as `PatchedMoE` has it: (returns, flat). Leaves no trace in the block."""
    weight = first_weight(block)
    x = weight.new_zeros(1, 32, weight.shape[-1])
    modes = {module: module.training for module in block.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        out = block.eval().forward(x)
    except NotImplementedError:  # no forward, or one for another device
        return PatchedMoE.returns, False
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"forward must take hidden states [1, 32, H] alone, got {said:.200}") from None
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)

    def has(value, columns=None):
        return isinstance(value, torch.Tensor) and value.dim() in (2, 3) and columns in (None, value.shape[-1])

    rest: Any
    y, rest = out if isinstance(out, (tuple, list)) and len(out) == 2 else (out, ())
    if isinstance(y, torch.Tensor) and y.shape == x.shape:
        if rest == () and y is out:
            return "y", False
        if rest is None:
            return "y, None", False
        if has(rest, num_experts(block)):
            return "y, logits", rest.dim() == 2
        if isinstance(rest, (tuple, list)) and len(rest) == 2 and has(rest[0], num_experts(block)) and has(rest[1]):
            return PatchedMoE.returns, rest[0].dim() == 2
    raise ValueError(
        f"forward must return y, (y, router_logits) or (y, (router_logits, topk_ids)), got {_described(out)}"
    )


def _described(out) -> str:
    if isinstance(out, torch.Tensor):
        return f"a tensor {list(out.shape)}"
    if isinstance(out, (tuple, list)):
        return f"({', '.join(map(_described, out))})"
    return type(out).__name__


def check_rotary(model: nn.Module) -> None:
    """Raises ValueError, naming the buffer, where the frequencies of a rotary embedding can't be right."""
    for name, module in model.named_modules():
        for key in ("inv_freq", "original_inv_freq"):
            value = getattr(module, key, None)
            if isinstance(value, torch.Tensor):
                config = getattr(module, "config", None) or getattr(model, "config", None)
                if not _is_plausible(value, config):
                    got = (
                        "no values" if value.is_meta else str([float(f"{v:.3g}") for v in value.flatten()[:4].tolist()])
                    )
                    raise ValueError(
                        f"{name + '.' if name else ''}{key} must hold the frequencies of a rotary embedding, falling from 1 "
                        f"by powers of rope_theta, got {got}: was the model loaded by a transformers that leaves it empty?"
                    )


def _is_plausible(inv_freq, config) -> bool:
    if inv_freq.is_meta or inv_freq.dim() != 1 or not inv_freq.numel():
        return False
    value = inv_freq.detach().double().cpu()
    falls = (value.diff() <= 0).all() and (len(value) == 1 or value[-1] < value[0])
    if not value.isfinite().all() or not falls or not 0 < value[0] <= 1 or value[-1] < 0:
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = getattr(config, "rope_scaling", None) or rope
    theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    if not theta or scaling.get("rope_type", scaling.get("type", "default")) != "default":
        return True
    expected = theta ** -(torch.arange(len(value), dtype=torch.float64) / len(value))
    return torch.allclose(value, expected, rtol=1e-2, atol=1e-7)  # the buffer may have been cast to half width


def routing_of(module: nn.Module, policy: str, model_config=None, **overrides) -> BlockRouting:
    """The policy with the geometry of a block, read from its gate or its config, and with the settings that the config was
    trained for. Raises ValueError for what a block without a selection bias leaves open, and for its groups."""
    config = getattr(module, "config", None) or getattr(module.gate, "config", None) or model_config
    biased = hf_block.expert_bias(module) is not None
    policy = own_policy(config, "dmoe" if biased else "token") if policy == OWN else policy

    def read(default, *names):
        for name in names:
            for source in (module.gate, module, config):
                value = getattr(source, name, None)
                if value is not None and not isinstance(value, nn.Module):
                    return value
        return default

    top_k = read(None, "top_k", "num_experts_per_tok")
    if top_k is None and "top_k" not in {**POLICIES[policy], **overrides}:
        raise ValueError("gate.top_k or config.num_experts_per_tok must be there, or top_k given, got neither")
    ungrouped = getattr(config, "expert_capacity", None)  # LLaDA2.2: its own code ignores groups then
    geometry: dict[str, Any] = dict(
        num_experts=num_experts(module),
        top_k=top_k,
        n_group=1 if ungrouped else read(1, "n_group") or 1,
        topk_group=1 if ungrouped else read(1, "topk_group") or 1,
        score=read("sigmoid" if biased else "softmax", "score_function", "scoring_func"),
        # LLaDA2's gate normalises except at top-1, whatever its config says.
        norm_topk_prob=top_k != 1 if biased else read(None, "norm_topk_prob"),
        routed_scaling_factor=float(read(1.0, "routed_scaling_factor")),
    )
    if not biased:
        if geometry["n_group"] != 1:
            raise ValueError(f"n_group must be 1 in a block without gate.expert_bias, got {geometry['n_group']}")
        if geometry["norm_topk_prob"] is None and "norm_topk_prob" not in overrides:
            raise ValueError("norm_topk_prob must be there in a block without gate.expert_bias, or given, got neither")
    if block_size := getattr(config, "block_size", None):
        geometry["block_size"] = block_size
    return BlockRouting.for_model(policy, geometry, **{**trained_for(config, policy), **overrides})
