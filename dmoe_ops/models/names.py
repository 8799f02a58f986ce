"""The names that a checkpoint gives to the weights of a model."""

from __future__ import annotations

import torch

from .config import DiffusionConfig
from .quantized import Matrix

# What a stacked weight of `BlockMoE` holds, in order of its rows.
PROJECTIONS = dict(w13=("gate_proj", "up_proj"), w2=("down_proj",))


def checkpoint_tensors(state: dict[str, torch.Tensor], config: DiffusionConfig) -> dict[str, torch.Tensor | Matrix]:
    """A state dict, or a part of one, under the names of a checkpoint; see `DiffusionModel.checkpoint_tensors`. Ours are
    LLaDA2's; `config.renamed` has other words for some of their parts, and three where query_key_value is three matrices."""
    tensors: dict[str, torch.Tensor | Matrix] = {}
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        scale = state.get(f"{name}_scale")
        if last in ("gate_weight", "expert_bias"):
            tensors[f"{prefix}.gate.{last.removeprefix('gate_')}"] = value
        elif last in ("w13", "w2"):
            for i, expert in enumerate(value):
                own = None if scale is None else scale[i]
                tensors.update(_projections(f"{prefix}.experts.{i}", last, expert, own))
        elif last in ("shared_w13", "shared_w2"):
            tensors.update(_projections(f"{prefix}.shared_experts", last.removeprefix("shared_"), value, scale))
        elif not last.endswith("_scale"):
            tensors.update(_renamed(name, value, config))
    return tensors


def renamed(name: str, config: DiffusionConfig) -> str:
    """What a checkpoint calls a weight that is neither stacked nor split there."""
    return next(iter(_renamed(name, None, config)))


def _renamed(name: str, value, config: DiffusionConfig) -> dict[str, torch.Tensor]:
    words = [config.renamed.get(word, word) for word in name.split(".")]
    at = next((i for i, word in enumerate(words) if isinstance(word, tuple)), None)
    if at is None:
        return {".".join(words): value}
    kv_heads, head_dim = config.num_key_value_heads or 0, config.head_dim or 0
    parts = value.split([heads * head_dim for heads in (config.num_attention_heads, kv_heads, kv_heads)])
    return {".".join([*words[:at], word, *words[at + 1 :]]): part for word, part in zip(words[at], parts)}


def _projections(prefix: str, stacked: str, weight, scale=None) -> dict[str, torch.Tensor | Matrix]:
    """w13 [2I, H] or w2 [H, I] under the names of the projections it holds."""
    names = PROJECTIONS[stacked]
    weights = weight.chunk(len(names))
    if scale is not None:
        weights = map(Matrix, weights, scale.chunk(len(names)))
    return {f"{prefix}.{name}.weight": part for name, part in zip(names, weights)}
