"""Experts: gate-up with SiLU and the routing weight in the epilogue, then down with the combine. Two launches, two forms.

Dense, for latency: a block's tokens all go through each of its experts, with weight 0 where a token did not choose one.
While reading weights is what takes the time, that arithmetic is free, and nothing is permuted. `dense_down_kernel` sums
over all experts in one long loop, which some programs share: each leaves its part in float32, and the one that comes last
(an integer counter tells) adds the parts up in their order. The price of the form: an expert whose own weights are not
finite reaches the whole block (0 * inf), not only the tokens that chose it.

Gathered, for throughput: grouped products over the positions of `schedule`. `gathered_down_kernel` writes one row per
position, `combine_kernel` adds a token's rows up in the order of its slots.

In both, weights are the left operand of the MMA (M) and tokens the right one (N), the routing weight is multiplied into h
before h is rounded, and the shared expert is one more expert with weight 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .products import multiply, rounded
from .schedule import block_range, load_positions, load_tile
from .weights import load_numbers, load_scales, of_expert, product, scale_rows, scales_per_half, stored_columns

COMBINE_COLUMNS = 1024  # of a program: 16 bytes at a time by each thread of 4 warps
HALF_GROUP = tl.constexpr(8)  # rows of gate and of up alternate in groups: both halves of a product sit in one thread


@triton.jit
def up_product(
    x_cols,
    token_mask,
    w13_ptr,
    scale_ptr,
    expert,
    first_row,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """silu(gate) * up for rows first_row .. first_row + BLOCK_I of one expert: float32 [BLOCK_I, tokens].

    x_cols: pointers [1, tokens] to the tokens' rows of x; w13_ptr: [experts, 2I, H].
    """
    r = tl.arange(0, 2 * BLOCK_I)
    i = first_row + r // (2 * HALF_GROUP) * HALF_GROUP + r % HALF_GROUP
    half = r // HALF_GROUP % 2
    w13_ptr, scale_ptr = of_expert(w13_ptr, scale_ptr, expert, 2, I, H, FORMAT)
    MASKED: tl.constexpr = I % BLOCK_I != 0 or H % BLOCK_H != 0
    acc = product(w13_ptr, scale_ptr, half, i, i < I, x_cols, token_mask, I, H, BLOCK_H, STAGES, MASKED, FORMAT)
    halves = tl.reshape(acc, [BLOCK_I // HALF_GROUP, 2, HALF_GROUP, token_mask.shape[0]])
    gate, up = tl.split(tl.permute(halves, [0, 2, 3, 1]))
    gate = tl.reshape(gate, [BLOCK_I, token_mask.shape[0]])
    up = tl.reshape(up, [BLOCK_I, token_mask.shape[0]])
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def clear(counters_ptr, n, program, n_programs):
    """Sets n counters to 0; the programs share them."""
    for first in range(program * 1024, n, n_programs * 1024):
        counter = first + tl.arange(0, 1024)
        tl.store(counters_ptr + counter, tl.zeros([1024], tl.int32), mask=counter < n)


@triton.jit
def local_expert(expert, map_ptr, HAS_MAP: tl.constexpr):
    """Where an expert's weights lie in w13 and w2."""
    if HAS_MAP:
        expert = tl.load(map_ptr + expert)
    return expert.to(tl.int64)


@triton.jit
def load_slots(token, token_mask, ids_ptr, weights_ptr, K: tl.constexpr, KP: tl.constexpr):
    """Each token's ids and weights, [tokens, KP]. Apart from `slot_weight`, so that the product need not wait for them."""
    slot = tl.arange(0, KP)
    at = token.to(tl.int64)[:, None] * K + slot[None, :]
    there = token_mask[:, None] & (slot < K)[None, :]
    return tl.load(ids_ptr + at, mask=there, other=-1), tl.load(weights_ptr + at, mask=there, other=0.0)


@triton.jit
def weighted(hidden, expert, ids, weights):
    """hidden [rows, tokens] times the weight that each token gives the expert. Where a token did not choose it the result is
    0, whatever stands in hidden: an overflow there must not reach the token."""
    weight = tl.sum(tl.where(ids == expert, weights, 0.0), 1)[None, :]
    return tl.where(weight != 0, hidden * weight, 0.0)


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
                H, SHARED_I, BLOCK_I, BLOCK_H, STAGES, SHARED_FORMAT,
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
            x_cols, there, w13_ptr, w13_scale_ptr, local, first_row, H, I, BLOCK_I, BLOCK_H, STAGES, FORMAT
        )
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


@triton.jit(do_not_specialize=["n_tokens", "begin", "end"])
def gathered_up_kernel(
    x_ptr,
    w13_ptr,
    w13_scale_ptr,
    shared_w13_ptr,
    shared_w13_scale_ptr,
    ids_ptr,
    weights_ptr,
    map_ptr,
    token_at_ptr,
    tiles_ptr,
    n_tiles_ptr,
    h_ptr,
    shared_h_ptr,
    n_tokens,
    begin,
    end,
    H: tl.constexpr,
    I: tl.constexpr,
    SHARED_I: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_MAP: tl.constexpr,
    FORMAT: tl.constexpr,
    SHARED_FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """h [T * K, I] of every position of the experts begin to end - 1, and shared_h [T, SHARED_I] by the first programs,
    which need no schedule."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_I)
    program = tl.program_id(0)
    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    SHARED_TILES: tl.constexpr = (SHARED_I + BLOCK_I - 1) // BLOCK_I
    n_shared = tl.cdiv(n_tokens, BLOCK_N) * SHARED_TILES

    if SHARED_I > 0:  # noqa: SIM102 - decided at compile time
        if program < n_shared:
            token = program // SHARED_TILES * BLOCK_N + n
            there = token < n_tokens
            first_row = program % SHARED_TILES * BLOCK_I
            x_cols = x_ptr + token.to(tl.int64)[None, :] * H
            out = up_product(
                x_cols, there, shared_w13_ptr, shared_w13_scale_ptr, 0, first_row,
                H, SHARED_I, BLOCK_I, BLOCK_H, STAGES, SHARED_FORMAT,
            )  # fmt: skip
            i = first_row + row
            at = token.to(tl.int64)[None, :] * SHARED_I + i[:, None]
            tl.store(
                shared_h_ptr + at, rounded(out, h_ptr.dtype.element_ty), mask=there[None, :] & (i < SHARED_I)[:, None]
            )

    if PDL:
        tl.extra.cuda.gdc_wait()
    program -= n_shared
    if (program >= 0) & (program < tl.load(n_tiles_ptr) * TILES):
        expert, position, there, token = load_tile(program // TILES, tiles_ptr, token_at_ptr, BLOCK_N)
        ids, weights = load_slots(token, there, ids_ptr, weights_ptr, K, KP)
        first_row = program % TILES * BLOCK_I
        x_cols = x_ptr + token.to(tl.int64)[None, :] * H
        if (expert >= begin) & (expert < end):
            local = local_expert(expert, map_ptr, HAS_MAP)
            out = up_product(
                x_cols, there, w13_ptr, w13_scale_ptr, local, first_row, H, I, BLOCK_I, BLOCK_H, STAGES, FORMAT
            )
            out = weighted(out, expert, ids, weights)
            i = first_row + row
            at = position.to(tl.int64)[None, :] * I + i[:, None]
            tl.store(h_ptr + at, rounded(out, h_ptr.dtype.element_ty), mask=there[None, :] & (i < I)[:, None])


@triton.jit
def down_rows(
    w2_ptr,
    scale_ptr,
    expert,
    h_ptr,
    position,
    there,
    hidden,
    out_ptr,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """One tile of W2 @ h into the rows `position` of out_ptr [., H]."""
    w2_ptr, scale_ptr = of_expert(w2_ptr, scale_ptr, expert, 1, H, I, FORMAT)
    h_cols = h_ptr + position.to(tl.int64)[None, :] * I
    MASKED: tl.constexpr = H % BLOCK_H != 0 or I % BLOCK_I != 0
    acc = product(w2_ptr, scale_ptr, 0, hidden, hidden < H, h_cols, there, H, I, BLOCK_I, STAGES, MASKED, FORMAT)
    at = position.to(tl.int64)[None, :] * H + hidden[:, None]
    tl.store(out_ptr + at, rounded(acc, out_ptr.dtype.element_ty), mask=(hidden < H)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["n_tokens", "begin", "end"])
def gathered_down_kernel(
    h_ptr,
    shared_h_ptr,
    w2_ptr,
    w2_scale_ptr,
    shared_w2_ptr,
    shared_w2_scale_ptr,
    map_ptr,
    tiles_ptr,
    n_tiles_ptr,
    rows_ptr,
    shared_rows_ptr,
    n_tokens,
    begin,
    end,
    H: tl.constexpr,
    I: tl.constexpr,
    SHARED_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_MAP: tl.constexpr,
    FORMAT: tl.constexpr,
    SHARED_FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows [T * K, H], one per position of the experts begin to end - 1, and shared_rows [T, H]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.arange(0, BLOCK_N)
    program = tl.program_id(0)
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    n_shared = tl.cdiv(n_tokens, BLOCK_N) * TILES if SHARED_I > 0 else 0
    hidden = program % TILES * BLOCK_H + tl.arange(0, BLOCK_H)

    if SHARED_I > 0:  # noqa: SIM102 - decided at compile time
        if program < n_shared:
            token = program // TILES * BLOCK_N + n
            down_rows(
                shared_w2_ptr, shared_w2_scale_ptr, 0, shared_h_ptr, token, token < n_tokens, hidden, shared_rows_ptr,
                H, SHARED_I, BLOCK_H, BLOCK_I, STAGES, SHARED_FORMAT,
            )  # fmt: skip
    program -= n_shared
    if (program >= 0) & (program < tl.load(n_tiles_ptr) * TILES):
        expert, position, there = load_positions(program // TILES, tiles_ptr, BLOCK_N)
        if (expert >= begin) & (expert < end):
            local = local_expert(expert, map_ptr, HAS_MAP)
            down_rows(
                w2_ptr, w2_scale_ptr, local, h_ptr, position, there, hidden, rows_ptr,
                H, I, BLOCK_H, BLOCK_I, STAGES, FORMAT,
            )  # fmt: skip


@triton.jit
def combine_kernel(
    rows_ptr,
    shared_rows_ptr,
    position_ptr,
    y_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [T, H]: the sum of each token's rows in the order of its slots, and the shared expert's row. Programs
    [T, H / BLOCK_H]."""
    token = tl.program_id(0).to(tl.int64)
    hidden = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_H], tl.float32)
    for j in tl.static_range(K):
        position = tl.load(position_ptr + token * K + j)
        part = rows_ptr + position.to(tl.int64) * H + hidden
        total += tl.load(part, mask=(hidden < H) & (position >= 0), other=0.0).to(tl.float32)
    if shared_rows_ptr is not None:
        total += tl.load(shared_rows_ptr + token * H + hidden, mask=hidden < H, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * H + hidden, rounded(total, y_ptr.dtype.element_ty), mask=hidden < H)


def dense(x, weights, topk_ids, topk_weights, block_offsets, seq_len, block_size, schedule, buffers, y, tiles, pdl):
    """y of blocks with a `schedule.Dense`. weights: `weights.Stored`; buffers: what `dense_buffers` allocates; tiles:
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
        PDL=pdl,
        **weights.formats,
        **(dict(launch_pdl=True) if pdl else {}),
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


def gathered(x, weights, topk_ids, topk_weights, schedule, h, rows, y, tiles, pdl, wave=None):
    """y of tokens with a `schedule.Gathered`. h, rows: what `gathered_buffers` allocates; the rest: see `dense`. wave: None,
    or the experts begin to end - 1 alone; the shared expert, and the sum of the rows, come with the last of them."""
    n_experts = schedule.words.shape[1]
    begin, end = wave or (0, n_experts)
    hidden, intermediate = x.shape[1], weights.intermediate
    shared = weights.shared_intermediate if end == n_experts else 0
    n_tokens, top_k = topk_ids.shape
    stored = weights.up[0].dtype
    up, down = (tiles.fit(name, schedule.tile, x.dtype, stored) for name in ("gathered_up", "gathered_down"))
    common = dict(
        H=hidden,
        I=intermediate,
        SHARED_I=shared,
        BLOCK_N=schedule.tile,
        HAS_MAP=weights.expert_map is not None,
        **weights.formats,
    )
    early = dict(PDL=pdl, **(dict(launch_pdl=True) if pdl else {}))
    most, token_tiles = schedule.tiles.shape[0], triton.cdiv(n_tokens, schedule.tile)
    programs = most * triton.cdiv(intermediate, up.rows) + token_tiles * triton.cdiv(shared, up.rows)
    gathered_up_kernel[(programs,)](
        x,
        *weights.up,
        topk_ids,
        topk_weights,
        weights.expert_map,
        schedule.token_at,
        schedule.tiles,
        schedule.n_tiles,
        *h,
        n_tokens,
        begin,
        end,
        K=top_k,
        KP=triton.next_power_of_2(top_k),
        BLOCK_I=up.rows,
        BLOCK_H=up.depth,
        STAGES=up.stages,
        num_warps=up.warps,
        **common,
        **early,
    )
    programs = (most + (token_tiles if shared else 0)) * triton.cdiv(hidden, down.rows)
    gathered_down_kernel[(programs,)](
        *h,
        *weights.down,
        weights.expert_map,
        schedule.tiles,
        schedule.n_tiles,
        *rows,
        n_tokens,
        begin,
        end,
        BLOCK_H=down.rows,
        BLOCK_I=down.depth,
        STAGES=down.stages,
        num_warps=down.warps,
        **common,
        **early,
    )
    if end < n_experts:
        return
    columns = min(COMBINE_COLUMNS, triton.next_power_of_2(hidden))
    combine_kernel[(n_tokens, triton.cdiv(hidden, columns))](
        *rows, schedule.position_of, y, H=hidden, K=top_k, BLOCK_H=columns, num_warps=4, **early
    )


def dense_buffers(x, weights, schedule, block_size: int, tiles) -> tuple:
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


def gathered_buffers(x, weights, top_k: int) -> tuple:
    """((h, shared_h or None), (rows, shared_rows or None)) of `gathered`."""
    n_tokens, hidden = x.shape
    h, rows = x.new_empty(n_tokens * top_k, weights.intermediate), x.new_empty(n_tokens * top_k, hidden)
    if not weights.shared_intermediate:
        return (h, None), (rows, None)
    return (h, x.new_empty(n_tokens, weights.shared_intermediate)), (rows, torch.empty_like(x))
