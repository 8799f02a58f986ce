"""The paper's tables 2, 3 and 4 in miniature: what each policy costs in experts, and what it keeps of the accuracy; and what
is left of both in fp8, int8 and int4.

    python -m examples.miniature.table

Decodes a held-out test set with the two shipped checkpoints under every policy, prints the tables with the paper's figures
beside ours, and writes results.json and tradeoff.png to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import dmoe_ops
from dmoe_ops.convert import quantize_folder
from dmoe_ops.eval import paper
from dmoe_ops.eval.paper import wilson
from dmoe_ops.formats import FORMATS

from . import tasks
from .model import BASE, BLOCK, BLOCKS, DMOE, MIN_EXPERTS, answer, encode, load, pyplot

SEED = 1_000_000  # of the test set; training seeds are small numbers, and its items are other ones anyway
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8)


class Run(NamedTuple):
    """What one policy did. experts: unique experts of a block, per task (denoising forwards, mean over layers: the paper's
    count); right: bool [tasks, prompts]; forwards: denoising forwards per prompt; expert_bytes: of one expert as the
    checkpoint stores it."""

    experts: dict[str, float]
    right: numpy.ndarray
    forwards: float
    expert_bytes: int

    @property
    def mean_experts(self) -> float:
        return sum(self.experts.values()) / len(self.experts)


class Bench:
    """The test set, the two checkpoints as they are and in each format, and the runs that have been made."""

    def __init__(self, folder: Path, per_task: int):
        self.tokenizer = Tokenizer.from_file(str(folder / BASE.name / "tokenizer.json"))
        self.models = {name: load(folder / name) for name in (BASE.name, DMOE.name)}
        with tempfile.TemporaryDirectory() as work:
            for name, form in itertools.product(list(self.models), FORMATS):
                quantize_folder(folder / name, form, Path(work, name, form))
                self.models[f"{name} in {form}"] = load(Path(work, name, form))
        self.examples = {name: tasks.examples(name, random.Random(SEED), per_task, test=True) for name in tasks.TASKS}
        self.runs: dict[str, Run] = {}
        self.bar = tqdm(unit="prompt", disable=not sys.stderr.isatty())

    def run(self, model: str, policy: str, block_length: int = BLOCK, **overrides) -> Run:
        settings = "".join(f", {key}={value}" for key, value in overrides.items())
        key = f"{model}: {policy}{settings}, blocks of {block_length}"
        if key in self.runs:
            return self.runs[key]
        self.bar.set_description(key)
        net = self.models[model]
        net.set_routing(policy, **overrides)
        experts, right, forwards = {}, [], 0
        for name, examples in self.examples.items():
            prompts = [example.prompt for example in examples]
            answers, stats = answer(net, self.tokenizer, prompts, BLOCKS[name], block_length=block_length)
            right.append([text == example.answer for text, example in zip(answers, examples)])
            steps = [s.denoising_forwards for s in stats]
            experts[name] = sum(s.unique_experts_denoising * n for s, n in zip(stats, steps)) / sum(steps)
            forwards += sum(steps)
            self.bar.update(len(prompts))
        self.runs[key] = Run(
            experts,
            numpy.array(right),
            forwards / sum(map(len, right)),
            net.bytes_per_expert // (1 if " in " in model else 2),  # float32 here is stored in bfloat16
        )
        return self.runs[key]


class Agreement(NamedTuple):
    """What two models choose for the same texts, over all MoE layers but the first, whose input no quantised weight has
    touched. coresets: shared members over all members, mean over the blocks; identical: share of coresets; experts: shared
    ones of a token's top-k."""

    coresets: float
    identical: float
    experts: float


@torch.no_grad()
def agreement(bench: Bench, model: str, other: str) -> Agreement:
    """Of two models under dMoE at p = 0.6, on the test set's texts with half of each answer masked."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, examples in bench.examples.items():
        pairs = [(example.prompt, example.answer) for example in examples]
        tokens, lengths = encode(bench.tokenizer, pairs, BLOCKS[name] * BLOCK)
        hidden = torch.rand(tokens.shape, generator=generator) < 0.5
        hidden &= torch.arange(tokens.shape[1]) >= lengths[:, None]
        tokens[hidden] = bench.models[model].config.mask_token_id
        ours, theirs = (choices(bench.models[one], tokens) for one in (model, other))
        (core, chosen), (other_core, other_chosen) = ours, theirs
        shared = (core & other_core).sum(-1) / (core | other_core).sum(-1)
        experts = (chosen & other_chosen).sum(-1) / chosen.sum(-1)
        found.append((shared.mean(), (core == other_core).all(-1).float().mean(), experts.mean()))
    return Agreement(*(float(sum(part) / len(part)) for part in zip(*found)))


def choices(net, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The coresets, bool [layers, blocks, E], and the tokens' experts, bool [layers, bsz, T, E], of the MoE layers but the
    first."""
    net.set_routing("dmoe", top_p=0.6, min_experts=MIN_EXPERTS)
    routed = net(tokens, block_length=BLOCK).routed
    coresets, chosen = [], []
    for moe, (logits, ids) in list(zip(net.moe_layers, routed))[1:]:
        members = dmoe_ops.block_route(logits, moe.expert_bias, routing=net.routing).coreset_ids
        coresets.append(mask_of(members, logits.shape[-1]))
        chosen.append(mask_of(ids, logits.shape[-1]))
    return torch.stack(coresets), torch.stack(chosen)


def mask_of(ids, size: int) -> torch.Tensor:
    """bool [..., size] of ids [..., n]; -1 is none."""
    mask = torch.zeros(*ids.shape[:-1], size + 1, dtype=torch.bool)
    return mask.scatter(-1, ids.long() % (size + 1), True)[..., :size]


def kept(run: Run, base: Run, draws: int = 2000) -> tuple[float, float, float]:
    """Mean accuracy over that of `base`, and its 95 % interval: bootstrap over the prompts, the same ones for both."""
    generator = numpy.random.default_rng(0)
    n = run.right.shape[1]
    ours, theirs = numpy.zeros(draws), numpy.zeros(draws)
    for mine, other in zip(run.right, base.right):
        drawn = generator.integers(0, n, (draws, n))
        ours += mine[drawn].mean(1)
        theirs += other[drawn].mean(1)
    low, high = numpy.quantile(ours / numpy.maximum(theirs, 1e-9), (0.025, 0.975))
    return float(run.right.mean() / base.right.mean()), float(low), float(high)


def measure(bench: Bench) -> dict:
    """The rows of the three tables and of the picture."""
    base = bench.run("base", "token")
    dmoe = dict(min_experts=MIN_EXPERTS)
    trained = {p: bench.run("dmoe", "dmoe", top_p=p, **dmoe) for p in THRESHOLDS}
    untrained = {p: bench.run("base", "dmoe", top_p=p, **dmoe) for p in THRESHOLDS}
    # The published points keep the paper's share of the base's experts; the starred ones get no fewer than dMoE takes.
    published = round(base.mean_experts * paper.summary(paper.TABLE_2["DES-V"])[1])
    starred = math.ceil(trained[0.6].mean_experts)

    def at_least(policy, least, **overrides):
        """A policy of fixed capacity at the smallest one that uses no fewer experts than `least`, as some go unused."""
        capacity = math.ceil(least)
        while (run := bench.run("base", policy, capacity=capacity, **overrides)).mean_experts < least:
            capacity += 1
        return run, capacity

    votes, vote_capacity = at_least("des_vote", trained[0.6].mean_experts)
    maxima, max_capacity = at_least("capacity", trained[0.6].mean_experts)
    table_2 = {
        "base": ("token routing, top 4 of 64", base),
        "top-k halved": ("token routing, top 2", bench.run("base", "top4", top_k=2)),
        "DES-S": ("every token's best 2", bench.run("base", "des_seq", union_k=2)),
        "DES-V": (f"the {published} with most votes", bench.run("base", "des_vote", capacity=published)),
        "capacity": (f"the {published} with the highest maximum", bench.run("base", "capacity", capacity=published)),
        "DES-S*": ("every token's best", bench.run("base", "des_seq", union_k=1)),
        "DES-V*": (f"the {vote_capacity} with most votes", votes),
        "capacity*": (f"the {max_capacity} with the highest maximum", maxima),
        "dMoE untrained": ("p = 0.6, base weights", untrained[0.6]),
        "dMoE": ("p = 0.6, self-distilled", trained[0.6]),
        "dMoE weights": ("token routing", bench.run("dmoe", "token")),
    }
    blocks = {
        size: (
            bench.run("base", "token", size),
            bench.run("dmoe", "dmoe", size, top_p=0.6, **dmoe),
            bench.run("dmoe", "token", size),
        )
        for size in paper.TABLE_4
    }
    curve = {n: bench.run("base", "des_vote", capacity=n) for n in sorted({starred, 8, 12, 16, 20, 24, 32})}
    quantized = {}
    for name, policy, settings in (("base", "token", {}), ("dmoe", "dmoe", dict(top_p=0.6, **dmoe))):
        for form in FORMATS:
            model = f"{name} in {form}"
            run = bench.run(model, policy, **settings)
            quantized[name, form] = (run, bench.run(name, policy, **settings), agreement(bench, model, name))
    return dict(table_2=table_2, trained=trained, untrained=untrained, blocks=blocks, curve=curve, quantized=quantized)


# ---- what is printed


def cells(run: Run, base: Run) -> list[str]:
    found = []
    for name, right in zip(tasks.TASKS, run.right):
        low, high = wilson(int(right.sum()), len(right))
        found += [f"{run.experts[name]:.1f}", f"{right.mean():.1%} ±{(high - low) / 2:.1%}"]
    share, low, high = kept(run, base)
    kilobytes = run.mean_experts * run.expert_bytes / 1000
    found += [f"{run.mean_experts:.1f}", f"{kilobytes:.0f}", f"{run.right.mean():.1%}"]
    return [*found, f"{share:.1%} ({low:.1%}–{high:.1%})"]


def theirs(row, base=paper.BASE) -> list[str]:
    if row is None:
        return ["–", "–"]
    experts, share, accuracy = paper.summary(row, base)
    return [f"{experts:.1f} ({share:.0%})", f"{accuracy:.1%}"]


def layout(title: str, rows: list[tuple[str, Run, Run, list[str]]], last=("paper: experts", "of base")) -> str:
    """A table in the layout of the paper's: experts and accuracy per task; ours, then theirs (or what `last` names)."""
    head = ["", *[part for name in tasks.TASKS for part in ("experts", name)], "experts", "kB", "accuracy", "of base"]
    lines = [[*head, *last]]
    lines += [[name, *cells(run, base), *others] for name, run, base, others in rows]
    return "\n" + aligned(title, lines)


def aligned(title: str, lines: list[list[str]]) -> str:
    """Lines of cells in columns, the first flush left, under a title and a rule."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([title, "-" * len(text[0]), *text])


def report(found: dict) -> str:
    table_2, blocks = found["table_2"], found["blocks"]
    base = table_2["base"][1]
    parts = [
        layout(
            "Table 2. Policies (blocks of 32)",
            [(f"{name}: {how}", run, base, theirs(paper.TABLE_2.get(name))) for name, (how, run) in table_2.items()],
        ),
        layout(
            "Table 3. The threshold p at test time, trained at p = 0.6",
            [(f"dMoE p = {p}", run, base, theirs(paper.TABLE_3[p])) for p, run in found["trained"].items()]
            + [(f"untrained p = {p}", run, base, theirs(None)) for p, run in found["untrained"].items()],
        ),
        layout(
            "Table 4. Block size at test time, self-distilled with blocks of 32 (of base: token routing at the same size)",
            [
                row
                for size, (token, ours, weights) in blocks.items()
                for row in (
                    (f"{size}: token routing", token, token, theirs(paper.TABLE_4[size][0], paper.TABLE_4[size][0])),
                    (f"{size}: dMoE p = 0.6", ours, token, theirs(paper.TABLE_4[size][1], paper.TABLE_4[size][0])),
                    (f"{size}: dMoE weights, token routing", weights, token, theirs(None)),
                )
            ],
        ),
        layout(
            "Table 5. Quantised experts (of base: the same in bfloat16)",
            [
                row
                for name, plain in (("base", table_2["base"][1]), ("dmoe", found["trained"][0.6]))
                for row in quantized_rows(name, plain, found["quantized"])
            ],
            ("coresets alike", "identical", "tokens' experts"),
        ),
        "",
        verdict(found),
    ]
    return "\n".join(parts)


def quantized_rows(name: str, plain: Run, found: dict) -> list[tuple[str, Run, Run, list[str]]]:
    title = "base, token routing" if name == "base" else "dMoE p = 0.6"
    rows = [(f"{title}: bfloat16", plain, plain, 3 * ["–"])]
    for form in FORMATS:
        run, _, agree = found[name, form]
        rows.append((f"{title}: {form}", run, plain, [f"{share:.1%}" for share in agree]))
    return rows


def verdict(found: dict) -> str:
    """Whether the aim is reached: 99 % of the accuracy at 30 % of the experts, and more than any training-free policy."""
    base, run = found["table_2"]["base"][1], found["trained"][0.6]
    share, low, high = kept(run, base)
    experts = run.mean_experts / base.mean_experts
    free = {name: r for name, (_, r) in found["table_2"].items() if name.endswith(("*", "untrained"))}
    best = max(free, key=lambda name: free[name].right.mean())
    lines = (
        f"Trained dMoE at p = 0.6 keeps {share:.1%} of the base's accuracy (95 %: {low:.1%}–{high:.1%}) with {experts:.1%} "
        "of its unique experts.",
        f"Of the training-free policies with at least as many, {best} keeps most: {kept(free[best], base)[0]:.1%} with "
        f"{free[best].mean_experts / base.mean_experts:.1%}.",
        "experts: unique experts of a block, mean over layers and denoising steps. kB: their weights in a layer, as stored.",
        "accuracy: answers right to the letter, with 95 % Wilson intervals; of base: paired bootstrap over the prompts.",
        "alike, identical, tokens' experts: under dMoE, on texts with half of each answer masked, beside bfloat16's; the "
        "share of a coreset's members, of coresets and of a token's experts. Of all MoE layers but the first.",
    )
    return "\n".join(lines)


def picture(found: dict, file: Path) -> None:
    """The trade-off of the paper's figure 6: accuracy against unique experts."""
    plt = pyplot(file)
    if plt is None:
        return
    base = found["table_2"]["base"][1]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    series = {
        "dMoE, self-distilled (p = 0.4 … 0.8)": (found["trained"].values(), "o-"),
        "dMoE, untrained (p = 0.4 … 0.8)": (found["untrained"].values(), "s--"),
        "DES-Vote, untrained": (found["curve"].values(), "^--"),
        "DES-Seq, untrained (best 1, best 2)": ([found["table_2"][n][1] for n in ("DES-S*", "DES-S")], "v:"),
    }
    for label, (runs, style) in series.items():
        points = sorted((run.mean_experts, 100 * run.right.mean()) for run in runs)
        axes.plot(*zip(*points), style, label=label, markersize=5)
    axes.plot(base.mean_experts, 100 * base.right.mean(), "k*", markersize=11, label="base, token routing")
    axes.axhline(99 * base.right.mean(), color="gray", linewidth=0.8, linestyle=":")
    axes.annotate(
        "99 % of base", (base.mean_experts, 99 * base.right.mean()), ha="right", va="top", fontsize=8, color="gray"
    )
    axes.set(xlabel="unique experts per block (of 64)", ylabel="answers right, %", ylim=(0, 102))
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(True, alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.miniature.table", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoints", type=Path, default=BASE.parent, help="folder with base and dmoe (default: the shipped)"
    )
    parser.add_argument("--per-task", type=int, default=400, help="test prompts of each task (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/miniature-table"), help="for results.json and tradeoff.png"
    )
    args = parser.parse_args(argv)
    if args.per_task < 1:
        parser.error(f"--per-task must be at least 1, got {args.per_task}")
    begin = time.perf_counter()
    bench = Bench(args.checkpoints, args.per_task)
    found = measure(bench)
    bench.bar.close()
    text = report(found)
    print(text)
    seconds = time.perf_counter() - begin
    print(f"{len(bench.runs)} runs of {args.per_task} prompts per task in {seconds:.0f} s, torch {torch.__version__}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {
        key: dict(
            experts={**run.experts, "mean": run.mean_experts},
            accuracy={name: float(right.mean()) for name, right in zip(tasks.TASKS, run.right)},
            interval={name: wilson(int(right.sum()), len(right)) for name, right in zip(tasks.TASKS, run.right)},
            denoising_forwards_per_prompt=run.forwards,
        )
        for key, run in bench.runs.items()
    }
    base = found["table_2"]["base"][1]
    table_2 = {
        name: dict(experts=run.mean_experts, right=run.right.mean(), of_base=kept(run, base))
        for name, (_, run) in found["table_2"].items()
    }
    quantized = {
        f"{name} in {form}": dict(right=run.right.mean(), of_bfloat16=kept(run, plain), **agree._asdict())
        for (name, form), (run, plain, agree) in found["quantized"].items()
    }
    figures = dict(per_task=args.per_task, seconds=round(seconds), table_2=table_2, quantized=quantized)
    figures |= dict(runs=rows, text=text.splitlines())
    (args.out / "results.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    picture(found, args.out / "tradeoff.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
