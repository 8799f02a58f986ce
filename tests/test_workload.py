"""The calibrated workload gives the operating points that the papers report for LLaDA2.0-mini."""

from __future__ import annotations

import pytest
import torch

from dmoe_ops import BlockRouting, block_route

# Policy, overrides, mean unique experts per block, tolerance. The workload was calibrated on `token` and `dmoe`; the
# others are measurements on the real model, whose tokens agree less on their third expert than the workload's do.
POINTS = [
    ("token", {}, 69.5, 0.01),
    ("top4", {}, 43.5, 0.03),
    ("des_seq", dict(union_k=3), 41.0, 0.20),
    ("des_seq", dict(union_k=1), 13.0, 0.03),
    ("des_vote", {}, 36.9, 0.03),
    ("capacity", {}, 48.0, 0.01),
    ("dmoe", dict(top_p=0.4), 13.9, 0.01),
    ("dmoe", dict(top_p=0.5), 13.9, 0.01),
    ("dmoe", dict(top_p=0.6), 14.7, 0.01),
    ("dmoe", dict(top_p=0.7), 19.3, 0.01),
    ("dmoe", dict(top_p=0.8), 28.1, 0.01),
]
BLOCKS, TOKENS, EXPERTS = 200, 32, 256


@pytest.mark.usefixtures("backend")
def test_operating_points(capsys, backend):
    generator = torch.Generator().manual_seed(0)
    of_block = torch.randn(BLOCKS, 1, EXPERTS, generator=generator)
    logits = -1 + 1.2 * of_block + torch.randn(BLOCKS, TOKENS, EXPERTS, generator=generator)
    lines, misses = [], []
    for name, overrides, expected, tolerance in POINTS:
        result = block_route(logits, routing=BlockRouting.policy(name, **overrides))
        used = torch.zeros(BLOCKS, EXPERTS + 1)
        used.scatter_(1, torch.where(result.topk_ids < 0, EXPERTS, result.topk_ids).long().view(BLOCKS, -1), 1)
        unique, coreset = used[:, :EXPERTS].sum(1).mean().item(), result.coreset_sizes.float().mean().item()
        label = " ".join([name, *(f"{key}={value}" for key, value in overrides.items())])
        lines.append(f"{label:<22}{unique:>8.1f}{expected:>10.1f}{coreset:>10.1f}")
        if abs(unique - expected) > tolerance * expected:
            misses.append(lines[-1])
        assert unique <= coreset
    with capsys.disabled():
        print(f"\n{f'policy ({backend})':<22}{'unique':>8}{'expected':>10}{'coreset':>10}", *lines, sep="\n")
    assert not misses
