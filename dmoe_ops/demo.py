"""`dmoe demo`: prompts decoded three times by the same weights, with the stock expert loop and with ours."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .layer import BlockMoE
from .models import Decoded, LLaDA2ForDiffusion
from .routing import POLICIES

# Trained by examples/miniature, which says what it has learned and what each policy costs and keeps. An installed package
# has a copy of its own; a checkout, editable or not, has the original.
PACKAGE = Path(__file__).resolve().parent
SHIPPED = (PACKAGE / "demo_checkpoint", PACKAGE.parent / "examples" / "miniature" / "checkpoints" / "dmoe")
SHIPPED_PROMPTS = (
    "Ben has 774 keys. Ada has 337 fewer. How many has Ada?",
    "work 8767+2064:",
    "sort 39,58,15,21,62:",
    "close {}[[]<{}>({[:",
)
PROMPTS = ("Why do diffusion language models decode several tokens at once?",)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="a LLaDA2 checkpoint (default: the small one that ships)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", nargs="+", help="decoded together, as one batch")
    prompt.add_argument("--prompt-ids", metavar="ID", type=int, nargs="+", help="token ids, instead of a text")
    parser.add_argument("--gen-length", metavar="N", type=int, default=160, help="new tokens at most (default: 160)")
    parser.add_argument("--block-length", metavar="N", type=int, default=32)
    parser.add_argument("--threshold", metavar="P", type=float, default=0.95, help="confidence that unmasks a token")
    parser.add_argument("--policy", choices=POLICIES, default="dmoe", help="block routing to show (default: dmoe)")
    parser.add_argument("--top-p", metavar="P", type=float, default=0.6, help="of dmoe (default: 0.6)")
    parser.add_argument("--min-experts", metavar="N", type=int, help="of dmoe (default: twice the model's top-k)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as stored; the shipped ones in float32)"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")


def run(args: argparse.Namespace) -> int:
    try:
        report = decode_three_ways(args)
    except ValueError as error:
        print(f"dmoe demo: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"figures written to {args.json}")
    return 0


def decode_three_ways(args: argparse.Namespace) -> dict:
    folder = Path(args.model) if args.model else shipped_checkpoint()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or (None if args.model else "float32")
    print(f"loading {folder} on {device}", flush=True)
    model = LLaDA2ForDiffusion.from_pretrained(
        folder, policy="token", dtype=DTYPES.get(dtype), device=torch.device(device)
    )
    config = model.config
    weight = model.model.word_embeddings.weight
    print(
        f"  {config.num_hidden_layers} layers, {len(model.moe_layers)} with {config.num_experts} experts of which a token "
        f"takes {config.num_experts_per_tok}; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights in "
        f"{str(weight.dtype).removeprefix('torch.')}; {torch.get_num_threads()} CPU threads"
    )
    codec = Codec(folder)
    prompts = args.prompt or (PROMPTS if args.model else SHIPPED_PROMPTS)
    ids = [args.prompt_ids] if args.prompt_ids else [codec.encode(text) for text in prompts]
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64, device=device)
    for row, values in zip(input_ids, ids):
        row[: len(values)] = torch.tensor(values)
    print(f"{len(ids)} prompts, {int(lengths.sum())} tokens" if len(ids) > 1 else f"prompt, {len(ids[0])} tokens")

    ours = model.moe_layers
    stock = [EagerMoE(moe) for moe in ours]
    plan = [
        ("stock", "token", stock, "token routing, one expert after the other in eager torch"),
        ("ours, token", "token", ours, "token routing, dmoe_ops"),
        (f"ours, {args.policy}", args.policy, ours, f"{args.policy} routing, dmoe_ops"),
    ]
    runs = []
    for name, policy, layers, what in plan:
        print(f"decoding up to {args.gen_length} tokens: {what}", flush=True)
        for layer, moe in zip(model.model.layers[config.first_k_dense_replace :], layers):
            layer.mlp = moe
        settings = {}
        if policy == "dmoe":
            least = 2 * config.num_experts_per_tok if args.min_experts is None else args.min_experts
            settings = dict(top_p=args.top_p, min_experts=least)
        model.set_routing(policy, **settings)
        options = dict(prompt_lengths=lengths, block_length=args.block_length)
        model.generate(input_ids, gen_length=1, steps=1, **options)  # warms up what is built lazily
        options.update(gen_length=args.gen_length, threshold=args.threshold)
        with Stopwatch(layers) as watch:
            begin = time.perf_counter()
            decoded = model.generate(input_ids, progress=True, **options)
            seconds = time.perf_counter() - begin
        runs.append(figures(name, policy, decoded, seconds, watch.seconds, codec, config.eos_token_id))
    for entry in runs:
        entry["speedup"] = entry["tokens_per_second"] / runs[0]["tokens_per_second"]
        entry["equal_tokens"] = equal_share(entry["tokens"], runs[0]["tokens"])
    questions = [codec.decode(row) for row in ids]
    return dict(model=str(folder), device=device, dtype=str(weight.dtype), prompts=questions, prompt_ids=ids, runs=runs)


def figures(name: str, policy: str, decoded: Decoded, seconds: float, moe_seconds: float, codec: Codec, eos) -> dict:
    answers = [row[: row.index(eos)] if eos in row else row for row in decoded.tokens.tolist()]
    return dict(
        name=name,
        policy=policy,
        tokens=answers,
        texts=[codec.decode(answer) for answer in answers],
        seconds=seconds,
        tokens_per_second=decoded.stats.tokens / seconds,
        moe_seconds=moe_seconds,
        stats=dataclasses.asdict(decoded.stats),
    )


def equal_share(answers: list[list[int]], others: list[list[int]]) -> float:
    equal = sum(a == b for row, other in zip(answers, others) for a, b in zip(row, other))
    longer = sum(max(len(row), len(other)) for row, other in zip(answers, others))
    return equal / longer if longer else 1.0


def table(report: dict) -> str:
    rows = [
        ("", "tokens/s", "vs stock", "in MoE", "unique experts", "expert MB", "forwards", "tokens"),
        ("", "", "", "seconds", "per block", "per step", "", "as stock"),
    ]
    for entry in report["runs"]:
        stats = entry["stats"]
        rows.append(
            (
                entry["name"],
                f"{entry['tokens_per_second']:.1f}",
                f"{entry['speedup']:.2f}x",
                f"{entry['moe_seconds']:.3f} ({entry['moe_seconds'] / entry['seconds']:.0%})",
                f"{stats['unique_experts_denoising']:.1f}",
                f"{stats['expert_bytes_per_step'] / 1e6:.2f}",
                f"{stats['forwards']}",
                f"{entry['equal_tokens']:.0%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    texts = []
    for entry in report["runs"]:
        texts += ["", f"{entry['name']}:"]
        texts += [f"  {question} {answer}" for question, answer in zip(report["prompts"], entry["texts"])]
    return "\n".join([*texts, "", *lines])


def shipped_checkpoint() -> Path:
    for folder in SHIPPED:
        if folder.is_dir():
            return folder
    raise ValueError(f"--model must be given: the checkpoint that ships is not in {SHIPPED[0]}")


class Codec:
    """Text to tokens and back by the folder's tokenizer.json; without one, tokens are shown as numbers."""

    def __init__(self, folder: Path):
        self.folder, self.tokenizer = folder, None
        if (folder / "tokenizer.json").is_file():
            try:
                from tokenizers import Tokenizer
            except ImportError:
                print("  the folder has a tokenizer.json, but the package tokenizers is not installed")
            else:
                self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(f"--prompt-ids must be given: no tokenizer for {self.folder}")
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return self.tokenizer.decode(ids)


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
        outs = [
            self.mlp(part, self.moe.w13[e], self.moe.w2[e]) for e, part in enumerate(rows.split(counts)) if len(part)
        ]
        slots = torch.empty_like(rows).index_copy_(0, order, torch.cat(outs))
        y = (slots.view(*ids.shape, -1).float() * weights[..., None]).sum(1).to(x.dtype)
        if self.moe.shared_w13 is not None:
            y = y + self.mlp(x, self.moe.shared_w13, self.moe.shared_w2)
        lead = hidden_states.shape[:-1]
        return y.view_as(hidden_states), (logits.view(*lead, -1), ids.view(*lead, -1))

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
