"""The dense form of the experts, for few tokens: two launches.

A block's tokens all go through each of its experts, with weight 0 where a token did not choose one.
While reading weights is what takes the time, that arithmetic is free, and nothing is permuted. `dense_down_kernel` sums
over all experts in one long loop, which some programs share: each leaves its part in float32, and the one that comes last
(an integer counter tells) adds the parts up in their order. The price of the form: an expert whose own weights are not
finite reaches the whole block (0 * inf), not only the tokens that chose it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .experts import load_slots, local_expert, up_product, weighted
from .launch import early
from .products import multiply, rounded
from .schedule import block_range
from .weights import load_numbers, load_scales, product, scale_rows, scales_per_half, stored_columns


@triton.jit
def clear(counters_ptr, n, program, n_programs):
    """Sets n counters to 0; the programs share them."""
    for first in range(program * 1024, n, n_programs * 1024):
        counter = first + tl.arange(0, 1024)
        tl.store(counters_ptr + counter, tl.zeros([1024], tl.int32), mask=counter < n)


@triton.jit(do_not_specialize=["seq_len", "n_arrived"])
def dense_up_kernel(
    x_ptr,
    w13_ptr,
    w13_scale_ptr,
    shared_w13_ptr,
    shared_w13_scale_ptr,
    ids_ptr,
    weights_ptr,
    map_ptr,
    offsets_ptr,
    used_ptr,
    counts_ptr,
    arrived_ptr,
    h_ptr,
    shared_h_ptr,
    seq_len,
    n_arrived,
    H: tl.constexpr,
    I: tl.constexpr,
    SHARED_I: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    FORMAT: tl.constexpr,
    SHARED_FORMAT: tl.constexpr,
    PDL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """h [n_blocks, slots, BLOCK_N, I] of every used expert. The shared expert's is the first slot where it is as wide as
    the others, else shared_h [n_blocks, BLOCK_N, SHARED_I]. Programs [p, n_blocks] take the block's tiles in turn: the
    shared expert's first, which need no schedule. Also clears the counters of the down kernel."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(1)
    if arrived_ptr is not None:
        clear(
            arrived_ptr,
            n_arrived,
            block * tl.num_programs(0) + tl.program_id(0),
            tl.num_programs(0) * tl.num_programs(1),
        )
    start, length = block_range(block, offsets_ptr, seq_len, BLOCK_SIZE, HAS_OFFSETS)
    n = tl.arange(0, BLOCK_N)
    there = n < length
    x_cols = x_ptr + (start + n).to(tl.int64)[None, :] * H
    row = tl.arange(0, BLOCK_I)
    step = tl.num_programs(0)
    tile = tl.program_id(0)
    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    SHARED_TILES: tl.constexpr = (SHARED_I + BLOCK_I - 1) // BLOCK_I
    FIRST: tl.constexpr = 1 if SHARED_I == I and SHARED_FORMAT == FORMAT else 0
    slots = block.to(tl.int64) * (WIDTH + FIRST) + FIRST

    if SHARED_I > 0:
        if FIRST == 1:
            shared_h = h_ptr + (slots - 1) * (BLOCK_N * I)
        else:
            shared_h = shared_h_ptr + block.to(tl.int64) * (BLOCK_N * SHARED_I)
        while tile < SHARED_TILES:
            out = up_product(
                x_cols, there, shared_w13_ptr, shared_w13_scale_ptr, 0, tile * BLOCK_I,
                H, SHARED_I, BLOCK_I, BLOCK_H, STAGES, SHARED_FORMAT, ACTIVATION,
            )  # fmt: skip
            i = tile * BLOCK_I + row
            at = n.to(tl.int64)[None, :] * SHARED_I + i[:, None]
            tl.store(shared_h + at, rounded(out, h_ptr.dtype.element_ty), mask=(i < SHARED_I)[:, None])
            tile += step

    if PDL:
        tl.extra.cuda.gdc_wait()
    tile -= SHARED_TILES
    used = used_ptr + block.to(tl.int64) * WIDTH
    # Loaded before it is known whether there is such a member: one wait less. What lies behind the last one is not used.
    expert = tl.load(used + tl.minimum(tile // TILES, WIDTH - 1))
    n_tiles = tl.load(counts_ptr + block) * TILES
    ids, weights = load_slots(start + n, there, ids_ptr, weights_ptr, K, KP)
    while tile < n_tiles:
        member = tile // TILES
        first_row = tile % TILES * BLOCK_I
        local = local_expert(expert, map_ptr, HAS_MAP)
        out = up_product(
            x_cols, there, w13_ptr, w13_scale_ptr, local, first_row,
            H, I, BLOCK_I, BLOCK_H, STAGES, FORMAT, ACTIVATION,
        )  # fmt: skip
        out = weighted(out, expert, ids, weights)
        i = first_row + row
        at = ((slots + member) * BLOCK_N + n)[None, :] * I + i[:, None]
        tl.store(h_ptr + at, rounded(out, h_ptr.dtype.element_ty), mask=(i < I)[:, None])
        tile += step
        expert = tl.load(used + tl.minimum(tile // TILES, WIDTH - 1))


@triton.jit
def member_scales(
    scale_ptr,
    shared_scale_ptr,
    used,
    map_ptr,
    step,
    there,
    row,
    H: tl.constexpr,
    I: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_MAP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The scales of one step of `dense_down_kernel`, if it is there: behind the last member's, `used` holds anything."""
    member = step // TILES
    expert = tl.load(used + tl.maximum(member - FIRST, 0), mask=there, other=0)
    if HAS_MAP:
        expert = tl.load(map_ptr + expert, mask=there & (member >= FIRST), other=0)
    scales = scale_ptr + expert.to(tl.int64) * scales_per_half(H, I, FORMAT)
    if FIRST == 1:
        scales = tl.where(member == 0, shared_scale_ptr, scales)
    scales = scale_rows(scales, 0, row, H, I, FORMAT)
    return load_scales(scales, there & (row < H), step % TILES * BLOCK_I, I, FORMAT)


@triton.jit(do_not_specialize=["seq_len"])
def dense_down_kernel(
    h_ptr,
    shared_h_ptr,
    w2_ptr,
    w2_scale_ptr,
    shared_w2_ptr,
    shared_w2_scale_ptr,
    map_ptr,
    offsets_ptr,
    used_ptr,
    counts_ptr,
    arrived_ptr,
    parts_ptr,
    y_ptr,
    seq_len,
    H: tl.constexpr,
    I: tl.constexpr,
    SHARED_I: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    FORMAT: tl.constexpr,
    SHARED_FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """y of one block, BLOCK_H of its columns: the used experts are one long K. Programs [H / BLOCK_H, splits of K,
    n_blocks]; parts [n_blocks, H / BLOCK_H, splits, BLOCK_H, BLOCK_N] unless there is one split."""
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    block = tl.program_id(2)
    start, length = block_range(block, offsets_ptr, seq_len, BLOCK_SIZE, HAS_OFFSETS)
    n = tl.arange(0, BLOCK_N)
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_mask = row < H
    k = tl.arange(0, BLOCK_I)
    acc = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    FIRST: tl.constexpr = 1 if SHARED_I == I and SHARED_FORMAT == FORMAT else 0
    n_steps = (tl.load(counts_ptr + block) + FIRST) * TILES
    begin, end = n_steps * split // n_splits, n_steps * (split + 1) // n_splits

    if SHARED_I > 0 and FIRST == 0:  # noqa: SIM102 - decided at compile time
        if split == 0:
            shared_cols = shared_h_ptr + (block.to(tl.int64) * BLOCK_N + n)[None, :] * SHARED_I
            acc = product(
                shared_w2_ptr, shared_w2_scale_ptr, 0, row, row_mask, shared_cols, n >= 0,
                H, SHARED_I, BLOCK_I, STAGES, True, SHARED_FORMAT,
            )  # fmt: skip

    used = used_ptr + block.to(tl.int64) * WIDTH
    rows = row.to(tl.int64)[:, None] * stored_columns(I, FORMAT)
    h_cols = h_ptr + (block.to(tl.int64) * ((WIDTH + FIRST) * BLOCK_N) + n)[None, :] * I
    if FORMAT != "plain":
        scale = member_scales(
            w2_scale_ptr, shared_w2_scale_ptr, used, map_ptr, begin, begin < end, row,
            H, I, FIRST, HAS_MAP, TILES, BLOCK_I, FORMAT,
        )  # fmt: skip
    # The expert's id is loaded in the loop, one more level of its pipeline: 2 * STAGES - 1 keeps STAGES buffers.
    for step in tl.range(begin, end, num_stages=2 * STAGES - 1):
        member = step // TILES
        first = step % TILES * BLOCK_I
        expert = tl.load(used + tl.maximum(member - FIRST, 0))
        if HAS_MAP:
            expert = tl.load(map_ptr + expert, mask=member >= FIRST, other=0)
        w2 = w2_ptr + expert.to(tl.int64) * (H * stored_columns(I, FORMAT))
        if FIRST == 1:
            w2 = tl.where(member == 0, shared_w2_ptr, w2)
        i = first + k
        h = tl.load(h_cols + member.to(tl.int64) * (BLOCK_N * I) + i[:, None], mask=(i < I)[:, None], other=0.0)
        w = load_numbers(w2 + rows, row_mask, first, I, BLOCK_I, True, FORMAT, h.dtype)
        if FORMAT == "plain":
            acc = multiply(w, h, acc)
        else:
            following = member_scales(
                w2_scale_ptr, shared_w2_scale_ptr, used, map_ptr, step + 1, step + 1 < end, row,
                H, I, FIRST, HAS_MAP, TILES, BLOCK_I, FORMAT,
            )  # fmt: skip
            acc += multiply(w, h, tl.zeros([BLOCK_H, BLOCK_N], tl.float32)) * scale[:, None]
            scale = following

    at = (start + n).to(tl.int64)[None, :] * H + row[:, None]
    mask = row_mask[:, None] & (n < length)[None, :]
    if parts_ptr is None:
        tl.store(y_ptr + at, rounded(acc, y_ptr.dtype.element_ty), mask=mask)
    else:
        tile = block * tl.num_programs(0) + tl.program_id(0)
        SIZE: tl.constexpr = BLOCK_H * BLOCK_N
        parts = parts_ptr + (tile.to(tl.int64) * n_splits) * SIZE
        parts += tl.arange(0, BLOCK_H)[:, None] * BLOCK_N + n[None, :]
        tl.store(parts + split * SIZE, acc)
        tl.debug_barrier()  # every thread's part is written before it counts as arrived
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == n_splits - 1:
            tl.debug_barrier()
            total = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
            for first in range(0, n_splits, 4):
                for i in tl.static_range(4):  # loads that don't wait for each other
                    total += tl.load(
                        parts + (first + i) * SIZE, mask=first + i < n_splits, other=0.0, cache_modifier=".cg"
                    )
            tl.store(y_ptr + at, rounded(total, y_ptr.dtype.element_ty), mask=mask)


def experts(x, weights, topk_ids, topk_weights, block_offsets, seq_len, block_size, schedule, buffers, y, tiles, pdl):
    """y of blocks with a `schedule.Dense`. weights: `weights.Stored`; buffers: what `buffers` allocates; tiles:
    `tiles.Tiles` of the device; pdl: see `router.route`."""
    n_blocks, width = schedule.used.shape
    routed_h, shared_h, arrived, parts = buffers
    hidden, intermediate = x.shape[1], weights.intermediate
    tokens = routed_h.shape[2]
    up, down = (tiles.fit(name, tokens, x.dtype, weights.up[0].dtype) for name in ("dense_up", "dense_down"))
    common = dict(
        H=hidden,
        I=intermediate,
        SHARED_I=weights.shared_intermediate,
        BLOCK_SIZE=block_size,
        WIDTH=width,
        BLOCK_N=tokens,
        HAS_OFFSETS=block_offsets is not None,
        HAS_MAP=weights.expert_map is not None,
        **weights.formats,
        **early(pdl),
    )
    most = triton.cdiv(intermediate, up.rows) * width + triton.cdiv(weights.shared_intermediate, up.rows)
    programs = min(most, max(1, triton.cdiv(tiles.processors * up.per_processor, n_blocks)))
    dense_up_kernel[(programs, n_blocks)](
        x,
        *weights.up,
        topk_ids,
        topk_weights,
        weights.expert_map,
        block_offsets,
        schedule.used,
        schedule.counts,
        arrived,
        routed_h,
        shared_h,
        seq_len,
        0 if arrived is None else arrived.numel(),
        K=topk_ids.shape[1],
        KP=triton.next_power_of_2(topk_ids.shape[1]),
        BLOCK_I=up.rows,
        BLOCK_H=up.depth,
        STAGES=up.stages,
        ACTIVATION=weights.activation,
        num_warps=up.warps,
        **common,
    )
    splits = 1 if parts is None else parts.shape[2]
    dense_down_kernel[(triton.cdiv(hidden, down.rows), splits, n_blocks)](
        routed_h,
        shared_h,
        *weights.down,
        weights.expert_map,
        block_offsets,
        schedule.used,
        schedule.counts,
        arrived,
        parts,
        y,
        seq_len,
        BLOCK_H=down.rows,
        BLOCK_I=down.depth,
        STAGES=down.stages,
        num_warps=down.warps,
        **common,
    )


def buffers(x, weights, schedule, block_size: int, tiles) -> tuple:
    """(h, shared_h, arrived, parts) of `dense`; all but h may be None."""
    n_blocks, width = schedule.used.shape
    tokens, intermediate = max(16, triton.next_power_of_2(block_size)), weights.intermediate
    alike, shared = weights.shared_alike, weights.shared_intermediate
    h = x.new_empty(n_blocks, width + alike, tokens, intermediate)
    shared_h = x.new_empty(n_blocks, tokens, shared) if shared and not alike else None
    down = tiles.fit("dense_down", tokens, x.dtype, weights.down[0].dtype)
    n_tiles = triton.cdiv(x.shape[1], down.rows)
    # As many programs as there are multiprocessors: one in two would leave half of the memory's bandwidth unused.
    splits = min(8, tiles.processors // (n_tiles * n_blocks))
    if splits < 2:
        return h, shared_h, None, None
    parts = x.new_empty((n_blocks, n_tiles, splits, down.rows, tokens), dtype=torch.float32)
    return h, shared_h, x.new_empty(n_blocks * n_tiles, dtype=torch.int32), parts
