"""What a decoder layer does beside its products: the forms of `dmoe_ops/reference.py`, rounding where they round."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import early

GREEDY_CHUNK = 4096  # logits at a time; others were not measured
GREEDY_PROGRAMS = 512  # for all rows, about: one per row took 49 us for 32 rows on an H200 (gpu-check step, af935c0)


@triton.jit
def follow(PDL: tl.constexpr):
    """Lets the next kernel be launched, and waits for what the one before has written."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def normalised(x, weight, total, eps, N: tl.constexpr):
    """round(weight * round(x / rms)), x and weight fp32 [n] of the dtype of `total`, whose fp32 squares make the rms."""
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)
    return (weight.to(tl.float32) * (x.to(tl.float32) * scale).to(total.dtype).to(tl.float32)).to(total.dtype)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    eps,
    normed_ptr,
    total_ptr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per row."""
    follow(PDL)
    column = tl.arange(0, WIDTH)
    inside = column < N
    at = tl.program_id(0).to(tl.int64) * N + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    total = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(total_ptr + at, total, mask=inside)
    tl.store(normed_ptr + at, normalised(total, weight, total, eps, N), mask=inside)


@triton.jit
def qk_norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    past_ptr,
    keys_ptr,
    values_ptr,
    query_ptr,
    tokens,
    capacity,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per token and head."""
    follow(PDL)
    i, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, token = i // tokens, i % tokens
    row = tl.load(rows_ptr + sequence) if HAS_ROWS else sequence
    k = tl.arange(0, WIDTH)
    inside = k < D
    from_ptr = qkv_ptr + (i * (HEADS + 2 * KV_HEADS) + head) * D
    x = tl.load(from_ptr + k, mask=inside, other=0.0)
    kv_head = tl.where(head < HEADS + KV_HEADS, head - HEADS, head - HEADS - KV_HEADS)
    position = tl.load(past_ptr) + token
    place = ((row * KV_HEADS + kv_head) * capacity + position) * D + k
    if head >= HEADS + KV_HEADS:
        tl.store(values_ptr + place, x, mask=inside)
    else:
        turned = k < ROTARY
        other = tl.where(k < ROTARY // 2, k + ROTARY // 2, k - ROTARY // 2)
        y, across = x, tl.load(from_ptr + other, mask=turned, other=0.0)
        if NORM:
            weight_ptr = q_weight_ptr if head < HEADS else k_weight_ptr
            across = normalised(across, tl.load(weight_ptr + other, mask=turned, other=0.0), x, eps, D)
            y = normalised(x, tl.load(weight_ptr + k, mask=inside, other=0.0), x, eps, D)
        cos = tl.load(cos_ptr + position * ROTARY + k, mask=turned, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * ROTARY + k, mask=turned, other=0.0).to(tl.float32)
        across = tl.where(k < ROTARY // 2, -across.to(tl.float32), across.to(tl.float32))
        straight = (y.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
        out = (straight + (across * sin).to(x.dtype).to(tl.float32)).to(x.dtype)
        out = tl.where(turned, out, y)
        if head < HEADS:
            tl.store(query_ptr + ((sequence * HEADS + head) * tokens + token) * D + k, out, mask=inside)
        else:
            tl.store(keys_ptr + place, out, mask=inside)


@triton.jit
def merged(most, total, token, other_most, other_total, other_token):
    """Of two sets of logits: the largest, the sum of exp of what each is below it, and its place (the first)."""
    token = tl.where(other_most > most, other_token, token)
    higher = tl.maximum(most, other_most)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(most - base) + other_total * tl.exp(other_most - base), token


@triton.jit
def greedy_kernel(logits_ptr, mass_ptr, place_ptr, vocab, share, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """A program per row and `share` of its logits, which leaves `merged` of them: mass float32 [rows, shares, 2], place
    int32 [rows, shares]."""
    follow(PDL)
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocab
    column = tl.arange(0, CHUNK)
    low = float("-inf")
    most, total, token = low, 0.0, 0
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, vocab)
    for first in range(begin, end, CHUNK):
        at = first + column
        x = tl.load(logits_ptr + at, mask=at < end, other=low).to(tl.float32)
        chunk = tl.max(tl.where(x == x, x, low), 0)
        place = tl.min(tl.where(x == chunk, at, vocab), 0)
        base = tl.where(chunk == low, 0.0, chunk)
        most, total, token = merged(most, total, token, chunk, tl.sum(tl.exp(x - base), 0), place)
    to = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(mass_ptr + 2 * to, most)
    tl.store(mass_ptr + 2 * to + 1, total)
    tl.store(place_ptr + to, token)


@triton.jit
def greedy_merge_kernel(
    mass_ptr, place_ptr, token_ptr, probability_ptr, SHARES: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    """A program per row."""
    follow(PDL)
    row, share = tl.program_id(0), tl.arange(0, WIDTH)
    inside = share < SHARES
    at = row * SHARES + share
    most = tl.load(mass_ptr + 2 * at, mask=inside, other=float("-inf"))
    total = tl.load(mass_ptr + 2 * at + 1, mask=inside, other=0.0)
    token = tl.load(place_ptr + at, mask=inside, other=0)
    highest = tl.max(most, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp(most - base), 0)
    token = tl.min(tl.where(inside & (most == highest), token, 2147483647), 0)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(probability_ptr + row, tl.where(highest == float("-inf"), float("nan"), 1.0 / total))


def add_rms_norm(x, delta, weight, eps: float, normed, total, pdl: bool) -> None:
    rows, size = x.shape
    width = triton.next_power_of_2(size)
    warps = max(1, min(8, width // 256))
    args = (x, delta, weight, eps, normed, total)
    add_rms_norm_kernel[(rows,)](*args, N=size, WIDTH=width, num_warps=warps, **early(pdl))


def qk_norm_rope(qkv, q_weight, k_weight, eps: float, cos, sin, rows, past, keys, values, query, pdl: bool) -> None:
    sequences, heads, tokens, size = query.shape
    kv_heads, capacity = keys.shape[1:3]
    qk_norm_rope_kernel[(sequences * tokens, heads + 2 * kv_heads)](
        # inputs
        qkv,
        q_weight,
        k_weight,
        eps,
        cos,
        sin,
        rows,
        past,
        # outputs
        keys,
        values,
        query,
        # shapes
        tokens,
        capacity,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=size,
        WIDTH=triton.next_power_of_2(size),
        ROTARY=cos.shape[1],
        NORM=q_weight is not None,
        HAS_ROWS=rows is not None,
        num_warps=1,
        **early(pdl),
    )


def greedy(logits, token, probability, pdl: bool) -> None:
    rows, vocab = logits.shape
    chunk = min(GREEDY_CHUNK, triton.next_power_of_2(vocab))
    chunks = triton.cdiv(vocab, chunk)
    each = triton.cdiv(chunks, max(1, GREEDY_PROGRAMS // rows))  # chunks of a program
    shares = triton.cdiv(chunks, each)
    mass = torch.empty(rows, shares, 2, dtype=torch.float32, device=logits.device)
    place = torch.empty(rows, shares, dtype=torch.int32, device=logits.device)
    greedy_kernel[(rows, shares)](logits, mass, place, vocab, each * chunk, CHUNK=chunk, num_warps=8, **early(pdl))
    width = triton.next_power_of_2(shares)
    greedy_merge_kernel[(rows,)](mass, place, token, probability, SHARES=shares, WIDTH=width, num_warps=1, **early(pdl))
