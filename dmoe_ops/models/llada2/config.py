"""The geometry of a LLaDA2 model, and the routing that its weights were trained for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ...routing import SCORES, BlockRouting, int_rule, is_number, plain
from .. import checkpoint, hub, quantized

RELEASED_VOCAB_SIZE, RELEASED_EOS, RELEASED_MASK = 157184, 156892, 156895
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
MAY_BE_ZERO = {
    "num_key_value_heads",
    "num_experts",
    "first_k_dense_replace",
    "num_shared_experts",
    "eos_token_id",
    "mask_token_id",
    "expert_capacity",
    "min_experts",
}
OWN = "own"  # the policy that a checkpoint was trained for


@dataclasses.dataclass(frozen=True)
class LLaDA2Config:
    """Geometry of a LLaDA2 model, by the names of its config.json. Fields without a default have to be there.

    The routing that the weights were trained for: core_threshold is the p of policy dmoe (with min_experts, if given);
    expert_capacity, where it isn't 0, the capacity of policy capacity, whose model has no groups. block_size: tokens of a
    block, of the routing with expert_capacity, else of the decode.

    Raises ValueError, naming the field and its value, for a value that is out of range or contradicts another, and for an
    option that is not supported (sliding window, scaled rotary embedding, activations other than SiLU, quantisation other
    than that of `dmoe_ops.models.quantized`).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
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
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 16384
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    rope_scaling: dict | None = None
    eos_token_id: int | None = None
    mask_token_id: int | None = None
    core_threshold: float | None = None
    min_experts: int | None = None
    expert_capacity: int = 0
    block_size: int | None = None
    quantization_config: dict | None = None
    model_type: str = "llada2_moe"

    def __post_init__(self):
        self._check_types()
        self._check_options()
        self._fill_heads()
        self._fill_tokens()
        self.routing("token")  # what it says of experts, top-k and groups

    def _fill(self, name: str, value) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check(self, fits, name: str, must: str) -> None:
        if not fits:
            raise ValueError(f"{name} must {must}, got {getattr(self, name)!r}")

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
            kind = str(field.type).removesuffix(" | None")
            value = getattr(self, field.name)
            if value is None and field.type != kind:
                continue
            if kind == "int":
                least = 0 if field.name in MAY_BE_ZERO else 1
                rule = int_rule(value, least)
                self._check(rule is None, field.name, f"be {rule}")
            elif kind == "float":
                fits = is_number(value) and math.isfinite(value) and value > 0
                self._check(fits, field.name, "be a positive number")
            elif kind == "bool":
                self._check(isinstance(value, bool), field.name, "be true or false")
            else:
                what = {"str": "a string", "dict": "an object"}[kind]
                self._check(isinstance(value, str if kind == "str" else dict), field.name, f"be {what}")

    def _check_options(self) -> None:
        self._check(self.model_type.startswith("llada2"), "model_type", "be llada2_moe")
        self._check(self.hidden_act in ("silu", "swish"), "hidden_act", "be silu")
        self._check(not self.use_sliding_window, "use_sliding_window", "be false (there is no sliding window here)")
        rope_type = (self.rope_scaling or {}).get("rope_type", (self.rope_scaling or {}).get("type", "default"))
        self._check(rope_type == "default", "rope_scaling", "be null or of type default")
        if self.quantization_config:
            quantized.storage_of(self.quantization_config)
        self._check(self.core_threshold is None or self.core_threshold <= 1, "core_threshold", "be in (0, 1]")
        self._check(self.score_function in SCORES, "score_function", f"be one of {', '.join(SCORES)}")
        if self.num_experts == 0 or self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"num_experts={self.num_experts}, first_k_dense_replace={self.first_k_dense_replace} and "
                f"num_hidden_layers={self.num_hidden_layers} leave no MoE layer"
            )
        self._check(
            not self.first_k_dense_replace or self.intermediate_size, "intermediate_size", "be given for dense layers"
        )

    def _fill_heads(self) -> None:
        """Sizes of heads that were not given, from those that were."""
        if self.head_dim is None:
            fits = self.hidden_size % self.num_attention_heads == 0
            must = f"divide hidden_size={self.hidden_size} where head_dim is not given"
            self._check(fits, "num_attention_heads", must)
        self._fill("head_dim", self.hidden_size // self.num_attention_heads)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", kv_heads)
        self._check(heads % kv_heads == 0, "num_key_value_heads", f"divide num_attention_heads={heads}")
        head_dim: Any = self.head_dim
        share = int(head_dim * self.partial_rotary_factor)
        self._fill("rotary_dim", share)
        must = f"be partial_rotary_factor={self.partial_rotary_factor} of head_dim={head_dim}"
        self._check(self.rotary_dim == share, "rotary_dim", must)
        fits = share % 2 == 0 and share <= head_dim
        self._check(fits, "rotary_dim", f"be even and at most head_dim={head_dim}")

    def _fill_tokens(self) -> None:
        for name in ("eos_token_id", "mask_token_id"):
            if self.vocab_size == RELEASED_VOCAB_SIZE:
                self._fill(name, RELEASED_EOS if name == "eos_token_id" else RELEASED_MASK)
            value = getattr(self, name)
            self._check(value is None or value < self.vocab_size, name, f"be below vocab_size={self.vocab_size}")

    @classmethod
    def from_dict(cls, values: dict) -> LLaDA2Config:
        """From the contents of a config.json; null stands for the default. Keys that are not fields are ignored, but for
        rope_parameters, in which transformers 5 keeps rope_theta and partial_rotary_factor, and compression_config."""
        fields = dataclasses.fields(cls)
        rope = values.get("rope_parameters")
        if rope is not None:
            if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
                raise ValueError(f"rope_parameters must be null or of rope_type default, got {rope!r:.200}")
            inner = {name: rope.get(name) for name in ("rope_theta", "partial_rotary_factor")}
            values = {**values, **{name: value for name, value in inner.items() if value is not None}}
        if values.get("compression_config"):
            raise ValueError(f"compression_config must be null, got {values['compression_config']!r:.200}")
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and values.get(f.name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given, got nothing")
        return cls(**{f.name: values[f.name] for f in fields if values.get(f.name) is not None})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> LLaDA2Config:
        """From FOLDER/config.json, or that of a model on the Hugging Face hub (owner/model). Raises ValueError that names
        the file and the key."""
        path = hub.folder_of(folder, revision, files=("config.json",)) / "config.json"
        values = checkpoint.read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def storage(self) -> quantized.Storage | None:
        """How the checkpoint's quantised matrices are stored; None where it has none."""
        return quantized.storage_of(self.quantization_config) if self.quantization_config else None

    @property
    def block_length(self) -> int:
        """Tokens that are decoded in parallel unless the caller says otherwise."""
        if self.expert_capacity and self.block_size:
            return -(-32 // self.block_size) * self.block_size
        return self.block_size or 32

    def routing(self, policy: str = OWN, **overrides) -> BlockRouting:
        """The policy with this model's experts, top-k, groups and scaling; `overrides` are fields of `BlockRouting`.
        "own": what the weights were trained for, dmoe where the config does not say."""
        return routing_for(self, policy, **overrides)


def routing_for(config, policy: str, **overrides) -> BlockRouting:
    """The policy with the experts, top-k, groups and scaling that a LLaDA2 config (ours or a Hugging Face model's) names."""
    policy = own_policy(config) if policy == OWN else policy
    ungrouped = getattr(config, "expert_capacity", None)
    geometry = dict(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        n_group=1 if ungrouped else getattr(config, "n_group", None) or 1,
        topk_group=1 if ungrouped else getattr(config, "topk_group", None) or 1,
        score=getattr(config, "score_function", None) or "sigmoid",
        # LLaDA2's gate normalises except at top-1.
        norm_topk_prob=config.num_experts_per_tok != 1,
        routed_scaling_factor=float(getattr(config, "routed_scaling_factor", None) or 1.0),
    )
    return BlockRouting.for_model(policy, geometry, **{**trained_for(config, policy), **overrides})


def own_policy(config) -> str:
    """The policy that the weights were trained for, or dmoe where the config (ours, a Hugging Face model's, or None) names
    none."""
    threshold, capacity = (getattr(config, name, None) for name in ("core_threshold", "expert_capacity"))
    if capacity and threshold is not None:
        raise ValueError(
            f"policy must be given where a config has core_threshold={threshold} and expert_capacity={capacity}, got {OWN!r}"
        )
    return "capacity" if capacity else "dmoe"


def trained_for(config, policy: str) -> dict:
    """The settings of a policy that a config (ours or a Hugging Face model's) gives, by the fields of `BlockRouting`."""

    def given(**fields):
        values = {field: getattr(config, name, None) for field, name in fields.items()}
        return {field: value for field, value in values.items() if value is not None}

    if policy == "dmoe" and getattr(config, "core_threshold", None):
        return given(top_p="core_threshold", min_experts="min_experts", block_size="block_size")
    if policy == "capacity" and getattr(config, "expert_capacity", None):
        return dict(block_size=32) | given(capacity="expert_capacity", block_size="block_size")
    return {}
