"""What is measured: the models, routing that behaves like a real model's, weights, and one `Case` that holds them."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from .. import reference
from ..formats import FORMATS, scale_dtypes, scale_shape, stored_columns
from ..quantize import LARGEST, pack
from ..routing import BlockRouting

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# How the weights of a layer may be stored: as they are, in a format of `dmoe_ops.formats`, or in int8 with activations that
# are rounded to int8 too.
FORMS = {**DTYPES, **FORMATS, "w8a8": torch.int8}


@dataclasses.dataclass(frozen=True)
class Model:
    """The MoE layer of one model. hidden, intermediate, shared: sizes H, I and the shared expert's I (0: none);
    moe_layers: how many such layers one forward runs through."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    score: str = "softmax"
    norm_topk_prob: bool = True
    scale: float = 1.0
    shared: int = 0
    block_size: int = 32
    moe_layers: int = 1

    def routing(self, policy: str, **overrides) -> BlockRouting:
        geometry = dict(
            num_experts=self.num_experts,
            top_k=self.top_k,
            block_size=self.block_size,
            n_group=self.n_group,
            topk_group=self.topk_group,
            score=self.score,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.scale,
        )
        return BlockRouting.for_model(policy, geometry, **overrides)

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one routed expert's three matrices, stored as `dtype` with their scales."""
        return _swiglu_bytes(dtype, self.hidden, self.intermediate)

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the shared expert, stored alike."""
        return _swiglu_bytes(dtype, self.hidden, self.shared) if self.shared else 0

    def layer_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all weights of one layer; the gate is never quantised."""
        gate = self.num_experts * self.hidden * max(dtype.itemsize, 2)
        return self.num_experts * self.expert_bytes(dtype) + gate + self.shared_bytes(dtype)


def _swiglu_bytes(dtype: torch.dtype, hidden: int, intermediate: int) -> int:
    matrices = (2 * intermediate, hidden, 2), (hidden, intermediate, 1)
    return sum(_stored_bytes(dtype, *matrix) for matrix in matrices)


def _stored_bytes(dtype: torch.dtype, rows: int, columns: int, halves: int) -> int:
    stored = rows * stored_columns(dtype, columns) * dtype.itemsize
    if dtype in DTYPES.values():
        return stored
    return stored + math.prod(scale_shape(dtype, rows, columns, halves)) * scale_dtypes(dtype)[0].itemsize


_llada2 = dict(num_experts=256, top_k=8, n_group=8, topk_group=4, score="sigmoid", scale=2.5)
_mini = dict(hidden=2048, intermediate=512, shared=512, moe_layers=19, **_llada2)
_flash = dict(hidden=4096, intermediate=1024, shared=1024, moe_layers=31, **_llada2)

MODELS = {
    model.name: model
    for model in (
        Model("llada2-mini", **_mini),
        Model("llada2.1-mini", **_mini),
        Model("dmoe-16b", **_mini),
        Model("llada2-flash", **_flash),
        Model("llada2.1-flash", **_flash),
        Model("llada2.2-flash", **{**_flash, "n_group": 1, "topk_group": 1}),
        Model("llada-moe-7b", 2048, 1024, 64, 8, norm_topk_prob=False, moe_layers=16),
        Model("sdar-30b", 2048, 768, 128, 8, moe_layers=48),
        Model("diffusiongemma-26b", 2816, 704, 128, 8, shared=704, block_size=256, moe_layers=30),
        # No model: small enough for a test.
        Model("tiny", 256, 64, 32, 4, n_group=4, topk_group=2, score="sigmoid", scale=2.5, shared=64, moe_layers=2),
    )
}


class Weights(NamedTuple):
    """One layer: gate_weight [E, H], expert_bias float32 [E], w13 [E, 2I, H], w2 [E, H, I], and the shared expert's
    (None without one), with scales where they are quantised; by the names of `block_moe`."""

    gate_weight: torch.Tensor
    expert_bias: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    shared_w13: torch.Tensor | None
    shared_w2: torch.Tensor | None
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    shared_w13_scale: torch.Tensor | None = None
    shared_w2_scale: torch.Tensor | None = None
    activations: str | None = None

    @property
    def form(self) -> str:
        """A name of FORMS."""
        if self.activations is not None:
            return "w8a8"
        return next(form for form, dtype in FORMS.items() if dtype == self.w13.dtype)

    def experts(self) -> dict:
        """The arguments of `moe_experts`."""
        names = ("w13", "w2", "w13_scale", "w2_scale", "activations")
        return {name: getattr(self, name) for name in names}

    def values(self, dtype, experts: torch.Tensor | None = None) -> list[torch.Tensor]:
        """w13 and w2 of some experts, or of the shared one, dequantised."""
        pair = []
        for name, halves in (("w13", 2), ("w2", 1)):
            name = name if experts is not None else f"shared_{name}"
            weight, scale = getattr(self, name), getattr(self, f"{name}_scale")
            if experts is not None:
                weight, scale = weight[experts], None if scale is None else scale[experts]
            pair.append(reference.widen(weight, scale, halves).to(dtype))
        return pair


class Case(NamedTuple):
    """One input of the layer. x [T, H]; logits float32 [T, E]: what the gate makes of x, up to rounding; expert_bias
    float32 [E]: zeros."""

    label: str
    model: Model
    routing: BlockRouting
    x: torch.Tensor
    logits: torch.Tensor
    expert_bias: torch.Tensor


def calibrated_logits(n_blocks: int, block_size: int, num_experts: int, generator) -> torch.Tensor:
    """Router logits [n_blocks, block_size, E] with the statistics of LLaDA2.0-mini: under its geometry they give 69.5
    unique experts to token routing and 14.7 to dMoE at p = 0.6."""
    block = torch.randn(n_blocks, 1, num_experts, generator=generator)
    token = torch.randn(n_blocks, block_size, num_experts, generator=generator)
    return -1 + 1.2 * block + token


def calibrated_case(label: str, model: Model, routing: BlockRouting, tokens: int, dtype, device, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    n_blocks = -(-tokens // routing.block_size)
    logits = calibrated_logits(n_blocks, routing.block_size, model.num_experts, generator).flatten(0, 1)[:tokens]
    return _case(label, model, routing, logits, dtype, device, generator)


def forced_case(label: str, model: Model, routing: BlockRouting, tokens: int, unique: int, dtype, device, seed) -> Case:
    """The `tokens` tokens use exactly `unique` experts together, the same ones in every block."""
    generator = torch.Generator().manual_seed(seed)
    ids = forced_ids(routing, tokens, unique, generator)
    noise = torch.randn(tokens, model.num_experts, generator=generator)
    logits = (0.5 * noise - 8).scatter(1, ids, 2 + 0.5 * noise.gather(1, ids))
    # Exactly the used experts have votes, so a coreset of this size is the used experts.
    if routing.select == "top_p":
        routing = dataclasses.replace(routing, min_experts=unique, max_experts=unique)
    return _case(label, model, routing, logits, dtype, device, generator)


def forced_ids(routing: BlockRouting, tokens: int, unique: int, generator) -> torch.Tensor:
    """Expert ids [T, k] that use exactly `unique` experts, each token's within `topk_group` groups. ValueError when no
    such choice exists."""
    k = routing.top_k
    most = min(routing.num_experts, tokens * k)
    if not k <= unique <= most:
        raise ValueError(f"--unique must be from top_k={k} to {most} for {tokens} tokens, got {unique}")
    # Few experts go into few groups, so that a token finds k of them inside the groups it may use.
    n_group = routing.n_group if unique // routing.n_group * routing.topk_group >= k else routing.topk_group
    per_group = routing.num_experts // routing.n_group
    if -(-unique // n_group) > per_group:
        raise ValueError(f"--unique {unique} does not fit into {n_group} groups of {per_group} experts")
    members = []
    for group in range(n_group):
        count = len(range(group, unique, n_group))
        some = torch.randperm(per_group, generator=generator)[:count]
        members.append((group * per_group + some).tolist())
    unused = [list(group) for group in members]
    ids = []
    for _ in range(tokens):
        mixed = torch.randperm(n_group, generator=generator).tolist()
        groups = sorted(mixed, key=lambda group: -len(unused[group]))[: routing.topk_group]
        chosen = []
        while len(chosen) < k:  # from the group with most unused experts, then anywhere
            group = max(groups, key=lambda group: len(unused[group]))
            if unused[group]:
                chosen.append(unused[group].pop())
            else:
                rest = [e for group in groups for e in members[group] if e not in chosen]
                some = torch.randperm(len(rest), generator=generator)[: k - len(chosen)]
                chosen += [rest[i] for i in some.tolist()]
        ids.append(chosen)
    if any(unused):
        raise ValueError(f"--unique {unique} can't be reached by {tokens} tokens under the group limit of this model")
    return torch.tensor(ids)


def _case(label, model: Model, routing, logits, dtype, device, generator) -> Case:
    """The first E columns of x carry the logits, and the gate reads them from there (`random_weights`)."""
    if model.hidden < model.num_experts:
        raise ValueError(f"--hidden must be at least --experts={model.num_experts}, got {model.hidden}")
    x = torch.randn(logits.shape[0], model.hidden, generator=generator)
    x[:, : model.num_experts] = logits
    bias = torch.zeros(model.num_experts, device=device)
    return Case(label, model, routing, x.to(device, dtype), logits.to(device), bias)


def random_tile(std: float, generator) -> torch.Tensor:
    """To `fill` weights from: drawing gigabytes of normal numbers would take minutes. Its odd length keeps the rows of a
    matrix, and the experts, different."""
    return std * torch.randn(4_000_037, generator=generator)


def fill(weight: torch.Tensor, tile: torch.Tensor, generator) -> torch.Tensor:
    """Repeats the tile over the weight, from a random place on."""
    start = int(torch.randint(tile.numel(), (), generator=generator))
    tile = tile.view(torch.uint8).roll(start * tile.itemsize).view(tile.dtype)  # CUDA rolls no fp8
    for chunk in weight.view(-1).split(tile.numel()):
        chunk.copy_(tile[: chunk.numel()])
    return weight


def _quantized_tile(tile: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile in a quantised format, all of it with one scale, and that scale."""
    step = tile.abs().max() / LARGEST[form]
    if form == "fp8":
        return (tile / step).to(FORMATS[form]), step
    values = (tile / step).round().to(torch.int8)
    return (pack(values[:-3]) if form == "int4" else values), step  # three less: an odd number of bytes again


def random_weights(model: Model, dtype, device, seed: int, form: str | None = None) -> Weights:
    """Random weights of one layer, never zeros: those are faster than data on some hardware. dtype: of the gate, and of all
    unless `form` names a quantised one of FORMS."""
    generator = torch.Generator().manual_seed(seed)
    tile, step = random_tile(0.02, generator), None
    if form is None or form in DTYPES:
        tile = tile.to(dtype)
    else:
        tile, step = _quantized_tile(tile, "int8" if form == "w8a8" else form)
    tile = tile.to(device)

    def filled(*shape, halves=1):
        """A weight and its scale."""
        *lead, rows, columns = shape
        weight = torch.empty(*lead, rows, stored_columns(tile.dtype, columns), dtype=tile.dtype, device=device)
        fill(weight, tile, generator)
        if step is None:
            return weight, None
        scale = torch.empty(*lead, *scale_shape(tile.dtype, rows, columns, halves))
        scale = step * scale.uniform_(0.5, 1.5, generator=generator)
        return weight, scale.to(device, scale_dtypes(tile.dtype)[0])

    # The same gate in every layer, so that every layer routes alike.
    generator.manual_seed(0)
    gate = (0.001 * torch.randn(model.num_experts, model.hidden, generator=generator)).to(device, dtype)
    gate[:, : model.num_experts] = torch.eye(model.num_experts, dtype=dtype, device=device)
    none = None, None
    pairs = (
        filled(model.num_experts, 2 * model.intermediate, model.hidden, halves=2),
        filled(model.num_experts, model.hidden, model.intermediate),
        filled(2 * model.shared, model.hidden, halves=2) if model.shared else none,
        filled(model.hidden, model.shared) if model.shared else none,
    )
    weights, scales = zip(*pairs)
    bias = torch.zeros(model.num_experts, device=device)
    return Weights(gate, bias, *weights, *scales, "int8" if form == "w8a8" else None)


def layers_that_fit(model: Model, layer_bytes: int, budget_bytes: float) -> int:
    """How many layers of weights to rotate: all of the model's, or as many as `budget_bytes` hold, at least one."""
    return max(1, min(model.moe_layers, int(budget_bytes // layer_bytes)))


def memory_budget(device: str) -> float:
    """Bytes for rotating weights: most of a GPU's free memory; of a shared CPU machine's a quarter, 8 GB at most."""
    if device == "cuda":
        return 0.6 * torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux
        return 4e9
    return min(8e9, 0.25 * 1024 * kib)
