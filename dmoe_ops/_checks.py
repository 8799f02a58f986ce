"""What every backend may rely on. Each check raises ValueError that names the argument and its value."""

from __future__ import annotations

import itertools

import torch

from .routing import BlockRouting

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _names(dtypes) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, value, shape=None, dtypes=None, device=None) -> None:
    """`shape` holds an int where a size is fixed and a name where it is free."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {value!r}")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            isinstance(want, str) or got == want for got, want in zip(value.shape, shape)
        )
        if not fits:
            want = ", ".join(str(s) for s in shape)
            raise ValueError(f"{name} must have shape [{want}], got {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise ValueError(f"{name} must be {_names(dtypes)}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the first tensor, got {value.device}")


def tensors(*, optional: dict | None = None, **values) -> None:
    """That every value is a tensor, or None among the optional ones: what a schema would reject with less to say."""
    for name, value in {**values, **(optional or {})}.items():
        if value is not None or name in values:
            tensor(name, value)


def rows(name: str, value, last: str) -> None:
    """value [T, last] or [bsz, seq, last]."""
    tensor(name, value)
    if value.dim() not in (2, 3):
        raise ValueError(f"{name} must have shape [T, {last}] or [bsz, seq, {last}], got {list(value.shape)}")
    columns(name, value, last)


def columns(name: str, value, last: str) -> None:
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have {last} of at least 1, got {list(value.shape)}")


def routing(value) -> None:
    if not isinstance(value, BlockRouting):
        raise ValueError(f"routing must be a BlockRouting, got {value!r}")


def block_offsets(value, tokens: int, device) -> None:
    if value is not None:
        tensor("block_offsets", value, ["n_blocks + 1"], (torch.int32,), device)
        if value.shape[0] == 0:
            raise ValueError(f"block_offsets must hold n_blocks + 1 entries from 0 to T={tokens}, got []")


def block_offset_values(value, tokens: int, block_size: int) -> None:
    """Reads the offsets, so for CPU tensors alone: elsewhere it would wait for the device."""
    if value is None or value.device.type != "cpu":
        return
    offsets = value.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"block_offsets must rise from 0 to T={tokens}, got {_short(offsets)}")
    for block, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end <= begin:
            raise ValueError(f"block_offsets must rise, got {begin} then {end} at block {block}")
        if end - begin > block_size:
            raise ValueError(
                f"block_offsets: block {block} has {end - begin} tokens, more than block_size={block_size}"
            )


def _short(values: list) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"


def logits(value, settings: BlockRouting) -> None:
    """value [T, E] or [bsz, seq, E]."""
    rows("logits", value, "E")
    if value.shape[-1] != settings.num_experts:
        raise ValueError(f"logits must have num_experts={settings.num_experts} columns, got {list(value.shape)}")


def route(logits, expert_bias, offsets, settings: BlockRouting) -> None:
    tensor("logits", logits, ["T", settings.num_experts], (torch.float32, torch.float64))
    if expert_bias is not None:
        tensor("expert_bias", expert_bias, [settings.num_experts], (logits.dtype,), logits.device)
    block_offsets(offsets, logits.shape[0], logits.device)


def experts(x, w13, w2, topk_ids, topk_weights) -> None:
    tensor("x", x, ["T", "H"], WEIGHT_DTYPES)
    columns("x", x, "H")
    expert_weights("w13", "w2", w13, w2, x)
    tensor("topk_ids", topk_ids, [x.shape[0], "top_k"], (torch.int32,), x.device)
    weight_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensor("topk_weights", topk_weights, list(topk_ids.shape), (weight_dtype,), x.device)


def expert_weights(name13: str, name2: str, w13, w2, x) -> None:
    """w13 [E, 2I, H] and w2 [E, H, I], like x in dtype and device."""
    hidden = x.shape[1]
    tensor(name13, w13, ["E", "2I", hidden], (x.dtype,), x.device)
    num_experts, double, _ = w13.shape
    if double % 2:
        raise ValueError(f"{name13} must have an even second dimension 2I, got {list(w13.shape)}")
    tensor(name2, w2, [num_experts, hidden, double // 2], (x.dtype,), x.device)
    contiguous(name13, w13)
    contiguous(name2, w2)


def contiguous(name: str, value) -> None:
    # A silent .contiguous() would make a second copy of the weights at every call.
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")


def layer(x, gate_weight, expert_bias, w13, w2, shared_w13, shared_w2, offsets, settings: BlockRouting) -> None:
    tensor("x", x, ["T", "H"], WEIGHT_DTYPES)
    columns("x", x, "H")
    tensor("gate_weight", gate_weight, [settings.num_experts, x.shape[1]], WEIGHT_DTYPES, x.device)
    if expert_bias is not None:
        bias_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        tensor("expert_bias", expert_bias, [settings.num_experts], (bias_dtype,), x.device)
    expert_weights("w13", "w2", w13, w2, x)
    if w13.shape[0] != settings.num_experts:
        raise ValueError(f"w13 must have num_experts={settings.num_experts} experts, got {list(w13.shape)}")
    if (shared_w13 is None) != (shared_w2 is None):
        missing, there = ("shared_w13", "shared_w2") if shared_w13 is None else ("shared_w2", "shared_w13")
        raise ValueError(f"{missing} must be given together with {there}, got None")
    if shared_w13 is not None:
        shared_weights(shared_w13, shared_w2, x)
    block_offsets(offsets, x.shape[0], x.device)


def shared_weights(shared_w13, shared_w2, x) -> None:
    """shared_w13 [2I_shared, H] and shared_w2 [H, I_shared]."""
    tensor("shared_w13", shared_w13, ["2I_shared", x.shape[1]], (x.dtype,), x.device)
    if shared_w13.shape[0] % 2:
        raise ValueError(f"shared_w13 must have an even first dimension, got {list(shared_w13.shape)}")
    tensor("shared_w2", shared_w2, [x.shape[1], shared_w13.shape[0] // 2], (x.dtype,), x.device)
    contiguous("shared_w13", shared_w13)
    contiguous("shared_w2", shared_w2)
