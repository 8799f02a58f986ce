"""The command `dmoe eval`; under torchrun every process answers its part of the items, and the first one reports.

torchrun --nproc-per-node=4 -m dmoe_ops eval --model FOLDER --data FOLDER --out eval.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .. import __version__, demo
from ..bench import results
from ..models import TextCodec, families, hub
from ..models.config import OWN, own_policy
from ..models.devices import default_device, usable
from ..routing import POLICIES
from . import answers, report, sets
from .store import Store

# The settings of a policy that can be given; any other is an error.
SETTINGS = {
    "dmoe": ("top_p", "min_experts"),
    "des_vote": ("capacity",),
    "capacity": ("capacity",),
    "des_seq": ("union_k",),
    "oea": ("union_k",),
    "xshare": ("pool_capacity",),
}
LONGEST_WAIT = datetime.timedelta(days=30)  # of processes that are done, for those that are not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="a folder or a hub id (default: the small checkpoint that ships)"
    )
    parser.add_argument("--sets", nargs="+", choices=sets.SETS, default=list(sets.SETS), help="default: all four")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--data", metavar="FOLDER", type=Path, help="with SET.jsonl, .json or .parquet (default: from the hub)"
    )
    data.add_argument("--sample", action="store_true", help="a few items that ship with this package")
    parser.add_argument("--limit", metavar="N", type=int, help="the first N items of each set")
    parser.add_argument("--protocol", choices=answers.PROTOCOLS, default="mended", help="default: mended")
    parser.add_argument("--policy", choices=(OWN, *POLICIES), default=OWN, help="default: what the weights are for")
    parser.add_argument("--top-p", metavar="P", type=float, help="of dmoe")
    parser.add_argument("--min-experts", metavar="N", type=int, help="of dmoe")
    parser.add_argument("--capacity", metavar="N", type=int, help="of des_vote and capacity")
    parser.add_argument("--union-k", metavar="N", type=int, help="of des_seq and oea")
    parser.add_argument("--pool-capacity", metavar="N", type=int, help="of xshare")
    parser.add_argument("--gen-length", metavar="N", type=int, default=2048, help="new tokens at most (default: 2048)")
    parser.add_argument("--steps", metavar="N", type=int, default=32, help="per block (default: 32)")
    parser.add_argument("--block-length", metavar="N", type=int, help="default: the model's own, LLaDA2's 32")
    parser.add_argument("--threshold", metavar="P", type=float, default=0.95, help="default: 0.95")
    parser.add_argument("--temperature", metavar="T", type=float, help="default: 1 for authors, 0 for mended")
    parser.add_argument("--seed", metavar="N", type=int, default=42, help="of what is drawn (default: 42)")
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="prompts decoded together (default: 1)")
    parser.add_argument("--raw", action="store_true", help="leave the model's chat template out")
    parser.add_argument(
        "--dtype", choices=demo.DTYPES, help="of the weights (default: as stored; the shipped ones in float32)"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--expert-memory", metavar="SIZE", help="keep experts in the files, so much in memory: 4GB, 25%%"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("eval.json"),
        help="every answer as JSON (default: eval.json); beside it, what an interrupted run goes on from",
    )


def run(args: argparse.Namespace) -> int:
    try:
        with processes() as (rank, count):
            Evaluation(args, rank, count).run()
    except (ValueError, OSError) as error:
        print(f"dmoe eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dmoe eval: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def processes():
    """This process's rank, and how many there are."""
    rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if count == 1:
        yield 0, 1
        return
    torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield rank, count
    finally:
        torch.distributed.destroy_process_group()


class Evaluation:
    """A run. What can be refused is refused before the weights are read."""

    def __init__(self, args: argparse.Namespace, rank: int, count: int):
        check(args)
        self.args, self.rank, self.count = args, rank, count
        self.folder = hub.folder_of(args.model) if args.model else demo.shipped_checkpoint()
        self.config = families.config_of(self.folder)
        self.policy = own_policy(self.config) if args.policy == OWN else args.policy
        args.block_length = args.block_length or self.config.block_length
        self.overrides = overrides_of(args, self.policy)
        self.device = self._device()
        self.codec = TextCodec(self.folder, chat=not args.raw)
        if self.codec.why_no_text:
            raise ValueError(self.codec.why_no_text)
        folder = sets.SAMPLE if args.sample else args.data
        self.items = {name: sets.load(name, folder)[: args.limit] for name in args.sets}
        self.prompts = {name: list(map(sets.SETS[name].prompt, items)) for name, items in self.items.items()}
        self.ids = {name: list(map(self.codec.encode, prompts)) for name, prompts in self.prompts.items()}
        self._check_lengths()
        self.settings = self._settings()
        self.store = Store(args.out, self.settings, rank)
        self._check_questions()

    def _device(self) -> torch.device:
        name = self.args.device or default_device()
        device = usable(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.count > 1 else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def _settings(self) -> dict:
        """What an answer depends on."""
        args, named = self.args, ("protocol", "gen_length", "steps", "block_length", "threshold", "seed", "batch")
        routing = self.config.routing(self.policy, **self.overrides)
        return dict(
            model=str(self.folder.resolve()),
            policy=self.policy,
            routing=dataclasses.asdict(dataclasses.replace(routing, block_size=self._block_size(routing))),
            **{name: getattr(args, name) for name in named},
            temperature=self.temperature,
            chat_template=self.codec.template is not None,
            dtype=args.dtype or ("as stored" if args.model else "float32"),
            device=self.device.type,
            dmoe_ops=__version__,
        )

    def _block_size(self, routing) -> int:
        """Of the routing: that of the decode, but for weights that were trained for a capacity (`set_routing`)."""
        fixed = self.policy == "capacity" and self.config.expert_capacity
        return routing.block_size if fixed else self.args.block_length

    @property
    def temperature(self) -> float:
        given = self.args.temperature
        return answers.TEMPERATURE[self.args.protocol] if given is None else given

    def _check_lengths(self) -> None:
        most = self.config.max_position_embeddings
        for name, rows in self.ids.items():
            longest = max(map(len, rows))
            if longest + self.args.gen_length > most:
                raise ValueError(
                    f"--gen-length must leave prompt and answer within max_position_embeddings={most} tokens, got "
                    f"{self.args.gen_length} and a prompt of {longest} in {name}"
                )

    def _check_questions(self) -> None:
        for (name, index), answer in self.store.found.items():
            asked = self.prompts.get(name, [])[index : index + 1]
            if asked and asked[0] != answer["prompt"]:
                raise ValueError(
                    f"{self.store.path.name} answers another question than item {index} of {name}: take another --out"
                )

    def run(self) -> None:
        missing = self.missing()
        there = sum((name, index) in self.store.found for name, rows in self.ids.items() for index in range(len(rows)))
        if there and self.rank == 0:
            print(f"{there} answers are there already, beside {self.args.out}", flush=True)
        if missing:
            self.answer(missing)
        if self.count > 1:
            torch.distributed.barrier()
        if self.rank == 0:
            self.finish()

    def missing(self) -> list[tuple[str, range]]:
        """The batches of this process in which an answer is missing. A batch is decoded whole: what it is decoded with may
        change the last bits of an answer."""
        found, batches = self.store.found, []
        for name, rows in self.ids.items():
            size = self.args.batch
            parts = [range(begin, min(begin + size, len(rows))) for begin in range(0, len(rows), size)]
            mine = parts[self.rank :: self.count]
            batches += [(name, part) for part in mine if any((name, index) not in found for index in part)]
        return batches

    def answer(self, batches: list[tuple[str, range]]) -> None:
        args, authors = self.args, self.args.protocol == "authors"
        if self.rank == 0:
            print(f"loading {self.folder} on {self.device}", flush=True)
            if self.codec.template is None:
                print("  no chat template: the prompts go in as they are", flush=True)
        dtype = args.dtype or (None if args.model else "float32")
        options = dict(dtype=dtype, device=self.device, expert_memory=args.expert_memory)
        model = families.load(self.folder, self.policy, **options, **self.overrides)
        named = ("gen_length", "steps", "block_length", "threshold")
        asked = dict({name: getattr(args, name) for name in named}, temperature=self.temperature)
        total = sum(len(part) for _, part in batches)
        with tqdm(total=total, unit="answer", disable=None if self.rank == 0 else True) as bar:
            for name, part in batches:
                bar.set_description(name)
                ids, seed = [self.ids[name][index] for index in part], answers.seed_of(args.seed, name, part[0])
                found = answers.decode(model, self.codec, ids, authors=authors, seed=seed, **asked)
                about = [dict(set=name, index=index, prompt=self.prompts[name][index]) for index in part]
                self.store.add([{**item, **answer} for item, answer in zip(about, found)])
                bar.update(len(part))

    def finish(self) -> None:
        machine = results.machine(self.device.type)
        whole = report.summary(self.settings, self.items, self.store.read(), machine, self.count)
        self.args.out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(report.table(whole))
        print(f"every answer: {self.args.out}")


def check(args: argparse.Namespace) -> None:
    for name in ("limit", "gen_length", "steps", "block_length", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], got {args.threshold:g}")
    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be a number of at least 0, got {args.temperature:g}")
    if len({*args.sets}) < len(args.sets):
        raise ValueError(f"--sets must name each set once, got {' '.join(args.sets)}")


def overrides_of(args: argparse.Namespace, policy: str) -> dict:
    """The settings of the policy that were given."""
    names = {name for group in SETTINGS.values() for name in group}
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in given.items():
        if name not in SETTINGS.get(policy, ()):
            raise ValueError(f"--{name.replace('_', '-')} is no setting of policy {policy}, got {value}")
    return given
