"""dmoe::moe_experts: the expert feed-forward for tokens that know their experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _backends, _checks, _library


def moe_experts(x, w13, w2, topk_ids, topk_weights) -> torch.Tensor:
    """See `dmoe_ops.reference.moe_experts`."""
    _checks.tensors(x=x, w13=w13, w2=w2, topk_ids=topk_ids, topk_weights=topk_weights)
    return torch.ops.dmoe.moe_experts(x, w13, w2, topk_ids, topk_weights)


def fake(x, w13, w2, topk_ids, topk_weights):
    _checks.experts(x, w13, w2, topk_ids, topk_weights)
    return x.new_empty(x.shape)


def impl(x, w13, w2, topk_ids, topk_weights):
    y = fake(x, w13, w2, topk_ids, topk_weights)
    if y.shape[0]:
        x, topk_ids, topk_weights = _library.contiguous(x, topk_ids, topk_weights)
        _backends.backend(x).moe_experts(x, w13, w2, topk_ids, topk_weights, y)
    return y


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, d_y):
    needs_x, needs_w13, needs_w2, _, needs_topk_weights = ctx.needs_input_grad
    d_x, d_w13, d_w2, d_topk_weights = torch.ops.dmoe._moe_experts_backward(
        d_y, *ctx.saved_tensors, needs_w13 or needs_w2
    )
    return (
        d_x if needs_x else None,
        d_w13 if needs_w13 else None,
        d_w2 if needs_w2 else None,
        None,
        d_topk_weights if needs_topk_weights else None,
    )


def gradient_fake(d_y, x, w13, w2, topk_ids, topk_weights, of_weights):
    return (
        x.new_empty(x.shape),
        w13.new_empty(w13.shape if of_weights else (0,)),
        w2.new_empty(w2.shape if of_weights else (0,)),
        topk_weights.new_empty(topk_weights.shape),
    )


def gradient(d_y, x, w13, w2, topk_ids, topk_weights, of_weights: bool):
    """Gradients of x, w13, w2 (both empty unless `of_weights`) and topk_weights. Each is accumulated in the dtype of
    topk_weights and rounded once; tokens are gathered by expert, so that each product is one matrix multiplication."""
    d_x, d_w13, d_w2, d_topk_weights = gradient_fake(d_y, x, w13, w2, topk_ids, topk_weights, of_weights)
    top_k, num_experts, acc_type = topk_ids.shape[1], w13.shape[0], topk_weights.dtype
    order = topk_ids.flatten().argsort(stable=True)
    counts = torch.bincount(topk_ids.flatten().clamp(min=-1) + 1, minlength=num_experts + 1)[: num_experts + 1].tolist()
    order = order[counts[0] : sum(counts)]  # the slots that have an expert
    rows, scale = order // top_k, topk_weights.flatten()[order, None]
    used = [(e, part) for e, part in enumerate(_slices(counts[1:])) if part.stop > part.start]
    tokens, d_out = x[rows].to(acc_type), d_y[rows].to(acc_type)

    gate_up, d_hidden = (tokens.new_empty(len(rows), n) for n in (w13.shape[1], w2.shape[2]))
    for e, part in used:
        torch.mm(tokens[part], w13[e].to(acc_type).T, out=gate_up[part])
        torch.mm(d_out[part], w2[e].to(acc_type), out=d_hidden[part])
    gate, up = gate_up.chunk(2, dim=1)
    silu = F.silu(gate)
    hidden = silu * up
    d_topk_weights.zero_().view(-1)[order] = (d_hidden * hidden).sum(1)
    d_hidden *= scale
    d_gate_up = torch.cat([torch.ops.aten.silu_backward(d_hidden * up, gate), d_hidden * silu], 1)
    if of_weights:
        hidden *= scale
        d_w13.zero_()
        d_w2.zero_()
    d_slots = tokens.new_zeros(topk_ids.numel(), x.shape[1])
    for e, part in used:
        d_slots[order[part]] = d_gate_up[part] @ w13[e].to(acc_type)
        if of_weights:
            d_w13[e] = d_gate_up[part].T @ tokens[part]
            d_w2[e] = d_out[part].T @ hidden[part]
    return d_x.copy_(d_slots.view(-1, top_k, x.shape[1]).sum(1)), d_w13, d_w2, d_topk_weights


def _slices(counts):
    begin = 0
    for count in counts:
        yield slice(begin, begin + count)
        begin += count


_library.define(
    "moe_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_ids, Tensor topk_weights) -> Tensor",
    impl,
    fake,
    setup_context,
    backward,
)
_library.lib.define(
    "_moe_experts_backward(Tensor d_y, Tensor x, Tensor w13, Tensor w2, Tensor topk_ids, Tensor topk_weights, "
    "bool of_weights) -> (Tensor d_x, Tensor d_w13, Tensor d_w2, Tensor d_topk_weights)"
)
_library.lib.impl("dmoe::_moe_experts_backward", gradient, "CompositeExplicitAutograd")
torch.library.register_fake("dmoe::_moe_experts_backward", gradient_fake, lib=_library.lib)
