"""What a decoder layer does beside its products, fused: dmoe::add_rms_norm, dmoe::qk_norm_rope, dmoe::block_attention and
dmoe::greedy.

The torch forms, with shapes and dtypes, are in reference.py. None of the ops has a gradient: with one to keep, a layer uses
the torch forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends, _library


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the RMS norm of x + delta, scaled by weight; x + delta). x and delta: [..., N], weight: [N], all of one dtype."""
    if _library.nobody_listens(x, delta, weight):
        return add_rms_norm_impl(x, delta, weight, eps)
    return torch.ops.dmoe.add_rms_norm(x, delta, weight, eps)


def add_rms_norm_fake(x, delta, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def add_rms_norm_impl(x, delta, weight, eps):
    normed, total = add_rms_norm_fake(x, delta, weight, eps)
    if x.numel():
        x, delta = _library.contiguous(x, delta)
        flat = (tensor.view(-1, x.shape[-1]) for tensor in (x, delta))
        outs = (tensor.view(-1, x.shape[-1]) for tensor in (normed, total))
        _backends.backend(x).add_rms_norm(*flat, weight, eps, *outs)
    return normed, total


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    past: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Splits qkv [n, T, (heads + 2 kv_heads) D] into heads, normalises and rotates queries and keys, and appends keys and
    values to a cache. Returns the queries [n, heads, T, D].

    q_weight, k_weight: [D], or both None for no norm. cos, sin: of every position from 0 on, [past + T or more, R], which
    rotate the first R dimensions of a head.
    keys, values: the cache [bsz, kv_heads, capacity, D], written in place behind `past` int64 [1] tokens, in the sequences
    `rows` int64 [n] (None: all).
    """
    args = (qkv, q_weight, k_weight, eps, cos, sin, rows, past, keys, values)
    if _library.nobody_listens(qkv, q_weight, k_weight, cos, sin, rows, past, keys, values):
        return qk_norm_rope_impl(*args)
    return torch.ops.dmoe.qk_norm_rope(*args)


def qk_norm_rope_fake(qkv, q_weight, k_weight, eps, cos, sin, rows, past, keys, values):
    n, tokens, width = qkv.shape
    return qkv.new_empty(n, width // keys.shape[3] - 2 * keys.shape[1], tokens, keys.shape[3])


def qk_norm_rope_impl(qkv, q_weight, k_weight, eps, cos, sin, rows, past, keys, values):
    query = qk_norm_rope_fake(qkv, q_weight, k_weight, eps, cos, sin, rows, past, keys, values)
    if query.numel():
        qkv, cos, sin, rows = _library.contiguous(qkv, cos, sin, rows)
        backend = _backends.backend(qkv)
        backend.qk_norm_rope(qkv, q_weight, k_weight, eps, cos, sin, rows, past, keys, values, query)
    return query


def block_attention(query: Tensor, keys: Tensor, values: Tensor, past: Tensor, block_length: int) -> Tensor:
    """Attention of the blocks behind a prefix, whose length lies on the device: a token sees its own block and all earlier
    ones. Returns [n, T, heads D].

    query: [n, heads, T, D], whole blocks behind `past` int64 [1] tokens, which end with a block; keys, values:
    [n, kv_heads, capacity, D], of any of which past + T count.
    """
    if _library.nobody_listens(query, keys, values, past):
        return block_attention_impl(query, keys, values, past, block_length)
    return torch.ops.dmoe.block_attention(query, keys, values, past, block_length)


def block_attention_fake(query, keys, values, past, block_length):
    n, heads, tokens, size = query.shape
    return query.new_empty(n, tokens, heads * size)


def block_attention_impl(query, keys, values, past, block_length):
    out = block_attention_fake(query, keys, values, past, block_length)
    if out.numel():
        query, keys, values = _library.contiguous(query, keys, values)
        _backends.backend(query).block_attention(query, keys, values, past, block_length, out)
    return out


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token of each row of logits [T, V], int64 [T] (the lowest of equal ones), and its probability,
    float32 [T], which is NaN where a row has a NaN or +inf, or only -inf."""
    if _library.nobody_listens(logits):
        return greedy_impl(logits)
    return torch.ops.dmoe.greedy(logits)


def greedy_fake(logits):
    return logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits), dtype=torch.float32)


def greedy_impl(logits):
    token, probability = greedy_fake(logits)
    if logits.numel():
        logits = logits.contiguous()
        _backends.backend(logits).greedy(logits, token, probability)
    return token, probability


for schema, impl, fake in (
    (
        "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor normed, Tensor total)",
        add_rms_norm_impl,
        add_rms_norm_fake,
    ),
    (
        "qk_norm_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, float eps, Tensor cos, Tensor sin, Tensor? rows, "
        "Tensor past, Tensor(a!) keys, Tensor(b!) values) -> Tensor query",
        qk_norm_rope_impl,
        qk_norm_rope_fake,
    ),
    (
        "block_attention(Tensor query, Tensor keys, Tensor values, Tensor past, int block_length) -> Tensor out",
        block_attention_impl,
        block_attention_fake,
    ),
    ("greedy(Tensor logits) -> (Tensor token, Tensor probability)", greedy_impl, greedy_fake),
):
    _library.lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.implement("dmoe::" + schema[: schema.index("(")], impl, fake)
