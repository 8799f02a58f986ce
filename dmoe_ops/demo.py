"""`dmoe demo`: prompts decoded three times by the same weights, with the stock expert loop and with ours."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import _backends, _files
from .bench import timing
from .expert_memory import MemoryStats
from .layer import BlockMoE
from .models import Decoded, DiffusionConfig, DiffusionModel, TextCodec, families, hub
from .models.devices import default_device, usable
from .models.text import StopStrings, before, padded
from .reference import dequantize
from .routing import POLICIES

# Trained by examples/miniature, which says what it has learned and what each policy costs and keeps. An installed package
# has its own copy; a checkout, editable or not, has the original.
PACKAGE = Path(__file__).resolve().parent
SHIPPED = (PACKAGE / "demo_checkpoint", PACKAGE.parent / "examples" / "miniature" / "checkpoints" / "dmoe")
SHIPPED_PROMPTS = (
    "Ben has 774 keys. Ada has 337 fewer. How many has Ada?",
    "work 8767+2064:",
    "sort 39,58,15,21,62:",
    "close {}[[]<{}>({[:",
)
PROMPTS = ("Why do diffusion language models decode several tokens at once?",)
DTYPES = ("bfloat16", "float16", "float32")
# Speeds are shown from so many rounds on: fewer have no spread to speak of.
MIN_ROUNDS, MAX_ROUNDS = 5, 30
NUMBERS = {2: "two", 3: "three"}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="a folder or a hub id (default: the small checkpoint that ships)"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", nargs="+", help="decoded together, as one batch")
    prompt.add_argument("--prompt-ids", metavar="ID", type=int, nargs="+", help="token ids, instead of a text")
    parser.add_argument("--raw", action="store_true", help="leave the model's chat template out")
    parser.add_argument("--gen-length", metavar="N", type=int, default=160, help="new tokens at most (default: 160)")


def prompts_of(args: argparse.Namespace, folder: Path) -> tuple[TextCodec, list[list[int]], list[str]]:
    """The folder's codec, the prompts' ids and their texts. Raises ValueError where text is given but no tokenizer."""
    codec = TextCodec(folder, chat=not args.raw)
    if codec.why_no_text and not args.prompt_ids:
        raise ValueError(f"--prompt-ids must be given: {codec.why_no_text}")
    prompts = args.prompt or (PROMPTS if args.model else SHIPPED_PROMPTS)
    ids = [args.prompt_ids] if args.prompt_ids else [codec.encode(text) for text in prompts]
    return codec, ids, [codec.decode(args.prompt_ids)] if args.prompt_ids else list(prompts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompts(parser)
    parser.add_argument("--stop", metavar="TEXT", nargs="+", default=[], help="texts that end an answer")
    parser.add_argument("--block-length", metavar="N", type=int, help="default: the model's own")
    parser.add_argument("--threshold", metavar="P", type=float, default=0.95, help="confidence that unmasks a token")
    parser.add_argument("--policy", choices=POLICIES, default="dmoe", help="block routing to show (default: dmoe)")
    parser.add_argument("--top-p", metavar="P", type=float, default=0.6, help="of dmoe (default: 0.6)")
    parser.add_argument("--min-experts", metavar="N", type=int, help="of dmoe (default: twice the model's top-k)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as stored; the shipped ones in float32)"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="keep routed experts in the files, and so much of them in memory: 4GB, 25%% (default: all)",
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=20, help="for repeated, interleaved timing (default: 20; 0: none)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")


def run(args: argparse.Namespace) -> int:
    try:
        if not 0 <= args.seconds < math.inf:
            raise ValueError(f"--seconds must be a number of at least 0, got {args.seconds:g}")
        if args.json:
            _files.check_writable(args.json)
        report = decode_three_ways(args)
    except (ValueError, OSError) as error:
        print(f"dmoe demo: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"figures written to {args.json}")
    return 0


def decode_three_ways(args: argparse.Namespace) -> dict:
    folder = hub.folder_of(args.model) if args.model else shipped_checkpoint()
    device = usable(args.device or default_device())
    _backends.name_for(device)
    # What can be refused is refused before the weights are read.
    settings = settings_of(args, families.config_of(folder))
    codec, ids, questions = prompts_of(args, folder)

    dtype = args.dtype or (None if args.model else "float32")
    print(f"loading {folder} on {device}", flush=True)
    model = families.load(folder, policy="token", dtype=dtype, device=device, expert_memory=args.expert_memory)
    about(model, ids, codec)
    input_ids, lengths = padded(ids)
    options = dict(block_length=args.block_length, gen_length=args.gen_length, threshold=args.threshold)
    decode = functools.partial(model.generate, input_ids.to(device), prompt_lengths=lengths, **options)
    if args.stop:
        stops = StopStrings(codec, args.stop, lengths.tolist(), model.config.eos_token_id)
        decode = functools.partial(decode, stream=stops)
    ways = ways_of(model, args.policy, settings, decode)
    for way in ways:
        print(f"decoding up to {args.gen_length} tokens: {way.what}", flush=True)
        way.first = way.decode(progress=True)  # also builds what is built lazily
    seconds = sum(way.first.seconds for way in ways)
    rounds = min(MAX_ROUNDS, int(args.seconds / seconds))
    if rounds >= MIN_ROUNDS:
        print(f"timing {rounds} rounds of all {NUMBERS[len(ways)]} in turn, about {rounds * seconds:.0f} s", flush=True)
        timing.take_turns(ways, rounds, "timing")
    runs = [figures(way, ways[0], codec, model.config.eos_token_id, args.stop) for way in ways]
    about_run = dict(model=str(folder), device=str(device), dtype=str(model.model.word_embeddings.weight.dtype))
    return dict(**about_run, prompts=questions, prompt_ids=ids, seconds_of_a_round=seconds, runs=runs)


def settings_of(args: argparse.Namespace, config: DiffusionConfig) -> dict:
    """The settings of the policy to show. Raises ValueError for one that is out of range."""
    settings = {}
    if args.policy == "dmoe":
        least = 2 * config.num_experts_per_tok if args.min_experts is None else args.min_experts
        settings = dict(top_p=args.top_p, min_experts=least)
    config.routing(args.policy, **settings)
    return settings


def about(model: DiffusionModel, ids: list[list[int]], codec: TextCodec) -> None:
    config = model.config
    dtype = str(model.model.word_embeddings.weight.dtype).removeprefix("torch.")
    weights = sum(p.numel() for p in DiffusionModel(config, device="meta").parameters())
    forms = sorted({moe.form for moe in model.moe_layers} - {None})
    experts = f", experts in {' and '.join(forms)}" if forms else ""
    print(
        f"  {config.num_hidden_layers} layers, {len(model.moe_layers)} with {config.num_experts} experts of which a token "
        f"takes {config.num_experts_per_tok}; {weights / 1e6:.1f} M weights in {dtype}{experts}; "
        f"{torch.get_num_threads()} CPU threads"
    )
    what = f"{len(ids)} prompts" if len(ids) > 1 else "prompt"
    chat = ", the chat template's among them" if codec.template else ""
    print(f"{what}, {sum(map(len, ids))} tokens{chat}")


class Run(NamedTuple):
    decoded: Decoded
    seconds: float
    moe_seconds: float


class Way:
    """One way to decode: a policy, and the MoE layers that follow it. samples: seconds of each timed decode."""

    def __init__(self, model, name: str, policy: str, settings: dict, layers: list, what: str, generate):
        self.model, self.name, self.policy, self.settings = model, name, policy, settings
        self.layers, self.what, self.generate = layers, what, generate
        self.samples: list[float] = []
        self.moe_samples: list[float] = []

    def decode(self, **options) -> Run:
        for layer, moe in zip(self.model.sparse_layers, self.layers):
            layer.mlp = moe
        self.model.set_routing(self.policy, **self.settings)
        with Stopwatch(self.layers) as watch:
            begin = time.perf_counter()
            decoded = self.generate(**options)
            return Run(decoded, time.perf_counter() - begin, watch.seconds)

    def run(self, turn: int) -> float:
        """What `timing.take_turns` calls."""
        done = self.decode()
        self.moe_samples.append(done.moe_seconds)
        return done.seconds


def ways_of(model, policy: str, settings: dict, generate) -> list[Way]:
    ours = model.moe_layers
    ways = [
        Way(model, "ours, token", "token", {}, ours, "token routing, dmoe_ops", generate),
        Way(model, f"ours, {policy}", policy, settings, ours, f"{policy} routing, dmoe_ops", generate),
    ]
    if model.expert_memory is None:  # else eager torch, which takes all experts from memory, has no part
        stock, what = [EagerMoE(moe) for moe in ours], "token routing, one expert after the other in eager torch"
        ways.insert(0, Way(model, "stock", "token", {}, stock, what, generate))
    return ways


def figures(way: Way, stock: Way, codec: TextCodec, eos: int | None, stops: list[str]) -> dict:
    """The times are null where there were too few rounds; spreads are over the rounds, a speed-up is taken within each."""
    answers, stats = answers_of(way.first.decoded, eos), way.first.decoded.stats
    entry = dict(
        name=way.name,
        policy=way.policy,
        tokens=answers,
        texts=[before(codec.decode(answer), stops)[0] for answer in answers],
    )
    entry.update(rounds=len(way.samples), seconds=None, tokens_per_second=None, moe_seconds=None, speedup=None)
    if way.samples:
        # By tokens, as the ways need not give the same number of them.
        rates = [stats.tokens / seconds for seconds in way.samples]
        stock_rates = [stock.first.decoded.stats.tokens / seconds for seconds in stock.samples]
        entry.update(seconds=timing.spread(way.samples), tokens_per_second=timing.spread(rates))
        entry.update(moe_seconds=timing.spread(way.moe_samples), speedup=timing.ratio(rates, stock_rates))
    entry.update(
        stats=dataclasses.asdict(stats), equal_tokens=equal_share(answers, answers_of(stock.first.decoded, eos))
    )
    return entry


def answers_of(decoded: Decoded, eos: int | None) -> list[list[int]]:
    """What was decoded, in front of the first eos."""
    return [row[: row.index(eos)] if eos in row else row for row in decoded.tokens.tolist()]


def equal_share(answers: list[list[int]], others: list[list[int]]) -> float:
    equal = sum(a == b for row, other in zip(answers, others) for a, b in zip(row, other))
    longer = sum(max(len(row), len(other)) for row, other in zip(answers, others))
    return equal / longer if longer else 1.0


def table(report: dict) -> str:
    first = report["runs"][0]["name"].split()[-1]
    rows = [
        ("", "tokens/s", f"vs {first}", "in MoE", "unique experts", "expert MB", "forwards", "tokens"),
        ("", "(p10–p90)", "(p10–p90)", "", "per block", "per step", "", f"as {first}"),
    ]
    texts = []
    for entry in report["runs"]:
        stats, timed = entry["stats"], entry["seconds"] is not None
        rows.append(
            (
                entry["name"],
                spread(entry["tokens_per_second"], "{:.1f}") if timed else "-",
                spread(entry["speedup"], "{:.2f}") if timed else "-",
                f"{entry['moe_seconds']['median'] / entry['seconds']['median']:.0%}" if timed else "-",
                f"{stats['unique_experts_denoising']:.1f}",
                f"{stats['expert_bytes_per_step'] / 1e6:.2f}",
                f"{stats['forwards']}",
                f"{entry['equal_tokens']:.0%}",
            )
        )
        texts += ["", f"{entry['name']}:"]
        if stats["expert_memory"]:
            texts += [f"  {MemoryStats(**stats['expert_memory'])}"]
        texts += [f"  {question} {answer}" for question, answer in zip(report["prompts"], entry["texts"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    rounds, one = report["runs"][0]["rounds"], report["seconds_of_a_round"]
    ways = NUMBERS[len(report["runs"])]
    note = f"speeds: medians of {rounds} rounds, all {ways} in turn; vs {first} is taken within each round"
    if not rounds:
        enough = math.ceil(1.1 * MIN_ROUNDS * one)
        note = f"speeds: not measured, as one round took {one:.2g} s (--seconds {enough} is enough for {MIN_ROUNDS})"
    return "\n".join([*texts, "", *lines, note])


def spread(value: dict, form: str) -> str:
    median, low, high = (form.format(value[part]) for part in ("median", "p10", "p90"))
    return f"{median} ({low}–{high})"


def shipped_checkpoint() -> Path:
    for folder in SHIPPED:
        if folder.is_dir():
            return folder
    raise ValueError(f"--model must be given: the checkpoint that ships is not in {SHIPPED[0]}")


class EagerMoE(nn.Module):
    """The MoE forward of the stock model: token routing and one expert after the other, in eager torch. Shares the weights
    of a `BlockMoE` and returns what it does."""

    def __init__(self, moe: BlockMoE):
        super().__init__()
        self.moe, self.routing = moe, moe.routing

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, -2)
        logits = F.linear(x.float(), self.moe.gate_weight.float())
        ids, weights = self.route(logits)
        # Tokens sorted by expert, so that each expert's are consecutive.
        order = ids.flatten().argsort(stable=True)
        rows = x[order // ids.shape[1]]
        counts = torch.bincount(ids.flatten(), minlength=self.routing.num_experts).tolist()
        outs = [self.mlp(part, *self.weights(x.dtype, at=e)) for e, part in enumerate(rows.split(counts)) if len(part)]
        slots = torch.empty_like(rows).index_copy_(0, order, torch.cat(outs))
        y = (slots.view(*ids.shape, -1).float() * weights[..., None]).sum(1).to(x.dtype)
        if self.moe.shared_w13 is not None:
            y = y + self.mlp(x, *self.weights(x.dtype, "shared_"))
        lead = hidden_states.shape[:-1]
        return y.view_as(hidden_states), (logits.view(*lead, -1), ids.view(*lead, -1))

    @property
    def bytes_per_expert(self) -> int:
        return self.moe.bytes_per_expert

    def weights(self, dtype, prefix: str = "", at=()) -> list[torch.Tensor]:
        """w13 and w2 of an expert (`at`), or of the shared one, dequantised where they are quantised."""
        found = []
        for name, halves in ((f"{prefix}w13", 2), (f"{prefix}w2", 1)):
            weight, scale = getattr(self.moe, name), getattr(self.moe, f"{name}_scale")
            found.append(weight[at] if scale is None else dequantize(weight[at], scale[at], halves=halves).to(dtype))
        return found

    def route(self, logits):
        routing = self.routing
        scores = logits.sigmoid() if routing.score == "sigmoid" else logits.softmax(-1)
        selection = scores if self.moe.expert_bias is None else scores + self.moe.expert_bias
        if routing.n_group > 1:
            grouped = selection.unflatten(1, (routing.n_group, -1))
            kept = grouped.topk(2, dim=2).values.sum(2).topk(routing.topk_group, dim=1).indices
            outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter(1, kept, False)
            selection = grouped.masked_fill(outside[:, :, None], -torch.inf).flatten(1)
        ids = selection.topk(routing.top_k, dim=1).indices
        weights = scores.gather(1, ids)
        if routing.norm_topk_prob:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return ids, weights * routing.routed_scaling_factor

    @staticmethod
    def mlp(x, w13, w2):
        gate, up = w13.chunk(2)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), w2)


class Stopwatch:
    """Seconds spent inside modules, by hooks; waits for a GPU at both ends of a forward."""

    def __init__(self, modules):
        self.modules, self.seconds, self.hooks = modules, 0.0, []

    def __enter__(self) -> Stopwatch:
        for module in self.modules:
            self.hooks += [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop)]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self.hooks:
            hook.remove()

    def _start(self, module, inputs) -> None:
        self._begin = self._now(inputs[0])

    def _stop(self, module, inputs, outputs) -> None:
        self.seconds += self._now(inputs[0]) - self._begin

    @staticmethod
    def _now(x) -> float:
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return time.perf_counter()
