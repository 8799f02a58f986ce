"""`dmoe bench decode`: block diffusion end to end, policy against policy, and where the time of a forward goes."""

from __future__ import annotations

import dataclasses
import time

import torch

from ..layer import BlockMoE
from ..models.llada2 import Attention, LLaDA2Config, LLaDA2ForDiffusion
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
    """Random matrices and routers, norms 1, but 4 for queries: with sharper attention the tokens of a block, most of them
    masks, differ enough to choose different experts."""
    model = LLaDA2ForDiffusion(config, "token", dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    tile = random_tile(config.initializer_range, generator).to(device, dtype)
    for weight in model.parameters():
        weight.fill_(1) if weight.dim() == 1 else fill(weight, tile, generator)
    for layer in model.model.layers:
        layer.attention.query_layernorm.weight.fill_(4)
    for moe in model.moe_layers:
        gate = torch.randn(moe.gate_weight.shape, generator=generator)
        moe.gate_weight.copy_(config.initializer_range * gate)
    return model


def calibrate(model: LLaDA2ForDiffusion, decode, target: float, seed: int) -> float:
    """Scales random router biases until token routing touches `target` experts per block and returns what it then
    touches: the wider the biases, the more the tokens agree. Bisection; unbiased routers touch the most."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [torch.randn(moe.expert_bias.shape, generator=generator) for moe in model.moe_layers]

    def touched(scale: float) -> float:
        for moe, shape in zip(model.moe_layers, shapes):
            moe.expert_bias.copy_(scale * shape)
        return decode().stats.unique_experts_denoising

    low, high = 0.0, 1.0
    for _ in results.progress(range(6), "router biases", "decode"):
        middle = (low + high) / 2
        low, high = (middle, high) if touched(middle) > target else (low, middle)
    return touched(high)


class Stopwatch:
    """Time inside modules of some classes, by hooks. On a GPU events, read after the run."""

    def __init__(self, model, classes: dict[str, type], device: str):
        self.device, self.marks, self.handles = device, {name: [] for name in classes}, []
        for module in model.modules():
            for name, kind in classes.items():
                if isinstance(module, kind):
                    self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._mark(name)))
                    self.handles.append(module.register_forward_hook(lambda *_, name=name: self._mark(name)))

    def _mark(self, name: str) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks[name].append(event)
        else:
            self.marks[name].append(time.perf_counter())

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *exc) -> None:
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


def run(out: dict, model: LLaDA2ForDiffusion, policies: list[str], decode, rounds: int) -> None:
    """Every policy decodes once a round, after one that is not counted. Adds a row per policy to `out`."""
    device = out["machine"]["device"]
    samples: dict[str, list[dict]] = {policy: [] for policy in policies}

    def once(policy: str) -> dict:
        model.set_routing(policy)
        with Stopwatch(model, dict(moe=BlockMoE, attention=Attention), device) as watch:
            begin = time.perf_counter()
            decoded = decode()
            if device == "cuda":
                torch.cuda.synchronize()
            total = time.perf_counter() - begin
            split = watch.seconds()
        return dict(total=total, rest=total - sum(split.values()), stats=decoded.stats, **split)

    try:
        for turn in results.progress(range(rounds + 1), "decoding", "round"):
            for sample in [(policy, once(policy)) for policy in policies]:
                if turn:
                    samples[sample[0]].append(sample[1])
    finally:
        if all(len(found) > 1 for found in samples.values()):
            out["rows"] += [row(policy, samples) for policy in policies]


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
            f"{part}_ms": 1e3 * timing.spread([s[part] / s["stats"].forwards for s in mine])["median"]
            for part in ("total", "moe", "attention", "rest")
        },
        ratios={other: timing.ratio(per_token[policy], per_token[other]) for other in samples if other != policy},
    )


def print_rows(out: dict) -> None:
    results.print_header(out)
    print(f"model      {out['settings']['model']}")
    parts = ["ms/forward", "MoE", "attention", "rest"]
    header = ["policy", "tokens/s", "p10–p90", "forwards", *parts, "unique", "MB/step", "faster than token"]
    lines = []
    for row in out["rows"]:
        rate = row["tokens_per_s"]
        token = next((other["ratios"].get(row["key"]) for other in out["rows"] if other["key"] == "token"), None)
        lines.append(
            [
                row["key"],
                results.number(rate["median"]),
                f"{results.number(rate['p10'])}–{results.number(rate['p90'])}",
                str(row["forwards"]),
                *(results.number(row[f"{part}_ms"]) for part in ("total", "moe", "attention", "rest")),
                f"{row['unique']:.1f}",
                results.number(row["bytes"] / 1e6),
                results.ratio(token) if token else "",
            ]
        )
    print("\n" + results.table(header, lines))
    print(
        "\nms per forward: prefill, denoising and commit forwards alike; rest: embedding, norms, the dense first layer, "
        "the head, sampling.\nunique: experts per block over denoising forwards. MB/step: their weights, all layers."
        "\nfaster than token: tokens/s over those of token routing, with p10–p90 of the rounds."
    )
