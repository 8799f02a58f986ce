"""PooledMoE: a `BlockMoE` whose routed experts lie in files, and in an `ExpertMemory` while they are used."""

from __future__ import annotations

import functools

import torch
from torch import nn

from . import layer, reference
from .expert_memory import IN_FILES, ExpertMemory
from .formats import ExpertWeights
from .layer import BlockMoE
from .routing import RoutingResult

POOLED = ("w13", "w2", "w13_scale", "w2_scale")


class PooledMoE(BlockMoE):
    """Takes the place of a `BlockMoE`: its parameters and buffers, but for those of the routed experts, which are layer
    `index` of `memory`. w13 and w2, with their scales, are the pool's slots. Same outputs, to the bit; no gradients.

    following: for `MemorySettings.ahead` "gate": the `PooledMoE` of the next layer, and the norms before this and that one.

    state_dict, casts, other devices, quantize and training are refused by a ValueError.
    """

    def __init__(self, moe: BlockMoE, memory: ExpertMemory, index: int):
        nn.Module.__init__(self)
        self.routing, self.memory, self.index = moe.routing, memory, index
        self.following: tuple[PooledMoE, nn.Module, nn.Module] | None = None
        self.activation, self.ids_dtype = moe.activation, moe.ids_dtype
        for name, parameter in moe._parameters.items():
            if name not in POOLED:
                self.register_parameter(name, parameter)
        for name, buffer in moe._buffers.items():
            if name not in POOLED:
                self.register_buffer(name, buffer, persistent=name not in moe._non_persistent_buffers_set)
        for name in ("shared_w13", "shared_w2"):
            if not hasattr(self, name):  # there is no shared expert
                setattr(self, name, None)
        for name, pool in zip(POOLED, memory.weights):
            setattr(self, name, pool)

    def compute(
        self, x, expert_bias, block_offsets, domain_offsets=None, coreset_ids=None
    ) -> tuple[torch.Tensor, RoutingResult, torch.Tensor]:
        shared = (self.shared_w13, self.shared_w2)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, self.gate_weight, *shared)):
            raise ValueError(f"a gradient needs all experts in memory: {IN_FILES}; use torch.no_grad()")
        routed = self.route(x, expert_bias, block_offsets, domain_offsets, coreset_ids)
        if self.memory.settings.resident_bias and x.numel() and coreset_ids is None:
            self.prefer_resident(x, expert_bias, block_offsets, domain_offsets, routed)
        foresees = self.following is not None and coreset_ids is None
        expected = functools.partial(self.expected, x, block_offsets, domain_offsets) if foresees else None
        with self.memory.visit(self.index, routed.result.topk_ids, expected) as (expert_map, waves):
            y = layer.experts(x, self.weights_at(expert_map), routed, waves)
        return y, routed.result, routed.router_logits

    def route(self, x, expert_bias, block_offsets, domain_offsets=None, coreset_ids=None) -> layer.Routed:
        return layer.route(
            x,
            self.gate_weight,
            expert_bias,
            self.weights_at(torch.empty(self.routing.num_experts, dtype=torch.int32, device=x.device)),
            routing=self.routing,
            block_offsets=block_offsets,
            domain_offsets=domain_offsets,
            coreset_ids=coreset_ids,
        )

    def expected(self, x, block_offsets, domain_offsets) -> torch.Tensor:
        """topk_ids that the next layer would have if nothing were added to the residual in between."""
        following, norm, next_norm = self.following
        scale = (next_norm.weight / norm.weight).nan_to_num(0, 0, 0)
        return following.route(x * scale, following.expert_bias, block_offsets, domain_offsets).result.topk_ids

    def weights_at(self, expert_map) -> ExpertWeights:
        return ExpertWeights(
            self.w13,
            self.w2,
            self.shared_w13,
            self.shared_w2,
            self.w13_scale,
            self.w2_scale,
            self.shared_w13_scale,
            self.shared_w2_scale,
            expert_map=expert_map,
            activation=self.activation,
        )

    def prefer_resident(self, x, expert_bias, block_offsets, domain_offsets, routed) -> None:
        """Routes again, with what is in memory preferred."""
        memory = self.memory
        result, kept = reference.block_route_resident(
            routed.router_logits.view(*x.shape[:-1], -1),
            expert_bias,
            resident=memory.resident(self.index),
            resident_bias=memory.settings.resident_bias,
            routing=self.routing,
            block_offsets=block_offsets,
            domain_offsets=domain_offsets,
        )
        for written, value in zip(routed.result, result):
            written.copy_(value)
        memory.add_kept_mass(kept)

    def _apply(self, fn, recurse=True):
        self.memory.check_move(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> PooledMoE:
        if mode:
            raise ValueError(f"training needs all experts in memory: {IN_FILES}")
        return super().train(mode)

    def quantize(self, form: str, *, shared: bool = False) -> PooledMoE:
        raise ValueError(f"quantize the checkpoint in place of the model (dmoe convert): {IN_FILES}")

    def _save_to_state_dict(self, *args, **kwargs):
        raise ValueError(f"a state dict or a saved model would lack them: {IN_FILES}; copy those")

    def _load_from_state_dict(self, *args, **kwargs):
        raise ValueError(f"a state dict has no place for them: {IN_FILES}")
