"""The contract of every kernel, in plain torch: same names, same signatures, same results as the ops of this package.

Written to be read, not to be fast. Sources: dMoE, arXiv 2605.30876, Algorithm 1; DES, arXiv 2602.00879; the
LLaDA2.2 report; OEA, arXiv 2511.02237, and XShare, arXiv 2602.07265, for blocks that share a pool.

Rounding. The router is fp32, yet two of its steps would depend on the order of additions or on the exp at hand, and a
coreset is a discrete thing. So every score and every sum is rounded to fp32 once, from float64: any order of summation
then gives the same bits, equal logits give equal scores, and a backend can reproduce a coreset exactly.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from . import _checks
from .formats import GROUP, NOT_LOADED, ExpertWeights
from .routing import BlockRouting, RoutingResult

EPS = 1e-20


def block_route(
    logits, expert_bias=None, *, routing: BlockRouting, block_offsets=None, domain_offsets=None, coreset_ids=None
) -> RoutingResult:
    """Coreset of every block and experts of every token.

    logits: float32 [T, E] or [bsz, seq, E]; blocks of `routing.block_size` rows are cut inside each sequence, the last
    one may be partial. (float64 is taken too, for gradcheck; the weights are float64 then.)
    expert_bias: float32 [E] or None; selections use score + bias, weights the score alone.
    block_offsets: int32 [n_blocks + 1] rising from 0 to T: block i holds rows offsets[i] to offsets[i + 1] - 1, of
    the flattened logits; at most `block_size` rows each. The values are checked on the CPU only: elsewhere it would
    need a synchronisation.
    domain_offsets: int32 or int64 [n_domains + 1], from 0 to n_blocks and nowhere falling: the blocks of domain i are
    offsets[i] to offsets[i + 1] - 1, those of a batch, say, whose experts are read from memory once for all. None: every
    block is a domain by itself. What a domain shares is up to the routing:

        choose="block", no pool_capacity: nothing; every block routes alone, whatever the domains.
        choose="pool", no pool_capacity: the pool is the union of the coresets, and tokens choose in it. No expert is read
            that no coreset has.
        pool_capacity P: the pool is the first P experts by the sum of v / (sum v + 1e-20) over the domain's blocks, ties to
            the lower id; negative v count 0, and an infinite one 1. choose="block": each coreset is selected inside the
            pool, as if there were no other experts. choose="pool": tokens choose in the pool (`select` has no say then).

    A block's result then depends on its domain, so that a batch reaches its members. Votes and pools know no groups:
    n_group limits the choice of each token, inside its coreset or the pool (stage 3).
    coreset_ids: int32 [n_blocks, width], in any order, -1 for none: the blocks' coresets, which nobody selects then (no
    stage 1 and 2, no domains); a step may so use those of an earlier one. Values are checked on the CPU only.

    Returns `RoutingResult`, its rows flattened to T. topk_weights is differentiable with respect to logits; the
    selection passes no gradient. A NaN logit is never chosen and never votes.

    Raises ValueError, naming the argument and its value, for wrong shapes, dtypes, devices, offsets or ids.
    Source: dMoE Algorithm 1, with every free slot filled from the coreset.
    """
    return _block_route(logits, expert_bias, routing, block_offsets, domain_offsets, coreset_ids)[0]


def block_route_resident(
    logits,
    expert_bias=None,
    *,
    resident,
    resident_bias: float,
    routing: BlockRouting,
    block_offsets=None,
    domain_offsets=None,
) -> tuple[RoutingResult, torch.Tensor]:
    """`block_route` with experts that are in memory preferred: every block's experts are ordered by v (1 + resident_bias)
    where `resident` bool [E] says so (and v > 0), by v elsewhere, v being the score of stage 1. top_p is a share of the true
    sum of v all the same, so a coreset covers at least what it would without, but for min_experts and max_experts.

    resident_bias: at least 0. Only the orders of top_p and top_n change, that of a pool does not. The rest, errors too, is
    `block_route`.

    Returns (result, kept_mass float32 [n_blocks]): the coreset's sum of v over that of the coreset without the bias.
    """
    _checks.resident(resident, resident_bias, logits)
    preference = resident.to(logits.dtype) * resident_bias
    return _block_route(logits, expert_bias, routing, block_offsets, domain_offsets, None, preference)


def _block_route(
    logits, expert_bias, routing: BlockRouting, block_offsets, domain_offsets, coreset_ids, preference=None
):
    _checks.routing(routing)
    _checks.logits(logits, routing)
    seq_len = logits.shape[-2]
    logits = logits.reshape(-1, logits.shape[-1])
    _checks.route(logits, expert_bias, block_offsets, routing)
    _checks.block_offset_values(block_offsets, logits.shape[0], routing.block_size)
    tokens, num_experts = logits.shape

    score = scores(logits, routing.score)
    with torch.no_grad():
        block_of, n_blocks = blocks(tokens, seq_len, routing.block_size, block_offsets, logits.device)
        _checks.sharing(domain_offsets, coreset_ids, n_blocks, logits.device)
        _checks.sharing_values(domain_offsets, coreset_ids, n_blocks, num_experts)
        selection = selection_scores(score.detach(), logits, expert_bias)
        value = aggregate(score.detach(), selection, block_of, n_blocks, routing)
        if coreset_ids is None:
            domain_of, n_domains = domains(n_blocks, domain_offsets, logits.device)
            coreset = coresets(value, domain_of, n_domains, routing, preference)
        else:
            coreset = mask_of(coreset_ids, num_experts)
        chosen, valid = choose(selection.masked_fill(~coreset[block_of], -torch.inf), routing)
        width = routing.coreset_width if coreset_ids is None else coreset_ids.shape[1]
        coreset_ids = ids_of(coreset, width)

    weights = score.gather(1, chosen).masked_fill(~valid, 0)
    if routing.norm_topk_prob:
        weights = weights / (round_sum(weights) + EPS)
    result = RoutingResult(
        chosen.masked_fill(~valid, -1).int(),
        weights * routing.routed_scaling_factor,
        coreset_ids,
        coreset.sum(1).int(),
    )
    if preference is None:
        return result, None
    return result, share_of(coreset, coresets(value, domain_of, n_domains, routing), value)


def moe_experts(
    x,
    w13,
    w2,
    topk_ids,
    topk_weights,
    *,
    w13_scale=None,
    w2_scale=None,
    activations=None,
    expert_map=None,
    activation="silu",
) -> torch.Tensor:
    """y_t = sum_j topk_weights[t, j] * W_down[e] (activation(W_gate[e] x_t) * (W_up[e] x_t)), e = topk_ids[t, j].

    x: [T, H] float32, bfloat16 or float16 (float64 too, for gradcheck).
    w13: [E, 2I, H], gate rows first; w2: [E, H, I]; contiguous, dtype of x, or both quantised (see `dmoe_ops.formats`):
        float8_e4m3fn with w13_scale float32 [E, 2 ceil(I/128), ceil(H/128)], w2_scale float32 [E, ceil(H/128), ceil(I/128)];
        int8 with w13_scale float32 [E, 2I], w2_scale float32 [E, H];
        int4 as uint8 [E, 2I, H/2] and [E, H, I/2], w13_scale [E, 2I, ceil(H/128)], w2_scale [E, H, ceil(I/128)], bfloat16 or
        float32; H and I even.
    topk_ids: int32 or int64 [T, k], -1 and all that are no expert's add nothing; topk_weights: float32 [T, k].
    activations: None, or with int8 weights "int8": each token's x, and each slot's h = activation(gate) * up, is rounded to
        int8 by its own scale, see `quantize_rows`.
    expert_map: None, or int32 [E_model]: topk_ids are the model's, and expert_map[e] is the row of w13, w2 and their scales
        that holds expert e. Rows may lie in any order, and be more than the experts; those that nobody names are not read.
        The map changes addresses alone: sums run in the order of the model's ids, so y has the bits of the call without it.
        -1: the expert is elsewhere and adds nothing; results over a partition of the experts (expert parallelism) add up to
        the whole. -2: it is not loaded; where a token chose it, that is an error on the CPU; on a GPU, which nobody
        waits for, it is taken for -1. The values are checked on the CPU only.
    activation: "silu", or "gelu_tanh", which is gelu(gate, approximate="tanh").

    Returns y [T, H] in the dtype of x; quantised weights are widened to fp32, products accumulate in fp32 and y is rounded
    once. Differentiable with respect to x, topk_weights, and w13 and w2 unless they are quantised; with `activations`
    not at all. Raises ValueError, naming the argument and its value.
    """
    _checks.activations(activations, w13)
    weights = ExpertWeights(
        w13,
        w2,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        quantize_activations=activations is not None,
        expert_map=expert_map,
        activation=activation,
    )
    _checks.experts(x, weights, topk_ids, topk_weights)
    _checks.expert_map_values(weights)
    if torch.is_grad_enabled():
        _checks.differentiable(weights, x=x, topk_weights=topk_weights)
    return all_experts(x.to(topk_weights.dtype), weights, topk_ids, topk_weights).to(x.dtype)


def moe_experts_backward(d_y, x, weights: ExpertWeights, topk_ids, topk_weights, out) -> None:
    """The gradient of `moe_experts`: fills out = (d_x, d_w13, d_w2, d_topk_weights); d_w13 and d_w2 may both be None, and
    are for quantised weights.

    d_y: [T, H], the dtype of x; weights without a shared expert and without a map; else as `moe_experts`. Each sum is
    accumulated in the dtype of topk_weights and rounded once; tokens are gathered by expert, so that each product is one
    matrix multiplication.
    """
    d_x, d_w13, d_w2, d_topk_weights = out
    w13 = weights.w13
    top_k, num_experts, acc_type = topk_ids.shape[1], w13.shape[0], topk_weights.dtype
    order = topk_ids.flatten().argsort(stable=True)
    counts = torch.bincount(topk_ids.flatten().clamp(-1, num_experts) + 1)[: num_experts + 1].tolist()
    order = order[counts[0] : sum(counts)]  # the slots that have an expert
    ends = list(itertools.accumulate(counts[1:]))
    used = [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts[1:])) if count]
    rows, scale = order // top_k, topk_weights.flatten()[order, None]
    tokens, d_out = x[rows].to(acc_type), d_y[rows].to(acc_type)

    def wide(name: str, e: int):
        scale_of = getattr(weights, f"{name}_scale")
        wide = widen(getattr(weights, name)[e], None if scale_of is None else scale_of[e], 2 if name == "w13" else 1)
        return wide.to(acc_type)

    gate_up, d_hidden = (tokens.new_empty(len(rows), n) for n in (w13.shape[1], w13.shape[1] // 2))
    for e, part in used:
        torch.mm(tokens[part], wide("w13", e).T, out=gate_up[part])
        torch.mm(d_out[part], wide("w2", e), out=d_hidden[part])
    gate, up = gate_up.chunk(2, dim=1)
    activated = activate(gate, weights.activation)
    hidden = activated * up
    d_topk_weights.zero_().view(-1)[order] = (d_hidden * hidden).sum(1)
    d_hidden *= scale
    if weights.activation == "silu":
        d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(d_hidden * up, gate, approximate="tanh")
    d_gate_up = torch.cat([d_gate, d_hidden * activated], 1)
    if d_w13 is not None:
        hidden *= scale
        d_w13.zero_()
        d_w2.zero_()
    d_slots = tokens.new_zeros(topk_ids.numel(), x.shape[1])
    for e, part in used:
        d_slots[order[part]] = d_gate_up[part] @ wide("w13", e)
        if d_w13 is not None:
            d_w13[e] = d_gate_up[part].T @ tokens[part]
            d_w2[e] = d_out[part].T @ hidden[part]
    d_x.copy_(d_slots.view(-1, top_k, x.shape[1]).sum(1))


def block_moe(
    x,
    gate_weight,
    expert_bias,
    w13,
    w2,
    shared_w13,
    shared_w2,
    *,
    routing: BlockRouting,
    block_offsets=None,
    w13_scale=None,
    w2_scale=None,
    shared_w13_scale=None,
    shared_w2_scale=None,
    activations=None,
    expert_map=None,
    activation="silu",
    domain_offsets=None,
    coreset_ids=None,
) -> tuple[torch.Tensor, RoutingResult, torch.Tensor]:
    """The whole layer: gate, block routing, experts and the shared expert.

    x: [T, H] or [bsz, seq, H]; gate_weight: [E, H], any float dtype; expert_bias: float32 [E] or None; w13, w2, their
    scales, activations, and the dtypes of x: see `moe_experts`; shared_w13 [2I_shared, H] and shared_w2 [H, I_shared], or
    both None: in the dtype of x, or quantised like w13 with scales of the same formats (without E), activations included.
    expert_map: see `moe_experts`; int32 [E], and w13 and w2 have any number of rows. Every token is routed over all experts;
    y is that of those which are here. The shared expert is added whole, so of the parts of an expert-parallel layer one
    alone may have it (or each its slice).
    routing, block_offsets, domain_offsets, coreset_ids: see `block_route`. activation: see `moe_experts`; of the shared
    expert too.

    Returns (y like x, `RoutingResult`, router_logits float32 [T, E]); y is rounded once, with the shared expert in it.
    Differentiable with respect to x, the gate weight (through the weights of the chosen experts), the expert weights
    and the shared expert's unless they are quantised. Raises ValueError, naming the argument and its value.
    """
    _checks.routing(routing)
    _checks.rows("x", x, "H")
    _checks.activations(activations, w13)
    scales = w13_scale, w2_scale, shared_w13_scale, shared_w2_scale
    weights = ExpertWeights(w13, w2, shared_w13, shared_w2, *scales, activations is not None, expert_map, activation)
    flat = x.reshape(-1, x.shape[-1])
    _checks.layer(flat, gate_weight, expert_bias, weights, block_offsets, routing)
    _checks.expert_map_values(weights)
    if torch.is_grad_enabled():
        _checks.differentiable(weights, x=x, gate_weight=gate_weight)
    acc = flat.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    logits = F.linear(acc, gate_weight.to(acc.dtype))
    routed = block_route(
        logits.view(*x.shape[:-1], -1),
        expert_bias,
        routing=routing,
        block_offsets=block_offsets,
        domain_offsets=domain_offsets,
        coreset_ids=coreset_ids,
    )
    # In the accumulator's dtype, so that the routed and the shared part are rounded together.
    y = all_experts(acc, weights, routed.topk_ids, routed.topk_weights)
    return y.to(x.dtype).view(x.shape), routed, logits


def all_experts(x, weights: ExpertWeights, topk_ids, topk_weights, carry=None, begin=0, end=None) -> torch.Tensor:
    """The routed experts in the order of their ids, then the shared one, in the dtype of x (that of topk_weights); weights
    are widened one at a time.

    One wave of a call: experts begin to end - 1 alone, where `carry` [T, H] is what the wave before it returned; the shared
    expert joins behind the last of the experts. The last wave returns the bits of one call.
    """
    y, experts = torch.zeros_like(x) if carry is None else carry, weights.experts
    end = experts if end is None else end
    how = weights.quantize_activations, weights.activation
    row_of = range(experts) if weights.expert_map is None else weights.expert_map.tolist()
    for expert in range(begin, end):
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        row = row_of[expert]
        if len(tokens) == 0 or row == -1:
            continue
        if row == NOT_LOADED:
            raise ValueError(
                f"expert_map must have a row for every expert that a token chose, got {row} for expert {expert}"
            )
        w13_scale, w2_scale = (part if part is None else part[row] for part in (weights.w13_scale, weights.w2_scale))
        out = mlp(x[tokens], weights.w13[row], weights.w2[row], w13_scale, w2_scale, *how)
        y = y.index_add(0, tokens, topk_weights[tokens, slots, None] * out)
    if weights.shared_w13 is not None and end == experts:
        shared = (weights.shared_w13, weights.shared_w2, weights.shared_w13_scale, weights.shared_w2_scale)
        y = y + mlp(x, *shared, *how)
    return y


def activate(gate, activation: str) -> torch.Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def mlp(
    x, w13, w2, w13_scale=None, w2_scale=None, quantize_activations: bool = False, activation: str = "silu"
) -> torch.Tensor:
    """W_down (activation(W_gate x) * (W_up x)) for x [T, H], w13 [2I, H], w2 [H, I], computed in the dtype of x."""
    gate, up = linear(x, w13, w13_scale, quantize_activations, 2).chunk(2, dim=1)
    return linear(activate(gate, activation) * up, w2, w2_scale, quantize_activations, 1)


def linear(x, weight, scale, quantize_activations: bool, halves: int) -> torch.Tensor:
    """x [T, columns] times weight [rows, columns], quantised where it has a scale; see `dequantize` for `halves`.
    quantize_activations counts where the weight is quantised (then it is int8)."""
    if scale is None or not quantize_activations:
        return F.linear(x, widen(weight, scale, halves).to(x.dtype))
    rounded, row_scale = quantize_rows(x)
    product = F.linear(rounded.double(), weight.double()).to(x.dtype)  # in float64: a sum of integers, exact
    return product * row_scale * scale.to(x.dtype)


def quantize_rows(x) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, n] as (whole numbers from -127 to 127 in the dtype of x, scale [T, 1]): scale = max |x| / 127 of the row, 1
    where that is 0; q = x / scale rounded half to even. A row with NaN or inf becomes NaN."""
    scale = x.abs().amax(1, keepdim=True) / 127
    scale = scale.masked_fill(scale == 0, 1)
    return (x / scale).round().clamp(-127, 127), scale


def widen(weight, scale, halves: int) -> torch.Tensor:
    """A weight as it stands, dequantised where it has a scale."""
    return weight if scale is None else dequantize(weight, scale, halves=halves)


def dequantize(weight, scale, *, halves: int = 1) -> torch.Tensor:
    """float32 [..., rows, columns]: the values of a quantised weight, each float32(q) * float32(scale), rounded once.

    weight, scale: of one of `dmoe_ops.formats`, with the same leading dimensions. halves: 2 for a w13, whose gate and up
    rows are blocked apart in fp8; 1 for any other. Raises ValueError, naming the argument and its value.
    """
    _checks.quantized(weight, scale, halves)
    if weight.dtype == torch.int8:
        return weight.float() * scale[..., None]
    if weight.dtype == torch.uint8:
        weight = torch.stack([weight & 15, weight >> 4], -1).flatten(-2).float() - 8
    else:
        rows = weight.shape[-2] // halves
        scale = scale.unflatten(-2, (halves, -1)).repeat_interleave(GROUP, -2)[..., :rows, :].flatten(-3, -2)
    return weight.float() * scale.float().repeat_interleave(GROUP, -1)[..., : weight.shape[-1]]


def scores(logits, kind: str) -> torch.Tensor:
    """s [T, E] of the logits, rounded once from float64. NaN logits score 0 and take no share of a softmax."""
    wide = logits.double().masked_fill(logits.isnan(), -torch.inf)
    if kind == "sigmoid":
        return torch.sigmoid(wide).to(logits.dtype)
    # The limits of a softmax: equal shares among the +inf, and among all where everything is -inf.
    top = wide.amax(1, keepdim=True)
    wide = torch.where(top.isinf(), torch.where((wide == top) & ~logits.isnan(), 0.0, -torch.inf), wide)
    return torch.softmax(wide, 1).masked_fill(logits.isnan(), 0).to(logits.dtype)


def selection_scores(score, logits, expert_bias) -> torch.Tensor:
    """r = s + expert_bias [T, E]; -inf where an expert may not be chosen: a NaN logit, or a bias of -inf or NaN."""
    selection = score if expert_bias is None else score + expert_bias
    return selection.masked_fill(logits.isnan() | selection.isnan(), -torch.inf)


def mask_of(ids, num_experts: int) -> torch.Tensor:
    """Coresets of ids [n_blocks, width] as a mask [n_blocks, E]; ids of no expert count for nothing."""
    ids = ids.long().masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    mask = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter(1, ids, True)[:, :num_experts]


def ids_of(coreset, width: int) -> torch.Tensor:
    """The inverse: int32 [n_blocks, width], ascending, padded with -1."""
    n_blocks, num_experts = coreset.shape
    members = torch.arange(num_experts, device=coreset.device).expand(n_blocks, -1)
    ids = members.masked_fill(~coreset, num_experts).sort().values[:, :width]
    ids = ids.masked_fill(ids == num_experts, -1).int()
    return F.pad(ids, (0, width - ids.shape[1]), value=-1)


def domains(n_blocks: int, domain_offsets, device) -> tuple[torch.Tensor, int]:
    """The domain of every block, int64 [n_blocks], and the number of domains."""
    block = torch.arange(n_blocks, device=device)
    if domain_offsets is None:
        return block, n_blocks
    return torch.searchsorted(domain_offsets[1:].long(), block, right=True), domain_offsets.shape[0] - 1


def blocks(tokens: int, seq_len: int, block_size: int, block_offsets, device) -> tuple[torch.Tensor, int]:
    """The block of every token, int64 [T], and the number of blocks."""
    token = torch.arange(tokens, device=device)
    if block_offsets is not None:
        return torch.searchsorted(block_offsets[1:], token, right=True), block_offsets.shape[0] - 1
    if tokens == 0:
        return token, 0
    per_sequence = -(-seq_len // block_size)
    return token // seq_len * per_sequence + token % seq_len // block_size, tokens // seq_len * per_sequence


def aggregate(score, selection, block_of, n_blocks: int, routing: BlockRouting) -> torch.Tensor:
    """Stage 1: v [n_blocks, E], one score per block and expert."""
    if not routing.votes:
        return score.new_zeros(n_blocks, score.shape[1])
    if routing.aggregate == "max":
        lowest = score.new_full((n_blocks, score.shape[1]), -torch.inf)
        return lowest.scatter_reduce(0, block_of[:, None].expand_as(selection), selection, "amax")
    if routing.aggregate == "sum":
        votes = score / (round_sum(score) + EPS)
    else:
        k: Any = routing.union_k if routing.aggregate == "union" else routing.top_k
        in_top_k, valid = best(selection, k)
        votes = selection if routing.aggregate == "topk_sum" else torch.ones_like(selection)
        votes = torch.zeros_like(selection).scatter(1, in_top_k, votes.gather(1, in_top_k).masked_fill(~valid, 0))
    total = torch.zeros(n_blocks, score.shape[1], dtype=torch.float64, device=score.device)
    return total.index_add_(0, block_of, votes.double()).to(score.dtype)


def coresets(value, domain_of, n_domains: int, routing: BlockRouting, preference=None) -> torch.Tensor:
    """Stage 2, with what blocks of a domain share: the experts that a block's tokens choose from, a mask [n_blocks, E]."""
    if not routing.pooled:
        return select(value, routing, preference)
    if routing.pool_capacity is None:
        own = select(value, routing, preference)
        count = torch.zeros(n_domains, value.shape[1], dtype=torch.int32, device=value.device)
        return count.index_add_(0, domain_of, own.int())[domain_of] > 0
    pool = pools(value, domain_of, n_domains, routing.pool_capacity)[domain_of]
    return pool if routing.choose == "pool" else select(value, routing, preference, pool)


def pools(value, domain_of, n_domains: int, capacity: int) -> torch.Tensor:
    """The first experts of every domain, a mask [n_domains, E], by the sum of what the blocks give each: shares of v."""
    positive = value.clamp(min=0)
    share = (positive / (round_sum(positive) + EPS)).masked_fill(positive == torch.inf, 1)
    total = torch.zeros(n_domains, value.shape[1], dtype=torch.float64, device=value.device)
    total = total.index_add_(0, domain_of, share.double()).to(value.dtype)
    first = total.sort(descending=True, stable=True).indices[:, :capacity]
    return torch.zeros_like(total, dtype=torch.bool).scatter(1, first, True)


def share_of(coreset, other, value) -> torch.Tensor:
    """The sum of v over a coreset, over that of another one; [n_blocks]. 1 where there is nothing to lose."""
    mine, full = (round_sum(value.clamp(min=0).masked_fill(~members, 0))[:, 0] for members in (coreset, other))
    return torch.where(full > 0, mine / full, 1)


def select(value, routing: BlockRouting, preference=None, pool=None) -> torch.Tensor:
    """Stage 2: the coreset as a mask [n_blocks, E]. preference: [E], see `block_route_resident`. pool: None, or a mask
    [n_blocks, E] of the experts there are, pool_capacity in each row."""
    n_blocks, num_experts = value.shape
    if routing.select == "all":
        return torch.ones_like(value, dtype=torch.bool) if pool is None else pool
    if routing.select == "nonzero":
        return value > 0 if pool is None else (value > 0) & pool
    ranked = value if preference is None else value + preference * value.clamp(min=0)
    order = ranked.sort(descending=True, stable=True).indices
    if pool is not None:
        value = value.masked_fill(~pool, 0)
        inside = pool.gather(1, order).int().sort(descending=True, stable=True).indices
        order = order.gather(1, inside)[:, : routing.pool_capacity]
    ordered = value.gather(1, order)
    if routing.select == "top_n":
        capacity: Any = routing.capacity
        size = torch.full((n_blocks, 1), capacity, device=value.device)
    else:
        share = ordered / (round_sum(value) + EPS)
        covered = share.double().cumsum(1).to(value.dtype)
        # Compared in fp32 like the rest: the threshold is the fp32 number nearest to top_p.
        threshold = torch.tensor(routing.top_p, dtype=value.dtype, device=value.device)
        size = (covered <= threshold).sum(1, keepdim=True) + 1
        size = size.clamp(min=routing.min_experts).clamp(max=routing.max_experts or num_experts)
    first = torch.arange(order.shape[1], device=value.device) < size
    return torch.zeros_like(value, dtype=torch.bool).scatter(1, order, first)


def choose(candidates, routing: BlockRouting) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 3: the experts of each token, best first, from scores that are -inf outside its coreset; with the mask of
    the slots that hold one. Members outside the kept groups come after all members inside."""
    if routing.n_group == 1:
        return best(candidates, routing.top_k)
    grouped = candidates.unflatten(1, (routing.n_group, -1))
    if grouped.shape[2] > 1:
        two = grouped.topk(2).values
        # Without a second candidate (-inf) the group ranks last, even where the first is +inf.
        group_score = two.sum(2).masked_fill(two[:, :, 1] == -torch.inf, -torch.inf)
    else:
        group_score = torch.full(grouped.shape[:2], -torch.inf, device=candidates.device)
    order = group_score.sort(descending=True, stable=True).indices[:, : routing.topk_group]
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, order, True)
    kept = kept[:, :, None].expand_as(grouped).reshape(candidates.shape)
    inside, inside_valid = best(candidates.masked_fill(~kept, -torch.inf), routing.top_k)
    outside, outside_valid = best(candidates.masked_fill(kept, -torch.inf), routing.top_k)
    # The valid slots of both, in order: a stable sort brings them to the front.
    ids, valid = torch.cat([inside, outside], 1), torch.cat([inside_valid, outside_valid], 1)
    front = valid.int().sort(descending=True, stable=True).indices[:, : routing.top_k]
    return ids.gather(1, front), valid.gather(1, front)


def best(value, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the k largest of each row, ties to the lower id, and the mask of those that are not -inf."""
    ordered, order = value.sort(descending=True, stable=True)
    return order[:, :k], ordered[:, :k] > -torch.inf


def round_sum(value) -> torch.Tensor:
    """The sum of each row of value [n, m], [n, 1], rounded once from float64."""
    return value.double().sum(1, keepdim=True).to(value.dtype)


def rms_norm(x, weight, eps: float) -> torch.Tensor:
    """x [..., N] divided by its root mean square in fp32, then times weight [N]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x, delta, weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + delta), x + delta), all [..., N] of one dtype."""
    total = x + delta
    return rms_norm(total, weight, eps), total


def rotate(x, cos, sin) -> torch.Tensor:
    """Rotary embedding of the first dimensions of x [..., T, D], as many as cos and sin [T, R] have; the rest passes."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def turned_heads(qkv, q_weight, k_weight, eps: float, cos, sin, kv_heads: int, size: int) -> tuple[torch.Tensor, ...]:
    """The queries, keys and values in qkv [n, T, (heads + 2 kv_heads) size], each [n, heads or kv_heads, T, size]: queries
    and keys normalised by q_weight and k_weight [size] (None: not at all), then turned by cos and sin [T, R]."""
    parts = qkv.unflatten(-1, (-1, size)).transpose(1, 2)
    query, key, value = parts.split([parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None:
        query, key = rms_norm(query, q_weight, eps), rms_norm(key, k_weight, eps)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def qk_norm_rope(qkv, q_weight, k_weight, eps: float, cos, sin, rows, past, keys, values) -> torch.Tensor:
    """`turned_heads` of qkv [n, T, (heads + 2 kv_heads) D], keys and values written behind the prefix of `past` int64 [1]
    tokens, into keys and values [bsz, kv_heads, capacity, D] of the sequences `rows` int64 [n] (None: all). cos and sin:
    of every position, [past + T or more, R]. Returns the queries [n, heads, T, D]."""
    position = past + torch.arange(qkv.shape[1], device=qkv.device)
    turns = cos.index_select(0, position), sin.index_select(0, position)
    query, key, value = turned_heads(qkv, q_weight, k_weight, eps, *turns, keys.shape[1], keys.shape[3])
    rows = torch.arange(len(qkv), device=qkv.device) if rows is None else rows
    for buffer, new in ((keys, key), (values, value)):
        buffer.transpose(1, 2).index_put_((rows[:, None], position), new.transpose(1, 2))
    return query.contiguous()


def attention(query, keys, values, mask=None) -> torch.Tensor:
    """query [n, heads, T, D] on keys and values [n, kv_heads, L, D], under a mask bool [T, L]. Returns [n, T, heads D]. The
    query heads that share keys become queries of one head: no copy of the keys, and, without a mask, every fast form of
    torch's attention serves."""
    n, heads, tokens, size = query.shape
    groups = heads // keys.shape[1]
    query = query.reshape(n, keys.shape[1], groups * tokens, size)
    mask = mask if mask is None else mask.repeat(groups, 1)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return out.reshape(n, heads, tokens, size).transpose(1, 2).flatten(2)


def sees(past, begin: int, end: int, length: int, block_length: int, device) -> torch.Tensor:
    """bool [end - begin, length]: which keys the queries behind `past`, an int or int64 [1], may look at: those of their own
    block and of all before it."""
    block = (past + torch.arange(begin, end, device=device)) // block_length
    return torch.arange(length, device=device) // block_length <= block[:, None]


def block_attention(query, keys, values, past, block_length: int) -> torch.Tensor:
    """`attention` of queries [n, heads, T, D] behind `past` int64 [1] tokens, the end of a block, on keys and values in
    buffers of any length: a token sees its own block and all earlier ones."""
    seen = sees(past, 0, query.shape[2], keys.shape[2], block_length, query.device)
    return attention(query, keys, values, seen)


def greedy(logits) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token of every row of logits [T, V], int64 [T], the lowest of equal ones, and its probability,
    float32 [T]: NaN where a logit is NaN or +inf, or all are -inf."""
    probability = logits.float().softmax(1)
    token = logits.argmax(1, keepdim=True)
    return token[:, 0], probability.gather(1, token)[:, 0]


def unique_experts(topk_ids, num_experts: int, block_length: int) -> torch.Tensor:
    """Distinct experts of each block, int64 [layers, n, blocks]; topk_ids int [layers, n, T, k], -1 for none."""
    layers, n, tokens, _ = topk_ids.shape
    blocks = tokens // block_length
    # Slots without an expert are counted in a bin of their own.
    used = topk_ids.new_zeros(layers, n, blocks, num_experts + 1, dtype=torch.bool)
    used.scatter_(3, topk_ids.reshape(layers, n, blocks, -1).long() % (num_experts + 1), True)
    return used[..., :-1].sum(3)


def count_step(
    topk_ids, router_logits, rows, active, length, begin, block_length: int, forwards, blocks, unique
) -> torch.Tensor:
    """See `dmoe_ops.unmasking.count_step`."""
    found = unique_experts(topk_ids, router_logits.shape[3], block_length)
    active, prompt = active.index_select(0, rows), length.index_select(0, rows) >= begin
    for block in range(found.shape[2]):
        last = block == found.shape[2] - 1
        kinds = {2: active} if last else {0: active & prompt, 1: active & ~prompt}
        for kind, counted in kinds.items():
            unique[kind] += (found[:, :, block] * counted).sum(1)
            blocks[kind] += counted.sum()
            forwards[kind] += counted.sum()
    return router_logits.isnan().flatten(2).any(2).int()


def unmask(
    tokens, confidence, broken, rows, x, new, steps, active, begin, step, mask_id: int, eos_id: int | None,
    early_stop: bool, threshold: float,
) -> torch.Tensor:  # fmt: skip
    """See `dmoe_ops.unmasking.unmask`, which adds one to step behind this."""
    size = tokens.shape[1]
    fine = confidence.isfinite().all(1) & ~broken.bool().any(0)
    text, fresh, going = x.index_select(0, rows), new.index_select(0, rows), active.index_select(0, rows)
    position = begin + torch.arange(size, device=x.device)
    block = text.index_select(1, position)
    masked = (block == mask_id) & going[:, None]
    steps = steps.index_select(0, rows)[:, None]
    chosen = choose_tokens(confidence, masked, threshold, size // steps + (step < size % steps))
    block = torch.where(chosen, tokens, block)
    x.index_put_((rows[:, None], position), block)
    left = (block == mask_id).sum(1)
    over = torch.zeros_like(going)
    if eos_id is not None:
        text = text.index_copy(1, position, block)
        over = (fresh & (text == eos_id)).any(1)
        if early_stop:
            left = left.masked_fill(ended(text, fresh, eos_id, mask_id), 0)
    left = (left * going).masked_fill(step + 1 >= steps[:, 0], 0)  # a mask may be what the model predicts
    active.index_copy_(0, rows, left > 0)
    return torch.stack([left, over.long(), fine.long()], 1)


def choose_tokens(confidence, active, threshold: float, share) -> torch.Tensor:
    """Which tokens a step unmasks, bool [..., B]: the active ones above the threshold, or, in a block where those are
    fewer, the `share` most confident ones. share: a number, or int64 [..., 1]."""
    confidence = confidence.masked_fill(~active, -torch.inf)
    sure = confidence > threshold
    order = confidence.sort(descending=True, stable=True).indices
    first = torch.arange(order.shape[-1], device=order.device) < share
    best = torch.zeros_like(active).scatter(-1, order, first.expand_as(active)) & active
    return torch.where(sure.sum(-1, keepdim=True) >= share, sure, best)


def ended(x, new, eos_id: int, mask_id: int) -> torch.Tensor:
    """bool [bsz]: whether an eos stands in the new tokens with no mask before it."""
    eos, masks = new & (x == eos_id), new & (x == mask_id)
    return eos.any(1) & (masks.cumsum(1).gather(1, eos.int().argmax(1, keepdim=True))[:, 0] == 0)
