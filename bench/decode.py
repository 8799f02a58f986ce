"""`dmoe bench decode`: block diffusion end to end, policy against policy, and where the time of a forward goes."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
import types
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..layer import BlockMoE
from ..models.llada2 import Attention, LLaDA2Config, LLaDA2ForDiffusion
from ..models.step import Batch, Rule, denoise
from . import results, timing
from .cases import fill, random_tile

CONFIGS = {
    "llada2-mini": LLaDA2Config(
        vocab_size=157184,
        hidden_size=2048,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        intermediate_size=5120,
        num_shared_experts=1,
        first_k_dense_replace=1,
        rope_theta=600000.0,
        rms_norm_eps=1e-6,
        mask_token_id=156895,
        eos_token_id=156892,
    ),
    # No model: small enough for a test.
    "tiny": LLaDA2Config(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        intermediate_size=128,
        num_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        mask_token_id=511,
        eos_token_id=510,
    ),
}
PARTS = ("total", "moe", "attention", "head", "sampling", "rest")
COMMON = 0.7  # length of what embeddings share, over that of what each has for itself
SINGLY = ", singly"  # behind a policy's name: its steps are launched op by op
PAPER = "the paper has 1.14–1.66, end to end"
TARGET_UNIQUE = 69.5  # experts of 256 that a block of LLaDA2.0-mini touches under token routing


def reduced(config: LLaDA2Config, layers: int, vocab: int) -> LLaDA2Config:
    """The model with fewer layers and tokens to predict; each layer keeps its full size."""
    tokens = {} if vocab >= config.vocab_size else dict(mask_token_id=vocab - 1, eos_token_id=vocab - 2)
    return dataclasses.replace(config, num_hidden_layers=layers, vocab_size=min(vocab, config.vocab_size), **tokens)


def weight_bytes(config: LLaDA2Config, layers: int, dtype: torch.dtype) -> int:
    """Bytes of embedding, head and experts; the rest is small."""
    experts = 3 * config.hidden_size * config.moe_intermediate_size * (config.num_experts + 1)
    moe_layers = layers - config.first_k_dense_replace
    return (2 * config.vocab_size * config.hidden_size + moe_layers * experts) * dtype.itemsize


def random_model(config: LLaDA2Config, dtype, device: str, seed: int) -> LLaDA2ForDiffusion:
    """Random matrices and routers without a bias, norms 1, but 4 for queries: with sharper attention the tokens of a block,
    most of them masks, differ enough to choose different experts."""
    model = LLaDA2ForDiffusion(config, "token", dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    tile = random_tile(config.initializer_range, generator).to(device, dtype)
    for weight in model.parameters():
        weight.fill_(1) if weight.dim() == 1 else fill(weight, tile, generator)
    # What all tokens have in common, in a trained model too: it is by this that they agree on experts.
    common = COMMON * config.initializer_range * torch.randn(config.hidden_size, generator=generator)
    model.model.word_embeddings.weight.add_(common.to(device, dtype))
    for layer in model.model.layers:
        layer.attention.query_layernorm.weight.fill_(4)
    for moe in model.moe_layers:
        moe.expert_bias.zero_()
        gate = torch.randn(moe.gate_weight.shape, generator=generator)
        moe.gate_weight.copy_(config.initializer_range * gate)
    return model


def calibrate(model: LLaDA2ForDiffusion, decode, target: float, seed: int, scale: float | None = None) -> float:
    """Gives random routers the statistics of a real one and returns how many experts token routing then touches per block.

    Logits are -1 + 1.2 n(expert) + s n(token, expert), as on the calibrated workload (`cases.calibrated_logits`): what all
    inputs of a layer share carries the first part, what they differ by the second. s, 1 there, is found by bisection, up
    to 5 (scores saturate): the tokens of a block, most of them masks, differ less than independent ones. The bias is the
    model's. scale: s, where it is known.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    shared = [-1 + 1.2 * torch.randn(config.num_experts, generator=generator) for _ in model.moe_layers]
    own = [torch.randn(config.num_experts, config.hidden_size, generator=generator) for _ in model.moe_layers]
    ids = torch.randint(config.mask_token_id - 1, (1, 8 * config.block_length), generator=generator)
    masked = (torch.rand(ids.shape, generator=generator) < 0.5).to(model.device)
    ids = ids.to(model.device).masked_fill(masked, config.mask_token_id)

    def fit(moe, inputs, of_all, of_each, scale: float) -> None:
        x = inputs[0].flatten(0, -2).float()
        mean = x.mean(0)
        masks = x[masked.flatten()]
        # Of n(0, 1) rows: the standard deviation of own @ (x - mean).
        spread = (masks - masks.mean(0)).square().sum(1).mean().sqrt()
        of_each = of_each.to(x.device)
        of_each = of_each - torch.outer(of_each @ mean, mean) / mean.square().sum()
        gate = torch.outer(of_all.to(x.device), mean) / mean.square().sum() + scale / spread * of_each
        moe.gate_weight.copy_(gate)

    def touched(scale: float) -> float:
        hooks = [
            moe.register_forward_pre_hook(lambda moe, inputs, parts=parts: fit(moe, inputs, *parts, scale))
            for moe, parts in zip(model.moe_layers, zip(shared, own))
        ]
        model.hidden_states(ids)  # layer after layer: each is fitted to what the ones before it give
        for hook in hooks:
            hook.remove()
        return decode().stats.unique_experts_denoising

    if scale is not None:
        return touched(scale)
    low, high = 1 / 8, 5.0
    for _ in results.progress(range(5), "routers", "decode"):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if touched(middle) < target else (low, middle)
    return touched(high)


class Stopwatch:
    """Time inside modules of some classes, by hooks, and inside the head and the choice of tokens. On a GPU events, read
    after the run."""

    def __init__(self, model, classes: dict[str, type], device: str):
        self.device, self.marks, self.handles = device, {name: [] for name in (*classes, "head", "sampling")}, []
        for module in model.modules():
            for name, kind in classes.items():
                if isinstance(module, kind):
                    self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._mark(name)))
                    self.handles.append(module.register_forward_hook(lambda *_, name=name: self._mark(name)))
        self.patches = [mock.patch.object(model, "head", self._around("head", model.head))]
        self.patches += [mock.patch.object(Rule, "sample", self._around("sampling", Rule.sample))]

    def _around(self, name: str, function):
        def run(*args):
            self._mark(name)
            out = function(*args)
            self._mark(name)
            return out

        return run

    def _mark(self, name: str) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks[name].append(event)
        else:
            self.marks[name].append(time.perf_counter())

    def __enter__(self) -> Stopwatch:
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *exc) -> None:
        for patch in self.patches:
            patch.stop()
        for handle in self.handles:
            handle.remove()

    def seconds(self) -> dict[str, float]:
        """Of each class, in all."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return {
                name: sum(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2])) / 1e3
                for name, marks in self.marks.items()
            }
        return {name: sum(b - a for a, b in zip(m[::2], m[1::2])) for name, m in self.marks.items()}


class Reads(TorchDispatchMode):
    """Ops of a decode that launch something, and those that read a value back."""

    def __init__(self):
        super().__init__()
        self.ops = self.reads = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += not op.is_view and op.name() != "aten::_unsafe_view"
        self.reads += op.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return op(*args, **(kwargs or {}))


def counted(model: LLaDA2ForDiffusion, prompt, steps: int) -> dict:
    """Ops of a forward of one block, and of a step; values that a step reads back."""
    size = model.config.block_length
    cache, prompt = model.new_cache(size), prompt.to(model.device)
    with torch.no_grad(), Reads() as forward:
        model.hidden_states(prompt[:, :size], kv_cache=cache)
    batch = Batch.empty(model, size, 1, size)
    rule = Rule(size, model.config.mask_token_id, None, True, 0.95)
    with torch.no_grad(), Reads() as step:
        denoise(model, batch, rule, torch.zeros(1, dtype=torch.int64, device=model.device), size, False)
    return dict(ops_per_forward=forward.ops, ops_per_step=step.ops, reads_per_step=step.reads)


def floors(model: LLaDA2ForDiffusion, unique: float, bandwidth: float, gemm: float) -> dict[str, float]:
    """ms per forward of one block that reading the weights once, and multiplying, take at least."""
    config, size = model.config, model.config.block_length
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = config.num_hidden_layers * config.hidden_size * (width + config.num_attention_heads * config.head_dim)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    shared, layers = config.shared_intermediate_size / config.moe_intermediate_size, len(model.moe_layers)
    head = config.vocab_size * config.hidden_size
    parts = dict(  # weights read, weights that a token is multiplied with
        moe=(layers * expert * (unique + shared), layers * expert * (config.num_experts_per_tok + shared)),
        attention=(attention, attention),
        head=(head, head),
    )
    wide = model.dtype.itemsize
    return {
        f"{part}_floor_ms": 1e3 * max(read * wide / bandwidth, 2 * size * used / gemm)
        for part, (read, used) in parts.items()
    }


def run(out: dict, model: LLaDA2ForDiffusion, policies: list[str], decode, rounds: int, released=None) -> None:
    """Every policy decodes once a round, after one that is not counted, by decode(use_graphs); on a GPU in graphs and, to
    tell where its time goes, launched singly. So does `released`, a function that returns the number of its tokens. Adds a
    row per contender to `out`."""
    device = out["machine"]["device"]
    samples: dict[str, list[dict]] = {policy: [] for policy in policies}
    if device == "cuda":
        samples |= {f"{policy}{SINGLY}": [] for policy in policies}
    if released is not None:
        samples["released"] = []

    def once(key: str) -> dict:
        begin = time.perf_counter()
        if key == "released":
            tokens, unique = released()
            total = time.perf_counter() - begin
            forwards = latest[policies[0]].forwards  # of a decode of the same steps
            stats = types.SimpleNamespace(
                tokens=tokens,
                forwards=forwards,
                tokens_per_forward=tokens / forwards,
                unique_experts_denoising=unique,
                expert_bytes_per_step=unique * len(model.moe_layers) * model.bytes_per_expert,
            )
            return dict(total=total, moe=0, attention=0, head=0, sampling=0, rest=total, stats=stats)
        model.set_routing(key.removesuffix(SINGLY))
        if device == "cuda" and not key.endswith(SINGLY):  # a stopwatch sees nothing of a replay
            begin = time.perf_counter()
            decoded = decode(True)
            total, split = time.perf_counter() - begin, dict.fromkeys(PARTS[1:-1], 0.0)
        else:
            with Stopwatch(model, dict(moe=BlockMoE, attention=Attention), device) as watch:
                begin = time.perf_counter()
                decoded = decode(False)
                if device == "cuda":
                    torch.cuda.synchronize()
                total = time.perf_counter() - begin
                split = watch.seconds()
        latest[key] = decoded.stats
        return dict(total=total, rest=total - sum(split.values()), stats=decoded.stats, **split)

    latest = {}
    try:
        for turn in results.progress(range(rounds + 1), "decoding", "round"):
            for key, sample in [(key, once(key)) for key in samples]:
                if turn:
                    samples[key].append(sample)
    finally:
        if all(len(found) > 1 for found in samples.values()):
            out["rows"] += [row(policy, samples) for policy in samples]


def run_prefill(out: dict, model: LLaDA2ForDiffusion, policies: list[str], prompt, rounds: int, released=None) -> None:
    """A prompt through all layers into an empty cache under every policy, and by `released`, a function that runs its own;
    in turns. Adds a row per contender to `out`."""

    @torch.no_grad()
    def forward(policy: str):
        model.set_routing(policy)
        return model.hidden_states(prompt, kv_cache=model.new_cache(prompt.shape[1]))[1]

    calls = {policy: functools.partial(forward, policy) for policy in policies}
    # The first forwards warm up, too.
    unique = {policy: statistics.mean(ids.unique().numel() for _, ids in call()) for policy, call in calls.items()}
    if released is not None:
        released()
        calls["released"], unique["released"] = released, unique[policies[0]]
    device = model.device.type
    contenders = {key: timing.Contender([call], device, capturable=False) for key, call in calls.items()}
    timing.take_turns(list(contenders.values()), rounds, "prefill")
    taken = {key: each.samples for key, each in contenders.items()}
    for key, mine in taken.items():
        us = {f"{part}_us": 1e6 * value for part, value in timing.spread(mine).items()}
        ratios = {other: timing.ratio(mine, theirs) for other, theirs in taken.items() if other != key}
        about = dict(op="prefill", key=key, impl=key, case="prefill", tokens=prompt.shape[1], unique=unique[key])
        about["bytes"] = round(unique[key] * len(model.moe_layers) * model.bytes_per_expert)
        out["rows"].append(dict(about, samples=len(mine), ratios=ratios, **us))


def row(policy: str, samples: dict[str, list[dict]]) -> dict:
    """Times in ms per forward; ratios: time per token over that of another policy, taken within each round."""
    mine = samples[policy]
    stats = mine[0]["stats"]
    per_token = {name: [s["total"] / s["stats"].tokens for s in found] for name, found in samples.items()}
    rate = timing.spread([1 / seconds for seconds in per_token[policy]])
    return dict(
        op="decode",
        key=policy,
        impl=policy,
        case="decode",
        tokens=stats.tokens,
        forwards=stats.forwards,
        tokens_per_forward=stats.tokens_per_forward,
        unique=stats.unique_experts_denoising,
        bytes=round(stats.expert_bytes_per_step),
        tokens_per_s=rate,
        median_us=1e6 * timing.spread(per_token[policy])["median"],
        p10_us=1e6 * timing.spread(per_token[policy])["p10"],
        p90_us=1e6 * timing.spread(per_token[policy])["p90"],
        samples=len(mine),
        **{
            f"{part}_ms": 1e3 * timing.spread([s[part] / s["stats"].forwards for s in mine])["median"] for part in PARTS
        },
        ratios={other: timing.ratio(per_token[policy], per_token[other]) for other in samples if other != policy},
    )


def print_rows(out: dict) -> None:
    results.print_header(out)
    print(f"model      {out['settings']['model']}")
    parts = ["ms/forward", "MoE", "attention", "head", "sampling", "rest"]
    header = ["policy", "tokens/s", "p10–p90", "forwards", *parts, "unique", "MB/step", "faster than token"]
    lines = []
    decoded = [row for row in out["rows"] if row["op"] == "decode"]
    for row in decoded:
        rate = row["tokens_per_s"]
        token = next((other["ratios"].get(row["key"]) for other in decoded if other["key"] == "token"), None)
        lines.append(
            [
                row["key"],
                results.number(rate["median"]),
                f"{results.number(rate['p10'])}–{results.number(rate['p90'])}",
                str(row["forwards"]),
                *(results.number(row[f"{part}_ms"]) for part in PARTS),
                f"{row['unique']:.1f}",
                results.number(row["bytes"] / 1e6),
                results.ratio(token) if token else "",
            ]
        )
    print("\n" + results.table(header, lines))
    print(
        "\nms per forward: prefill, denoising and commit forwards alike; rest: norms, the dense layer, counts."
        "\nunique: experts per block over denoising forwards. MB/step: their weights, all layers."
        f"\nfaster than token: tokens/s over those of token routing, with p10–p90 of the rounds; {PAPER}."
    )
    counts = out["settings"].get("counts")
    if counts:
        print(
            "{ops_per_forward} ops per forward, {ops_per_step} per step, which reads {reads_per_step} values back".format(
                **counts
            )
        )
    for row in decoded:
        floor = {part: row.get(f"{part}_floor_ms") for part in ("moe", "attention", "head")}
        if all(floor.values()):
            said = ", ".join(f"{part} {results.number(value)}" for part, value in floor.items())
            print(f"floor of a full forward under {row['key']}, ms: {said}")
    released = next((row["ratios"] for row in decoded if row["key"] == "released"), {})
    for policy, ratio in released.items():
        print(f"{policy} over the released generate: {results.ratio(ratio)}")
    prefilled = [row for row in out["rows"] if row["op"] == "prefill"]
    for row in prefilled:
        print(f"prefill of {row['tokens']} tokens, {row['key']}: {results.number(row['median_us'] / 1e3)} ms")
    released = next((row["ratios"] for row in prefilled if row["key"] == "released"), {})
    for policy, ratio in released.items():
        print(f"prefill, {policy} over the released forward: {results.ratio(ratio)}")
