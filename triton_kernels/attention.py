"""Attention of a text's last blocks to all that is before them, the length of which lies on the device.

A program per head and share of the keys, as flash-decoding has it: each leaves its sums in float32, and a second launch adds
them up. Where heads alone fill the GPU there is one share, and one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .decoder import follow
from .launch import early
from .products import multiply, rounded

# As many as multiprocessors, about: 3.9 us for 256 tokens on an H200 (gpu-check step, c5d3887); others were not measured.
PROGRAMS, SHARES = 128, 8
LOG2_E = 1.4426950408889634


@triton.jit
def attention_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    past_ptr,
    out_ptr,
    parts_ptr,
    masses_ptr,
    tokens,
    capacity,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS queries of a head and a share of the keys. With one share out [n, T, heads D]; else parts [n heads T, SHARES, D]
    and masses [n heads T, SHARES, 2]: the largest score, and the sum of 2 ** (score - largest)."""
    follow(PDL)
    i, share, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    sequence, head = i // HEADS, i % HEADS
    past = tl.load(past_ptr)
    row = tile * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    there = (row < tokens)[:, None] & (k < D)[None, :]
    query = tl.load(query_ptr + (i * tokens + row)[:, None] * D + k[None, :], mask=there, other=0.0)
    seen = past + tl.minimum((row // BLOCK + 1) * BLOCK, tokens)
    last = past + tl.minimum(((tile + 1) * ROWS + BLOCK - 1) // BLOCK * BLOCK, tokens)
    size = (last + SHARES * CHUNK - 1) // (SHARES * CHUNK) * CHUNK
    begin = share * size
    end = tl.minimum(begin + size, last)

    prefix = (sequence * KV_HEADS + head // (HEADS // KV_HEADS)) * capacity * D
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(begin, end, CHUNK):
        key = first + tl.arange(0, CHUNK)
        inside = (key < end)[:, None] & (k < D)[None, :]
        at = prefix + key.to(tl.int64)[:, None] * D + k[None, :]
        keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
        score = multiply(query, tl.trans(keys), tl.zeros([ROWS, CHUNK], tl.float32)) * scale
        score = tl.where((key < end)[None, :] & (key[None, :] < seen[:, None]), score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        shrunk = tl.exp2(most - base)
        total = total * shrunk + tl.sum(weight, 1)
        result = multiply(rounded(weight, values.dtype), values, result * shrunk[:, None])
        most = higher
    place = (i * tokens + row) * SHARES + share
    if SHARES == 1:
        at = ((sequence * tokens + row) * HEADS + head)[:, None] * D + k[None, :]
        tl.store(out_ptr + at, rounded(result / total[:, None], out_ptr.dtype.element_ty), mask=there)
    else:
        tl.store(masses_ptr + 2 * place, most, mask=row < tokens)
        tl.store(masses_ptr + 2 * place + 1, total, mask=row < tokens)
        if begin < end:
            tl.store(parts_ptr + place[:, None] * D + k[None, :], result, mask=there)


@triton.jit
def combine_kernel(
    parts_ptr,
    masses_ptr,
    out_ptr,
    tokens,
    n_rows,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [n, T, heads D] from the shares of ROWS rows of [n heads T]. A share without keys has left a mass alone."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    share = tl.arange(0, SHARES)
    at = 2 * (row[:, None] * SHARES + share[None, :])
    most = tl.load(masses_ptr + at, mask=inside[:, None], other=0.0)
    highest = tl.max(most, 1)
    weights = tl.exp2(most - highest[:, None]) * tl.load(masses_ptr + at + 1, mask=inside[:, None], other=1.0)
    total = tl.sum(weights, 1)
    k = tl.arange(0, WIDTH)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    for one in tl.static_range(SHARES):
        most = tl.load(masses_ptr + 2 * (row * SHARES + one), mask=inside, other=float("-inf"))
        used = (inside & (most > float("-inf")))[:, None] & (k < D)[None, :]
        part = tl.load(parts_ptr + (row * SHARES + one)[:, None] * D + k[None, :], mask=used, other=0.0)
        result += tl.exp2(most - highest)[:, None] * part
    sequence, head, token = row // (HEADS * tokens), row // tokens % HEADS, row % tokens
    to = ((sequence * tokens + token) * HEADS + head)[:, None] * D + k[None, :]
    out = rounded(result / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + to, out, mask=inside[:, None] & (k < D)[None, :])


def block_attention(query, keys, values, past, block_length: int, out, pdl: bool) -> None:
    n, heads, tokens, size = query.shape
    kv_heads, capacity = keys.shape[1:3]
    width = max(16, triton.next_power_of_2(size))
    rows = max(16, min(64, triton.next_power_of_2(tokens)))
    programs = n * heads * triton.cdiv(tokens, rows)
    shares = 1
    while shares < SHARES and 2 * shares * programs <= PROGRAMS:
        shares *= 2
    parts = query.new_empty((n * heads * tokens, shares, size) if shares > 1 else (1,), dtype=torch.float32)
    masses = query.new_empty((n * heads * tokens, shares, 2) if shares > 1 else (1,), dtype=torch.float32)
    attention_kernel[(n * heads, shares, triton.cdiv(tokens, rows))](
        query,
        keys,
        values,
        past,
        out,
        parts,
        masses,
        tokens,
        capacity,
        size**-0.5 * LOG2_E,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=size,
        WIDTH=width,
        ROWS=rows,
        CHUNK=64 if query.element_size() < 4 else 32,
        SHARES=shares,
        BLOCK=block_length,
        num_warps=4,
        num_stages=2,
        **early(pdl),
    )
    if shares > 1:
        combine_rows = 4
        combine_kernel[(triton.cdiv(n * heads * tokens, combine_rows),)](
            parts,
            masses,
            out,
            tokens,
            n * heads * tokens,
            HEADS=heads,
            D=size,
            WIDTH=width,
            ROWS=combine_rows,
            SHARES=shares,
            num_warps=4,
            **early(pdl),
        )
