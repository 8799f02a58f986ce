"""The geometry of a model in the shape of Qwen3-MoE: a softmax over all experts, no shared expert, no selection bias."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from ... import _files
from .. import checkpoint
from ..config import DiffusionConfig

GENERATION = "generation_config.json"

# Names of a checkpoint's tensors, beside LLaDA2's; Qwen2, Llama and others have them too.
RENAMED: dict[str, Any] = dict(
    word_embeddings="embed_tokens",
    attention="self_attn",
    query_key_value=("q_proj", "k_proj", "v_proj"),
    dense="o_proj",
    query_layernorm="q_norm",
    key_layernorm="k_norm",
)


@dataclasses.dataclass(frozen=True)
class SeparateConfig(DiffusionConfig):
    """A config whose checkpoints have queries, keys and values apart; attention_bias is that of all projections."""

    attention_bias: bool = False

    renamed: ClassVar[dict[str, Any]] = RENAMED

    @property
    def use_qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def use_bias(self) -> bool:
        return self.attention_bias


@dataclasses.dataclass(frozen=True)
class SDARConfig(SeparateConfig):
    """SDAR-30B-A3B, and Qwen3-MoE itself, from which it was made; see `DiffusionConfig`.

    Of decoder_sparse_step layers the last has experts, unless its number (from 0 on) is in mlp_only_layers.
    """

    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple = ()
    model_type: str = "sdar_moe"

    family: ClassVar[str] = "SDAR"
    model_types: ClassVar[tuple[str, ...]] = ("sdar_moe", "qwen3_moe")
    architectures: ClassVar[tuple[str, ...]] = ("SDARMoeForCausalLM",)
    default_block: ClassVar[int] = 4
    released_ids: ClassVar[dict[int, tuple[int, int]]] = {151936: (151643, 151669)}
    files: ClassVar[tuple[str, ...]] = ("config.json", GENERATION)

    @classmethod
    def beside(cls, folder: Path) -> dict:
        """What ends a text: a chat model's config.json keeps the end of Qwen3's documents, its generation_config.json begins
        with that of a turn. Only the first counts."""
        if not _files.is_file(folder / GENERATION):
            return {}
        ends = checkpoint.read_json(folder / GENERATION).get("eos_token_id")
        ends = ends[:1] if isinstance(ends, list) else [] if ends is None else [ends]
        return dict(eos_token_id=ends[0]) if ends else {}

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return ("decoder_sparse_step", "mlp_only_layers")

    @property
    def moe_layers(self) -> int:
        dense = {layer for layer in self.mlp_only_layers if layer < self.num_hidden_layers and self._sparse(layer)}
        return self.num_hidden_layers // self.decoder_sparse_step - len(dense)

    def has_experts(self, layer: int) -> bool:
        return self._sparse(layer) and layer not in self.mlp_only_layers

    def _sparse(self, layer: int) -> bool:
        return (layer + 1) % self.decoder_sparse_step == 0

    def geometry(self) -> dict[str, Any]:
        return softmax_geometry(self, self.norm_topk_prob)


def softmax_geometry(config: DiffusionConfig, norm_topk_prob: bool) -> dict[str, Any]:
    """Of a routing without groups and scaling."""
    return dict(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        n_group=1,
        topk_group=1,
        block_size=config.block_length,
        score="softmax",
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=1.0,
    )
