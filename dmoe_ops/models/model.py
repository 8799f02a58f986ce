"""The model: forward, generation, reading and writing checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import decoder, reference
from ..expert_memory import MemorySettings
from ..layer import BlockMoE
from ..routing import BlockRouting, is_int
from . import attention, checkpoint, decoding, hub, quantized
from .attention import KVCache
from .config import OWN, DiffusionConfig, own_policy
from .devices import usable
from .layers import Attention, Decoder, rotary
from .names import checkpoint_tensors, renamed
from .pooled import keep_in_files
from .quantized import Matrix


class DiffusionOutput(NamedTuple):
    """logits: float32 [bsz, T, vocab]. routed: of each MoE layer in order, (router_logits float32 [bsz, T, E], topk_ids
    int64 [bsz, T, k])."""

    logits: torch.Tensor
    routed: tuple[tuple[torch.Tensor, torch.Tensor], ...]


Model = TypeVar("Model", bound="DiffusionModel")


class DiffusionModel(nn.Module):
    """A model that routes by block; a family is a subclass with its `config_type`, see `dmoe_ops.models.families`.

    config: a `DiffusionConfig`; routing: see `set_routing`; dtype of the weights (by default torch's). Weights are created
    empty and as floats: `from_pretrained` reads them, `init_weights` draws them, `quantize` rounds the experts.
    """

    config_type: ClassVar[type[DiffusionConfig]]  # config_class is transformers' name for its own

    def __init__(
        self,
        config: DiffusionConfig,
        routing: BlockRouting | str = OWN,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ):
        super().__init__()
        self.config, self.expert_memory = config, None
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
    def sparse_layers(self) -> list[nn.Module]:
        """The layers that have experts."""
        return [layer for i, layer in enumerate(self.model.layers) if self.config.has_experts(i)]

    @property
    def moe_layers(self) -> list[nn.Module]:
        return [layer.mlp for layer in self.sparse_layers]

    @property
    def bytes_per_expert(self) -> int:
        """As it is held, scales included; the mean over the layers, where only some are quantised."""
        sizes = [moe.bytes_per_expert for moe in self.moe_layers]
        return round(sum(sizes) / len(sizes))

    def _apply(self, fn, recurse=True):
        if self.expert_memory is not None:
            self.expert_memory.check_move(fn)  # before anything is moved
        return super()._apply(fn, recurse)

    def set_routing(self, routing: BlockRouting | str, **overrides) -> None:
        """Routes all MoE layers by a `BlockRouting`, taken as it stands, or by a policy's name with `overrides`; "own" is
        the policy that the weights were trained for (`DiffusionConfig`). A policy's blocks are those of the decode
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
        cache = KVCache(*sizes, dtype=weight.dtype, device=weight.device)
        cache.turns = self._turns(torch.arange(capacity, device=weight.device))
        return cache

    def _turns(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary(position, self.config.rotary_dim, self.config.rope_theta, self.dtype)

    def forward(
        self, input_ids: torch.Tensor, *, kv_cache: KVCache | None = None, block_length: int | None = None
    ) -> DiffusionOutput:
        """Logits of every token under block-causal attention: a token sees its own block and all earlier ones, or all tokens
        where the config says so (`sees_all`).

        input_ids: int64 [bsz, T], at the positions behind `kv_cache`'s committed tokens (from 0 without one); blocks of
        `block_length` (by default config.block_length) are cut from position 0, and a cache's prefix must end with one.
        The tokens become part of the prefix by `kv_cache.commit(T)`. A cache needs `torch.no_grad()`.

        Returns `DiffusionOutput`. Raises ValueError that names the argument and its value.
        """
        decoding.check_ids(input_ids, self.config.vocab_size)
        hidden, routed = self.hidden_states(input_ids, kv_cache=kv_cache, block_length=block_length)
        return DiffusionOutput(self.logits(hidden), tuple((router, ids.long()) for router, ids in routed))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        kv_cache: KVCache | None = None,
        block_length: int | None = None,
        layout: tuple[torch.Tensor, torch.Tensor] | None = None,
        **coresets: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, torch.Tensor], ...]]:
        """What `forward` computes before the head: hidden states [bsz, T, H] after the last norm, and `routed`, topk_ids in
        int32.

        input_ids, kv_cache, block_length, errors: those of `forward`, which looks at the ids first.
        layout: (position int64 [T], mask bool [T, T]) for sequences that are not one text from position 0, such as the two
        halves of training; without a cache.
        coresets: coreset_ids or coresets_out of `BlockMoE.forward`, those of all MoE layers stacked in front.
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
        if kv_cache is not None and self.config.sees_all:
            raise ValueError("kv_cache must be None for a model whose tokens see all others, got one")
        if kv_cache is not None:
            kv_cache.check(input_ids)
            past = kv_cache.length
            if not isinstance(past, torch.Tensor) and past % block_length:
                raise ValueError(f"kv_cache must end with a block of block_length={block_length}, got {past} tokens")
        mask = None
        if kv_cache is None:
            position = torch.arange(input_ids.shape[1], device=input_ids.device)
            position, mask = (position, None) if layout is None else layout
            turns = self._turns(position)
        else:
            if kv_cache.turns is None:
                kv_cache.turns = self._turns(torch.arange(kv_cache.keys.shape[3], device=input_ids.device))
            turns = kv_cache.turns
        x, delta, routed = self.model.word_embeddings(input_ids), None, []
        at = past if isinstance(past, torch.Tensor) else torch.full((1,), past, device=x.device)

        def attend(layer: int, own: Attention, qkv):
            if kv_cache is not None:
                query, *prefix = kv_cache.extend(layer, qkv, *own.norms(), *turns, at)
            elif torch.is_grad_enabled():
                query, *prefix = own.split(qkv, *turns)
            else:
                shape = len(qkv), own.kv_heads, qkv.shape[1], own.head_dim
                prefix = qkv.new_empty(shape), qkv.new_empty(shape)
                query = decoder.qk_norm_rope(qkv, *own.norms(), *turns, None, at, *prefix)
            if mask is not None or self.config.sees_all:
                return reference.attention(query, *prefix, mask)
            if isinstance(past, torch.Tensor):
                return decoder.block_attention(query, *prefix, past, block_length)
            return attention.attend(query, *prefix, past, block_length)

        for i, layer in enumerate(self.model.layers):
            own = {name: ids[len(routed)] for name, ids in coresets.items() if isinstance(layer.mlp, BlockMoE)}
            x, delta, chosen = layer(x, delta, functools.partial(attend, i), **own)
            if chosen is not None:
                routed.append(chosen)
        return self.model.norm(x, delta)[0], tuple(routed)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits of hidden states [..., H]."""
        return self.head(hidden).float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in the dtype of the hidden states."""
        head = self.model.word_embeddings if self.config.tie_word_embeddings else self.lm_head
        weight = head.weight
        if self.config.norm_head:  # the columns of the head at length 1, as its base family (Bailing) has it
            weight = (weight.float() / (weight.float().norm(dim=0, keepdim=True) + 1e-7)).to(weight.dtype)
        return F.linear(hidden, weight)

    def quantize(self: Model, form: str) -> Model:
        """Puts the routed experts of every layer into a format ("fp8", "int8", "int4"); see `BlockMoE.quantize`."""
        for moe in self.moe_layers:
            moe.quantize(form)
        return self

    @torch.no_grad()
    def init_weights(self: Model, seed: int = 0) -> Model:
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
        return checkpoint_tensors(self.state_dict(), self.config)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        *,
        policy: str = OWN,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        revision: str | None = None,
        expert_memory: MemorySettings | int | str | None = None,
        **overrides,
    ) -> Model:
        """Reads a checkpoint folder: config.json, and model.safetensors or model.safetensors.index.json with its shards.
        "owner/model", where it is no folder, is a model on the Hugging Face hub (`revision`: which state of it); that takes
        the package huggingface_hub.

        policy, overrides: see `set_routing`; by default the policy that the weights were trained for. dtype: of the
        weights, of torch or by name ("bfloat16"); torch_dtype is another name for it. By default, and for "auto", it is that
        of the stored embedding (expert_bias is fp32 always). device: by default torch's. Files are memory-mapped and read
        layer by layer, straight into the stacked weights.

        expert_memory: bytes, "4GB", "25%" (of all experts) or a `MemorySettings`: routed experts then stay in the files, as
        they are stored, and so much memory holds those in use (`model.expert_memory`); on the CPU, and not for training.

        Raises ValueError, one line that names the file, the key or the tensor, before any weight is read; a tensor that is
        not finite shows when it is read.
        """
        if dtype is not None and torch_dtype is not None:
            raise ValueError(f"dtype must be given alone, got dtype={dtype!r} and torch_dtype={torch_dtype!r}")
        dtype = checkpoint.dtype_of(torch_dtype if dtype is None else dtype)
        device = usable(device)
        settings = None if expert_memory is None else MemorySettings.of(expert_memory)
        config = cls.config_type.from_pretrained(folder, revision=revision)
        config.routing(policy, **overrides)  # a wrong policy shows before anything is opened
        folder = hub.folder_of(folder, revision)
        stored, _ = open_checkpoint(config, folder)
        dtype = dtype or stored_dtype(stored, config)
        model = cls(config, dtype=dtype, device="meta")._quantize_like(stored)
        device = device or torch.get_default_device()
        if settings:
            if device.type != "cpu":
                raise ValueError(f"expert_memory needs a model on the CPU, got {device}")
            model.expert_memory = keep_in_files(model, stored, settings)
        model.to_empty(device=device)
        model.set_routing(policy, **overrides)
        with torch.no_grad():
            held = dict(model.named_parameters()) | dict(model.named_buffers())
            stored.read(checkpoint_tensors(held, config))
        return model.eval() if settings is None else model.eval().requires_grad_(False)

    def _quantize_like(self: Model, stored: checkpoint.Checkpoint) -> Model:
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

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | str | None = None) -> None:
        """Writes config.json and model.safetensors under a checkpoint's names, weights in `dtype` (by default the model's;
        the selection bias stays float32, quantised weights and their scales as they are) and, for LLaDA2, two files of
        Python by which AutoConfig (SGLang asks it) and AutoModelForCausalLM read the folder under trust_remote_code=True.
        The tokenizer's files are the caller's to add. Raises ValueError where layers are quantised in different formats."""
        dtype = checkpoint.dtype_of(dtype) or self.dtype
        config = dict(torch_dtype=str(dtype).removeprefix("torch.")) | self.config.to_dict()
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
        checkpoint.write(Path(folder), config, narrow)


def open_checkpoint(config: DiffusionConfig, folder: Path) -> tuple[checkpoint.Checkpoint, DiffusionModel]:
    """The checkpoint of a folder, and its model on the meta device, quantised as the checkpoint is. Raises ValueError, one
    line, unless its tensors are those of the config: from their shapes, so that nothing is allocated for others."""
    stored = checkpoint.Checkpoint(folder, config.storage)
    for name in ("num_hidden_layers", "num_experts"):  # each has tensors of its own
        if getattr(config, name) > len(stored.file_of):
            raise ValueError(f"{name} must fit {len(stored.file_of)} stored tensors, got {getattr(config, name)}")
    try:
        model = DiffusionModel(config, "token", device="meta")._quantize_like(stored)
        targets = model.checkpoint_tensors()
    except RuntimeError as error:  # a size of more than 64 bits
        why = " ".join(str(error).splitlines()[:1])
        raise ValueError(f"{folder / 'config.json'} asks for weights that no memory holds: {why}") from None
    stored.check(targets, ignore=("rotary_emb.inv_freq", *(["lm_head.weight"] * config.tie_word_embeddings)))
    return stored, model


def stored_dtype(stored: checkpoint.Checkpoint, config: DiffusionConfig) -> torch.dtype:
    """That of the embedding."""
    name = stored.dtypes.get(renamed("model.word_embeddings.weight", config), "")
    return checkpoint.DTYPES.get(name, torch.bfloat16)
