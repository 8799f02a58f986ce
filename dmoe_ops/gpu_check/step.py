"""A whole denoising step of a random LLaDA2.0-mini, replayed as a CUDA graph: its time, the cost model's, and the time of
every kernel in it. python -m dmoe_ops.gpu_check.step --backend cuda --json FILE"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from ..bench import decode, results, timing
from ..models import graphs
from ..models.step import Batch, Rule, denoise
from .kernels import kernels_of

PREFIX = 224  # tokens in front of the block
REPLAYS = 50
NAMED = 150  # characters of a kernel's name: with its template, which tells what it computes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check step")
    parser.add_argument("--backend", choices=("cuda", "triton"), required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--capacities", type=int, nargs="+", default=[1024, 4096], help="of the cache, tokens")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, launched singly")
    args = parser.parse_args(argv)
    os.environ["DMOE_BACKEND"] = "cpp" if args.rehearse and args.backend == "cuda" else args.backend
    device, name = ("cpu", "tiny") if args.rehearse else ("cuda", "llada2-mini")
    config = decode.CONFIGS[name]
    model = decode.random_model(config, torch.float32 if args.rehearse else torch.bfloat16, device, 0)
    prompt = torch.randint(config.mask_token_id - 1, (1, PREFIX), generator=torch.Generator().manual_seed(0)).to(device)
    target = decode.TARGET_UNIQUE * config.num_experts / 256

    def short():
        return model.generate(prompt, gen_length=32, steps=8, eos_id=None, use_graphs=False)

    model.set_routing("token")
    scale = 1.0 if args.rehearse else None
    touched = decode.calibrate(model, short, target, 0, scale)
    print(f"token routing touches {touched:.0f} experts")
    rows = []
    for policy in ("dmoe", "token"):
        model.set_routing(policy)
        for capacity in args.capacities[:1] if args.rehearse else args.capacities:
            rows.append(dict(policy=policy, capacity=capacity, **measured(model, prompt, capacity, device)))
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
            print(table(rows[-1]), flush=True)
    return 0


def measured(model, prompt, capacity: int, device: str) -> dict:
    """A step on the block behind the prompt, which is all masks before each replay."""
    size = model.config.block_length
    rule = Rule(size, model.config.mask_token_id, None, True, 0.95)
    every = torch.zeros(1, dtype=torch.int64, device=device)
    if device == "cuda":
        made = graphs.StepGraphs(model, rule, 1, capacity, ())
        batch, step = made.batch, lambda: made.step(False)
    else:
        batch = Batch.empty(model, size, 1, capacity)

        def step():
            return denoise(model, batch, rule, every, size, False, fixed=True)

    lengths, gen_lengths = torch.tensor([PREFIX]), torch.tensor([size])
    batch.fill(prompt, lengths, gen_lengths, torch.tensor([8]), rule.mask_id)
    model.hidden_states(prompt, kv_cache=batch.cache, block_length=size)
    batch.begin.fill_(PREFIX)
    text = batch.x.clone()

    def fresh() -> None:
        batch.x.copy_(text)
        batch.active.fill_(True)
        batch.step.zero_()

    contender = timing.Contender([step], device, capturable=False)
    times = []
    for turn in range(3 if device == "cpu" else REPLAYS):
        fresh()
        times.append(1e3 * contender.run(turn))
    counter = batch.counter
    fresh()
    found = kernels_of(contender, device, lambda name: name[:NAMED])
    unique = float(counter.unique.sum() / counter.blocks.sum() / counter.unique.shape[1])
    kernels = [dict(each, total=each["per_call"] * each["us"]) for each in found]
    return dict(unique=unique, ms=timing.spread(times), launches=kernels)


def table(row: dict) -> str:
    lines = [
        [each["name"], f"{each['per_call']:g}", results.number(each["us"]), results.number(each["total"])]
        for each in sorted(row["launches"], key=lambda each: -each["total"])
    ]
    ms, kernels = row["ms"], row["launches"]
    head = (
        f"{row['policy']}, a cache of {row['capacity']} tokens: {ms['median']:.3f} ms ({ms['p10']:.3f}–{ms['p90']:.3f}), "
        f"{row['unique']:.1f} experts; {sum(each['per_call'] for each in kernels):.0f} kernels, "
        f"{sum(each['total'] for each in kernels) / 1e3:.3f} ms"
    )
    return f"\n{head}\n" + results.table(["kernel", "in a step", "µs each", "µs in all"], lines)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
