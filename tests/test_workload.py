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
# Blocks of a batch that share a pool, a domain: half of the blocks' variance is common to it. Policy, overrides, and at 1, 4
# and 16 blocks what was measured: distinct experts of all coresets together, and the router's mass that tokens keep of
# that of their own top-k.
SHARED = [
    ("token", {}, (256, 256, 256), (1.0, 1.0, 1.0)),
    ("dmoe", {}, (16.8, 46.5, 96.4), (0.951, 0.950, 0.949)),
    ("dmoe", dict(choose="pool"), (16.8, 46.5, 96.4), (0.951, 0.977, 0.991)),
    ("dmoe", dict(pool_capacity=48), (16.1, 42.7, 47.9), (0.947, 0.945, 0.935)),
    ("dmoe", dict(pool_capacity=48, choose="pool"), (48, 48, 48), (0.994, 0.980, 0.970)),
    ("oea", {}, (15.0, 43.3, 97.2), (0.910, 0.966, 0.989)),
    ("xshare", {}, (48, 48, 48), (0.993, 0.976, 0.969)),
]
DOMAINS = {1: 100, 4: 40, 16: 12}


def distinct(ids, rows: int) -> float:
    """Experts that ids name, -1 is none, in each of so many equal parts; on average."""
    used = torch.zeros(rows, EXPERTS + 1)
    used.scatter_(1, torch.where(ids < 0, EXPERTS, ids).long().view(rows, -1), 1)
    return used[:, :EXPERTS].sum(1).mean().item()


def label_of(name: str, overrides: dict) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in overrides.items())])


@pytest.mark.usefixtures("backend")
def test_operating_points(capsys, backend):
    generator = torch.Generator().manual_seed(0)
    of_block = torch.randn(BLOCKS, 1, EXPERTS, generator=generator)
    logits = -1 + 1.2 * of_block + torch.randn(BLOCKS, TOKENS, EXPERTS, generator=generator)
    lines, misses = [], []
    for name, overrides, expected, tolerance in POINTS:
        result = block_route(logits, routing=BlockRouting.policy(name, **overrides))
        unique, coreset = distinct(result.topk_ids, BLOCKS), result.coreset_sizes.float().mean().item()
        label = label_of(name, overrides)
        lines.append(f"{label:<22}{unique:>8.1f}{expected:>10.1f}{coreset:>10.1f}")
        if abs(unique - expected) > tolerance * expected:
            misses.append(lines[-1])
        assert unique <= coreset
    with capsys.disabled():
        print(f"\n{f'policy ({backend})':<22}{'unique':>8}{'expected':>10}{'coreset':>10}", *lines, sep="\n")
    assert not misses


def test_operating_points_of_a_batch(capsys, backend):
    lines, misses = [], []
    for batch, domains in DOMAINS.items():
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(domains, 1, 1, EXPERTS, generator=generator)
        of_block = torch.randn(domains, batch, 1, EXPERTS, generator=generator)
        of_block = of_block if batch == 1 else (common + of_block) / 2**0.5
        logits = -1 + 1.2 * of_block + torch.randn(domains, batch, TOKENS, EXPERTS, generator=generator)
        logits, offsets = logits.view(-1, TOKENS, EXPERTS), torch.arange(domains + 1) * batch
        score = logits.view(-1, EXPERTS).sigmoid()
        own = score.gather(1, block_route(logits, routing=BlockRouting.policy("token")).topk_ids.long()).sum(1)
        for name, overrides, members, mass in SHARED:
            routing = BlockRouting.policy(name, **overrides)
            result = block_route(logits, routing=routing, domain_offsets=offsets)
            kept = score.gather(1, result.topk_ids.clamp(min=0).long()) * (result.topk_ids >= 0)
            kept = (kept.sum(1) / own).mean().item()
            unique, together = distinct(result.topk_ids, domains), distinct(result.coreset_ids, domains)
            line = f"{label_of(name, overrides):<34}{batch:>6}{unique:>8.1f}{together:>10.1f}{kept:>8.3f}"
            lines.append(line)
            at = list(DOMAINS).index(batch)
            if abs(together - members[at]) > 0.01 * members[at] or abs(kept - mass[at]) > 0.002:
                misses.append(line)
            assert unique <= together <= (routing.pool_capacity or EXPERTS)
    head = f"{f'policy of a batch ({backend})':<34}{'blocks':>6}{'unique':>8}{'coresets':>10}{'kept':>8}"
    with capsys.disabled():
        print(f"\n{head}", *lines, sep="\n")
    assert not misses
