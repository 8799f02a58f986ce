"""LLaDA2: a block-diffusion transformer with sparse MoE layers, on `BlockMoE`.

Facts from the released code and checkpoints (LLaDA2.0-mini, LLaDA2.0-flash, dMoE-16B); tensor names are theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import decoder, reference
from ..layer import BlockMoE
from ..routing import SCORES, BlockRouting, int_rule, is_int, is_number, plain
from . import attention, checkpoint, decoding, hub, quantized
from .attention import KVCache
from .quantized import Matrix

# What LLaDA2.0's generate() falls back to: its config.json names neither token.
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
        def fill(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        def check(fits: bool, name: str, must: str):
            if not fits:
                raise ValueError(f"{name} must {must}, got {getattr(self, name)!r}")

        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
            kind = field.type.removesuffix(" | None")
            value = getattr(self, field.name)
            if value is None and field.type != kind:
                continue
            if kind == "int":
                least = 0 if field.name in MAY_BE_ZERO else 1
                rule = int_rule(value, least)
                check(rule is None, field.name, f"be {rule}")
            elif kind == "float":
                fits = is_number(value) and math.isfinite(value) and value > 0
                check(fits, field.name, "be a positive number")
            elif kind == "bool":
                check(isinstance(value, bool), field.name, "be true or false")
            else:
                what = {"str": "a string", "dict": "an object"}[kind]
                check(isinstance(value, str if kind == "str" else dict), field.name, f"be {what}")

        check(self.model_type.startswith("llada2"), "model_type", "be llada2_moe")
        check(self.hidden_act in ("silu", "swish"), "hidden_act", "be silu")
        check(not self.use_sliding_window, "use_sliding_window", "be false (there is no sliding window here)")
        rope_type = (self.rope_scaling or {}).get("rope_type", (self.rope_scaling or {}).get("type", "default"))
        check(rope_type == "default", "rope_scaling", "be null or of type default")
        if self.quantization_config:
            quantized.storage_of(self.quantization_config)
        check(self.core_threshold is None or self.core_threshold <= 1, "core_threshold", "be in (0, 1]")
        check(self.score_function in SCORES, "score_function", f"be one of {', '.join(SCORES)}")
        if self.num_experts == 0 or self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"num_experts={self.num_experts}, first_k_dense_replace={self.first_k_dense_replace} and "
                f"num_hidden_layers={self.num_hidden_layers} leave no MoE layer"
            )
        check(
            not self.first_k_dense_replace or self.intermediate_size, "intermediate_size", "be given for dense layers"
        )
        if self.head_dim is None:
            fits = self.hidden_size % self.num_attention_heads == 0
            check(fits, "num_attention_heads", f"divide hidden_size={self.hidden_size} where head_dim is not given")
        fill("head_dim", self.hidden_size // self.num_attention_heads)
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        fits = self.num_attention_heads % self.num_key_value_heads == 0
        check(fits, "num_key_value_heads", f"divide num_attention_heads={self.num_attention_heads}")
        fill("rotary_dim", int(self.head_dim * self.partial_rotary_factor))
        fits = self.rotary_dim == int(self.head_dim * self.partial_rotary_factor)
        check(fits, "rotary_dim", f"be partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim}")
        fits = self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim
        check(fits, "rotary_dim", f"be even and at most head_dim={self.head_dim}")
        for name in ("eos_token_id", "mask_token_id"):
            if self.vocab_size == RELEASED_VOCAB_SIZE:
                fill(name, RELEASED_EOS if name == "eos_token_id" else RELEASED_MASK)
            value = getattr(self, name)
            check(value is None or value < self.vocab_size, name, f"be below vocab_size={self.vocab_size}")
        self.routing("token")  # what it says of experts, top-k and groups

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
    def from_pretrained(cls, folder, *, revision: str | None = None) -> LLaDA2Config:
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
    return BlockRouting.of_model(policy, geometry, **{**trained_for(config, policy), **overrides})


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


class LLaDA2Output(NamedTuple):
    """logits: float32 [bsz, T, vocab]. routed: of each MoE layer in order, (router_logits float32 [bsz, T, E], topk_ids
    int64 [bsz, T, k])."""

    logits: torch.Tensor
    routed: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps = eps

    def forward(self, x, delta=None):
        """(the norm of x + delta, x + delta)."""
        if delta is None:
            return reference.rms_norm(x, self.weight, self.eps), x
        fused = reference if torch.is_grad_enabled() else decoder
        return fused.add_rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LLaDA2Config, dtype):
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
        """attend: from this layer and [n, T, queries, keys and values] to what the queries see, [n, heads, T, D]."""
        return self.dense(attend(self, self.query_key_value(x)).transpose(1, 2).flatten(2))

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
    def __init__(self, config: LLaDA2Config, routing: BlockRouting | None, dtype):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if routing is None:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype)
        else:
            shared = config.moe_intermediate_size * (config.num_shared_experts or 0)
            self.mlp = BlockMoE(
                config.hidden_size,
                config.moe_intermediate_size,
                routing,
                shared_intermediate_size=shared,
                dtype=dtype,
            )

    def forward(self, x, delta, attend):
        """x, and what the layer before adds to it (None: nothing). Returns both for the next one and, from a MoE layer,
        (router_logits, topk_ids)."""
        normed, x = self.input_layernorm(x, delta)
        normed, x = self.post_attention_layernorm(x, self.attention(normed, attend))
        out, routed = self.mlp(normed), None
        if isinstance(out, tuple):
            out, routed = out
        return x, out, routed


class Decoder(nn.Module):
    def __init__(self, config: LLaDA2Config, routing: BlockRouting, dtype):
        super().__init__()
        # Given empty: to draw it on the meta device, torch would import its compiler first.
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, _weight=embedding)
        dense = config.first_k_dense_replace
        self.layers = nn.ModuleList(
            Layer(config, routing if i >= dense else None, dtype) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)


class LLaDA2ForDiffusion(nn.Module):
    """A LLaDA2 model that routes by block.

    config: `LLaDA2Config`; routing: see `set_routing`; dtype of the weights (by default torch's). The weights are created
    empty and as floats: `from_pretrained` reads them, `init_weights` draws them, `quantize` rounds the experts.
    """

    def __init__(self, config: LLaDA2Config, routing: BlockRouting | str = OWN, *, dtype=None, device=None):
        super().__init__()
        self.config = config
        with torch.device("meta"):  # no time for an initialisation that nobody reads
            self.model = Decoder(config, config.routing("token"), dtype)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.to_empty(device=device or torch.get_default_device())
        self.set_routing(routing)

    generate = decoding.generate
    stream = decoding.stream

    @property
    def device(self) -> torch.device:
        return self.model.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.word_embeddings.weight.dtype

    @property
    def moe_layers(self) -> list[nn.Module]:
        return [layer.mlp for layer in self.model.layers[self.config.first_k_dense_replace :]]

    @property
    def bytes_per_expert(self) -> int:
        """As it is held, scales included; the mean over the layers, where only some are quantised."""
        sizes = [moe.bytes_per_expert for moe in self.moe_layers]
        return round(sum(sizes) / len(sizes))

    def set_routing(self, routing: BlockRouting | str, **overrides) -> None:
        """Routes all MoE layers by a `BlockRouting`, taken as it stands, or by a policy's name with `overrides`; "own" is
        the policy that the weights were trained for (`LLaDA2Config`). A policy's blocks are those of the decode
        (`block_length`) unless `block_size` is among the overrides, or the weights were trained for policy capacity.

        Raises ValueError, naming the argument, for an unknown policy or settings of another number of experts.
        """
        follows = isinstance(routing, str) and "block_size" not in overrides
        if isinstance(routing, str):
            policy = own_policy(self.config) if routing == OWN else routing
            follows = follows and not (policy == "capacity" and self.config.expert_capacity)
            routing = self.config.routing(policy, **overrides)
        elif overrides:
            raise ValueError(f"overrides need a policy's name, got {', '.join(overrides)} with {routing!r}")
        if not isinstance(routing, BlockRouting):
            raise ValueError(f"routing must be a BlockRouting or a policy's name, got {routing!r}")
        if routing.num_experts != self.config.num_experts:
            raise ValueError(
                f"routing must have num_experts={self.config.num_experts} like the model, got {routing.num_experts}"
            )
        self.block_size_follows = follows
        self._use(routing)

    def _use(self, routing: BlockRouting) -> None:
        self.routing = routing
        for moe in self.moe_layers:
            moe.routing = routing

    def use_block_length(self, block_length: int) -> None:
        """Cuts the routing's blocks like those of a decode, where they follow it (`set_routing`)."""
        if self.block_size_follows and self.routing.block_size != block_length:
            self._use(dataclasses.replace(self.routing, block_size=block_length))

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `capacity` tokens."""
        config, weight = self.config, self.model.word_embeddings.weight
        heads = self.model.layers[0].attention.kv_heads  # a rank may hold some of them
        sizes = config.num_hidden_layers, batch, heads, capacity, config.head_dim
        return KVCache(*sizes, dtype=weight.dtype, device=weight.device)

    def forward(self, input_ids, *, kv_cache: KVCache | None = None, block_length: int | None = None) -> LLaDA2Output:
        """Logits of every token under block-causal attention: a token sees its own block and all earlier ones.

        input_ids: int64 [bsz, T], at the positions behind `kv_cache`'s committed tokens (from 0 without one); blocks of
        `block_length` (by default config.block_length) are cut from position 0, and a cache's prefix must end with one.
        The tokens become part of the prefix by `kv_cache.commit(T)`. A cache needs `torch.no_grad()`.

        Returns `LLaDA2Output`. Raises ValueError that names the argument and its value.
        """
        decoding.check_ids(input_ids, self.config.vocab_size)
        hidden, routed = self.hidden_states(input_ids, kv_cache=kv_cache, block_length=block_length)
        return LLaDA2Output(self.logits(hidden), routed)

    def hidden_states(self, input_ids, *, kv_cache=None, block_length: int | None = None, layout=None):
        """What `forward` computes before the head: hidden states [bsz, T, H] after the last norm, and `routed`.

        input_ids, kv_cache, block_length, errors: those of `forward`, which looks at the ids first.
        layout: (position int64 [T], mask bool [T, T]) for sequences that are not one text from position 0, such as the two
        halves of training; without a cache.
        """
        block_length = self.config.block_length if block_length is None else block_length
        if not is_int(block_length) or block_length < 1:
            raise ValueError(f"block_length must be an integer of at least 1, got {block_length!r}")
        self.use_block_length(block_length)
        if block_length % self.routing.block_size:
            raise ValueError(
                f"block_length must be a multiple of the routing's block_size={self.routing.block_size}, "
                f"got {block_length}"
            )
        past = 0
        if kv_cache is not None:
            kv_cache.check(input_ids)
            past = kv_cache.length
            if not isinstance(past, torch.Tensor) and past % block_length:
                raise ValueError(f"kv_cache must end with a block of block_length={block_length}, got {past} tokens")
        if layout is None:
            position, mask = past + torch.arange(input_ids.shape[1], device=input_ids.device), None
        else:
            position, mask = layout
        x, delta, routed = self.model.word_embeddings(input_ids), None, []
        cos, sin = rotary(position, self.config.rotary_dim, self.config.rope_theta, x.dtype)
        at = past if isinstance(past, torch.Tensor) else torch.full((1,), past, device=x.device)

        def attend(layer: int, own: Attention, qkv):
            if kv_cache is not None:
                query, *prefix = kv_cache.extend(layer, qkv, *own.norms(), cos, sin, at)
            elif torch.is_grad_enabled():
                query, *prefix = own.split(qkv, cos, sin)
            else:
                shape = len(qkv), own.kv_heads, qkv.shape[1], own.head_dim
                prefix = qkv.new_empty(shape), qkv.new_empty(shape)
                query = decoder.qk_norm_rope(qkv, *own.norms(), cos, sin, None, at, *prefix)
            if mask is not None:
                return attention.masked(query, *prefix, mask)
            return attention.attend(query, *prefix, past, block_length)

        for i, layer in enumerate(self.model.layers):
            x, delta, chosen = layer(x, delta, functools.partial(attend, i))
            if chosen is not None:
                routed.append(chosen)
        return self.model.norm(x, delta)[0], tuple(routed)

    def logits(self, hidden) -> torch.Tensor:
        """float32 logits of hidden states [..., H]."""
        return self.head(hidden).float()

    def head(self, hidden) -> torch.Tensor:
        """Logits in the dtype of the hidden states."""
        head = self.model.word_embeddings if self.config.tie_word_embeddings else self.lm_head
        weight = head.weight
        if self.config.norm_head:  # the columns of the head at length 1, as its base family (Bailing) has it
            weight = (weight.float() / (weight.float().norm(dim=0, keepdim=True) + 1e-7)).to(weight.dtype)
        return F.linear(hidden, weight)

    def quantize(self, form: str) -> LLaDA2ForDiffusion:
        """Puts the routed experts of every layer into a format ("fp8", "int8", "int4"); see `BlockMoE.quantize`."""
        for moe in self.moe_layers:
            moe.quantize(form)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> LLaDA2ForDiffusion:
        """Draws matrices from N(0, initializer_range); norms become 1, biases 0. The same seed gives the same weights on
        every device."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.checkpoint_tensors().items():
            if isinstance(weight, Matrix):
                raise ValueError(f"{name} must be float to be drawn, got {weight.weight.dtype}")
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1)
            else:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn * self.config.initializer_range)
        return self

    def checkpoint_tensors(self) -> dict[str, torch.Tensor | Matrix]:
        """The weights by their names in a checkpoint; those of experts are views of `BlockMoE`'s stacked ones. Quantised
        ones are a Matrix under the name of the weight."""
        return checkpoint_tensors(self.state_dict())

    @classmethod
    def from_pretrained(
        cls, folder, *, policy: str = OWN, dtype=None, torch_dtype=None, device=None, revision=None, **overrides
    ) -> LLaDA2ForDiffusion:
        """Reads a checkpoint folder: config.json, and model.safetensors or model.safetensors.index.json with its shards.
        "owner/model", where it is no folder, is a model on the Hugging Face hub (`revision`: which state of it); that takes
        the package huggingface_hub.

        policy, overrides: see `set_routing`; by default the policy that the weights were trained for. dtype: of the
        weights, of torch or by name ("bfloat16"); torch_dtype is another name for it. By default, and for "auto", it is that
        of the stored embedding (expert_bias is fp32 always). device: by default torch's. Files are memory-mapped and read
        layer by layer, straight into the stacked weights.

        Raises ValueError, one line that names the file, the key or the tensor, before any weight is read; a tensor that is
        not finite shows when it is read.
        """
        if dtype is not None and torch_dtype is not None:
            raise ValueError(f"dtype must be given alone, got dtype={dtype!r} and torch_dtype={torch_dtype!r}")
        dtype = checkpoint.dtype_of(torch_dtype if dtype is None else dtype)
        device = usable(device)
        config = LLaDA2Config.from_pretrained(folder, revision=revision)
        config.routing(policy, **overrides)  # a wrong policy shows before anything is opened
        folder = hub.folder_of(folder, revision)
        stored, _ = open_checkpoint(config, folder)
        dtype = dtype or checkpoint.DTYPES.get(stored.dtypes.get("model.word_embeddings.weight"), torch.bfloat16)
        model = cls(config, dtype=dtype, device="meta")._quantize_like(stored)
        model.to_empty(device=device or torch.get_default_device())
        model.set_routing(policy, **overrides)
        with torch.no_grad():
            stored.read(model.checkpoint_tensors())
        return model.eval()

    def _quantize_like(self, stored: checkpoint.Checkpoint) -> LLaDA2ForDiffusion:
        """Quantises the layers, which are on the meta device, whose experts a checkpoint has quantised, the shared expert
        among them. Whatever else is quantised there is read into floats."""
        for i, layer in enumerate(self.model.layers):
            within = f"model.layers.{i}.mlp."
            inside = [module for module in stored.matrices if module.startswith(within)]
            kinds = {module.removeprefix(within).split(".")[0] for module in inside}
            if isinstance(layer.mlp, BlockMoE) and "experts" in kinds:
                layer.mlp.quantize(stored.storage.form, shared="shared_experts" in kinds)
                if {stored.dtypes.get(f"{module}.{stored.storage.scale}") for module in inside} != {"BF16"}:
                    layer.mlp.widen_scales()
        return self

    def save_pretrained(self, folder, *, dtype: torch.dtype | str | None = None) -> None:
        """Writes config.json and model.safetensors under a checkpoint's names, weights in `dtype` (by default the model's;
        the selection bias stays float32, quantised weights and their scales as they are), and two files of Python by which
        AutoConfig (SGLang asks it) and AutoModelForCausalLM read the folder under trust_remote_code=True. The tokenizer's
        files are the caller's to add. Raises ValueError where layers are quantised in different formats."""
        dtype = checkpoint.dtype_of(dtype) or self.dtype
        config = {key: value for key, value in dataclasses.asdict(self.config).items() if value is not None}
        if not self.config.expert_capacity:
            del config["expert_capacity"]  # SGLang takes one that is there, 0 too, for block routing
        extra = dict(architectures=["LLaDA2MoeModelLM"], torch_dtype=str(dtype).removeprefix("torch."))
        extra |= dict(auto_map=checkpoint.AUTO_MAP, pad_token_id=self.config.eos_token_id, **READ_BY_OTHERS)
        extra |= dict(norm_topk_prob=self.config.routing("token").norm_topk_prob)
        tensors = self.checkpoint_tensors()
        forms = sorted({moe.form for moe in self.moe_layers} - {None})
        if len(forms) > 1:
            raise ValueError(f"experts must be in one format to be saved, got {' and '.join(forms)}")
        config.pop("quantization_config", None)
        if forms:
            config["quantization_config"] = quantized.config_of(forms[0], tensors)
        narrow = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Matrix):
                narrow |= quantized.WRITTEN[forms[0]].pack(name, tensor)
            else:
                narrow[name] = tensor if name.endswith("expert_bias") else tensor.to(dtype)
        checkpoint.write(Path(folder), {**extra, **config}, narrow)


def rotary(position, size: int, theta: float, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., T, size] of position int64 [..., T]; the angles are fp32 whatever the dtype."""
    exponent = torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size
    angle = position.float()[..., None] * (1.0 / theta**exponent)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def checkpoint_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Matrix]:
    """A state dict, or a part of one, under the names of a checkpoint; see `LLaDA2ForDiffusion.checkpoint_tensors`."""
    tensors = {}
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        scale = state.get(f"{name}_scale")
        if last in ("gate_weight", "expert_bias"):
            tensors[f"{prefix}.gate.{last.removeprefix('gate_')}"] = value
        elif last in ("w13", "w2"):
            for i, expert in enumerate(value):
                own = None if scale is None else scale[i]
                tensors.update(_projections(f"{prefix}.experts.{i}", last, expert, own))
        elif last in ("shared_w13", "shared_w2"):
            tensors.update(_projections(f"{prefix}.shared_experts", last.removeprefix("shared_"), value, scale))
        elif not last.endswith("_scale"):
            tensors[name] = value
    return tensors


def open_checkpoint(config: LLaDA2Config, folder: Path) -> tuple[checkpoint.Checkpoint, LLaDA2ForDiffusion]:
    """The checkpoint of a folder, and its model on the meta device, quantised as the checkpoint is. Raises ValueError, one
    line, unless its tensors are those of the config: from their shapes, so that nothing is allocated for others."""
    stored = checkpoint.Checkpoint(folder, config.storage)
    for name in ("num_hidden_layers", "num_experts"):  # each has tensors of its own
        if getattr(config, name) > len(stored.file_of):
            raise ValueError(f"{name} must fit {len(stored.file_of)} stored tensors, got {getattr(config, name)}")
    try:
        model = LLaDA2ForDiffusion(config, "token", device="meta")._quantize_like(stored)
        targets = model.checkpoint_tensors()
    except RuntimeError as error:  # a size of more than 64 bits
        why = " ".join(str(error).splitlines()[:1])
        raise ValueError(f"{folder / 'config.json'} asks for weights that no memory holds: {why}") from None
    stored.check(targets, ignore=("rotary_emb.inv_freq", *(["lm_head.weight"] * config.tie_word_embeddings)))
    return stored, model


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable(device) -> torch.device | None:
    """A device that can hold weights and give them back; None stays None. Raises ValueError for any other."""
    if device is None:
        return None
    try:
        torch.zeros(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"device must be one that torch can use here, got {str(device)!r}: {why[:300]}") from None


def _projections(prefix: str, stacked: str, weight, scale=None) -> dict[str, torch.Tensor | Matrix]:
    """w13 [2I, H] or w2 [H, I] under the names of the projections it holds."""
    names = ["down_proj"] if stacked == "w2" else ["gate_proj", "up_proj"]
    weights = weight.chunk(len(names))
    if scale is not None:
        weights = map(Matrix, weights, scale.chunk(len(names)))
    return {f"{prefix}.{name}.weight": part for name, part in zip(names, weights)}
