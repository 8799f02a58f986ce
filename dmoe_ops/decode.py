"""`dmoe decode`: prompts decoded by a model on one process or, under torchrun, spread over several.

torchrun --nproc-per-node=2 -m dmoe_ops decode --model FOLDER --experts expert --prompt "..."
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

import torch

from . import demo
from .models import hub, load
from .models.config import OWN
from .models.devices import default_device, usable
from .models.text import padded
from .routing import POLICIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    demo.add_prompts(parser)
    parser.add_argument("--policy", choices=(OWN, *POLICIES), default=OWN, help="default: what the weights are for")
    parser.add_argument(
        "--experts",
        choices=("tensor", "expert"),
        default="tensor",
        help="under torchrun: split every expert over the ranks (tensor, the default) or deal them out (expert)",
    )
    parser.add_argument("--dtype", choices=demo.DTYPES, help="of the weights (default: as stored)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    try:
        folder = hub.folder_of(args.model) if args.model else demo.shipped_checkpoint()
        codec, ids, questions = demo.prompts_of(args, folder)
        with model_on(ranks, folder, args) as model:
            begin = time.perf_counter()
            tokens, lengths = padded(ids)
            decoded = model.generate(
                tokens.to(model.device), prompt_lengths=lengths, gen_length=args.gen_length, progress=False
            )
            seconds = time.perf_counter() - begin
            routing = model.routing
    except ValueError as error:
        print(f"dmoe decode: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        for question, answer in zip(questions, demo.answers_of(decoded, model.config.eos_token_id)):
            print(f"{question} {codec.decode(answer)}")
        stats, where = decoded.stats, f"{ranks} ranks, experts by {args.experts}" if ranks > 1 else "one process"
        print(
            f"{where}: {stats.tokens} tokens in {seconds:.2f} s, {stats.forwards} forwards, "
            f"{stats.unique_experts_denoising:.1f} unique experts per block; {routing}"
        )
    return 0


@contextlib.contextmanager
def model_on(ranks: int, folder, args: argparse.Namespace):
    """The model on this process's device, or this rank's part of it."""
    kind = args.device or default_device()
    options = dict(policy=args.policy, dtype=args.dtype)
    if ranks == 1:
        yield load(folder, device=kind, **options)
        return
    from .models import parallel  # takes torch's compiler, which is slow to import

    device = usable(f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = torch.distributed.init_device_mesh(device.type, (ranks,))
    try:
        yield parallel.from_pretrained(folder, mesh, args.experts, device=device, **options)
    finally:
        torch.distributed.destroy_process_group()
