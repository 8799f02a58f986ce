"""What the config of every model has: its geometry, how it is checked, and the policy that the weights were trained for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..routing import BlockRouting, int_rule, is_number, plain
from . import checkpoint, hub, quantized

OWN = "own"  # the policy that a checkpoint was trained for
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
# Keys of other families' config.json that change what the layers compute, with the values (null among them) that do not. A
# key that is a field of the config is none of these.
NEUTRAL: dict[str, tuple] = dict(
    attention_bias=(False,),
    attention_multiplier=(),
    attn_logit_softcapping=(),
    clip_qkv=(),
    compression_config=(),
    embedding_multiplier=(1,),
    final_logit_softcapping=(),
    logit_scale=(1,),
    logits_scaling=(1,),
    moe_router_enable_expert_bias=(False,),
    moe_router_score_function=("softmax",),
    moe_shared_expert_intermediate_size=(0,),
    n_group=(1,),
    n_shared_experts=(0,),
    no_rope_layers=(),
    norm_head=(False,),
    norm_softmax=(False,),
    num_shared_experts=(0,),
    partial_rotary_factor=(1,),
    qk_layernorm=(True,),
    residual_multiplier=(1,),
    routed_scaling_factor=(1,),
    score_function=("softmax",),
    scoring_func=("softmax",),
    shared_expert_intermediate_size=(0,),
    swiglu_limit=(),
    topk_group=(1,),
    use_qk_norm=(True,),
    using_split_qkv_in_self_attention=(False,),
)

Config = TypeVar("Config", bound="DiffusionConfig")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Geometry of a model, by the names of its config.json. Fields without a default have to be there. A family adds its own
    fields, and gives what the decoder asks for beside them.

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
    model_type: str = ""

    # What a family says of all its models: its name, what its model_type begins with, the tokens of a block, the policy of
    # weights that were trained for none, and the ids that its released vocabulary has: size -> (eos, mask).
    family: ClassVar[str] = ""
    model_types: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[tuple[str, ...]] = ()  # the first is written
    default_block: ClassVar[int] = 32
    default_policy: ClassVar[str] = "token"
    released_ids: ClassVar[dict[int, tuple[int, int]]] = {}
    renamed: ClassVar[dict[str, Any]] = {}  # see `names.checkpoint_tensors`
    files: ClassVar[tuple[str, ...]] = ("config.json",)  # that the config is read from
    expert_bias: ClassVar[bool] = False  # whether routers have a selection bias
    sees_all: ClassVar[bool] = False  # attention of a token to all others, rather than to its block and those before it

    def __post_init__(self):
        self._check_types()
        self._check_options()
        self._fill_heads()
        self._check_rotary()
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
            elif kind == "tuple":
                self._check_tuple(field.name, value)
            else:
                what = {"str": "a string", "dict": "an object"}[kind]
                self._check(isinstance(value, str if kind == "str" else dict), field.name, f"be {what}")

    def _check_tuple(self, name: str, value) -> None:
        """A list of integers, one per layer or the numbers of some."""
        fits = isinstance(value, (list, tuple)) and all(int_rule(one, 0) is None for one in value)
        self._check(fits, name, "be a list of integers")
        object.__setattr__(self, name, tuple(int(one) for one in value))

    def _check_options(self) -> None:
        self._check(self.model_type.startswith(self.model_types), "model_type", f"be {type(self).model_type}")
        self._check(self.hidden_act in ("silu", "swish"), "hidden_act", "be silu")
        self._check(not self.use_sliding_window, "use_sliding_window", "be false (there is no sliding window here)")
        rope_type = (self.rope_scaling or {}).get("rope_type", (self.rope_scaling or {}).get("type", "default"))
        self._check(rope_type == "default", "rope_scaling", "be null or of type default")
        if self.quantization_config:
            quantized.storage_of(self.quantization_config)
        self._check(self.core_threshold is None or self.core_threshold <= 1, "core_threshold", "be in (0, 1]")
        if self.num_experts == 0 or self.moe_layers <= 0:
            said = ", ".join(f"{name}={getattr(self, name)}" for name in ("num_experts", *self.layer_kinds))
            raise ValueError(f"{said} and num_hidden_layers={self.num_hidden_layers} leave no MoE layer")
        dense = self.num_hidden_layers - self.moe_layers
        self._check(not dense or self.intermediate_size, "intermediate_size", "be given for dense layers")

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

    def _check_rotary(self) -> None:
        self._check((self.rotary_dim or 0) % 2 == 0, "head_dim", "be even")

    def _fill_tokens(self) -> None:
        for name, released in zip(
            ("eos_token_id", "mask_token_id"), self.released_ids.get(self.vocab_size, (None, None))
        ):
            self._fill(name, released)
            value = getattr(self, name)
            self._check(value is None or value < self.vocab_size, name, f"be below vocab_size={self.vocab_size}")

    @classmethod
    def from_dict(cls: type[Config], values: dict) -> Config:
        """From the contents of a config.json; null stands for the default. A key that is no field and would change what the
        layers compute is an error, and so is one of rope_parameters, in which transformers 5 keeps rope_theta and
        partial_rotary_factor; other keys are ignored."""
        fields = dataclasses.fields(cls)
        rope = values.get("rope_parameters")
        if rope is not None:
            if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
                raise ValueError(f"rope_parameters must be null or of rope_type default, got {rope!r:.200}")
            inner = {name: rope.get(name) for name in ("rope_theta", "partial_rotary_factor")}
            values = {**values, **{name: value for name, value in inner.items() if value is not None}}
        values = cls.translated(values)
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and values.get(f.name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given, got nothing")
        names = {field.name for field in fields}
        check_neutral(values, {key: allowed for key, allowed in cls.neutral(values).items() if key not in names})
        return cls(**{f.name: values[f.name] for f in fields if values.get(f.name) is not None})

    @classmethod
    def neutral(cls, values: dict) -> dict[str, tuple]:
        """`NEUTRAL`, as it is for this family and the other values of a config.json."""
        return NEUTRAL

    @classmethod
    def beside(cls, folder: Path) -> dict:
        """What other files of a folder say, which wins over config.json."""
        return {}

    @classmethod
    def translated(cls, values: dict) -> dict:
        """The contents of a config.json by the names of the fields, where those are others."""
        return values

    @classmethod
    def from_pretrained(cls: type[Config], folder: str | Path, *, revision: str | None = None) -> Config:
        """From FOLDER/config.json, or that of a model on the Hugging Face hub (owner/model). Raises ValueError that names
        the file and the key."""
        path = hub.folder_of(folder, revision, files=cls.files) / "config.json"
        values = checkpoint.read_json(path)
        try:
            return cls.from_dict(values | cls.beside(path.parent))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict:
        """What a config.json says of this model: the fields, and what others read of it."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if not self.expert_capacity:
            del fields["expert_capacity"]  # SGLang takes one that is there, 0 too, for block routing
        return dict(architectures=[self.architectures[0]]) | fields

    @property
    def storage(self) -> quantized.Storage | None:
        """How the checkpoint's quantised matrices are stored; None where it has none."""
        return quantized.storage_of(self.quantization_config) if self.quantization_config else None

    @property
    def block_length(self) -> int:
        """Tokens that are decoded in parallel unless the caller says otherwise."""
        if self.expert_capacity and self.block_size:
            return -(-32 // self.block_size) * self.block_size
        return self.block_size or self.default_block

    # What a layer is made of: a family overrides a property, or has a field of that name.

    @property
    def rotary_dim(self) -> int | None:
        """Dimensions of a head that turn."""
        return self.head_dim

    @property
    def use_qk_norm(self) -> bool:
        return True

    @property
    def use_qkv_bias(self) -> bool:
        return False

    @property
    def use_bias(self) -> bool:
        """Of the projection behind attention."""
        return False

    @property
    def norm_head(self) -> bool:
        """Whether the columns of the head are brought to length 1."""
        return False

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the expert that takes every token; 0 where there is none."""
        return 0

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The fields that say which layers have experts."""
        return ()

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return self.num_hidden_layers

    def has_experts(self, layer: int) -> bool:
        return True

    def geometry(self) -> dict[str, Any]:
        """Of the routing, by the fields of `BlockRouting`: experts, top-k, groups, scores, scaling."""
        raise NotImplementedError

    def routing(self, policy: str = OWN, **overrides) -> BlockRouting:
        """The policy with this model's experts, top-k, groups and scaling; `overrides` are fields of `BlockRouting`.
        "own": what the weights were trained for, the family's where the config does not say."""
        policy = own_policy(self) if policy == OWN else policy
        return BlockRouting.for_model(policy, self.geometry(), **{**trained_for(self, policy), **overrides})

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def parameters(self) -> int:
        """Weights of the model, selection biases among them."""
        hidden, head_dim = self.hidden_size, self.head_dim or 0
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or 0
        width = (heads + 2 * kv_heads) * head_dim
        layer = hidden * (width + heads * head_dim) + 2 * hidden + 2 * head_dim * self.use_qk_norm
        layer += width * self.use_qkv_bias + hidden * self.use_bias
        sparse = self.num_experts * (self.expert_parameters + hidden + self.expert_bias)
        sparse += 3 * hidden * self.shared_intermediate_size
        dense = 3 * hidden * (self.intermediate_size or 0)
        ends = hidden * self.vocab_size * (1 if self.tie_word_embeddings else 2) + hidden
        return self.num_hidden_layers * (layer + dense) + self.moe_layers * (sparse - dense) + ends


def check_neutral(values: dict, neutral: dict[str, tuple]) -> None:
    """Raises ValueError, naming the key, for one that changes what the layers compute."""
    for key, allowed in neutral.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            said = " or ".join(["null", *map(json.dumps, allowed)])
            raise ValueError(f"{key} must be {said} (others change what the layers compute), got {value!r:.200}")
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError(f"layer_types must all be full_attention, got {kinds!r:.200}")


def own_policy(config, default: str = "dmoe") -> str:
    """The policy that the weights were trained for, or, where the config (ours, a Hugging Face model's, or None) names
    none, that of its family; `default` where it has none either."""
    threshold, capacity = (getattr(config, name, None) for name in ("core_threshold", "expert_capacity"))
    if capacity and threshold is not None:
        raise ValueError(
            f"policy must be given where a config has core_threshold={threshold} and expert_capacity={capacity}, got {OWN!r}"
        )
    if capacity:
        return "capacity"
    return "dmoe" if threshold is not None else getattr(config, "default_policy", default)


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
