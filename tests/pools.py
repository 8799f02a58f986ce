"""Weights of experts in the rows of a pool."""

from __future__ import annotations

import torch


def in_a_pool(weights, seed=0, spare=5):
    """The same experts anywhere in pools of more rows, and their map. The other rows hold NaN, or have a scale of NaN."""
    experts = weights["w13"].shape[0]
    rows = torch.randperm(experts + spare, generator=torch.Generator().manual_seed(seed))[:experts]
    pools = {}
    for name, value in weights.items():
        pool = torch.full((experts + spare, value[0].nbytes), 0xFF, dtype=torch.uint8)
        pool[rows] = value.view(torch.uint8).flatten(1)
        pools[name] = pool.view(value.dtype).view(-1, *value.shape[1:])
    return pools, rows.int()
