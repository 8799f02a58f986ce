"""dmoe::moe_experts: the expert feed-forward for tokens that know their experts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import _backends, _checks, _library
from .formats import ExpertWeights


def moe_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    activations: Literal["int8"] | None = None,
    expert_map: Tensor | None = None,
    activation: Literal["silu", "gelu_tanh"] = "silu",
) -> Tensor:
    """Runs every token through its experts and adds their outputs up: y[t] = sum over j of topk_weights[t, j] * MLP(x[t]) of
    expert topk_ids[t, j], where MLP(x) = w2 @ (activation(gate @ x) * (up @ x)).

    Args:
        x: [T, H], float32, bfloat16 or float16 (float64 for gradcheck).
        w13: [E, 2I, H], the I gate rows of each expert before its I up rows. w2: [E, H, I]. Both contiguous, and either in
            the dtype of x or quantised: float8_e4m3fn, int8, or int4 packed into uint8 (layouts: `dmoe_ops.formats`).
        topk_ids: int32 or int64 [T, k]; an id of -1, or any other that is no expert's, adds nothing. The kernels take int32:
            int64 is converted once, here. topk_weights: float32 [T, k].
        w13_scale, w2_scale: the scales of quantised weights; None for others.
        activations: "int8" also rounds x and the hidden activations, row by row; for int8 weights only.
        expert_map: int32 [E_model], where topk_ids are a model's and w13 and w2 hold some of its experts: the row of each
            expert. -1 marks one that is elsewhere, which adds nothing (expert parallelism); -2 one that is not loaded, which
            no token may choose. The values are checked on the CPU only.
        activation: "silu", or "gelu_tanh": torch's gelu(gate, approximate="tanh").

    Returns:
        y [T, H] in the dtype of x, accumulated in float32 and rounded once. Differentiable once, with respect to x,
        topk_weights and weights that are not quantised; with `activations` not at all.

    Raises:
        ValueError: a wrong argument. The message names it and its value.

    `dmoe_ops.reference.moe_experts` is the contract.
    """
    _checks.activations(activations, w13)
    _checks.activation(activation)
    tensors = (x, w13, w2, topk_ids, topk_weights)
    rest = (w13_scale, w2_scale, activations is not None, expert_map, activation)
    if _library.nobody_listens(*tensors, w13_scale, w2_scale, expert_map):
        return moe_experts_impl(*tensors, *rest)
    optional = dict(w13_scale=w13_scale, w2_scale=w2_scale, expert_map=expert_map)
    _checks.tensors(x=x, w13=w13, w2=w2, topk_ids=topk_ids, topk_weights=topk_weights, optional=optional)
    return torch.ops.dmoe.moe_experts(*tensors, *rest)


def op_weights(w13: Tensor, w2: Tensor, *rest) -> ExpertWeights:
    """From the op's arguments; `rest` are those behind topk_weights, where torch leaves out trailing defaults."""
    names = ("w13_scale", "w2_scale", "quantize_activations", "expert_map", "activation")
    return ExpertWeights(w13, w2, **dict(zip(names, rest)))


def int32_ids(topk_ids: Tensor) -> Tensor:
    """The ids as kernels take them. What int32 can't hold is no expert's id, and stays none."""
    return topk_ids if topk_ids.dtype == torch.int32 else topk_ids.clamp(-1, torch.iinfo(torch.int32).max).int()


def map_of_rank(experts: int, local: int, rank: int, device) -> Tensor | None:
    """int32 [experts]: where rank `rank` of those that hold `local` experts each has an expert, or -1. None where one rank
    holds all."""
    if local == experts:
        return None
    rows = torch.arange(experts, dtype=torch.int32, device=device) - rank * local
    return rows.masked_fill((rows < 0) | (rows >= local), -1)


def moe_experts_fake(x, w13, w2, topk_ids, topk_weights, *rest):
    _checks.experts(x, op_weights(w13, w2, *rest), topk_ids, topk_weights)
    return x.new_empty(x.shape)


def moe_experts_impl(x, w13, w2, topk_ids, topk_weights, *rest):
    weights = op_weights(w13, w2, *rest)
    _checks.once(_checks.experts, x, weights, topk_ids, topk_weights)
    _checks.expert_map_values(weights)
    y = x.new_empty(x.shape)
    if not topk_ids.numel():
        return y.zero_()
    x, topk_ids, topk_weights = _library.contiguous(x, int32_ids(topk_ids), topk_weights)
    _backends.backend(x).moe_experts(x, weights, topk_ids, topk_weights, y)
    return y


def moe_experts_setup_context(ctx, inputs, output):
    x, w13, w2, topk_ids, topk_weights, *rest = inputs
    weights = op_weights(w13, w2, *rest)
    _checks.differentiable(weights, x=x, topk_weights=topk_weights)
    ctx.save_for_backward(x, w13, w2, topk_ids, topk_weights, weights.w13_scale, weights.w2_scale, weights.expert_map)
    ctx.n_inputs, ctx.activation = len(inputs), weights.activation


@_library.once_differentiable
def moe_experts_backward(ctx, d_y):
    needs_x, needs_w13, needs_w2, _, needs_topk_weights, *_ = ctx.needs_input_grad
    x, w13, w2, topk_ids, topk_weights, *scales, expert_map = ctx.saved_tensors
    rows = ExpertWeights(w13, w2, expert_map=expert_map).local(topk_ids)
    d_x, d_w13, d_w2, d_topk_weights = torch.ops.dmoe._moe_experts_backward(
        d_y, x, w13, w2, rows, topk_weights, needs_w13 or needs_w2, *scales, ctx.activation
    )
    return (
        d_x if needs_x else None,
        d_w13 if needs_w13 else None,
        d_w2 if needs_w2 else None,
        None,
        d_topk_weights if needs_topk_weights else None,
        *[None] * (ctx.n_inputs - 5),
    )


def moe_experts_gradient_fake(d_y, x, w13, w2, topk_ids, topk_weights, of_weights, *_):
    return (
        x.new_empty(x.shape),
        w13.new_empty(w13.shape if of_weights else (0,)),
        w2.new_empty(w2.shape if of_weights else (0,)),
        topk_weights.new_empty(topk_weights.shape),
    )


def moe_experts_gradient(
    d_y, x, w13, w2, topk_ids, topk_weights, of_weights: bool, w13_scale=None, w2_scale=None, activation="silu"
):
    """Gradients of x, w13, w2 (both empty unless `of_weights`) and topk_weights; topk_ids are rows of w13."""
    d_x, d_w13, d_w2, d_topk_weights = out = moe_experts_gradient_fake(
        d_y, x, w13, w2, topk_ids, topk_weights, of_weights
    )
    if not topk_ids.numel():
        return tuple(grad.zero_() for grad in out)
    d_y, x, topk_ids, topk_weights = _library.contiguous(d_y, x, int32_ids(topk_ids), topk_weights)
    wanted = (d_x, d_w13, d_w2, d_topk_weights) if of_weights else (d_x, None, None, d_topk_weights)
    weights = ExpertWeights(w13, w2, w13_scale=w13_scale, w2_scale=w2_scale, activation=activation)
    _backends.backend(x).moe_experts_backward(d_y, x, weights, topk_ids, topk_weights, wanted)
    return out


_library.define(
    "moe_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_ids, Tensor topk_weights, Tensor? w13_scale=None, "
    "Tensor? w2_scale=None, bool quantize_activations=False, Tensor? expert_map=None, str activation='silu') -> Tensor",
    moe_experts_impl,
    moe_experts_fake,
    moe_experts_setup_context,
    moe_experts_backward,
)
_library.lib.define(
    "_moe_experts_backward(Tensor d_y, Tensor x, Tensor w13, Tensor w2, Tensor topk_ids, Tensor topk_weights, "
    "bool of_weights, Tensor? w13_scale=None, Tensor? w2_scale=None, str activation='silu') -> (Tensor d_x, "
    "Tensor d_w13, Tensor d_w2, Tensor d_topk_weights)"
)
_library.implement("dmoe::_moe_experts_backward", moe_experts_gradient, moe_experts_gradient_fake)
