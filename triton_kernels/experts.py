"""What both forms of the expert kernels share: the gate-up product with the activation, and the routing weight behind it.

The forms are dense.py, for few tokens, and gathered.py, for many. In both, weights are the left operand of the MMA (M) and
tokens the right one (N), the routing weight is multiplied into h before h is rounded, and the shared expert is one more
expert with weight 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .weights import of_expert, product

GELU_LINEAR = tl.constexpr(1.5957691216057308)  # see csrc/activation.h
GELU_CUBIC = tl.constexpr(0.07135481627260025)
HALF_GROUP = tl.constexpr(8)  # rows of gate and of up alternate in groups: both halves of a product sit in one thread


@triton.jit
def up_product(
    x_cols,
    token_mask,
    w13_ptr,
    scale_ptr,
    expert,
    first_row,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """activation(gate) * up for rows first_row .. first_row + BLOCK_I of one expert: float32 [BLOCK_I, tokens].

    x_cols: pointers [1, tokens] to the tokens' rows of x; w13_ptr: [experts, 2I, H].
    """
    r = tl.arange(0, 2 * BLOCK_I)
    i = first_row + r // (2 * HALF_GROUP) * HALF_GROUP + r % HALF_GROUP
    half = r // HALF_GROUP % 2
    w13_ptr, scale_ptr = of_expert(w13_ptr, scale_ptr, expert, 2, I, H, FORMAT)
    MASKED: tl.constexpr = I % BLOCK_I != 0 or H % BLOCK_H != 0
    acc = product(w13_ptr, scale_ptr, half, i, i < I, x_cols, token_mask, I, H, BLOCK_H, STAGES, MASKED, FORMAT)
    halves = tl.reshape(acc, [BLOCK_I // HALF_GROUP, 2, HALF_GROUP, token_mask.shape[0]])
    gate, up = tl.split(tl.permute(halves, [0, 2, 3, 1]))
    gate = tl.reshape(gate, [BLOCK_I, token_mask.shape[0]])
    up = tl.reshape(up, [BLOCK_I, token_mask.shape[0]])
    return gate / (1.0 + tl.exp(-exponent(gate, ACTIVATION))) * up


@triton.jit
def exponent(gate, ACTIVATION: tl.constexpr):
    """z of activation(gate) = gate / (1 + exp(-z))."""
    if ACTIVATION == "gelu_tanh":
        gate *= GELU_LINEAR + GELU_CUBIC * gate * gate
    return gate


@triton.jit
def local_expert(expert, map_ptr, HAS_MAP: tl.constexpr):
    """Where an expert's weights lie in w13 and w2."""
    if HAS_MAP:
        expert = tl.load(map_ptr + expert)
    return expert.to(tl.int64)


@triton.jit
def load_slots(token, token_mask, ids_ptr, weights_ptr, K: tl.constexpr, KP: tl.constexpr):
    """Each token's ids and weights, [tokens, KP]. Apart from `slot_weight`, so that the product need not wait for them."""
    slot = tl.arange(0, KP)
    at = token.to(tl.int64)[:, None] * K + slot[None, :]
    there = token_mask[:, None] & (slot < K)[None, :]
    return tl.load(ids_ptr + at, mask=there, other=-1), tl.load(weights_ptr + at, mask=there, other=0.0)


@triton.jit
def weighted(hidden, expert, ids, weights):
    """hidden [rows, tokens] times the weight that each token gives the expert. Where a token did not choose it the result is
    0, whatever stands in hidden: an overflow there must not reach the token."""
    weight = tl.sum(tl.where(ids == expert, weights, 0.0), 1)[None, :]
    return tl.where(weight != 0, hidden * weight, 0.0)
