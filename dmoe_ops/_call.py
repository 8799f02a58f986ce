"""What a call of `block_moe` carries from the op to the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .formats import ExpertWeights
from .routing import BlockRouting, RoutingResult


class LayerCall(NamedTuple):
    """One call of a MoE layer: its inputs, validated and contiguous, and its outputs, allocated and not yet filled. A tuple,
    so that the backends can compare calls field by field."""

    # inputs
    x: Tensor  # [T, H]
    gate_weight: Tensor  # [E, H]
    expert_bias: Tensor | None  # [E]
    weights: ExpertWeights
    block_offsets: Tensor | None  # int32 [n_blocks + 1]
    # settings
    seq_len: int  # T is a whole number of sequences of this length; ignored with block_offsets
    routing: BlockRouting
    # outputs
    y: Tensor | None  # [T, H]; None where the experts are a second call (`layer.route`)
    routed: RoutingResult
    router_logits: Tensor  # float32 [T, E]
    # inputs of routings over several blocks
    domain_offsets: Tensor | None = None  # int32 [n_domains + 1]; None where no block reaches another
    coreset_ids: Tensor | None = None  # int32 [n_blocks, width]
