"""Router: the gate product, and block routing with the schedule of the expert kernels. Two launches, or one from logits.

`gate_kernel` leaves logits and, for sigmoid, scores. `route_kernel` runs one program per block through the three stages of
`dmoe_ops.reference.block_route`, whose rounding it follows: scores and sums are float64, rounded to float32 once.

Selections compare `rank_bits`: the bits of a float32 score as an int32 in the same order, NONE for what may not be
chosen. Of equal ones the lowest column wins. Columns are experts laid out [groups, members], both padded to a power of
two, in the order of the ids. int32, as NVIDIA reduces those over a warp in one instruction (redux).
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .products import multiply
from .schedule import MAX_WORD, block_range, local_only, order, store_used, store_word

NONE = tl.constexpr(-(1 << 31))  # below the bits of -inf
EPS = tl.constexpr(1e-20)


@triton.jit
def sigmoid(logits):
    wide = logits.to(tl.float64)
    return (1.0 / (1.0 + tl.exp(-wide))).to(tl.float32)


@triton.jit
def softmax(logits, real):
    """Shares of each row [rows, columns]; NaN stays NaN and takes no share. The limits: equal shares among the +inf, and
    among all where everything is -inf."""
    wide = tl.where(real & (logits == logits), logits, -float("inf")).to(tl.float64)
    top = tl.max(wide, 1)[:, None]
    infinite = (top == float("inf")) | (top == -float("inf"))
    wide = tl.where(infinite, tl.where(wide == top, 0.0, -float("inf")), wide - top)
    wide = tl.where(real, wide, -float("inf"))
    power = tl.exp(wide)
    share = (power / tl.sum(power, 1)[:, None]).to(tl.float32)
    return tl.where(logits == logits, share, logits)


@triton.jit
def rank_bits(value):
    value = tl.where(value == 0, 0.0, value)  # -0.0 ties with 0.0
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(bits):
    """The float32 number that `rank_bits` took."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(keys, column, AXIS: tl.constexpr):
    """The largest key along the last axis, AXIS, and the lowest column that has it; both without that axis."""
    best = tl.max(keys, AXIS)
    return best, tl.min(tl.where(keys == tl.expand_dims(best, AXIS), column, 1 << 30), AXIS)


@triton.jit
def without_best(keys, column, K: tl.constexpr):
    """keys [rows, columns] with the K first of each row replaced by NONE. column: [1, columns]."""
    for _ in range(K):
        _best, at = first_best(keys, column, 1)
        keys = tl.where(column == at[:, None], NONE, keys)
    return keys


@triton.jit
def load_scores(
    logits_ptr,
    score_ptr,
    bias_ptr,
    token,
    inside,
    expert,
    real,
    E: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Scores s (0 where the logit is NaN), selection scores r and their rank bits, [tokens, EP]."""
    at = token.to(tl.int64)[:, None] * E + expert[None, :]
    there = inside[:, None] & real[None, :]
    if HAS_SCORE:
        score = tl.load(score_ptr + at, mask=there, other=float("nan"))
    else:
        score = tl.load(logits_ptr + at, mask=there, other=float("nan"))
        if SOFTMAX:
            score = softmax(score, there)
        else:
            score = sigmoid(score)
    selection = score
    if HAS_BIAS:
        selection = score + tl.load(bias_ptr + expert, mask=real, other=0.0)[None, :]
    open_ = there & (selection == selection) & (selection > -float("inf"))
    keys = tl.where(open_, rank_bits(selection), NONE)
    return tl.where(score == score, score, 0.0), selection, keys


@triton.jit
def vote(score, selection, keys, column, AGGREGATE: tl.constexpr, K: tl.constexpr, UNION_K: tl.constexpr):
    """Stage 1 for some of the block's tokens: [EP] float64."""
    if AGGREGATE == "max":
        return tl.max(tl.where(keys > NONE, selection, -float("inf")), 0).to(tl.float64)
    if AGGREGATE == "sum":
        total = tl.sum(score.to(tl.float64), 1).to(tl.float32) + EPS
        votes = tl.div_rn(score, tl.broadcast_to(total[:, None], score.shape))
    else:
        left = without_best(keys, column[None, :], UNION_K if AGGREGATE == "union" else K)
        voted = (keys > NONE) & (left == NONE)
        votes = tl.where(voted, 1.0 if AGGREGATE == "union" else selection, 0.0)
    return tl.sum(votes.to(tl.float64), 0)


@triton.jit
def coreset(
    value,
    expert,
    real,
    column,
    top_p,
    EP: tl.constexpr,
    SELECT: tl.constexpr,
    MIN_EXPERTS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Stage 2: the members as a mask [EP]. No sort: an expert's rank is the number of better keys, and what `top_p`
    cumulates up to it is the sum over the keys that are no worse."""
    if SELECT == "all":
        return real
    if SELECT == "nonzero":
        return real & (value > 0)
    # Rank and column in one key: larger for larger values, then for lower columns.
    keys = (rank_bits(value).to(tl.int64) << 32) - column
    keys = tl.where(real, keys, -(1 << 63))
    value = tl.where(real, value, 0.0)
    total = tl.sum(value.to(tl.float64), 0).to(tl.float32) + EPS
    share = tl.div_rn(value, tl.full([EP], 1.0, tl.float32) * total)
    # Some of the others at a time: all pairs at once do not fit into the registers.
    OTHERS: tl.constexpr = 8 if EP >= 8 else EP
    better = tl.zeros([EP, OTHERS], tl.int32)
    covered = tl.zeros([EP, OTHERS], tl.float64)
    for first in range(0, EP, OTHERS):
        other = first + tl.arange(0, OTHERS)
        other_key = tl.gather(keys, other, 0)[None, :]
        better += (other_key > keys[:, None]).to(tl.int32)
        if SELECT == "top_p":
            other_share = tl.gather(share, other, 0).to(tl.float64)[None, :]
            covered += tl.where(other_key >= keys[:, None], other_share, 0.0)
    rank = tl.sum(better, 1)
    if SELECT == "top_n":
        return real & (rank < CAPACITY)
    size = tl.sum((real & (tl.sum(covered, 1).to(tl.float32) <= top_p)).to(tl.int32), 0) + 1
    size = tl.minimum(tl.maximum(size, MIN_EXPERTS), MAX_EXPERTS)
    return real & (rank < size)


@triton.jit
def kept_groups(keys, EP: tl.constexpr, GP: tl.constexpr, G: tl.constexpr, TOPK_GROUP: tl.constexpr):
    """The columns of the groups that each token keeps, as a mask like keys."""
    grouped = tl.reshape(keys, [keys.shape[0], GP, EP // GP])
    member = tl.arange(0, EP // GP)[None, None, :]
    first, at = first_best(grouped, member, 2)
    second = tl.max(tl.where(member == at[:, :, None], NONE, grouped), 2)
    score = tl.where(second > NONE, value_of(first) + value_of(second), -float("inf"))
    group = tl.arange(0, GP)[None, :]
    ranks = tl.where(group < G, rank_bits(score), NONE)
    kept = (ranks > NONE) & (without_best(ranks, group, TOPK_GROUP) == NONE)
    kept = tl.broadcast_to(kept[:, :, None], grouped.shape)
    return tl.reshape(kept, [keys.shape[0], EP])


@triton.jit
def take_best(keys, column, best, slot, first_slot, K: tl.constexpr):
    """Puts the columns of each row's best keys, in order, into the slots from first_slot [rows] on, at most up to K.
    best [rows, slots]: -1 where a slot is free."""
    for j in range(K):
        top, at = first_best(keys, column, 1)
        here = (slot == (first_slot + j)[:, None]) & (top > NONE)[:, None]
        best = tl.where(here, at[:, None], best)
        keys = tl.where((column == at[:, None]) & (first_slot + j < K)[:, None], NONE, keys)
    return keys, best


@triton.jit(do_not_specialize=["n_tokens"])
def gate_kernel(
    x_ptr,
    gate_ptr,
    logits_ptr,
    score_ptr,
    done_ptr,
    n_tokens,
    E: tl.constexpr,
    H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [T, E] = x @ gate.T in float32 and their sigmoid. Experts are the M side of the MMA, tokens the N side."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(done_ptr, 0)  # counts the programs of route_kernel, which waits for this kernel
    gate_rows = gate_ptr + e.to(tl.int64)[:, None] * H
    x_rows = x_ptr + t.to(tl.int64)[None, :] * H
    acc = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for h0 in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        h = h0 + tl.arange(0, BLOCK_H)
        gate = tl.load(gate_rows + h[None, :], mask=(e < E)[:, None] & (h < H)[None, :], other=0.0)
        x = tl.load(x_rows + h[:, None], mask=(t < n_tokens)[None, :] & (h < H)[:, None], other=0.0)
        if gate.dtype != x.dtype:
            gate = gate.to(tl.float32)
            x = x.to(tl.float32)
        acc = multiply(gate, x, acc)
    at = t.to(tl.int64)[None, :] * E + e[:, None]
    inside = (e < E)[:, None] & (t < n_tokens)[None, :]
    tl.store(logits_ptr + at, acc, mask=inside)
    if HAS_SCORE:
        tl.store(score_ptr + at, sigmoid(acc), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "n_blocks", "seq_len"])
def route_kernel(
    logits_ptr,
    score_ptr,
    bias_ptr,
    offsets_ptr,
    map_ptr,
    ids_ptr,
    weights_ptr,
    coreset_ptr,
    sizes_ptr,
    used_ptr,
    counts_ptr,
    words_ptr,
    base_ptr,
    token_word_ptr,
    token_at_ptr,
    position_ptr,
    tiles_ptr,
    n_tiles_ptr,
    done_ptr,
    n_tokens,
    n_blocks,
    seq_len,
    top_p,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    EP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    AGGREGATE: tl.constexpr,
    SELECT: tl.constexpr,
    MIN_EXPERTS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    UNION_K: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_P: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    N_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    SCHEDULE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: coreset, experts and weights of its tokens, and its part of the SCHEDULE ("", "dense" or "gathered")."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    start, length = block_range(block, offsets_ptr, seq_len, BLOCK_SIZE, HAS_OFFSETS)
    column = tl.arange(0, EP)
    group = column // (EP // GP)
    member = column % (EP // GP)
    expert = group * (E // G) + member
    real = (group < G) & (member < E // G)
    t = tl.arange(0, BLOCK_T)
    ONE_TILE: tl.constexpr = N_WORDS == 1

    if ONE_TILE:
        score, selection, keys = load_scores(
            logits_ptr, score_ptr, bias_ptr, start + t, t < length, expert, real,
            E, SOFTMAX, HAS_SCORE, HAS_BIAS,
        )  # fmt: skip

    value = tl.zeros([EP], tl.float32)
    if SELECT != "all":
        if ONE_TILE:
            value = vote(score, selection, keys, column, AGGREGATE, K, UNION_K).to(tl.float32)
        else:
            votes = tl.full([EP], -float("inf") if AGGREGATE == "max" else 0.0, tl.float64)
            for word in range(0, N_WORDS):
                local = word * BLOCK_T + t
                score, selection, keys = load_scores(
                    logits_ptr, score_ptr, bias_ptr, start + local, local < length, expert, real,
                    E, SOFTMAX, HAS_SCORE, HAS_BIAS,
                )  # fmt: skip
                more = vote(score, selection, keys, column, AGGREGATE, K, UNION_K)
                votes = tl.maximum(votes, more) if AGGREGATE == "max" else votes + more
            value = votes.to(tl.float32)
    inside = coreset(value, expert, real, column, top_p, EP, SELECT, MIN_EXPERTS, MAX_EXPERTS, CAPACITY)

    size = tl.sum(inside.to(tl.int32), 0)
    place = tl.cumsum(inside.to(tl.int32), 0) - 1
    row = block.to(tl.int64) * WIDTH
    tl.store(coreset_ptr + row + place, expert, mask=inside)
    rest = tl.arange(0, WIDTH_P)
    tl.store(coreset_ptr + row + rest, tl.full([WIDTH_P], -1, tl.int32), mask=(rest >= size) & (rest < WIDTH))
    tl.store(sizes_ptr + block, size)

    used = tl.zeros([EP], tl.int32)
    slot = tl.arange(0, KP)
    for word in range(0, N_WORDS):
        local = word * BLOCK_T + t
        if not ONE_TILE:
            score, selection, keys = load_scores(
                logits_ptr, score_ptr, bias_ptr, start + local, local < length, expert, real,
                E, SOFTMAX, HAS_SCORE, HAS_BIAS,
            )  # fmt: skip
        candidates = tl.where(inside[None, :], keys, NONE)
        best = tl.full([BLOCK_T, KP], -1, tl.int32)
        first_slot = tl.zeros([BLOCK_T], tl.int32)
        if G > 1:
            kept = kept_groups(candidates, EP, GP, G, TOPK_GROUP)
            left, best = take_best(
                tl.where(kept, candidates, NONE), column[None, :], best, slot[None, :], first_slot, K
            )
            chosen = kept & (left == NONE) & (candidates > NONE)
            found = tl.sum((best >= 0).to(tl.int32), 1)
            free = (found < K) & (local < length)
            if tl.max(free.to(tl.int32), 0) > 0:  # rare: the free slots take members outside the kept groups
                outside = tl.where(kept, NONE, candidates)
                left, best = take_best(outside, column[None, :], best, slot[None, :], found, K)
                chosen = chosen | ((left == NONE) & (outside > NONE))
        else:
            left, best = take_best(candidates, column[None, :], best, slot[None, :], first_slot, K)
            chosen = (left == NONE) & (candidates > NONE)

        at = (start + local).to(tl.int64)[:, None] * K + slot[None, :]
        there = (local < length)[:, None] & (slot < K)[None, :]
        best_expert = best // (EP // GP) * (E // G) + best % (EP // GP)
        tl.store(ids_ptr + at, tl.where(best >= 0, best_expert, -1), mask=there)
        of_slot = (start + local).to(tl.int64)[:, None] * E + best_expert
        if HAS_SCORE:
            picked = tl.load(score_ptr + of_slot, mask=there & (best >= 0), other=0.0)
        elif SOFTMAX:
            picked = tl.gather(score, tl.maximum(best, 0), 1)
            picked = tl.where(best >= 0, picked, 0.0)
        else:
            picked = sigmoid(tl.load(logits_ptr + of_slot, mask=there & (best >= 0), other=-float("inf")))
        if NORM:
            total = tl.sum(picked.to(tl.float64), 1).to(tl.float32) + EPS
            picked = tl.div_rn(picked, tl.broadcast_to(total[:, None], picked.shape))
        tl.store(weights_ptr + at, picked * scale, mask=there)

        if SCHEDULE != "":
            chosen = local_only(chosen, expert[None, :], real[None, :], map_ptr, HAS_MAP)
            if SCHEDULE == "dense":
                used = used | tl.max(chosen.to(tl.int32), 0)
            else:
                first = word * BLOCK_T
                store_word(
                    chosen, block * N_WORDS + word, start + first, length - first, t, expert, real,
                    words_ptr, token_word_ptr, E,
                )  # fmt: skip

    if SCHEDULE == "dense":
        store_used(used > 0, expert, block, used_ptr, counts_ptr, USED_WIDTH)
    if SCHEDULE == "gathered":
        tl.debug_barrier()  # all of this block's masks are written before it counts as done
        if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu") == n_blocks - 1:
            tl.debug_barrier()
            order(
                n_blocks * N_WORDS, n_tokens, ids_ptr, words_ptr, base_ptr, token_word_ptr, token_at_ptr, position_ptr,
                tiles_ptr, n_tiles_ptr, E, triton.next_power_of_2(E), K, TILE, False, ROWS, SLOTS,
            )  # fmt: skip


def gate(x, gate_weight, logits, score, done, tile, pdl: bool) -> None:
    """logits [T, E] and, unless None, their sigmoid; sets `done` int32 [1] to 0. tile: `tiles.Gate`."""
    n_tokens, n_experts = logits.shape
    grid = (triton.cdiv(n_experts, tile.experts), triton.cdiv(n_tokens, tile.tokens))
    gate_kernel[grid](
        x,
        gate_weight,
        logits,
        score,
        done,
        n_tokens,
        E=n_experts,
        H=x.shape[1],
        BLOCK_E=tile.experts,
        BLOCK_T=tile.tokens,
        BLOCK_H=tile.hidden,
        STAGES=tile.stages,
        HAS_SCORE=score is not None,
        PDL=pdl,
        num_warps=tile.warps,
    )


def route(logits, score, expert_bias, block_offsets, seq_len, routing, out, schedule, tile, expert_map, pdl) -> None:
    """Fills `out` (a RoutingResult) and, unless None, `schedule` (`schedule.Dense` or `schedule.Gathered`).

    score: sigmoid of the logits where `gate` left it, or None. schedule.done: 0 at the start, see `gate`.
    tile: `tiles.Route`. pdl: launched behind `gate` by programmatic dependent launch.
    """
    n_blocks = out.coreset_sizes.shape[0]
    pdl_option = dict(launch_pdl=True) if pdl else {}
    route_kernel[(n_blocks,)](
        logits,
        score,
        expert_bias,
        block_offsets,
        expert_map,
        *out,
        *(schedule.dense_args() if schedule else (None,) * 2),
        *(schedule.gathered_args() if schedule else (None,) * 8),
        logits.shape[0],
        n_blocks,
        seq_len,
        routing.top_p,
        routing.routed_scaling_factor,
        **route_constants(routing, tile),
        USED_WIDTH=schedule.width if schedule else 1,
        TILE=schedule.tile if schedule else 1,
        HAS_SCORE=score is not None,
        HAS_BIAS=expert_bias is not None,
        HAS_OFFSETS=block_offsets is not None,
        HAS_MAP=expert_map is not None,
        SCHEDULE=schedule.form if schedule else "",
        PDL=pdl,
        num_warps=tile.warps,
        **pdl_option,
    )


@functools.lru_cache(maxsize=256)
def route_constants(routing, tile) -> dict:
    """What the kernel compiles in of a BlockRouting."""
    groups = triton.next_power_of_2(routing.n_group)
    columns = groups * triton.next_power_of_2(routing.num_experts // routing.n_group)
    # Tiles are meant for 256 columns; more of them leave room for fewer tokens in the registers.
    tokens = max(1, tile.tokens * 256 // max(columns, 256))
    tokens = min(tokens, MAX_WORD, triton.next_power_of_2(routing.block_size))
    return dict(
        E=routing.num_experts,
        K=routing.top_k,
        KP=triton.next_power_of_2(routing.top_k),
        BLOCK_SIZE=routing.block_size,
        G=routing.n_group,
        GP=groups,
        EP=columns,
        TOPK_GROUP=routing.topk_group,
        SOFTMAX=routing.score == "softmax",
        AGGREGATE=routing.aggregate,
        SELECT=routing.select,
        MIN_EXPERTS=routing.min_experts,
        MAX_EXPERTS=routing.max_experts or routing.num_experts,
        CAPACITY=routing.capacity or 1,
        UNION_K=routing.union_k or 1,
        NORM=routing.norm_topk_prob,
        WIDTH=routing.coreset_width,
        WIDTH_P=triton.next_power_of_2(routing.coreset_width),
        BLOCK_T=tokens,
        N_WORDS=triton.cdiv(routing.block_size, tokens),
        ROWS=max(1, 4096 // columns),
        SLOTS=1024,
    )
