"""Gradient of the experts, over the positions of a gathered `schedule`: four launches, no atomics, one order of additions.

`hidden_gradient_kernel` computes gate and up once more, so that the forward keeps nothing but its inputs, and the gradient
of the hidden values beside them; `token_gradient_kernel` takes that back to one row of d_x per position;
`combine_gradient_kernel` adds up the rows of a token, and the parts of the routing weights' gradient;
`weight_gradient_kernel` sums the outer products of an expert's positions, once for w13 and once for w2.

What is written between two of them has the dtype of x; every sum is float32. Quantised weights are widened tile by tile, and
rounded to the dtype of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .experts import GELU_CUBIC, GELU_LINEAR, exponent, load_slots
from .products import multiply, rounded
from .schedule import load_tile, popcount
from .weights import dequantised, of_expert

# Hidden values per program of `hidden_gradient_kernel`, each of which leaves a part of the weights' gradient. Not measured.
HIDDEN_TILE = 32


@triton.jit
def hidden_gradient_kernel(
    d_y_ptr,
    x_ptr,
    w13_ptr,
    w13_scale_ptr,
    w2_ptr,
    w2_scale_ptr,
    ids_ptr,
    weights_ptr,
    token_at_ptr,
    tiles_ptr,
    n_tiles_ptr,
    hidden_ptr,
    d_gate_up_ptr,
    d_weight_ptr,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Per position: hidden [., I], activation(gate) * up times the routing weight, for the gradient of w2;
    d_gate_up [., 2I]; and d_weight [., I tiles], the parts of the routing weight's gradient. Programs [tiles * I tiles]."""
    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    program = tl.program_id(0)
    if program < tl.load(n_tiles_ptr) * TILES:
        expert, position, there, token = load_tile(program // TILES, tiles_ptr, token_at_ptr, BLOCK_N)
        ids, weights = load_slots(token, there, ids_ptr, weights_ptr, K, KP)
        i_tile = program % TILES
        i = i_tile * BLOCK_I + tl.arange(0, BLOCK_I)
        x_columns = token.to(tl.int64)[None, :] * H
        w13, w13_scale = of_expert(w13_ptr, w13_scale_ptr, expert.to(tl.int64), 2, I, H, FORMAT)
        w2, w2_scale = of_expert(w2_ptr, w2_scale_ptr, expert.to(tl.int64), 1, H, I, FORMAT)
        k = tl.arange(0, BLOCK_H)
        gate = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
        d_hidden = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
        for h0 in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            h = h0 + k
            w_mask = (i < I)[:, None] & (h < H)[None, :]
            x_mask = there[None, :] & (h < H)[:, None]
            x = tl.load(x_ptr + x_columns + h[:, None], mask=x_mask, other=0.0)
            d_y = tl.load(d_y_ptr + x_columns + h[:, None], mask=x_mask, other=0.0)
            rows, columns = i[:, None], h[None, :]
            w = dequantised(w13, w13_scale, 0, rows, columns, w_mask, I, H, FORMAT, x.dtype)
            gate = multiply(w, x, gate)
            w = dequantised(w13, w13_scale, 1, rows, columns, w_mask, I, H, FORMAT, x.dtype)
            up = multiply(w, x, up)
            w = dequantised(w2, w2_scale, 0, columns, rows, w_mask, H, I, FORMAT, x.dtype)  # transposed
            d_hidden = multiply(w, d_y, d_hidden)

        sigmoid = 1.0 / (1.0 + tl.exp(-exponent(gate, ACTIVATION)))
        activated = gate * sigmoid
        weight = tl.sum(tl.where(ids == expert, weights, 0.0), 1)[None, :]
        hidden = activated * up
        d_weight = tl.sum(d_hidden * hidden, 0)
        tl.store(d_weight_ptr + position.to(tl.int64) * TILES + i_tile, d_weight, mask=there)
        d_hidden *= weight
        mask = there[None, :] & (i < I)[:, None]
        dtype = hidden_ptr.dtype.element_ty
        at = position.to(tl.int64)[None, :] * I + i[:, None]
        tl.store(hidden_ptr + at, rounded(hidden * weight, dtype), mask=mask)
        at = position.to(tl.int64)[None, :] * (2 * I) + i[:, None]
        if ACTIVATION == "gelu_tanh":  # in this order: gate^3 may overflow where sigmoid is 0 or 1
            slope = GELU_LINEAR + 3.0 * GELU_CUBIC * gate * gate
            d_gate = d_hidden * up * (sigmoid + activated * (1.0 - sigmoid) * slope)
        else:
            d_gate = d_hidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(d_gate_up_ptr + at, rounded(d_gate, dtype), mask=mask)
        tl.store(d_gate_up_ptr + at + I, rounded(d_hidden * activated, dtype), mask=mask)


@triton.jit
def token_gradient_kernel(
    d_gate_up_ptr,
    w13_ptr,
    w13_scale_ptr,
    token_at_ptr,
    tiles_ptr,
    n_tiles_ptr,
    rows_ptr,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """rows [., H]: what each position adds to d_x. Programs [tiles * H tiles]."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    if program < tl.load(n_tiles_ptr) * TILES:
        expert, position, there, _ = load_tile(program // TILES, tiles_ptr, token_at_ptr, BLOCK_N)
        h = program % TILES * BLOCK_H + tl.arange(0, BLOCK_H)
        w13, w13_scale = of_expert(w13_ptr, w13_scale_ptr, expert.to(tl.int64), 2, I, H, FORMAT)
        d_columns = d_gate_up_ptr + position.to(tl.int64)[None, :] * (2 * I)
        k = tl.arange(0, BLOCK_I)
        acc = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        for i0 in tl.range(0, 2 * I, BLOCK_I, num_stages=STAGES):
            i = i0 + k
            w_mask = (h < H)[:, None] & (i < 2 * I)[None, :]
            d = tl.load(d_columns + i[:, None], mask=there[None, :] & (i < 2 * I)[:, None], other=0.0)
            half = i // I
            w = dequantised(
                w13, w13_scale, half[None, :], (i - half * I)[None, :], h[:, None], w_mask, I, H, FORMAT, d.dtype
            )
            acc = multiply(w, d, acc)
        at = position.to(tl.int64)[None, :] * H + h[:, None]
        tl.store(rows_ptr + at, rounded(acc, rows_ptr.dtype.element_ty), mask=there[None, :] & (h < H)[:, None])


@triton.jit
def combine_gradient_kernel(
    rows_ptr,
    d_weight_ptr,
    ids_ptr,
    position_ptr,
    d_x_ptr,
    d_topk_weights_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    WEIGHT_TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """d_x and d_topk_weights of one token per program, in the order of its slots."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, KP)
    ids = tl.load(ids_ptr + token * K + slot, mask=slot < K, other=-1)
    # A token that names an expert twice has one position for both, that of the first slot.
    position = tl.full([KP], -1, tl.int32)
    for j in tl.static_range(0, K):
        same = ids == tl.load(ids_ptr + token * K + j)
        position = tl.where(same, tl.maximum(position, tl.load(position_ptr + token * K + j)), position)
    d_weight = tl.zeros([KP], tl.float32)
    for i in range(0, WEIGHT_TILES):
        at = position.to(tl.int64) * WEIGHT_TILES + i
        d_weight += tl.load(d_weight_ptr + at, mask=position >= 0, other=0.0)
    tl.store(d_topk_weights_ptr + token * K + slot, d_weight, mask=slot < K)

    column = tl.arange(0, BLOCK_H)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + column
        total = tl.zeros([BLOCK_H], tl.float32)
        for j in tl.static_range(0, K):
            row = tl.load(position_ptr + token * K + j)
            part = rows_ptr + row.to(tl.int64) * H + h
            # One comparison: the interpreter of Triton 3.9 makes an integer of `scalar & vector`, which is no mask.
            total += tl.load(part, mask=h < tl.where(row >= 0, H, 0), other=0.0).to(tl.float32)
        tl.store(d_x_ptr + token * H + h, rounded(total, d_x_ptr.dtype.element_ty), mask=h < H)


@triton.jit(do_not_specialize=["n_words"])
def weight_gradient_kernel(
    left_ptr,
    right_ptr,
    token_at_ptr,
    words_ptr,
    base_ptr,
    out_ptr,
    n_words,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [E, M, N]: the sum over an expert's positions of left [., M] times right [., N], of which one has a row per token
    and the other one a row per position. Zero for an expert without positions. Programs [M tiles * N tiles, E]."""
    expert = tl.program_id(1)
    begin = tl.load(base_ptr + expert)  # positions before the first word's
    last = (n_words - 1).to(tl.int64) * E + expert
    end = tl.load(base_ptr + last) + popcount(tl.load(words_ptr + last).to(tl.uint32, bitcast=True))
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        position = first + k
        there = position < end
        token = tl.load(token_at_ptr + position, mask=there, other=0)
        left_row = token if LEFT_BY_TOKEN else position
        right_row = position if LEFT_BY_TOKEN else token
        left_mask = (m < M)[:, None] & there[None, :]
        left = tl.load(left_ptr + left_row.to(tl.int64)[None, :] * M + m[:, None], mask=left_mask, other=0.0)
        right_mask = there[:, None] & (n < N)[None, :]
        right = tl.load(right_ptr + right_row.to(tl.int64)[:, None] * N + n[None, :], mask=right_mask, other=0.0)
        acc = multiply(left, right, acc)
    at = expert.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + at, rounded(acc, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def most_positions(dtype: torch.dtype) -> int:
    """Positions per tile at most: three accumulators have to fit into the registers."""
    return 64 if dtype.itemsize <= 2 else 32


def gradient_buffers(x, intermediate: int, slots: int) -> tuple[torch.Tensor, ...]:
    """Scratch of `experts_gradient`: hidden values, gradients of gate and up, of the tokens, and of the weights in parts."""
    hidden = x.shape[1]
    rows = (x.new_empty(slots, n) for n in (intermediate, 2 * intermediate, hidden))
    return *rows, x.new_empty((slots, triton.cdiv(intermediate, HIDDEN_TILE)), dtype=torch.float32)


def experts_gradient(d_y, x, weights, topk_ids, topk_weights, schedule, buffers, out) -> None:
    """Fills out = (d_x, d_w13, d_w2, d_topk_weights); d_w13 and d_w2 may both be None.

    weights: `weights.Stored`, without a shared expert; schedule: a `schedule.Gathered` of topk_ids, in tiles of at most
    `most_positions`; buffers: `gradient_buffers`.
    """
    d_x, d_w13, d_w2, d_topk_weights = out
    n_tokens, top_k = topk_ids.shape
    hidden, intermediate, form = x.shape[1], weights.intermediate, weights.formats["FORMAT"]
    tile = schedule.tile
    # Tiles not measured; chosen from the resource report (python tools/triton_resources.py --ops). float32 is there for
    # checks, and runs without matrix units: shallow tiles.
    depth, side, warps = (64, 128, 8) if x.dtype.itemsize <= 2 else (32, 64, 4)
    kept, d_gate_up, rows, d_weight = buffers
    i_tiles = d_weight.shape[1]
    most = schedule.tiles.shape[0]
    slot_columns = triton.next_power_of_2(top_k)
    hidden_gradient_kernel[(most * i_tiles,)](
        d_y,
        x,
        *weights.up[:2],
        *weights.down[:2],
        topk_ids,
        topk_weights,
        schedule.token_at,
        schedule.tiles,
        schedule.n_tiles,
        kept,
        d_gate_up,
        d_weight,
        H=hidden,
        I=intermediate,
        K=top_k,
        KP=slot_columns,
        BLOCK_N=tile,
        BLOCK_I=HIDDEN_TILE,
        BLOCK_H=depth,
        STAGES=2,
        FORMAT=form,
        ACTIVATION=weights.activation,
        num_warps=4,
    )
    token_gradient_kernel[(most * triton.cdiv(hidden, 64),)](
        d_gate_up,
        *weights.up[:2],
        schedule.token_at,
        schedule.tiles,
        schedule.n_tiles,
        rows,
        H=hidden,
        I=intermediate,
        BLOCK_N=tile,
        BLOCK_H=64,
        BLOCK_I=depth,
        STAGES=3,
        FORMAT=form,
        num_warps=4,
    )
    combine_gradient_kernel[(n_tokens,)](
        rows,
        d_weight,
        topk_ids,
        schedule.position_of,
        d_x,
        d_topk_weights,
        H=hidden,
        K=top_k,
        KP=slot_columns,
        WEIGHT_TILES=i_tiles,
        BLOCK_H=1024,
        num_warps=4,
    )
    if d_w13 is None:
        return
    for left, right, by_token, grad in ((d_gate_up, x, False, d_w13), (d_y, kept, True, d_w2)):
        n_experts, m, n = grad.shape
        weight_gradient_kernel[(triton.cdiv(m, side) * triton.cdiv(n, side), n_experts)](
            left,
            right,
            schedule.token_at,
            schedule.words,
            schedule.base,
            grad,
            schedule.words.shape[0],
            E=n_experts,
            M=m,
            N=n,
            LEFT_BY_TOKEN=by_token,
            BLOCK_M=side,
            BLOCK_N=side,
            BLOCK_K=32,
            STAGES=3,
            num_warps=warps,
        )
