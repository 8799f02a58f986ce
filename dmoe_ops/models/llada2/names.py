"""The names that a checkpoint gives to the weights of a LLaDA2 model."""

from __future__ import annotations

import torch

from ..quantized import Matrix

# What a stacked weight of `BlockMoE` holds, in order of its rows.
PROJECTIONS = dict(w13=("gate_proj", "up_proj"), w2=("down_proj",))


def checkpoint_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Matrix]:
    """A state dict, or a part of one, under the names of a checkpoint; see `LLaDA2ForDiffusion.checkpoint_tensors`."""
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
            tensors[name] = value
    return tensors


def _projections(prefix: str, stacked: str, weight, scale=None) -> dict[str, torch.Tensor | Matrix]:
    """w13 [2I, H] or w2 [H, I] under the names of the projections it holds."""
    names = PROJECTIONS[stacked]
    weights = weight.chunk(len(names))
    if scale is not None:
        weights = map(Matrix, weights, scale.chunk(len(names)))
    return {f"{prefix}.{name}.weight": part for name, part in zip(names, weights)}
