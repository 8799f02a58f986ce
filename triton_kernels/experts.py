"""Experts: gate-up with SiLU and the routing weight in the epilogue, then down with the combine. Two launches, two forms.

Dense, for latency: a block's tokens all go through each of its experts, with weight 0 where a token did not choose one.
While reading weights is what takes the time, that arithmetic is free, and nothing is permuted. `dense_down_kernel` sums
over all experts in one long loop, so a program owns its outputs: no atomics, one order of additions. The price: an expert
whose own weights are not finite reaches the whole block (0 * inf), not only the tokens that chose it.

Gathered, for throughput: grouped products over the positions of `schedule`. `gathered_down_kernel` writes one row per
position, and the program that brings a token's last row (an integer counter tells) adds the rows up in the order of the
token's slots: which program that is may change, the sum does not.

In both, weights are the left operand of the MMA (M) and tokens the right one (N), the routing weight is multiplied into h
before h is rounded, and the shared expert is one more expert with weight 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .products import multiply, rounded
from .schedule import block_range, load_tile

HALF_GROUP = tl.constexpr(8)  # rows of gate and of up alternate in groups: both halves of a product sit in one thread


@triton.jit
def up_product(
    x_cols,
    token_mask,
    w13_ptr,
    first_row,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """silu(gate) * up for rows first_row .. first_row + BLOCK_I of one expert: float32 [BLOCK_I, BLOCK_N].

    x_cols: pointers [1, BLOCK_N] to the tokens' rows of x; w13_ptr: the expert's [2I, H].
    """
    r = tl.arange(0, 2 * BLOCK_I)
    i = first_row + r // (2 * HALF_GROUP) * HALF_GROUP + r % HALF_GROUP
    rows = i + (r // HALF_GROUP % 2) * I
    w_rows = w13_ptr + rows.to(tl.int64)[:, None] * H
    k = tl.arange(0, BLOCK_H)
    acc = tl.zeros([2 * BLOCK_I, BLOCK_N], tl.float32)
    for h0 in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        h = h0 + k
        if I % BLOCK_I == 0 and H % BLOCK_H == 0:
            w = tl.load(w_rows + h[None, :])
        else:
            w = tl.load(w_rows + h[None, :], mask=(i < I)[:, None] & (h < H)[None, :], other=0.0)
        x = tl.load(x_cols + h[:, None], mask=token_mask[None, :] & (h < H)[:, None], other=0.0)
        acc = multiply(w, x, acc)
    halves = tl.reshape(acc, [BLOCK_I // HALF_GROUP, 2, HALF_GROUP, BLOCK_N])
    gate, up = tl.split(tl.permute(halves, [0, 2, 3, 1]))
    gate = tl.reshape(gate, [BLOCK_I, BLOCK_N])
    up = tl.reshape(up, [BLOCK_I, BLOCK_N])
    return gate / (1.0 + tl.exp(-gate)) * up


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


@triton.jit(do_not_specialize=["seq_len"])
def dense_up_kernel(
    x_ptr,
    w13_ptr,
    shared_w13_ptr,
    ids_ptr,
    weights_ptr,
    map_ptr,
    offsets_ptr,
    used_ptr,
    counts_ptr,
    h_ptr,
    shared_h_ptr,
    seq_len,
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
    PDL: tl.constexpr,
):
    """h [n_blocks, slots, BLOCK_N, I] of every used expert. The shared expert's is the first slot where it is as wide as
    the others, else shared_h [n_blocks, BLOCK_N, SHARED_I]. Programs [p, n_blocks] take the block's tiles in turn: the
    shared expert's first, which need no schedule."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(1)
    start, length = block_range(block, offsets_ptr, seq_len, BLOCK_SIZE, HAS_OFFSETS)
    n = tl.arange(0, BLOCK_N)
    there = n < length
    x_cols = x_ptr + (start + n).to(tl.int64)[None, :] * H
    row = tl.arange(0, BLOCK_I)
    step = tl.num_programs(0)
    tile = tl.program_id(0)
    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    SHARED_TILES: tl.constexpr = (SHARED_I + BLOCK_I - 1) // BLOCK_I
    FIRST: tl.constexpr = 1 if SHARED_I == I else 0
    slots = block.to(tl.int64) * (WIDTH + FIRST) + FIRST

    if SHARED_I > 0:
        if FIRST == 1:
            shared_h = h_ptr + (slots - 1) * (BLOCK_N * I)
        else:
            shared_h = shared_h_ptr + block.to(tl.int64) * (BLOCK_N * SHARED_I)
        while tile < SHARED_TILES:
            out = up_product(
                x_cols, there, shared_w13_ptr, tile * BLOCK_I, H, SHARED_I, BLOCK_N, BLOCK_I, BLOCK_H, STAGES
            )
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
        w13 = w13_ptr + local_expert(expert, map_ptr, HAS_MAP) * (2 * I * H)
        out = up_product(x_cols, there, w13, first_row, H, I, BLOCK_N, BLOCK_I, BLOCK_H, STAGES)
        out = weighted(out, expert, ids, weights)
        i = first_row + row
        at = ((slots + member) * BLOCK_N + n)[None, :] * I + i[:, None]
        tl.store(h_ptr + at, rounded(out, h_ptr.dtype.element_ty), mask=(i < I)[:, None])
        tile += step
        expert = tl.load(used + tl.minimum(tile // TILES, WIDTH - 1))


@triton.jit(do_not_specialize=["seq_len"])
def dense_down_kernel(
    h_ptr,
    shared_h_ptr,
    w2_ptr,
    shared_w2_ptr,
    map_ptr,
    offsets_ptr,
    used_ptr,
    counts_ptr,
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
    PDL: tl.constexpr,
):
    """y of one block, BLOCK_H of its columns: the used experts are one long K. Programs [H / BLOCK_H, n_blocks]."""
    block = tl.program_id(1)
    start, length = block_range(block, offsets_ptr, seq_len, BLOCK_SIZE, HAS_OFFSETS)
    n = tl.arange(0, BLOCK_N)
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_mask = (row < H)[:, None]
    k = tl.arange(0, BLOCK_I)
    acc = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    FIRST: tl.constexpr = 1 if SHARED_I == I else 0
    n_steps = (tl.load(counts_ptr + block) + FIRST) * TILES

    if SHARED_I > 0 and FIRST == 0:
        shared_rows = shared_w2_ptr + row.to(tl.int64)[:, None] * SHARED_I
        shared_cols = shared_h_ptr + (block.to(tl.int64) * BLOCK_N + n)[None, :] * SHARED_I
        for i0 in tl.range(0, SHARED_I, BLOCK_I, num_stages=STAGES):
            i = i0 + k
            w = tl.load(shared_rows + i[None, :], mask=row_mask & (i < SHARED_I)[None, :], other=0.0)
            h = tl.load(shared_cols + i[:, None], mask=(i < SHARED_I)[:, None], other=0.0)
            acc = multiply(w, h, acc)

    used = used_ptr + block.to(tl.int64) * WIDTH
    rows = row.to(tl.int64)[:, None] * I
    h_cols = h_ptr + (block.to(tl.int64) * ((WIDTH + FIRST) * BLOCK_N) + n)[None, :] * I
    # The expert's id is loaded in the loop, one more level of its pipeline: 2 * STAGES - 1 keeps STAGES buffers.
    for step in tl.range(0, n_steps, num_stages=2 * STAGES - 1):
        member = step // TILES
        i = step % TILES * BLOCK_I + k
        expert = tl.load(used + tl.maximum(member - FIRST, 0))
        if HAS_MAP:
            expert = tl.load(map_ptr + expert, mask=member >= FIRST, other=0)
        w2 = w2_ptr + expert.to(tl.int64) * (H * I)
        if FIRST == 1:
            w2 = tl.where(member == 0, shared_w2_ptr, w2)
        w = tl.load(w2 + rows + i[None, :], mask=row_mask & (i < I)[None, :], other=0.0)
        h = tl.load(h_cols + member.to(tl.int64) * (BLOCK_N * I) + i[:, None], mask=(i < I)[:, None], other=0.0)
        acc = multiply(w, h, acc)

    at = (start + n).to(tl.int64)[None, :] * H + row[:, None]
    tl.store(y_ptr + at, rounded(acc, y_ptr.dtype.element_ty), mask=row_mask & (n < length)[None, :])


@triton.jit(do_not_specialize=["n_tokens", "n_arrived"])
def gathered_up_kernel(
    x_ptr,
    w13_ptr,
    shared_w13_ptr,
    ids_ptr,
    weights_ptr,
    map_ptr,
    token_at_ptr,
    position_ptr,
    tiles_ptr,
    n_tiles_ptr,
    arrived_ptr,
    h_ptr,
    shared_h_ptr,
    y_ptr,
    n_tokens,
    n_arrived,
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
    PDL: tl.constexpr,
):
    """h of every position [T * K, I], and shared_h [T, SHARED_I] by the first programs, which need no schedule. Also clears
    the counters of the down kernel, and the rows of y that nothing reaches."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_I)
    program = tl.program_id(0)
    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    SHARED_TILES: tl.constexpr = (SHARED_I + BLOCK_I - 1) // BLOCK_I
    n_shared = tl.cdiv(n_tokens, BLOCK_N) * SHARED_TILES

    for first in range(program * 1024, n_arrived, tl.num_programs(0) * 1024):
        counter = first + tl.arange(0, 1024)
        tl.store(arrived_ptr + counter, tl.zeros([1024], tl.int32), mask=counter < n_arrived)

    if SHARED_I > 0:  # noqa: SIM102 - decided at compile time
        if program < n_shared:
            token = program // SHARED_TILES * BLOCK_N + n
            there = token < n_tokens
            first_row = program % SHARED_TILES * BLOCK_I
            x_cols = x_ptr + token.to(tl.int64)[None, :] * H
            out = up_product(x_cols, there, shared_w13_ptr, first_row, H, SHARED_I, BLOCK_N, BLOCK_I, BLOCK_H, STAGES)
            i = first_row + row
            at = token.to(tl.int64)[None, :] * SHARED_I + i[:, None]
            tl.store(
                shared_h_ptr + at, rounded(out, h_ptr.dtype.element_ty), mask=there[None, :] & (i < SHARED_I)[:, None]
            )

    if PDL:
        tl.extra.cuda.gdc_wait()
    if SHARED_I == 0:
        slot = tl.arange(0, KP)
        column = tl.arange(0, 1024)
        row_of_y = program
        while row_of_y < n_tokens:
            position = tl.load(position_ptr + row_of_y.to(tl.int64) * K + slot, mask=slot < K, other=-1)
            if tl.max(position, 0) < 0:
                for h0 in range(0, H, 1024):
                    at = row_of_y.to(tl.int64) * H + h0 + column
                    tl.store(y_ptr + at, tl.zeros([1024], y_ptr.dtype.element_ty), mask=h0 + column < H)
            row_of_y += tl.num_programs(0)

    program -= n_shared
    if (program >= 0) & (program < tl.load(n_tiles_ptr) * TILES):
        expert, position, there, token = load_tile(program // TILES, tiles_ptr, token_at_ptr, BLOCK_N)
        ids, weights = load_slots(token, there, ids_ptr, weights_ptr, K, KP)
        first_row = program % TILES * BLOCK_I
        x_cols = x_ptr + token.to(tl.int64)[None, :] * H
        w13 = w13_ptr + local_expert(expert, map_ptr, HAS_MAP) * (2 * I * H)
        out = up_product(x_cols, there, w13, first_row, H, I, BLOCK_N, BLOCK_I, BLOCK_H, STAGES)
        out = weighted(out, expert, ids, weights)
        i = first_row + row
        at = position.to(tl.int64)[None, :] * I + i[:, None]
        tl.store(h_ptr + at, rounded(out, h_ptr.dtype.element_ty), mask=there[None, :] & (i < I)[:, None])


@triton.jit
def down_rows(
    w2_ptr,
    h_ptr,
    position,
    there,
    hidden,
    token,
    arrived_ptr,
    position_ptr,
    rows_ptr,
    shared_rows_ptr,
    out_ptr,
    y_ptr,
    hidden_tile,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):
    """One tile of W2 @ h into the rows `position` of out_ptr [., H]; then y of the tokens whose last row this was."""
    hidden_mask = (hidden < H)[:, None]
    w_rows = w2_ptr + hidden.to(tl.int64)[:, None] * I
    h_cols = h_ptr + position.to(tl.int64)[None, :] * I
    k = tl.arange(0, BLOCK_I)
    acc = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    for i0 in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        i = i0 + k
        if H % BLOCK_H == 0 and I % BLOCK_I == 0:
            w = tl.load(w_rows + i[None, :])
        else:
            w = tl.load(w_rows + i[None, :], mask=hidden_mask & (i < I)[None, :], other=0.0)
        h = tl.load(h_cols + i[:, None], mask=there[None, :] & (i < I)[:, None], other=0.0)
        acc = multiply(w, h, acc)
    mask = hidden_mask & there[None, :]
    at = position.to(tl.int64)[None, :] * H + hidden[:, None]
    tl.store(out_ptr + at, rounded(acc, out_ptr.dtype.element_ty), mask=mask)

    expected = tl.zeros([BLOCK_N], tl.int32) + (1 if HAS_SHARED else 0)
    for j in range(K):
        slot = tl.load(position_ptr + token.to(tl.int64) * K + j, mask=there, other=-1)
        expected += (slot >= 0).to(tl.int32)
    tl.debug_barrier()  # every thread's part of the rows is written before they count as arrived
    counter = arrived_ptr + token.to(tl.int64) * tl.cdiv(H, BLOCK_H) + hidden_tile
    last = there & (tl.atomic_add(counter, 1, mask=there, sem="acq_rel", scope="gpu") == expected - 1)
    tl.debug_barrier()
    if tl.max(last.to(tl.int32), 0) > 0:
        total = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        for j in range(K):
            slot = tl.load(position_ptr + token.to(tl.int64) * K + j, mask=last, other=-1)
            part = rows_ptr + slot.to(tl.int64)[None, :] * H + hidden[:, None]
            # .cg: other programs wrote these rows, a copy in this processor's L1 could be older.
            total += tl.load(part, mask=hidden_mask & (slot >= 0)[None, :], other=0.0, cache_modifier=".cg").to(
                tl.float32
            )
        at = token.to(tl.int64)[None, :] * H + hidden[:, None]
        if HAS_SHARED:
            total += tl.load(
                shared_rows_ptr + at, mask=hidden_mask & last[None, :], other=0.0, cache_modifier=".cg"
            ).to(tl.float32)
        tl.store(y_ptr + at, rounded(total, y_ptr.dtype.element_ty), mask=hidden_mask & last[None, :])


@triton.jit(do_not_specialize=["n_tokens"])
def gathered_down_kernel(
    h_ptr,
    shared_h_ptr,
    w2_ptr,
    shared_w2_ptr,
    map_ptr,
    token_at_ptr,
    position_ptr,
    tiles_ptr,
    n_tiles_ptr,
    arrived_ptr,
    rows_ptr,
    shared_rows_ptr,
    y_ptr,
    n_tokens,
    H: tl.constexpr,
    I: tl.constexpr,
    SHARED_I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_MAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows [T * K, H], one per position, and shared_rows [T, H]; then y [T, H]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    n = tl.arange(0, BLOCK_N)
    program = tl.program_id(0)
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    n_shared = tl.cdiv(n_tokens, BLOCK_N) * TILES if SHARED_I > 0 else 0
    hidden_tile = program % TILES
    hidden = hidden_tile * BLOCK_H + tl.arange(0, BLOCK_H)

    if SHARED_I > 0:  # noqa: SIM102 - decided at compile time
        if program < n_shared:
            token = program // TILES * BLOCK_N + n
            down_rows(
                shared_w2_ptr, shared_h_ptr, token, token < n_tokens, hidden, token, arrived_ptr, position_ptr,
                rows_ptr, shared_rows_ptr, shared_rows_ptr, y_ptr, hidden_tile,
                H, SHARED_I, K, BLOCK_N, BLOCK_H, BLOCK_I, STAGES, True,
            )  # fmt: skip
    program -= n_shared
    if (program >= 0) & (program < tl.load(n_tiles_ptr) * TILES):
        expert, position, there, token = load_tile(program // TILES, tiles_ptr, token_at_ptr, BLOCK_N)
        expert = local_expert(expert, map_ptr, HAS_MAP)
        down_rows(
            w2_ptr + expert * (H * I), h_ptr, position, there, hidden, token, arrived_ptr, position_ptr,
            rows_ptr, shared_rows_ptr, rows_ptr, y_ptr, hidden_tile,
            H, I, K, BLOCK_N, BLOCK_H, BLOCK_I, STAGES, SHARED_I > 0,
        )  # fmt: skip


def dense(
    x, weights, topk_ids, topk_weights, block_offsets, seq_len, block_size, schedule, h, y, tiles, expert_map, pdl
):
    """y of blocks with a `schedule.Dense`. h: what `dense_h` allocates; tiles: `tiles.Tiles` of the device; pdl: see
    `router.route`."""
    w13, w2, shared_w13, shared_w2 = weights
    n_blocks, width = schedule.used.shape
    routed_h, shared_h = h
    hidden, intermediate = w2.shape[1:]
    tokens = routed_h.shape[2]
    up, down = tiles.fit("dense_up", tokens, x.dtype), tiles.fit("dense_down", tokens, x.dtype)
    common = dict(
        H=hidden,
        I=intermediate,
        SHARED_I=shared_intermediate(shared_w2),
        BLOCK_SIZE=block_size,
        WIDTH=width,
        BLOCK_N=tokens,
        HAS_OFFSETS=block_offsets is not None,
        HAS_MAP=expert_map is not None,
        PDL=pdl,
        **(dict(launch_pdl=True) if pdl else {}),
    )
    most = triton.cdiv(intermediate, up.rows) * width + triton.cdiv(common["SHARED_I"], up.rows)
    programs = min(most, max(1, triton.cdiv(tiles.processors * up.per_processor, n_blocks)))
    dense_up_kernel[(programs, n_blocks)](
        x,
        w13,
        shared_w13,
        topk_ids,
        topk_weights,
        expert_map,
        block_offsets,
        schedule.used,
        schedule.counts,
        routed_h,
        shared_h,
        seq_len,
        K=topk_ids.shape[1],
        KP=triton.next_power_of_2(topk_ids.shape[1]),
        BLOCK_I=up.rows,
        BLOCK_H=up.depth,
        STAGES=up.stages,
        num_warps=up.warps,
        **common,
    )
    dense_down_kernel[(triton.cdiv(hidden, down.rows), n_blocks)](
        routed_h,
        shared_h,
        w2,
        shared_w2,
        expert_map,
        block_offsets,
        schedule.used,
        schedule.counts,
        y,
        seq_len,
        BLOCK_H=down.rows,
        BLOCK_I=down.depth,
        STAGES=down.stages,
        num_warps=down.warps,
        **common,
    )


def gathered(x, weights, topk_ids, topk_weights, schedule, h, rows, y, tiles, expert_map, pdl):
    """y of tokens with a `schedule.Gathered`. h, rows: what `gathered_buffers` allocates; the rest: see `dense`."""
    w13, w2, shared_w13, shared_w2 = weights
    hidden, intermediate = w2.shape[1:]
    n_tokens, top_k = topk_ids.shape
    up, down = (tiles.fit(name, schedule.tile, x.dtype) for name in ("gathered_up", "gathered_down"))
    shared = shared_intermediate(shared_w2)
    common = dict(
        H=hidden,
        I=intermediate,
        SHARED_I=shared,
        K=top_k,
        BLOCK_N=schedule.tile,
        HAS_MAP=expert_map is not None,
        PDL=pdl,
        **(dict(launch_pdl=True) if pdl else {}),
    )
    most, token_tiles = schedule.tiles.shape[0], triton.cdiv(n_tokens, schedule.tile)
    programs = most * triton.cdiv(intermediate, up.rows) + token_tiles * triton.cdiv(shared, up.rows)
    gathered_up_kernel[(programs,)](
        x,
        w13,
        shared_w13,
        topk_ids,
        topk_weights,
        expert_map,
        schedule.token_at,
        schedule.position_of,
        schedule.tiles,
        schedule.n_tiles,
        schedule.arrived,
        *h,
        y,
        n_tokens,
        schedule.arrived.numel(),
        KP=triton.next_power_of_2(top_k),
        BLOCK_I=up.rows,
        BLOCK_H=up.depth,
        STAGES=up.stages,
        num_warps=up.warps,
        **common,
    )
    programs = (most + (token_tiles if shared else 0)) * triton.cdiv(hidden, down.rows)
    gathered_down_kernel[(programs,)](
        *h,
        w2,
        shared_w2,
        expert_map,
        schedule.token_at,
        schedule.position_of,
        schedule.tiles,
        schedule.n_tiles,
        schedule.arrived,
        *rows,
        y,
        n_tokens,
        BLOCK_H=down.rows,
        BLOCK_I=down.depth,
        STAGES=down.stages,
        num_warps=down.warps,
        **common,
    )


def shared_intermediate(shared_w2) -> int:
    return 0 if shared_w2 is None else shared_w2.shape[1]


def dense_h(x, w2, shared_w2, schedule, block_size: int) -> tuple:
    """(h, shared_h or None) of `dense`."""
    n_blocks, width = schedule.used.shape
    tokens, intermediate = max(16, triton.next_power_of_2(block_size)), w2.shape[2]
    shared = shared_intermediate(shared_w2)
    if shared == intermediate:
        return x.new_empty(n_blocks, width + 1, tokens, intermediate), None
    shared_h = x.new_empty(n_blocks, tokens, shared) if shared else None
    return x.new_empty(n_blocks, width, tokens, intermediate), shared_h


def gathered_buffers(x, w2, shared_w2, top_k: int) -> tuple:
    """((h, shared_h or None), (rows, shared_rows or None)) of `gathered`."""
    n_tokens, hidden = x.shape
    h, rows = x.new_empty(n_tokens * top_k, w2.shape[2]), x.new_empty(n_tokens * top_k, hidden)
    if shared_w2 is None:
        return (h, None), (rows, None)
    return (h, x.new_empty(n_tokens, shared_w2.shape[1])), (rows, torch.empty_like(x))
