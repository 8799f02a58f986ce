"""dmoe::block_route: logits to coresets, expert ids and weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backends, _checks, _library, reference
from .routing import BlockRouting, RoutingResult, count_blocks


def block_route(
    logits: Tensor,
    expert_bias: Tensor | None = None,
    *,
    routing: BlockRouting,
    block_offsets: Tensor | None = None,
    domain_offsets: Tensor | None = None,
    coreset_ids: Tensor | None = None,
) -> RoutingResult:
    """Picks a coreset of experts for every block of tokens, then the experts of every token inside its block's coreset.

    Args:
        logits: router logits, float32 [T, E] or [bsz, seq, E] (float64 for gradcheck). Each sequence is cut into blocks of
            `routing.block_size` tokens; its last block may be shorter. An expert whose logit is NaN is never chosen.
        expert_bias: float32 [E], added to the scores that select. It does not enter the weights.
        routing: the settings; `BlockRouting.policy("dmoe")` has those of the paper.
        block_offsets: int32 [n_blocks + 1], for blocks of different lengths: block i holds the tokens from offsets[i] up to
            offsets[i + 1]. The values must rise from 0 to T by at most `block_size`, which is checked on the CPU only.
        domain_offsets: int32 or int64 [n_domains + 1], for blocks that share a pool of experts: domain i is the blocks from
            offsets[i] up to offsets[i + 1]. What they share is `pool_capacity` and `choose` of the routing; a block's result
            then depends on the others of its domain. None: every block is alone.
        coreset_ids: int32 [n_blocks, width], coresets to use in place of those that `routing` would select; -1 is none.

    Returns:
        `RoutingResult`, with T = bsz * seq rows. Only topk_weights has a gradient, with respect to logits.

    Raises:
        ValueError: a wrong shape, dtype, device or offset. The message names the argument and its value.

    `dmoe_ops.reference.block_route` is the contract. Source: dMoE (arXiv 2605.30876), Algorithm 1.
    """
    _checks.routing(routing)
    shared = domain_offsets, coreset_ids
    if _library.nobody_listens(logits, expert_bias, block_offsets, *shared):
        _checks.once(_checks.route_call, logits, expert_bias, block_offsets, routing)
        rows = logits.reshape(-1, logits.shape[-1])
        return routing_result(block_route_run(rows, expert_bias, block_offsets, logits.shape[-2], routing, *shared))
    _checks.route_arguments(
        logits, expert_bias, block_offsets, routing, domain_offsets=domain_offsets, coreset_ids=coreset_ids
    )
    rows = logits.reshape(-1, logits.shape[-1])
    settings = (*routing.args(), *routing.pool_args())
    outputs = torch.ops.dmoe.block_route(rows, expert_bias, block_offsets, logits.shape[-2], *settings, *shared)
    return routing_result(outputs)


def route_outputs(result: RoutingResult) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A result in the order of the op's outputs: the differentiable one first, as torch.library.opcheck adds all
    outputs up in the type of the first."""
    return result.topk_weights, result.topk_ids, result.coreset_ids, result.coreset_sizes


def routing_result(outputs: Sequence[Tensor]) -> RoutingResult:
    """The inverse of `route_outputs`."""
    topk_weights, topk_ids, coreset_ids, coreset_sizes = outputs
    return RoutingResult(topk_ids, topk_weights, coreset_ids, coreset_sizes)


def allocate_routing(
    tokens: int,
    seq_len: int,
    block_offsets: Tensor | None,
    routing: BlockRouting,
    like: Tensor,
    domain_offsets: Tensor | None = None,
    coreset_ids: Tensor | None = None,
) -> RoutingResult:
    """Empty outputs for `tokens` rows in sequences of `seq_len`, on the device of `like`; checks what blocks share, whose
    shapes depend on the number of blocks."""
    n_blocks = count_blocks(tokens, seq_len, block_offsets, routing.block_size)
    if domain_offsets is not None or coreset_ids is not None:
        _checks.sharing(domain_offsets, coreset_ids, n_blocks, like.device)
    width = routing.coreset_width if coreset_ids is None else coreset_ids.shape[1]
    weight_dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return RoutingResult(
        like.new_empty((tokens, routing.top_k), dtype=torch.int32),
        like.new_empty((tokens, routing.top_k), dtype=weight_dtype),
        like.new_empty((n_blocks, width), dtype=torch.int32),
        like.new_empty((n_blocks,), dtype=torch.int32),
    )


def sharing_for_kernels(
    routing: BlockRouting, domain_offsets: Tensor | None, coreset_ids: Tensor | None, result: RoutingResult
) -> tuple[Tensor | None, Tensor | None]:
    """(domain_offsets in int32 where blocks may reach each other, else None; coreset_ids), contiguous. Looks at the values
    of a CPU's tensors."""
    if domain_offsets is None and coreset_ids is None and routing.pool_capacity is None:
        return None, None
    n_blocks = result.coreset_sizes.shape[0]
    _checks.sharing_values(domain_offsets, coreset_ids, n_blocks, routing.num_experts)
    if coreset_ids is not None:
        return None, coreset_ids.contiguous()
    if not routing.pooled:
        return None, None
    if domain_offsets is None:
        return torch.arange(n_blocks + 1, dtype=torch.int32, device=result.coreset_sizes.device), None
    return domain_offsets.int().contiguous(), None


def check_seq_len(seq_len: int, tokens: int) -> None:
    if tokens != 0 and (seq_len < 1 or tokens % seq_len != 0):
        raise ValueError(f"seq_len must divide T={tokens}, got {seq_len}")


def op_settings(args: tuple) -> tuple[BlockRouting, Tensor | None, Tensor | None]:
    """From the op's arguments behind seq_len: (routing, domain_offsets, coreset_ids)."""
    pool_args, domain_offsets, coreset_ids = _library.unpack_sharing(args[_library.N_ROUTING :])
    return _library.unpack_routing(args[: _library.N_ROUTING], pool_args), domain_offsets, coreset_ids


def block_route_fake(logits, expert_bias, block_offsets, seq_len, *settings):
    routing, *shared = op_settings(settings)
    _checks.route(logits, expert_bias, block_offsets, routing)
    check_seq_len(seq_len, logits.shape[0])
    return route_outputs(allocate_routing(logits.shape[0], seq_len, block_offsets, routing, logits, *shared))


def block_route_impl(logits, expert_bias, block_offsets, seq_len, *settings):
    routing, *shared = op_settings(settings)
    _checks.once(_checks.route, logits, expert_bias, block_offsets, routing)
    check_seq_len(seq_len, logits.shape[0])
    return block_route_run(logits, expert_bias, block_offsets, seq_len, routing, *shared)


def block_route_run(
    logits: Tensor,
    expert_bias: Tensor | None,
    block_offsets: Tensor | None,
    seq_len: int,
    routing: BlockRouting,
    domain_offsets: Tensor | None,
    coreset_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op on arguments that have been checked."""
    result = allocate_routing(logits.shape[0], seq_len, block_offsets, routing, logits, domain_offsets, coreset_ids)
    _checks.block_offset_values(block_offsets, logits.shape[0], routing.block_size)
    shared = sharing_for_kernels(routing, domain_offsets, coreset_ids, result)
    if logits.shape[0]:
        logits, expert_bias, block_offsets = _library.contiguous(logits, expert_bias, block_offsets)
        _backends.backend(logits).block_route(logits, expert_bias, block_offsets, seq_len, routing, result, *shared)
    return route_outputs(result)


def block_route_setup_context(ctx, inputs, output):
    logits = inputs[0]
    _, topk_ids, coreset_ids, coreset_sizes = output
    ctx.mark_non_differentiable(topk_ids, coreset_ids, coreset_sizes)
    (ctx.routing, *_), ctx.n_inputs = op_settings(inputs[4:]), len(inputs)
    ctx.save_for_backward(logits, topk_ids)


def topk_weights_backward(d_weights: Tensor, logits: Tensor, topk_ids: Tensor, routing: BlockRouting) -> Tensor:
    """d logits [T, E] of the weights of the chosen experts; the selection passes no gradient."""
    chosen, valid = topk_ids.clamp(min=0).long(), topk_ids >= 0
    score = reference.scores(logits, routing.score)
    picked = score.gather(1, chosen) * valid
    d_picked = d_weights * routing.routed_scaling_factor * valid
    if routing.norm_topk_prob:
        total = picked.sum(1, keepdim=True) + reference.EPS
        d_picked = (d_picked - (d_picked * picked).sum(1, keepdim=True) / total) / total * valid
    if routing.score == "sigmoid":
        return torch.zeros_like(logits).scatter_add(1, chosen, d_picked * picked * (1 - picked))
    d_score = torch.zeros_like(logits).scatter_add(1, chosen, d_picked)
    return score * (d_score - (d_score * score).sum(1, keepdim=True))


def block_route_backward(ctx, d_weights, _ids, _coreset_ids, _coreset_sizes):
    logits, topk_ids = ctx.saved_tensors
    return topk_weights_backward(d_weights, logits, topk_ids, ctx.routing), *[None] * (ctx.n_inputs - 1)


_library.define(
    "block_route(Tensor logits, Tensor? expert_bias, Tensor? block_offsets, SymInt seq_len, "
    f"{_library.ROUTING}, {_library.SHARING}) -> (Tensor topk_weights, Tensor topk_ids, Tensor coreset_ids, "
    "Tensor coreset_sizes)",
    block_route_impl,
    block_route_fake,
    block_route_setup_context,
    block_route_backward,
)
