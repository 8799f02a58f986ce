"""What a denoising step does behind its layers: the counts of experts, and which tokens are unmasked.

A program per sequence, for the counts per sequence and layer: nothing but sums of integers crosses programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoder import follow
from .launch import early

SCAN = 1024  # tokens, or router logits, at a time; others were not measured
SLOTS = 32  # slots of topk_ids at a time


@triton.jit
def count_kernel(
    ids_ptr,
    logits_ptr,
    rows_ptr,
    active_ptr,
    length_ptr,
    begin_ptr,
    forwards_ptr,
    blocks_ptr,
    unique_ptr,
    broken_ptr,
    slots,
    n_logits,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    SCAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """slots: of topk_ids, and n_logits: router logits, of a sequence in a layer."""
    follow(PDL)
    layer, i = tl.program_id(0), tl.program_id(1)
    layers, n = tl.num_programs(0), tl.num_programs(1)
    row = tl.load(rows_ptr + i)
    active = tl.load(active_ptr + row) != 0
    at = layer.to(tl.int64) * n + i

    column = tl.arange(0, SCAN)
    broken = tl.zeros([SCAN], tl.int32)
    for first in range(0, n_logits, SCAN):
        logit = tl.load(logits_ptr + at * n_logits + first + column, mask=first + column < n_logits, other=0.0)
        broken |= (logit != logit).to(tl.int32)
    tl.store(broken_ptr + at, tl.max(broken, 0))

    expert = tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    size = slots // BLOCKS
    for block in tl.static_range(BLOCKS):
        used = tl.zeros([WIDTH], tl.int32)
        for first in range(0, size, SLOTS):
            inside = first + slot < size
            chosen = tl.load(ids_ptr + at * slots + block * size + first + slot, mask=inside, other=-1)
            used |= tl.max((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
        kind = 2
        if block < BLOCKS - 1:
            kind = tl.where(tl.load(length_ptr + row) >= tl.load(begin_ptr), 0, 1)
        if active:
            tl.atomic_add(unique_ptr + kind * layers + layer, tl.sum(used * (expert < EXPERTS), 0).to(tl.int64))
            if layer == 0:
                one = tl.full([], 1, tl.int64)
                tl.atomic_add(blocks_ptr + kind, one)
                tl.atomic_add(forwards_ptr + kind, one)


@triton.jit
def unmask_kernel(
    tokens_ptr,
    confidence_ptr,
    broken_ptr,
    rows_ptr,
    x_ptr,
    new_ptr,
    steps_ptr,
    active_ptr,
    begin_ptr,
    step_ptr,
    flags_ptr,
    capacity,
    layers,
    threshold,
    MASK: tl.constexpr,
    EOS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SCAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """EOS: -1 for none. Adds nothing to `step`, which the other programs read."""
    follow(PDL)
    i, n = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row = tl.load(rows_ptr + i)
    begin, step, steps = tl.load(begin_ptr), tl.load(step_ptr), tl.load(steps_ptr + row)
    active = tl.load(active_ptr + row) != 0
    x_ptr += row * capacity
    new_ptr += row * capacity
    column = tl.arange(0, WIDTH)
    inside = column < BLOCK
    block = tl.load(x_ptr + begin + column, mask=inside, other=0)
    token = tl.load(tokens_ptr + i * BLOCK + column, mask=inside, other=0)
    confidence = tl.load(confidence_ptr + i * BLOCK + column, mask=inside, other=0.0)
    fine = tl.min(tl.where(tl.abs(confidence) < float("inf"), 1, 0), 0)
    at = tl.arange(0, SCAN)
    for first in range(0, layers, SCAN):
        broken = tl.load(broken_ptr + (first + at) * n + i, mask=first + at < layers, other=0)
        fine = tl.minimum(fine, 1 - tl.max(broken, 0))

    masked = inside & (block == MASK) & active
    confidence = tl.where(masked, confidence, float("-inf"))
    share = BLOCK // steps + tl.where(step < BLOCK % steps, 1, 0)
    sure = masked & (confidence > threshold)
    ahead = confidence[None, :] > confidence[:, None]
    ahead |= (confidence[None, :] == confidence[:, None]) & (column[None, :] < column[:, None])
    best = masked & (tl.sum((ahead & inside[None, :]).to(tl.int32), 1) < share)
    many = tl.sum(sure.to(tl.int32), 0) >= share
    block = tl.where((many & sure) | (best & (many == 0)), token, block)
    left = tl.sum((inside & (block == MASK)).to(tl.int64), 0)

    first_eos, first_mask = capacity, capacity
    if EOS >= 0:
        fresh = tl.load(new_ptr + begin + column, mask=inside, other=0) != 0
        position = (begin + column).to(tl.int32)
        first_eos = tl.min(tl.where(fresh & (block == EOS), position, capacity), 0)
        first_mask = tl.min(tl.where(fresh & (block == MASK), position, capacity), 0)
        for first in range(0, capacity, SCAN):
            place = first + at
            outside = (place < capacity) & ((place < begin) | (place >= begin + BLOCK))
            text = tl.load(x_ptr + place, mask=outside, other=0)
            own = outside & (tl.load(new_ptr + place, mask=outside, other=0) != 0)
            first_eos = tl.minimum(first_eos, tl.min(tl.where(own & (text == EOS), place, capacity), 0))
            first_mask = tl.minimum(first_mask, tl.min(tl.where(own & (text == MASK), place, capacity), 0))
        if EARLY:
            left = tl.where((first_eos < capacity) & (first_mask > first_eos), 0, left)
    left = tl.where(active & (step + 1 < steps), left, 0)
    tl.store(x_ptr + begin + column, block, mask=inside)
    tl.store(active_ptr + row, left > 0)
    tl.store(flags_ptr + 3 * i, left)
    tl.store(flags_ptr + 3 * i + 1, (first_eos < capacity).to(tl.int64))
    tl.store(flags_ptr + 3 * i + 2, fine.to(tl.int64))


def count_step(
    topk_ids, router_logits, rows, active, length, begin, block_length, forwards, blocks, unique, broken, pdl: bool
) -> None:
    layers, n, tokens, top_k = topk_ids.shape
    experts = router_logits.shape[3]
    count_kernel[(layers, n)](
        # inputs
        topk_ids,
        router_logits,
        rows,
        active,
        length,
        begin,
        # outputs
        forwards,
        blocks,
        unique,
        broken,
        # shapes
        tokens * top_k,
        tokens * experts,
        EXPERTS=experts,
        WIDTH=triton.next_power_of_2(experts),
        BLOCKS=tokens // block_length,
        SLOTS=SLOTS,
        SCAN=SCAN,
        num_warps=4,
        **early(pdl),
    )


def unmask(
    tokens, confidence, broken, rows, x, new, steps, active, begin, step, mask_id, eos_id, early_stop, threshold, flags,
    pdl: bool,
) -> None:  # fmt: skip
    block_length = tokens.numel() // len(rows)
    unmask_kernel[(len(rows),)](
        # inputs
        tokens,
        confidence,
        broken,
        rows,
        # inputs and outputs
        x,
        new,
        steps,
        active,
        begin,
        step,
        # outputs
        flags,
        # shapes and settings
        x.shape[1],
        broken.shape[0],
        threshold,
        MASK=mask_id,
        EOS=-1 if eos_id is None else eos_id,
        EARLY=early_stop,
        BLOCK=block_length,
        WIDTH=triton.next_power_of_2(block_length),
        SCAN=SCAN,
        num_warps=4,
        **early(pdl),
    )
