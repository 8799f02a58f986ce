"""The specification as plain loops over NumPy scalars; shares no code with the package.

cut(tokens, seq_len, block_size, offsets) -> the rows of every block
route(logits, bias, routing, blocks) -> (ids [T, k], weights [T, k], coresets, one ascending list per block); domains: the
    blocks of every domain; given: the coresets, which nobody selects then
votes(scores, selection, routing, rows), choose(selection, members, routing): stages 1 and 3 by themselves
experts(x, w13, w2, ids, weights), mlp(x, w13, w2) -> float64; activation: silu or gelu_tanh
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

f32 = np.float32


def cut(tokens, seq_len, block_size, offsets=None):
    if offsets is not None:
        return [range(a, b) for a, b in itertools.pairwise(offsets)]
    starts = [s + p for s in range(0, tokens, max(seq_len, 1)) for p in range(0, seq_len, block_size)]
    return [range(s, min(s + block_size, s // seq_len * seq_len + seq_len)) for s in starts]


def scores(logits, kind):
    """s [T, E], rounded to float32 once; a NaN logit scores 0 and takes no share."""
    result = np.zeros(logits.shape, f32)
    with np.errstate(over="ignore"):
        for t, row in enumerate(logits.astype(np.float64)):
            alive = ~np.isnan(row)
            if kind == "sigmoid":
                result[t, alive] = 1 / (1 + np.exp(-row[alive]))
            elif alive.any():
                top = row[alive].max()
                share = (row[alive] == top) * 1.0 if np.isinf(top) else np.exp(row[alive] - top)
                result[t, alive] = share / share.sum()
    return result


def _best(selection, experts, k):
    """The k largest of `experts`, ties to the lower id; an expert at -inf is never chosen."""
    return sorted((e for e in experts if selection[e] > -np.inf), key=lambda e: (-selection[e], e))[:k]


def votes(scores, selection, routing, rows):
    """Stage 1, v [E] of one block."""
    n = routing.num_experts
    v = np.full(n, -np.inf) if routing.aggregate == "max" else np.zeros(n)
    for t in rows:
        if routing.aggregate == "topk_sum":
            for e in _best(selection[t], range(n), routing.top_k):
                v[e] += selection[t, e]
        elif routing.aggregate == "union":
            for e in _best(selection[t], range(n), routing.union_k):
                v[e] += 1
        elif routing.aggregate == "sum":
            v += scores[t] / (f32(scores[t].sum(dtype=np.float64)) + f32(1e-20))
        else:
            v = np.maximum(v, selection[t])
    return v.astype(f32)


def _coreset(votes, routing, there):
    """Stage 2, from the votes of one block, among the experts that are there."""
    n = routing.num_experts
    if routing.select == "all":
        return sorted(there)
    order = sorted(there, key=lambda e: (-votes[e], e))
    if routing.select == "nonzero":
        return [e for e in sorted(there) if votes[e] > 0]
    if routing.select == "top_n":
        return sorted(order[: routing.capacity])
    covered, size = 0.0, 1
    with np.errstate(all="ignore"):
        total = f32(votes[sorted(there)].sum(dtype=np.float64)) + f32(1e-20)
        for e in order:
            covered += float(votes[e] / total)
            size += f32(covered) <= f32(routing.top_p)
    limit = n if routing.max_experts is None else routing.max_experts
    return sorted(order[: min(max(size, routing.min_experts), limit, n)])


def _pool(votes, routing):
    """The pool of a domain, from the votes of its blocks."""
    total = np.zeros(routing.num_experts)
    with np.errstate(all="ignore"):
        for v in votes:
            positive = np.maximum(v, f32(0))
            norm = f32(positive.sum(dtype=np.float64)) + f32(1e-20)
            total += [1.0 if p == np.inf else float(p / norm) for p in positive]
    return sorted(range(routing.num_experts), key=lambda e: (-f32(total[e]), e))[: routing.pool_capacity]


def _coresets(votes, routing, domains):
    """Stage 2 of all blocks."""
    result = []
    for blocks in domains:
        everyone = range(routing.num_experts)
        there = everyone if routing.pool_capacity is None else _pool([votes[b] for b in blocks], routing)
        own = [_coreset(votes[b], routing, there) for b in blocks]
        if routing.choose == "pool":
            pool = set().union(*own) if routing.pool_capacity is None else there
            own = [sorted(pool)] * len(own)
        result += own
    return result


def choose(selection, members, routing):
    """Stage 3, the experts of one token."""
    members = [e for e in members if selection[e] > -np.inf]
    k, group_size = routing.top_k, routing.num_experts // routing.n_group
    if routing.n_group == 1:
        return _best(selection, members, k)
    group_scores = []
    for g in range(routing.n_group):
        two = _best(selection, [e for e in members if e // group_size == g], 2)
        group_scores.append(selection[two[0]] + selection[two[1]] if len(two) == 2 else -np.inf)
    kept = sorted(range(routing.n_group), key=lambda g: (-group_scores[g], g))[: routing.topk_group]
    inside = [e for e in members if e // group_size in kept]
    outside = [e for e in members if e // group_size not in kept]
    return (_best(selection, inside, k) + _best(selection, outside, k))[:k]


def route(logits, bias, routing, blocks, domains=None, given=None):
    s = scores(logits, routing.score)
    selection = s if bias is None else s + bias
    selection = np.where(np.isnan(logits) | np.isnan(selection), f32(-np.inf), selection)
    ids = np.full((len(logits), routing.top_k), -1)
    weights = np.zeros(ids.shape, f32)
    if given is None:
        has_votes = routing.select != "all" or routing.pool_capacity is not None
        v = [votes(s, selection, routing, rows) if has_votes else None for rows in blocks]
        coresets = _coresets(v, routing, [[b] for b in range(len(blocks))] if domains is None else domains)
    else:
        coresets = [sorted({e for e in members if e >= 0}) for members in given]
    for rows, members in zip(blocks, coresets):
        for t in rows:
            chosen = choose(selection[t], members, routing)
            w = s[t, chosen]
            if routing.norm_topk_prob:
                w = w / (f32(w.sum(dtype=np.float64)) + f32(1e-20))
            ids[t, : len(chosen)] = chosen
            weights[t, : len(chosen)] = w * f32(routing.routed_scaling_factor)
    return ids, weights, coresets


def mlp(x, w13, w2, absolute=False, activation="silu"):
    """W_down (activation(W_gate x) * (W_up x)) of one token, in float64; with `absolute` the sum of its terms' sizes."""
    x, w13, w2 = (v.double().numpy() for v in (x, w13, w2))
    gate, up = np.split(w13 @ x, 2)
    with np.errstate(over="ignore"):
        if activation == "silu":
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            hidden = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
        return abs(w2) @ abs(hidden) if absolute else w2 @ hidden


def experts(x, w13, w2, ids, weights, absolute=False, activation="silu"):
    y = np.zeros(x.shape)
    for t in range(x.shape[0]):
        for e, w in zip(ids[t].tolist(), weights[t].tolist()):
            if e >= 0:
                y[t] += w * mlp(x[t], w13[e], w2[e], absolute, activation)
    return torch.from_numpy(y)
