"""A LLaDA2 as remote code for transformers: the classes and members of the released one, and its rotary embedding's defect
under transformers 5. tests/engines/test_hf.py puts it into a checkpoint's folder."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dmoe_ops import reference
from dmoe_ops.models import attention
from dmoe_ops.models.llada2 import MLP, Attention, RMSNorm, routing_for

from .configuration_llada2_moe import LLaDA2MoeConfig


class LLaDA2MoeRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        inv_freq, _ = ROPE_INIT_FUNCTIONS["default"](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.original_inv_freq = self.inv_freq

    def forward(self, x, position_ids):
        angle = (position_ids[..., None].float() * self.inv_freq).repeat(1, 1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class LLaDA2MoeGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))


class LLaDA2MoeSparseMoeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, hidden, inner = config, config.hidden_size, config.moe_intermediate_size
        self.experts = nn.ModuleList(MLP(hidden, inner, None) for _ in range(config.num_experts))
        self.gate = LLaDA2MoeGate(config)
        if config.num_shared_experts:
            self.shared_experts = MLP(hidden, inner * config.num_shared_experts, None)

    def forward(self, x):
        """Token routing, one expert after the other."""
        rows, routing = x.flatten(0, 1), routing_for(self.config, "token")
        logits = rows.float() @ self.gate.weight.float().T
        routed = reference.block_route(logits, self.gate.expert_bias.float(), routing=routing)
        y = self.shared_experts(rows) if self.config.num_shared_experts else torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            weight = (routed.topk_weights * (routed.topk_ids == e)).sum(1, keepdim=True)
            y = y + weight.to(x.dtype) * expert(rows)
        lead = x.shape[:-1]
        return y.view_as(x), (logits.view(*lead, -1), routed.topk_ids.long().view(*lead, -1))


class LLaDA2MoeDecoderLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps, None) for _ in range(2)
        )
        self.attention = Attention(config, None)
        dense = layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size, None) if dense else LLaDA2MoeSparseMoeBlock(config)

    def forward(self, x, rotary):
        def attend(own, qkv):
            return attention.attend(*own.split(qkv, *rotary), 0, 32)

        x = x + self.attention(self.input_layernorm(x)[0], attend)
        out = self.mlp(self.post_attention_layernorm(x)[0])
        return x + (out[0] if isinstance(out, tuple) else out)


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=self.config.initializer_range)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, None)
        self.rotary_emb = LLaDA2MoeRotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids):
        x = self.word_embeddings(input_ids)
        rotary = [part[0] for part in self.rotary_emb(x, torch.arange(x.shape[1])[None])]
        for layer in self.layers:
            x = layer(x, rotary)
        return self.norm(x)[0]


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)).float())
