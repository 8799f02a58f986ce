"""The layers of a model, by the names that LLaDA2 has for them. A layer's MoE is `dmoe_ops.BlockMoE`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import decoder, reference
from ..layer import BlockMoE
from ..routing import BlockRouting
from .config import DiffusionConfig


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps = eps

    def forward(self, x, delta=None):
        """(the norm of x + delta, x + delta)."""
        delta = torch.zeros_like(x) if delta is None else delta
        fused = reference if torch.is_grad_enabled() else decoder
        return fused.add_rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: DiffusionConfig, dtype):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.use_qkv_bias, dtype=dtype)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.use_bias, dtype=dtype)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        else:
            self.query_layernorm = self.key_layernorm = nn.Identity()

    def forward(self, x, attend):
        """attend: from this layer and [n, T, queries, keys and values] to what the queries see, [n, T, heads D]."""
        return self.dense(attend(self, self.query_key_value(x)))

    def norms(self) -> tuple:
        """Weights of the norms of queries and keys, or None, and their eps."""
        query, key = self.query_layernorm, self.key_layernorm
        return (query.weight, key.weight, query.eps) if isinstance(query, RMSNorm) else (None, None, 0.0)

    def split(self, qkv, cos, sin) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [n, heads, T, D], normalised and turned."""
        return reference.turned_heads(qkv, *self.norms(), cos, sin, self.kv_heads, self.head_dim)


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, dtype):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, dtype=dtype)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DiffusionConfig, routing: BlockRouting | None, dtype):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if routing is None:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype)
        else:
            self.mlp = BlockMoE(
                config.hidden_size,
                config.moe_intermediate_size,
                routing,
                shared_intermediate_size=config.shared_intermediate_size,
                expert_bias=config.expert_bias,
                dtype=dtype,
            )
            self.mlp.ids_dtype = torch.int32

    def forward(self, x, delta, attend, **coresets):
        """x, and what the layer before adds to it (None: nothing). Returns both for the next one and, from a MoE layer,
        (router_logits, topk_ids). coresets: of a MoE layer, see `BlockMoE.forward`."""
        normed, x = self.input_layernorm(x, delta)
        normed, x = self.post_attention_layernorm(x, self.attention(normed, attend))
        out, routed = self.mlp(normed, **coresets), None
        if isinstance(out, tuple):
            out, routed = out
        return x, out, routed


class Decoder(nn.Module):
    def __init__(self, config: DiffusionConfig, routing: BlockRouting, dtype):
        super().__init__()
        # Given empty: to draw it on the meta device, torch would import its compiler first.
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, _weight=embedding)
        self.layers = nn.ModuleList(
            Layer(config, routing if config.has_experts(i) else None, dtype) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)


def rotary(position, size: int, theta: float, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., T, size] of position int64 [..., T]; the angles are fp32 whatever the dtype."""
    exponent = torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size
    angle = position.float()[..., None] * (1.0 / theta**exponent)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
