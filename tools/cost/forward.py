"""A denoising step of LLaDA2.0-mini as one CUDA graph: what its launches take beside the MoE layers, whose times come in.

Products of matrices read their weights once (32 tokens), so bytes decide; every launch costs its start and one latency of
memory. The numbers of launches are those that tests/test_step.py counts, in a step of fixed shapes.
"""

from __future__ import annotations

import dataclasses

from .machines import Machine

HIDDEN, LAYERS, DENSE, VOCAB = 2048, 20, 5120, 157184
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
TOKENS = 32
SMALL_US = 0.5  # what a launch over a block of 32 tokens computes, beside start and latency; assumed


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    launches: int
    us: float


def parts(machine: Machine, moe_us: float, moe_launches: int, prefix: int = 1024) -> list[Part]:
    """moe_us: of one MoE layer, all its moe_launches. prefix: tokens in front of the block."""

    def part(name: str, launches: int, mbytes: float, own: float = 0.0) -> Part:
        each = machine.launch + machine.dram_us + own
        return Part(name, launches, launches * each + mbytes / machine.hbm)

    def weights(rows: int, columns: int) -> float:
        return 2 * rows * columns / 1e6

    cache = 2 * 2 * KV_HEADS * HEAD_DIM * prefix / 1e6
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return [
        Part("MoE", moe_launches * (LAYERS - 1), (LAYERS - 1) * moe_us),
        part("qkv", LAYERS, LAYERS * weights(width, HIDDEN)),
        part("output projection", LAYERS, LAYERS * weights(HIDDEN, HEADS * HEAD_DIM)),
        part("dense layer", 5, 3 * weights(HIDDEN, DENSE)),
        part("head", 1, weights(VOCAB, HIDDEN)),
        part("norms", 2 * LAYERS + 1, 0, SMALL_US),
        part("heads' norms, rotary embedding, cache", LAYERS, 0, SMALL_US),
        part("attention, its shares added up", 2 * LAYERS, LAYERS * cache, 2 * SMALL_US),
        part("choice of tokens", 2, 2 * TOKENS * VOCAB / 1e6, 2 * SMALL_US),
        part("text, counts, unmasking", 10, 0, SMALL_US),
    ]
