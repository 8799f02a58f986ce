"""The gathered form of the experts, for many tokens: three launches.

Grouped products over the positions of `schedule`. `gathered_down_kernel` writes one row per
position, `combine_kernel` adds a token's rows up in the order of its slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .experts import load_slots, local_expert, up_product, weighted
from .launch import early
from .products import rounded
from .schedule import load_positions, load_tile
from .weights import of_expert, product

COMBINE_COLUMNS = 1024  # of a program: 16 bytes at a time by each thread of 4 warps


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
    ACTIVATION: tl.constexpr,
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
                H, SHARED_I, BLOCK_I, BLOCK_H, STAGES, SHARED_FORMAT, ACTIVATION,
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
                x_cols, there, w13_ptr, w13_scale_ptr, local, first_row,
                H, I, BLOCK_I, BLOCK_H, STAGES, FORMAT, ACTIVATION,
            )  # fmt: skip
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


def experts(x, weights, topk_ids, topk_weights, schedule, h, rows, y, tiles, pdl, wave=None):
    """y of tokens with a `schedule.Gathered`. h, rows: what `buffers` allocates; the rest: see `dense.experts`. wave: None,
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
        ACTIVATION=weights.activation,
        num_warps=up.warps,
        **common,
        **early(pdl),
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
        **early(pdl),
    )
    if end < n_experts:
        return
    columns = min(COMBINE_COLUMNS, triton.next_power_of_2(hidden))
    combine_kernel[(n_tokens, triton.cdiv(hidden, columns))](
        *rows, schedule.position_of, y, H=hidden, K=top_k, BLOCK_H=columns, num_warps=4, **early(pdl)
    )


def buffers(x, weights, top_k: int) -> tuple:
    """((h, shared_h or None), (rows, shared_rows or None)) of `gathered`."""
    n_tokens, hidden = x.shape
    h, rows = x.new_empty(n_tokens * top_k, weights.intermediate), x.new_empty(n_tokens * top_k, hidden)
    if not weights.shared_intermediate:
        return (h, None), (rows, None)
    return (h, x.new_empty(n_tokens, weights.shared_intermediate)), (rows, torch.empty_like(x))
