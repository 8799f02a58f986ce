"""dmoe::block_route: logits to coresets, expert ids and weights."""

from __future__ import annotations

import torch

from . import _backends, _checks, _library, reference
from .routing import BlockRouting, RoutingResult


def block_route(logits, expert_bias=None, *, routing: BlockRouting, block_offsets=None) -> RoutingResult:
    _checks.routing(routing)
    if _library.nobody_listens(logits, expert_bias, block_offsets):
        _checks.once(_checks.route_call, logits, expert_bias, block_offsets, routing)
        rows = logits.reshape(-1, logits.shape[-1])
        return result(run(rows, expert_bias, block_offsets, logits.shape[-2], routing))
    _checks.route_arguments(logits, expert_bias, block_offsets, routing)
    rows = logits.reshape(-1, logits.shape[-1])
    return result(torch.ops.dmoe.block_route(rows, expert_bias, block_offsets, logits.shape[-2], *routing.args()))


block_route.__doc__ = reference.block_route.__doc__


def outputs(result: RoutingResult) -> tuple:
    """A result in the order of the op's outputs: the differentiable one first, as torch.library.opcheck adds all
    outputs up in the type of the first."""
    return result.topk_weights, result.topk_ids, result.coreset_ids, result.coreset_sizes


def result(outputs) -> RoutingResult:
    topk_weights, topk_ids, coreset_ids, coreset_sizes = outputs
    return RoutingResult(topk_ids, topk_weights, coreset_ids, coreset_sizes)


def allocate(tokens, seq_len, block_offsets, routing: BlockRouting, like) -> RoutingResult:
    """Empty outputs for `tokens` rows in sequences of `seq_len`, on the device of `like`."""
    if block_offsets is not None:
        n_blocks = block_offsets.shape[0] - 1
    elif isinstance(tokens, int) and tokens == 0:
        n_blocks = 0
    else:
        n_blocks = tokens // seq_len * ((seq_len + routing.block_size - 1) // routing.block_size)
    weight_dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return RoutingResult(
        like.new_empty((tokens, routing.top_k), dtype=torch.int32),
        like.new_empty((tokens, routing.top_k), dtype=weight_dtype),
        like.new_empty((n_blocks, routing.coreset_width), dtype=torch.int32),
        like.new_empty((n_blocks,), dtype=torch.int32),
    )


def check_seq_len(seq_len, tokens) -> None:
    if tokens != 0 and (seq_len < 1 or tokens % seq_len != 0):
        raise ValueError(f"seq_len must divide T={tokens}, got {seq_len}")


def fake(logits, expert_bias, block_offsets, seq_len, *routing_args):
    routing = _library.unpack_routing(routing_args)
    _checks.route(logits, expert_bias, block_offsets, routing)
    check_seq_len(seq_len, logits.shape[0])
    return outputs(allocate(logits.shape[0], seq_len, block_offsets, routing, logits))


def impl(logits, expert_bias, block_offsets, seq_len, *routing_args):
    routing = _library.unpack_routing(routing_args)
    _checks.once(_checks.route, logits, expert_bias, block_offsets, routing)
    check_seq_len(seq_len, logits.shape[0])
    return run(logits, expert_bias, block_offsets, seq_len, routing)


def run(logits, expert_bias, block_offsets, seq_len, routing: BlockRouting) -> tuple:
    """The op on arguments that have been checked."""
    routed = allocate(logits.shape[0], seq_len, block_offsets, routing, logits)
    _checks.block_offset_values(block_offsets, logits.shape[0], routing.block_size)
    if logits.shape[0]:
        logits, expert_bias, block_offsets = _library.contiguous(logits, expert_bias, block_offsets)
        _backends.backend(logits).block_route(logits, expert_bias, block_offsets, seq_len, routing, routed)
    return outputs(routed)


def setup_context(ctx, inputs, output):
    logits = inputs[0]
    _, topk_ids, coreset_ids, coreset_sizes = output
    ctx.mark_non_differentiable(topk_ids, coreset_ids, coreset_sizes)
    ctx.routing, ctx.n_inputs = _library.unpack_routing(inputs[4:]), len(inputs)
    ctx.save_for_backward(logits, topk_ids)


def weights_backward(d_weights, logits, topk_ids, routing: BlockRouting):
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


def backward(ctx, d_weights, _ids, _coreset_ids, _coreset_sizes):
    logits, topk_ids = ctx.saved_tensors
    return weights_backward(d_weights, logits, topk_ids, ctx.routing), *[None] * (ctx.n_inputs - 1)


_library.define(
    "block_route(Tensor logits, Tensor? expert_bias, Tensor? block_offsets, SymInt seq_len, "
    f"{_library.ROUTING}) -> (Tensor topk_weights, Tensor topk_ids, Tensor coreset_ids, Tensor coreset_sizes)",
    impl,
    fake,
    setup_context,
    backward,
)
