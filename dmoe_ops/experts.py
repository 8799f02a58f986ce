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
    """Gradients of x, w13, w2 (both empty unless `of_weights`) and topk_weights, one expert at a time. Each is
    accumulated in the dtype of topk_weights and rounded once."""
    d_x, d_w13, d_w2, d_topk_weights = (
        torch.zeros_like(t) for t in gradient_fake(d_y, x, w13, w2, topk_ids, topk_weights, of_weights)
    )
    acc_type = topk_weights.dtype
    d_x_acc = torch.zeros(x.shape, dtype=acc_type, device=x.device)
    slots = topk_ids.flatten()
    order = slots.argsort(stable=True)
    counts = torch.bincount(slots.clamp(min=-1) + 1, minlength=w13.shape[0] + 1).tolist()
    for expert, chosen in enumerate(order.split(counts)[1 : w13.shape[0] + 1]):
        if not len(chosen):
            continue
        rows = chosen // topk_ids.shape[1]
        weight = topk_weights.flatten()[chosen, None]
        tokens, d_out = x[rows].to(acc_type), d_y[rows].to(acc_type)
        up_proj, down_proj = w13[expert].to(acc_type), w2[expert].to(acc_type)
        gate, up = F.linear(tokens, up_proj).chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        hidden = gate * sigmoid * up
        d_hidden = d_out @ down_proj
        d_topk_weights.view(-1)[chosen] = (d_hidden * hidden).sum(1)
        d_hidden = d_hidden * weight
        d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_gate_up = torch.cat([d_gate, d_hidden * gate * sigmoid], 1)
        d_x_acc.index_add_(0, rows, d_gate_up @ up_proj)
        if of_weights:
            d_w13[expert] = d_gate_up.T @ tokens
            d_w2[expert] = (d_out * weight).T @ hidden
    return d_x.copy_(d_x_acc), d_w13, d_w2, d_topk_weights


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
