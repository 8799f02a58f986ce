"""The geometry of a LLaDA2 model, and the routing that its weights were trained for."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ...routing import SCORES, BlockRouting
from .. import checkpoint
from ..config import NEUTRAL, OWN, DiffusionConfig, own_policy, trained_for

# Keys of config.json that the released code and SGLang's read, null ones too, with what they are here.
READ_BY_OTHERS = dict(
    rope_scaling=None,
    num_shared_experts=None,
    intermediate_size=None,
    moe_router_enable_expert_bias=True,
    router_dtype="fp32",
    attention_dropout=0.0,
    embedding_dropout=0.0,
    output_dropout=0.0,
    output_router_logits=False,
    sliding_window=None,
    max_window_layers=0,
    use_cache=False,
    use_rmsnorm=True,
)


@dataclasses.dataclass(frozen=True)
class LLaDA2Config(DiffusionConfig):
    """LLaDA2.0 to 2.2, mini and flash, and dMoE-16B; see `DiffusionConfig`."""

    first_k_dense_replace: int = 0
    num_shared_experts: int | None = None
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    score_function: str = "sigmoid"
    partial_rotary_factor: float = 0.5
    rotary_dim: int | None = None
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    norm_head: bool = False
    model_type: str = "llada2_moe"

    family: ClassVar[str] = "LLaDA2"
    model_types: ClassVar[tuple[str, ...]] = ("llada2",)
    architectures: ClassVar[tuple[str, ...]] = ("LLaDA2MoeModelLM",)
    default_policy: ClassVar[str] = "dmoe"
    released_ids: ClassVar[dict[int, tuple[int, int]]] = {157184: (156892, 156895)}
    expert_bias: ClassVar[bool] = True

    @classmethod
    def neutral(cls, values: dict) -> dict[str, tuple]:
        shared = (values.get("moe_intermediate_size"),)
        score = (values.get("score_function") or cls.score_function,)
        own = dict(moe_router_enable_expert_bias=(True,), moe_shared_expert_intermediate_size=shared)
        return NEUTRAL | own | dict(moe_router_score_function=score, scoring_func=score)

    def _check_options(self) -> None:
        super()._check_options()
        self._check(self.score_function in SCORES, "score_function", f"be one of {', '.join(SCORES)}")

    def _check_rotary(self) -> None:
        head_dim: Any = self.head_dim
        share = int(head_dim * self.partial_rotary_factor)
        self._fill("rotary_dim", share)
        must = f"be partial_rotary_factor={self.partial_rotary_factor} of head_dim={head_dim}"
        self._check(self.rotary_dim == share, "rotary_dim", must)
        fits = share % 2 == 0 and share <= head_dim
        self._check(fits, "rotary_dim", f"be even and at most head_dim={head_dim}")

    @property
    def shared_intermediate_size(self) -> int:
        return self.moe_intermediate_size * (self.num_shared_experts or 0)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return ("first_k_dense_replace",)

    @property
    def moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    def has_experts(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def geometry(self) -> dict[str, Any]:
        return geometry_of(self)

    def to_dict(self) -> dict:
        extra = dict(auto_map=checkpoint.AUTO_MAP, pad_token_id=self.eos_token_id, **READ_BY_OTHERS)
        return extra | dict(norm_topk_prob=self.geometry()["norm_topk_prob"]) | super().to_dict()


def routing_for(config, policy: str, **overrides) -> BlockRouting:
    """The policy with the experts, top-k, groups and scaling that a LLaDA2 config (ours or a Hugging Face model's) names."""
    policy = own_policy(config) if policy == OWN else policy
    return BlockRouting.for_model(policy, geometry_of(config), **{**trained_for(config, policy), **overrides})


def geometry_of(config) -> dict[str, Any]:
    ungrouped = getattr(config, "expert_capacity", None)
    return dict(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        n_group=1 if ungrouped else getattr(config, "n_group", None) or 1,
        topk_group=1 if ungrouped else getattr(config, "topk_group", None) or 1,
        score=getattr(config, "score_function", None) or "sigmoid",
        # LLaDA2's gate normalises except at top-1.
        norm_topk_prob=config.num_experts_per_tok != 1,
        routed_scaling_factor=float(getattr(config, "routed_scaling_factor", None) or 1.0),
    )
