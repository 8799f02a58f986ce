"""Router: the gate product, and block routing with the schedule of the expert kernels. Two launches, or one from logits.

`gate_kernel` leaves logits and, for sigmoid, scores. `route_kernel` runs one program per block through the three stages of
`dmoe_ops.reference.block_route`, whose rounding it follows: scores and sums are float64, rounded to float32 once. Where
blocks share a pool, `votes_kernel` runs in front of it, and every program then adds up the ballots of its domain.

Selections compare `rank_bits`: the bits of a float32 score as an int32 in the same order, NONE for what may not be
chosen. Of equal ones the lowest column wins. Columns are experts laid out [groups, members], both padded to a power of
two, in the order of the ids. int32, as NVIDIA reduces those over a warp in one instruction (redux).

Scores are [tokens, chunks, lanes], column = chunk * lanes + lane: Triton gives 128 lanes of a token to one warp and the
chunks to each of its threads, so a reduction over a token's columns needs no barrier, where one over [tokens, 256] would.
One block has one multiprocessor, whose integer units are what bounds it: hence comparisons of whole tensors where they
can be few, and stage 3 over the members alone where they are.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .launch import early
from .products import multiply
from .schedule import MAX_WORD, block_range, local_only, order, store_used, store_word

NONE = tl.constexpr(-(1 << 31))  # below the bits of -inf
EPS = tl.constexpr(1e-20)


@triton.jit
def sigmoid(logits):
    wide = logits.to(tl.float64)
    return (1.0 / (1.0 + tl.exp(-wide))).to(tl.float32)


@triton.jit
def softmax(logits):
    """Shares of each token [tokens, chunks, lanes]; NaN stays NaN and takes no share. The limits: equal shares among the
    +inf, and among all where everything is -inf."""
    real = logits == logits
    wide = tl.where(real, logits, -float("inf")).to(tl.float64)
    top = per_token(tl.max(tl.max(wide, 1), 1))
    power = tl.where(real, tl.exp(tl.where(wide == top, 0.0, wide - top)), 0.0)
    share = (power / per_token(tl.sum(tl.sum(power, 1), 1))).to(tl.float32)
    return tl.where(real, share, logits)


@triton.jit
def rank_bits(value):
    bits = value.to(tl.int32, bitcast=True)  # no score and no vote is -0.0: sums of other numbers never are
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(bits):
    """The float32 number that `rank_bits` took."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def per_token(x):
    """x [tokens] as [tokens, 1, 1], in the layout that a reduction leaves: nothing is moved."""
    return tl.expand_dims(tl.expand_dims(x, 1), 1)


@triton.jit
def first_best(keys, column):
    """The largest of each token's keys [tokens, chunks, lanes], and the lowest column [1, chunks, lanes] that has it."""
    best = tl.max(tl.max(keys, 1), 1)
    return best, tl.min(tl.min(tl.where(keys == per_token(best), column, 1 << 30), 1), 1)


@triton.jit
def without_best(keys, column, K: tl.constexpr):
    """keys with the K first of each token replaced by NONE."""
    for _ in range(K):
        _best, at = first_best(keys, column)
        keys = tl.where(column == per_token(at), NONE, keys)
    return keys


@triton.jit
def in_best(keys, column, K: tl.constexpr):
    """Mask of the K first of each token's keys: all from the K-th different value up, unless equal ones make too many."""
    limit = tl.max(tl.max(keys, 1), 1)
    for _ in range(K - 1):
        limit = tl.max(tl.max(tl.where(keys < per_token(limit), keys, NONE), 1), 1)
    inside = keys >= per_token(tl.maximum(limit, NONE + 1))
    if tl.max(tl.sum(tl.sum(inside.to(tl.int32), 1), 1), 0) > K:  # rare
        inside = (keys > NONE) & (without_best(keys, column, K) == NONE)
    return inside


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
    COMPACT: tl.constexpr,
):
    """Scores s (0 where the logit is NaN), selection scores r and their rank bits, [tokens, chunks, lanes]. expert, real:
    [chunks, lanes]; COMPACT: see `assign`."""
    at = token.to(tl.int64)[:, None, None] * E + expert[None, :, :]
    if COMPACT:
        # They are not, but this is what lays a warp's threads along the lanes. The mask keeps the accesses apart.
        at = tl.max_contiguous(at, (1, 1, 2))
    there = inside[:, None, None] & real[None, :, :]
    if HAS_SCORE:
        score = tl.load(score_ptr + at, mask=there, other=float("nan"))
    else:
        score = tl.load(logits_ptr + at, mask=there, other=float("nan"))
        if SOFTMAX:
            score = softmax(score)
        else:
            score = sigmoid(score)
    selection = score
    if HAS_BIAS:
        selection = score + tl.load(bias_ptr + expert, mask=real, other=0.0)[None, :, :]
    open_ = there & (selection == selection) & (selection > -float("inf"))
    keys = tl.where(open_, rank_bits(selection), NONE)
    return tl.where(score == score, score, 0.0), selection, keys


@triton.jit
def vote(score, selection, keys, column, AGGREGATE: tl.constexpr, K: tl.constexpr, UNION_K: tl.constexpr):
    """Stage 1 for some of the block's tokens: float64 [chunks, lanes]."""
    if AGGREGATE == "max":
        return tl.max(tl.where(keys > NONE, selection, -float("inf")), 0).to(tl.float64)
    if AGGREGATE == "sum":
        total = tl.sum(tl.sum(score.to(tl.float64), 1), 1).to(tl.float32) + EPS
        votes = tl.div_rn(score, tl.broadcast_to(per_token(total), score.shape))
    else:
        voted = in_best(keys, column, UNION_K if AGGREGATE == "union" else K)
        votes = tl.where(voted, 1.0 if AGGREGATE == "union" else selection, 0.0)
    return tl.sum(votes.to(tl.float64), 0)


@triton.jit
def sum_of_pairs(x):
    """Sum over both axes of the others."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def part(x, i, EP: tl.constexpr, PARTS: tl.constexpr):
    """A part of x [EP] as [a, 1, b], to be paired with [1, EP, 1]: a sum over both outer axes then needs no barrier."""
    SIZE: tl.constexpr = EP // PARTS
    B: tl.constexpr = 16 if SIZE >= 16 else SIZE
    if PARTS == 1:
        some = tl.reshape(x, [SIZE // B, B])
    elif PARTS == 2:
        even, odd = tl.split(tl.reshape(x, [SIZE // B, B, 2]))
        some = even if i == 0 else odd
    else:
        some = tl.reshape(tl.gather(x, i * SIZE + tl.arange(0, SIZE), 0), [SIZE // B, B])
    return tl.expand_dims(some, 1)


@triton.constexpr_function
def n_parts(columns, bits):
    """Parts that leave each thread of 16 warps 64 pairs of 32 bits: what fits into its registers."""
    return max(1, min(columns, columns**2 * bits // (64 * 512 * 32)))


@triton.jit
def larger(keys, EP: tl.constexpr, ONE: tl.constexpr, TYPE: tl.constexpr):
    """How many keys are larger than each one [EP], counted by ONE of that TYPE."""
    PARTS: tl.constexpr = n_parts(EP, keys.dtype.primitive_bitwidth)
    mine = keys[None, :, None]
    if PARTS == 2:
        first = sum_of_pairs(tl.where(part(keys, 0, EP, 2) > mine, ONE, 0))
        return first + sum_of_pairs(tl.where(part(keys, 1, EP, 2) > mine, ONE, 0))
    count = tl.zeros([EP], TYPE)
    for i in range(PARTS):
        count += sum_of_pairs(tl.where(part(keys, i, EP, PARTS) > mine, ONE, 0))
    return count


@triton.jit
def ranks(value, real, E: tl.constexpr, EP: tl.constexpr):
    """How many experts come before each one. [EP] int32; any number where there is none."""
    # In floats, as a comparison that leaves 1.0 or 0.0 is one instruction.
    rank = larger(tl.where(real, value, -float("inf")), EP, 1.0, tl.float32).to(tl.int32)
    zero = (real & (value == 0)).to(tl.int32)  # the experts without a vote: the equal ones that are always there
    rank += tl.where(zero > 0, tl.cumsum(zero, 0) - 1, 0)
    if tl.sum(tl.where(real, rank, 0), 0) != E * (E - 1) // 2:  # others are equal
        # Rank and column in one key: larger for larger values, then for lower columns.
        keys = (rank_bits(value).to(tl.int64) << 32) - tl.arange(0, EP)
        rank = larger(tl.where(real, keys, -(1 << 63)), EP, 1, tl.int32)
    return rank


@triton.jit
def by_rank(share, rank, real, row_ptr, E: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr):
    """The shares in the order of the ranks. row_ptr [WIDTH]: the block's row of the coresets, which is not written yet."""
    column = tl.arange(0, EP)
    if WIDTH == E:
        tl.store(row_ptr + rank, share.to(tl.int32, bitcast=True), mask=real)
        tl.debug_barrier()
        ordered = tl.load(row_ptr + column, mask=column < E, other=0).to(tl.float32, bitcast=True)
        tl.debug_barrier()
    else:
        rank = tl.where(real, rank, EP)
        PARTS: tl.constexpr = max(4, n_parts(EP, 32)) if EP >= 4 else 1
        place = column[None, :, None]
        ordered = tl.zeros([EP], tl.float32)
        for i in range(PARTS):  # sums of one term each
            here = part(rank, i, EP, PARTS) == place
            ordered += sum_of_pairs(tl.where(here, part(share, i, EP, PARTS), 0.0))
    return ordered


@triton.jit
def coreset(
    value,
    real,
    top_p,
    row_ptr,
    E: tl.constexpr,
    EP: tl.constexpr,
    SELECT: tl.constexpr,
    MIN_EXPERTS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stage 2: the members as a mask [EP]."""
    if SELECT == "all":
        return real
    if SELECT == "nonzero":
        return real & (value > 0)
    rank = ranks(value, real, E, EP)
    if SELECT == "top_n":
        return real & (rank < CAPACITY)
    value = tl.where(real, value, 0.0)
    total = tl.sum(value.to(tl.float64), 0).to(tl.float32) + EPS
    share = tl.div_rn(value, tl.full([EP], 1.0, tl.float32) * total)
    ordered = by_rank(share, rank, real, row_ptr, E, EP, WIDTH)
    covered = tl.cumsum(ordered.to(tl.float64), 0).to(tl.float32)
    size = tl.sum(((tl.arange(0, EP) < E) & (covered <= top_p)).to(tl.int32), 0) + 1
    size = tl.minimum(tl.maximum(size, MIN_EXPERTS), MAX_EXPERTS)
    return real & (rank < size)


@triton.jit
def block_votes(
    logits_ptr,
    score_ptr,
    bias_ptr,
    start,
    length,
    column,
    expert,
    real,
    E: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    AGGREGATE: tl.constexpr,
    UNION_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    N_WORDS: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Stage 1 of a block: v [chunks, lanes]."""
    t = tl.arange(0, BLOCK_T)
    votes = tl.full(column.shape, -float("inf") if AGGREGATE == "max" else 0.0, tl.float64)
    for word in range(0, N_WORDS):
        local = word * BLOCK_T + t
        score, selection, keys = load_scores(
            logits_ptr, score_ptr, bias_ptr, start + local, local < length, expert, real,
            E, SOFTMAX, HAS_SCORE, HAS_BIAS, False,
        )  # fmt: skip
        more = vote(score, selection, keys, column[None, :, :], AGGREGATE, K, UNION_K)
        votes = tl.maximum(votes, more) if AGGREGATE == "max" else votes + more
    return votes.to(tl.float32)


@triton.jit
def pool_members(
    block,
    n_blocks,
    top_p,
    expert,
    real,
    ballots_ptr,
    domains_ptr,
    E: tl.constexpr,
    EP: tl.constexpr,
    SELECT: tl.constexpr,
    MIN_EXPERTS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    POOL: tl.constexpr,
    IN_POOL: tl.constexpr,
):
    """Stage 2 of a block of a domain, from the ballots that `votes_kernel` left: the members as a mask [EP]."""
    domain = 0
    while tl.load(domains_ptr + domain + 1) <= block:
        domain += 1
    first = tl.load(domains_ptr + domain)
    row_ptr = ballots_ptr + first.to(tl.int64) * E
    total = tl.zeros([EP], tl.float64)
    for _ in range(first, tl.load(domains_ptr + domain + 1)):
        total += tl.load(row_ptr + expert, mask=real, other=0.0).to(tl.float64)
        row_ptr += E
    if POOL == 0:
        return real & (total > 0)
    pool = real & (ranks(total.to(tl.float32), real, E, EP) < POOL)
    if IN_POOL:
        return pool
    votes = tl.load(ballots_ptr + (n_blocks + block).to(tl.int64) * E + expert, mask=pool, other=0.0)
    SIZE: tl.constexpr = POOL if POOL < E else E
    return coreset(votes, pool, top_p, ballots_ptr, SIZE, EP, SELECT, MIN_EXPERTS, MAX_EXPERTS, CAPACITY, 0)


@triton.jit
def given_members(row_ptr, expert, real, EP: tl.constexpr, GIVEN: tl.constexpr):
    """A coreset of GIVEN ids in any order, as a mask [EP]."""
    inside = tl.zeros([EP], tl.int32)
    for first in range(0, GIVEN, 32):
        at = first + tl.arange(0, 32)
        ids = tl.load(row_ptr + at, mask=at < GIVEN, other=-1)
        inside |= tl.max((expert[:, None] == ids[None, :]).to(tl.int32), 1)
    return real & (inside > 0)


@triton.jit
def group_ranks(best, second, there):
    """Rank bits of groups by the keys of their two best."""
    score = tl.where(second > NONE, value_of(best) + value_of(second), -float("inf"))
    return tl.where(there, rank_bits(score), NONE)


@triton.jit
def kept_columns(keys, MEMBERS: tl.constexpr, G: tl.constexpr, TOPK_GROUP: tl.constexpr):
    """The columns of the groups that each token keeps, as a mask like keys, where all experts have a column."""
    C: tl.constexpr = keys.shape[1]
    GROUPS: tl.constexpr = keys.shape[2] // MEMBERS  # of a chunk
    grouped = tl.reshape(keys, [keys.shape[0], C, GROUPS, MEMBERS])
    member = tl.arange(0, MEMBERS)[None, None, None, :]
    first = tl.max(grouped, 3)
    at = tl.min(tl.where(grouped == first[:, :, :, None], member, 1 << 30), 3)
    second = tl.max(tl.where(member == at[:, :, :, None], NONE, grouped), 3)
    group = tl.arange(0, C)[None, :, None] * GROUPS + tl.arange(0, GROUPS)[None, None, :]
    places = group_ranks(first, second, group < G)
    kept = (places > NONE) & (without_best(places, group, TOPK_GROUP) == NONE)
    kept = tl.broadcast_to(kept[:, :, :, None], grouped.shape)
    return tl.reshape(kept, keys.shape)


@triton.jit
def kept_members(keys, expert, SIZE: tl.constexpr, G: tl.constexpr, TOPK_GROUP: tl.constexpr):
    """As `kept_columns`, where only some experts have a column; SIZE: experts of a group, of which there are 32 at most."""
    GP: tl.constexpr = triton.next_power_of_2(G)
    group = tl.arange(0, GP)[None, None, :]
    firsts = tl.full([keys.shape[0], 1, GP], NONE, tl.int32)
    seconds = firsts
    for g in tl.static_range(G):
        own = tl.where(expert // SIZE == g, keys, NONE)
        best, at = first_best(own, expert)
        second = tl.max(tl.max(tl.where(expert == per_token(at), NONE, own), 1), 1)
        firsts = tl.where(group == g, per_token(best), firsts)
        seconds = tl.where(group == g, per_token(second), seconds)
    places = group_ranks(firsts, seconds, group < G)
    kept = (places > NONE) & (without_best(places, group, TOPK_GROUP) == NONE)
    bits = tl.sum(tl.sum(kept.to(tl.int32) << group, 1), 1)
    return ((per_token(bits) >> (expert // SIZE)) & 1) != 0


@triton.jit
def take_best(keys, column, best, slot, first_slot, K: tl.constexpr):
    """Puts the columns of each token's best keys, in order, into the slots from first_slot [tokens] on, at most up to K.
    best [tokens, slots]: -1 where a slot is free."""
    for j in range(K):
        top, at = first_best(keys, column)
        here = (slot == (first_slot + j)[:, None]) & (top > NONE)[:, None]
        best = tl.where(here, at[:, None], best)
        keys = tl.where((column == per_token(at)) & per_token(first_slot + j < K), NONE, keys)
    return keys, best


@triton.jit
def pick(score, column, best, slot, K: tl.constexpr):
    """The scores of each token's columns `best` [tokens, slots], 0 where that is -1."""
    picked = tl.zeros(best.shape, tl.float32)
    for j in range(K):
        at = tl.sum(tl.where(slot == j, best, 0), 1)
        value = tl.sum(tl.sum(tl.where(column == per_token(at), score, 0.0), 1), 1)
        picked = tl.where((slot == j) & (best >= 0), value[:, None], picked)
    return picked


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


@triton.jit
def expert_of(column, E: tl.constexpr, G: tl.constexpr, MEMBERS: tl.constexpr):
    """The expert of each column, and whether there is one; the groups' members are padded to MEMBERS."""
    if E == G * MEMBERS:
        return column, column < E
    group, member = column // MEMBERS, column % MEMBERS
    return group * (E // G) + member, (group < G) & (member < E // G)


@triton.jit
def assign(
    expert,
    real,
    inside,
    block,
    start,
    length,
    logits_ptr,
    score_ptr,
    bias_ptr,
    map_ptr,
    ids_ptr,
    weights_ptr,
    used_ptr,
    counts_ptr,
    words_ptr,
    token_word_ptr,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    G: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORM: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    N_WORDS: tl.constexpr,
    COMPACT: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Stage 3 of a block, and its part of the SCHEDULE. expert, real, inside [chunks, lanes]: the columns' experts, whether
    there is one, and whether it is a member. COMPACT: the columns are the members alone."""
    t = tl.arange(0, BLOCK_T)
    slot = tl.arange(0, KP)
    column = expert[None, :, :]
    used = tl.zeros(expert.shape, tl.int32)
    for word in range(0, N_WORDS):
        local = word * BLOCK_T + t
        # Loaded anew even where there is one word: held over the coreset, the scores take more registers than there are.
        score, _selection, keys = load_scores(
            logits_ptr, score_ptr, bias_ptr, start + local, local < length, expert, real,
            E, SOFTMAX, HAS_SCORE, HAS_BIAS, COMPACT,
        )  # fmt: skip
        candidates = tl.where(inside[None, :, :], keys, NONE)
        best = tl.full([BLOCK_T, KP], -1, tl.int32)
        first_slot = tl.zeros([BLOCK_T], tl.int32)
        if G > 1:
            if COMPACT:
                kept = kept_members(candidates, column, E // G, G, TOPK_GROUP)
            else:
                kept = kept_columns(candidates, MEMBERS, G, TOPK_GROUP)
            left, best = take_best(tl.where(kept, candidates, NONE), column, best, slot[None, :], first_slot, K)
            chosen = kept & (left == NONE) & (candidates > NONE)
            found = tl.sum((best >= 0).to(tl.int32), 1)
            free = (found < K) & (local < length)
            if tl.max(free.to(tl.int32), 0) > 0:  # rare: the free slots take members outside the kept groups
                outside = tl.where(kept, NONE, candidates)
                left, best = take_best(outside, column, best, slot[None, :], found, K)
                chosen = chosen | ((left == NONE) & (outside > NONE))
        else:
            left, best = take_best(candidates, column, best, slot[None, :], first_slot, K)
            chosen = (left == NONE) & (candidates > NONE)

        at = (start + local).to(tl.int64)[:, None] * K + slot[None, :]
        there = (local < length)[:, None] & (slot < K)[None, :]
        tl.store(ids_ptr + at, best, mask=there)
        of_slot = (start + local).to(tl.int64)[:, None] * E + best
        if HAS_SCORE:
            picked = tl.load(score_ptr + of_slot, mask=there & (best >= 0), other=0.0)
        elif SOFTMAX:
            picked = pick(score, column, best, slot[None, :], K)
        else:
            picked = sigmoid(tl.load(logits_ptr + of_slot, mask=there & (best >= 0), other=-float("inf")))
        if NORM:
            total = tl.sum(picked.to(tl.float64), 1).to(tl.float32) + EPS
            picked = tl.div_rn(picked, tl.broadcast_to(total[:, None], picked.shape))
        tl.store(weights_ptr + at, picked * scale, mask=there)

        if SCHEDULE != "":
            chosen = local_only(chosen, column, real[None, :, :], map_ptr, HAS_MAP)
            if SCHEDULE == "dense":
                used = used | tl.max(chosen.to(tl.int32), 0)
            else:
                first = word * BLOCK_T
                store_word(
                    chosen, block * N_WORDS + word, start + first, length - first, t, expert, real,
                    words_ptr, token_word_ptr, E, COMPACT,
                )  # fmt: skip
    if SCHEDULE == "dense":
        columns: tl.constexpr = expert.shape[0] * expert.shape[1]
        store_used(
            tl.reshape(used, [columns]) > 0, tl.reshape(expert, [columns]), block, used_ptr, counts_ptr, USED_WIDTH
        )


@triton.jit(do_not_specialize=["n_blocks", "seq_len"])
def votes_kernel(
    logits_ptr,
    score_ptr,
    bias_ptr,
    offsets_ptr,
    coreset_ptr,
    ballots_ptr,
    n_blocks,
    seq_len,
    top_p,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    EP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    AGGREGATE: tl.constexpr,
    SELECT: tl.constexpr,
    MIN_EXPERTS: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    UNION_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    N_WORDS: tl.constexpr,
    LANES: tl.constexpr,
    POOL: tl.constexpr,
    IN_POOL: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block's ballot, its row of `ballots` [1 or 2, n_blocks, E]: 1.0 for a member of its coreset; or with POOL each
    expert's share of its votes, and unless IN_POOL the votes. coreset_ptr: room for a row of the coresets."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    start, length = block_range(block, offsets_ptr, seq_len, BLOCK_SIZE, HAS_OFFSETS)
    column = tl.arange(0, EP // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    expert, real = expert_of(column, E, G, EP // GP)
    value = block_votes(
        logits_ptr, score_ptr, bias_ptr, start, length, column, expert, real,
        E, K, SOFTMAX, AGGREGATE, UNION_K, BLOCK_T, N_WORDS, HAS_SCORE, HAS_BIAS,
    )  # fmt: skip
    value = tl.reshape(value, [EP])
    expert, real = expert_of(tl.arange(0, EP), E, G, EP // GP)
    row_ptr = ballots_ptr + block.to(tl.int64) * E
    if POOL == 0:
        scratch = coreset_ptr + block.to(tl.int64) * WIDTH
        inside = coreset(value, real, top_p, scratch, E, EP, SELECT, MIN_EXPERTS, MAX_EXPERTS, CAPACITY, WIDTH)
        tl.store(row_ptr + expert, inside.to(tl.float32), mask=real)
    else:
        positive = tl.where(real & (value > 0), value, 0.0)
        total = tl.sum(positive.to(tl.float64), 0).to(tl.float32) + EPS
        share = tl.div_rn(positive, tl.full([EP], 1.0, tl.float32) * total)
        tl.store(row_ptr + expert, tl.where(positive == float("inf"), 1.0, share), mask=real)
        if not IN_POOL:
            tl.store(row_ptr + n_blocks.to(tl.int64) * E + expert, value, mask=real)


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
    ballots_ptr,
    domains_ptr,
    given_ptr,
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
    LANES: tl.constexpr,
    MOST_MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    POOL: tl.constexpr,
    IN_POOL: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_DOMAINS: tl.constexpr,
    SCHEDULE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: coreset, experts and weights of its tokens, and its part of the SCHEDULE ("", "dense" or "gathered").
    The coreset is that of the block's votes, with HAS_DOMAINS of its domain's ballots, or with GIVEN ids of `given`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    start, length = block_range(block, offsets_ptr, seq_len, BLOCK_SIZE, HAS_OFFSETS)
    MEMBERS: tl.constexpr = EP // GP
    CHUNKS: tl.constexpr = EP // LANES
    column = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    expert, real = expert_of(column, E, G, MEMBERS)
    flat_expert, flat_real = expert_of(tl.arange(0, EP), E, G, MEMBERS)

    row = block.to(tl.int64) * WIDTH
    if GIVEN:
        inside = given_members(given_ptr + block.to(tl.int64) * GIVEN, flat_expert, flat_real, EP, GIVEN)
    elif HAS_DOMAINS:
        inside = pool_members(
            block, n_blocks, top_p, flat_expert, flat_real, ballots_ptr, domains_ptr,
            E, EP, SELECT, MIN_EXPERTS, MAX_EXPERTS, CAPACITY, POOL, IN_POOL,
        )  # fmt: skip
    else:
        value = tl.zeros([CHUNKS, LANES], tl.float32)
        if SELECT != "all":
            value = block_votes(
                logits_ptr, score_ptr, bias_ptr, start, length, column, expert, real,
                E, K, SOFTMAX, AGGREGATE, UNION_K, BLOCK_T, N_WORDS, HAS_SCORE, HAS_BIAS,
            )  # fmt: skip
        value = tl.reshape(value, [EP])
        inside = coreset(
            value, flat_real, top_p, coreset_ptr + row, E, EP, SELECT, MIN_EXPERTS, MAX_EXPERTS, CAPACITY, WIDTH
        )

    size = tl.sum(inside.to(tl.int32), 0)
    place = tl.cumsum(inside.to(tl.int32), 0) - 1
    tl.store(coreset_ptr + row + place, flat_expert, mask=inside)
    rest = tl.arange(0, WIDTH_P)
    tl.store(coreset_ptr + row + rest, tl.full([WIDTH_P], -1, tl.int32), mask=(rest >= size) & (rest < WIDTH))
    tl.store(sizes_ptr + block, size)

    COMPACT: tl.constexpr = MOST_MEMBERS < EP and not SOFTMAX
    if COMPACT and size <= MOST_MEMBERS:
        tl.debug_barrier()  # the ids are read by other threads than those that wrote them
        lane = tl.arange(0, MOST_MEMBERS // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
        members = tl.load(coreset_ptr + row + lane, mask=lane < size, other=0)
        assign(
            members, lane < size, lane < size, block, start, length, logits_ptr, score_ptr, bias_ptr, map_ptr,
            ids_ptr, weights_ptr, used_ptr, counts_ptr, words_ptr, token_word_ptr, scale,
            E, K, KP, G, MEMBERS, TOPK_GROUP, SOFTMAX, NORM, USED_WIDTH, BLOCK_T, N_WORDS, True,
            HAS_SCORE, HAS_BIAS, HAS_MAP, SCHEDULE,
        )  # fmt: skip
    else:
        assign(
            expert, real, tl.reshape(inside, [CHUNKS, LANES]), block, start, length, logits_ptr, score_ptr, bias_ptr,
            map_ptr, ids_ptr, weights_ptr, used_ptr, counts_ptr, words_ptr, token_word_ptr, scale,
            E, K, KP, G, MEMBERS, TOPK_GROUP, SOFTMAX, NORM, USED_WIDTH, BLOCK_T, N_WORDS, False,
            HAS_SCORE, HAS_BIAS, HAS_MAP, SCHEDULE,
        )  # fmt: skip
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


def route(
    logits, score, expert_bias, block_offsets, seq_len, routing, out, schedule, tile, expert_map, pdl,
    domain_offsets=None, coreset_ids=None,
) -> None:  # fmt: skip
    """Fills `out` (a RoutingResult) and, unless None, `schedule` (`schedule.Dense` or `schedule.Gathered`).

    score: sigmoid of the logits where `gate` left it, or None. schedule.done: 0 at the start, see `gate`.
    tile: `tiles.Route`. pdl: launched behind `gate` by programmatic dependent launch. domain_offsets, coreset_ids: see
    `LayerCall`; with the first, two launches.
    """
    n_blocks, width = out.coreset_ids.shape
    constants = route_constants(routing, tile, width)
    inputs = dict(
        HAS_SCORE=score is not None, HAS_BIAS=expert_bias is not None, HAS_OFFSETS=block_offsets is not None
    )  # fmt: skip
    ballots = None
    if domain_offsets is not None:
        planes = 2 if routing.pool_capacity and routing.choose == "block" else 1
        ballots = logits.new_empty(planes, n_blocks, routing.num_experts)
        used = {name: value for name, value in constants.items() if name in (*votes_kernel.arg_names, "num_warps")}
        arguments = (
            logits,
            score,
            expert_bias,
            block_offsets,
            out.coreset_ids,
            ballots,
            n_blocks,
            seq_len,
            routing.top_p,
        )
        votes_kernel[(n_blocks,)](*arguments, **used, **inputs, **early(pdl))
    route_kernel[(n_blocks,)](
        logits,
        score,
        expert_bias,
        block_offsets,
        expert_map,
        *out,
        *(schedule.dense_args() if schedule else (None,) * 2),
        *(schedule.gathered_args() if schedule else (None,) * 8),
        ballots,
        domain_offsets,
        coreset_ids,
        logits.shape[0],
        n_blocks,
        seq_len,
        routing.top_p,
        routing.routed_scaling_factor,
        **constants,
        **inputs,
        USED_WIDTH=schedule.width if schedule else 1,
        TILE=schedule.tile if schedule else 1,
        GIVEN=0 if coreset_ids is None else width,
        HAS_MAP=expert_map is not None,
        HAS_DOMAINS=domain_offsets is not None,
        SCHEDULE=schedule.form if schedule else "",
        **early(pdl),
    )


@functools.lru_cache(maxsize=256)
def route_constants(routing, tile, width: int) -> dict:
    """What the kernels compile in of a BlockRouting, with coresets of `width`."""
    groups = triton.next_power_of_2(routing.n_group)
    columns = groups * triton.next_power_of_2(routing.num_experts // routing.n_group)
    # Tiles are meant for 256 columns; more of them leave room for fewer tokens in the registers.
    tokens = max(1, tile.tokens * 256**2 // max(columns, 256) ** 2)
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
        WIDTH=width,
        WIDTH_P=triton.next_power_of_2(width),
        BLOCK_T=tokens,
        N_WORDS=triton.cdiv(routing.block_size, tokens),
        MOST_MEMBERS=32 if routing.n_group <= 32 else columns,
        LANES=min(columns, max(128, columns // groups if groups > 1 else 1)),
        ROWS=max(1, 4096 // columns),
        SLOTS=1024,
        POOL=routing.pool_capacity or 0,
        IN_POOL=routing.choose == "pool",
        num_warps=tile.warps if columns >= 256 else max(4, tile.warps // 2),
    )
