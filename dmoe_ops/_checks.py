"""What every backend may rely on. Each check raises ValueError that names the argument and its value."""

from __future__ import annotations

import itertools

import torch

from .formats import ACTIVATIONS, NOT_LOADED, QUANTIZED, ExpertWeights, scale_dtypes, scale_shape, stored_columns
from .routing import BlockRouting, is_number

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


_passed: set = set()


def once(check, *args) -> None:
    """check(*args), unless it has passed on arguments of this kind: equal ones, and tensors of the same shape, strides,
    dtype and device. So it is for checks that look at no more than that, and never for fake tensors."""
    key = (check, *kinds(flat(args)))
    if key not in _passed:
        check(*args)
        if len(_passed) >= 4096:
            _passed.clear()
        _passed.add(key)


def flat(args) -> list:
    """Arguments, and those in tuples among them."""
    return [value for arg in args for value in (arg if isinstance(arg, tuple) else (arg,))]


def kinds(values) -> list:
    """What `once` compares of values: hashable."""
    return [
        (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, torch.Tensor) else value
        for value in values
    ]


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


def sharing(domain_offsets, coreset_ids, n_blocks: int, device) -> None:
    """What blocks share, or are given. Values are read on the CPU alone, see `block_offset_values`."""
    if domain_offsets is None and coreset_ids is None:
        return
    if domain_offsets is not None:
        tensor("domain_offsets", domain_offsets, ["n_domains + 1"], (torch.int32, torch.int64), device)
        if domain_offsets.shape[0] == 0:
            raise ValueError(f"domain_offsets must hold n_domains + 1 entries from 0 to n_blocks={n_blocks}, got []")
        if coreset_ids is not None:
            raise ValueError(f"domain_offsets must be None with coreset_ids, got {_shape_of(domain_offsets)}")
        return
    tensor("coreset_ids", coreset_ids, [n_blocks, "width"], (torch.int32,), device)
    if coreset_ids.shape[1] == 0:
        raise ValueError(f"coreset_ids must have a width of at least 1, got {list(coreset_ids.shape)}")


def sharing_values(domain_offsets, coreset_ids, n_blocks: int, num_experts: int) -> None:
    """What a CPU may look at of `sharing`."""
    if domain_offsets is not None and domain_offsets.device.type == "cpu":
        offsets = domain_offsets.tolist()
        if offsets[0] != 0 or offsets[-1] != n_blocks:
            raise ValueError(f"domain_offsets must rise from 0 to n_blocks={n_blocks}, got {_short(offsets)}")
        for domain, (begin, end) in enumerate(itertools.pairwise(offsets)):
            if end < begin:
                raise ValueError(f"domain_offsets must not fall, got {begin} then {end} at domain {domain}")
    if coreset_ids is not None and coreset_ids.device.type == "cpu" and coreset_ids.numel():
        low, high = (int(value) for value in coreset_ids.aminmax())
        if low < -1 or high >= num_experts:
            wrong = low if low < -1 else high
            raise ValueError(f"coreset_ids must be -1 or below num_experts={num_experts}, got {wrong}")


def _short(values: list) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"


def logits(value, settings: BlockRouting) -> None:
    """value [T, E] or [bsz, seq, E]."""
    rows("logits", value, "E")
    if value.shape[-1] != settings.num_experts:
        raise ValueError(f"logits must have num_experts={settings.num_experts} columns, got {list(value.shape)}")


def route_arguments(value, expert_bias, offsets, settings: BlockRouting, **shared) -> None:
    """What `block_route` itself looks at: logits of two or three dimensions, and tensors where a schema asks for them."""
    logits(value, settings)
    tensors(optional=dict(expert_bias=expert_bias, block_offsets=offsets) | shared)


def route_call(value, expert_bias, offsets, settings: BlockRouting) -> None:
    route_arguments(value, expert_bias, offsets, settings)
    route(value.reshape(-1, value.shape[-1]), expert_bias, offsets, settings)


def route(logits, expert_bias, offsets, settings: BlockRouting) -> None:
    tensor("logits", logits, ["T", settings.num_experts], (torch.float32, torch.float64))
    if expert_bias is not None:
        tensor("expert_bias", expert_bias, [settings.num_experts], (logits.dtype,), logits.device)
    block_offsets(offsets, logits.shape[0], logits.device)


def resident(value, bias, logits) -> None:
    tensor("resident", value, [logits.shape[-1]], (torch.bool,), logits.device)
    if not is_number(bias) or not 0 <= bias < float("inf"):
        raise ValueError(f"resident_bias must be a number of at least 0, got {bias!r}")


def activations(value, w13) -> None:
    if value is None:
        return
    if value != "int8":
        raise ValueError(f"activations must be None or 'int8', got {value!r}")
    if getattr(w13, "dtype", None) != torch.int8:
        raise ValueError(f"activations must be None unless w13 is int8, got 'int8' with {_dtype_of(w13)}")


def activation(value) -> None:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {value!r}")


def _dtype_of(value) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else repr(value)


def _shape_of(value) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def experts(x, weights: ExpertWeights, topk_ids, topk_weights) -> None:
    tensor("x", x, ["T", "H"], WEIGHT_DTYPES)
    columns("x", x, "H")
    expert_weights(x, weights)
    tensor("topk_ids", topk_ids, [x.shape[0], "top_k"], (torch.int32, torch.int64), x.device)
    weight_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensor("topk_weights", topk_weights, list(topk_ids.shape), (weight_dtype,), x.device)
    expert_map(weights, "E_model", x.device)


def expert_map(weights: ExpertWeights, experts: int | str, device) -> None:
    value = weights.expert_map
    if value is None:
        return
    tensor("expert_map", value, [experts], (torch.int32,), device)
    contiguous("expert_map", value)
    if value.shape[0] == 0:
        raise ValueError("expert_map must have an entry per expert of the model, got []")


def expert_map_values(weights: ExpertWeights) -> None:
    """Reads the map, so for CPU tensors alone, as `block_offset_values`."""
    value = weights.expert_map
    if value is None or value.device.type != "cpu":
        return
    low, high, rows = *(bound.item() for bound in value.aminmax()), weights.w13.shape[0]
    if low < NOT_LOADED or high >= rows:
        raise ValueError(
            f"expert_map must hold rows of w13, from 0 to {rows - 1}, -1 or -2, got {low if low < NOT_LOADED else high}"
        )


def expert_weights(x, weights: ExpertWeights) -> None:
    """w13 [E, 2I, H] and w2 [E, H, I], and the shared expert's without E, like x in dtype and device or quantised."""
    activation(weights.activation)
    _swiglu("", ["E"], (x.dtype, *QUANTIZED), x, weights)
    if (weights.shared_w13 is None) != (weights.shared_w2 is None):
        order = ("shared_w13", "shared_w2") if weights.shared_w13 is None else ("shared_w2", "shared_w13")
        raise ValueError(f"{order[0]} must be given together with {order[1]}, got None")
    if weights.shared_w13 is not None:
        own = (weights.w13.dtype,) if weights.quantized else ()
        _swiglu("shared_", [], (x.dtype, *own), x, weights)
    for name in ("shared_w13_scale", "shared_w2_scale") if weights.shared_w13 is None else ():
        if getattr(weights, name) is not None:
            raise ValueError(f"{name} must be None without a shared expert, got {_shape_of(getattr(weights, name))}")


def _swiglu(prefix: str, lead: list, dtypes, x, weights: ExpertWeights) -> None:
    """The pair {prefix}w13 and {prefix}w2 with their scales; `lead`: the dimensions in front."""
    w13, w2, name13, name2 = *(getattr(weights, prefix + name) for name in ("w13", "w2")), prefix + "w13", prefix + "w2"
    inter = "I_shared" if prefix else "I"
    tensor(name13, w13)
    hidden = x.shape[1]
    tensor(name13, w13, [*lead, f"2{inter}", stored_columns(w13.dtype, hidden)], dtypes, x.device)
    *count, double, _ = w13.shape
    if double % 2:
        raise ValueError(f"{name13} must have an even number of rows 2{inter}, got {list(w13.shape)}")
    if w13.dtype == torch.uint8 and (hidden % 2 or double % 4):
        raise ValueError(
            f"{name13} must have even H and {inter} as it is int4 (uint8), got H={hidden} and {inter}={double // 2}"
        )
    tensor(name2, w2, [*count, hidden, stored_columns(w13.dtype, double // 2)], (w13.dtype,), x.device)
    contiguous(name13, w13)
    contiguous(name2, w2)
    scale(name13, w13, getattr(weights, name13 + "_scale"), [*count, double, hidden], 2)
    scale(name2, w2, getattr(weights, name2 + "_scale"), [*count, hidden, double // 2], 1)


def scale(name: str, weight, value, shape: list[int], halves: int) -> None:
    """The scale of a weight that holds `shape` values: there exactly where it is quantised."""
    if weight.dtype not in QUANTIZED:
        if value is not None:
            raise ValueError(f"{name}_scale must be None as {name} is {_dtype_of(weight)}, got {_shape_of(value)}")
        return
    if value is None:
        raise ValueError(f"{name}_scale must be given as {name} is {_dtype_of(weight)}, got None")
    *count, rows, columns = shape
    want = [*count, *scale_shape(weight.dtype, rows, columns, halves)]
    tensor(f"{name}_scale", value, want, scale_dtypes(weight.dtype), weight.device)
    contiguous(f"{name}_scale", value)


def quantized(weight, value, halves: int) -> None:
    tensor("weight", weight, None, QUANTIZED)
    if weight.dim() < 2 or halves not in (1, 2) or weight.shape[-2] % halves:
        raise ValueError(
            f"weight must have shape [..., rows, columns], rows in {halves!r} parts, got {list(weight.shape)}"
        )
    *lead, rows, columns = weight.shape
    columns *= 2 if weight.dtype == torch.uint8 else 1
    want = [*lead, *scale_shape(weight.dtype, rows, columns, halves)]
    tensor("scale", value, want, scale_dtypes(weight.dtype), weight.device)


def differentiable(weights: ExpertWeights, **others) -> None:
    """That no gradient is asked for which there is none of: of quantised weights, or through rounded activations."""
    fixed = {name: value for name, value in weights._asdict().items() if name.endswith("_scale")}
    for name, scale_of in list(fixed.items()):
        if scale_of is not None:
            fixed[name.removesuffix("_scale")] = getattr(weights, name.removesuffix("_scale"))
    for name, value in fixed.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: quantised weights have none, got requires_grad=True")
    for name, value in others.items() if weights.quantize_activations else ():
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient with activations='int8', got requires_grad=True")


def contiguous(name: str, value) -> None:
    # A silent .contiguous() would make a second copy of the weights at every call.
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")


def layer_arguments(x, gate_weight, expert_bias, weights: ExpertWeights, offsets, **shared) -> None:
    """What `block_moe` itself looks at: x of two or three dimensions, and tensors where a schema asks for them."""
    rows("x", x, "H")
    required = dict(gate_weight=gate_weight, w13=weights.w13, w2=weights.w2)
    names = [name for name in weights._fields[2:] if name not in ("quantize_activations", "activation")]
    optional = dict(expert_bias=expert_bias, block_offsets=offsets) | {name: getattr(weights, name) for name in names}
    tensors(**required, optional=optional | shared)


def layer_call(x, gate_weight, expert_bias, weights: ExpertWeights, offsets, settings: BlockRouting) -> None:
    layer_arguments(x, gate_weight, expert_bias, weights, offsets)
    layer(x.reshape(-1, x.shape[-1]), gate_weight, expert_bias, weights, offsets, settings)


def layer(x, gate_weight, expert_bias, weights: ExpertWeights, offsets, settings: BlockRouting) -> None:
    tensor("x", x, ["T", "H"], WEIGHT_DTYPES)
    columns("x", x, "H")
    tensor("gate_weight", gate_weight, [settings.num_experts, x.shape[1]], WEIGHT_DTYPES, x.device)
    if expert_bias is not None:
        bias_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        tensor("expert_bias", expert_bias, [settings.num_experts], (bias_dtype,), x.device)
    expert_weights(x, weights)
    expert_map(weights, settings.num_experts, x.device)
    if weights.expert_map is None and weights.w13.shape[0] != settings.num_experts:
        raise ValueError(f"w13 must have num_experts={settings.num_experts} experts, got {list(weights.w13.shape)}")
    block_offsets(offsets, x.shape[0], x.device)
