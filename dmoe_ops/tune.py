"""`dmoe tune`: measures the tiles of the Triton kernels on this machine's GPU, and keeps the best in a file of the user's.

One setting after the other, each over the whole layer in a CUDA graph, with enough layers of weights in turn that none is
read from the cache. A setting changes only when that saves more than the noise of measuring the old one twice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import os
import statistics
import sys

import torch

LAYERS = 8  # 8 times 15 experts of LLaDA2.0-mini are 755 MB, many times any L2 cache
LATENCY_TOKENS, THROUGHPUT_TOKENS = 32, 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llada2-mini", help="whose shapes (default: llada2-mini)")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timings per candidate (default: 30)")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, keep nothing")


def run(args) -> int:
    if not torch.cuda.is_available():
        print("dmoe tune: there is no GPU here, and tiles can only be measured on one", file=sys.stderr)
        return 2
    from .bench.cases import MODELS
    from .triton_kernels import tiles

    if args.model not in MODELS:
        print(f"dmoe tune: --model must be one of {', '.join(MODELS)}, got {args.model!r}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    best = tiles.for_device(device)
    print(f"{name}: starting from {best.measured_by}")
    work = Work(MODELS[args.model], device, args.repeats)
    for tokens, field, candidates in plan():
        best = work.improve(best, tokens, field, candidates)
    best = dataclasses.replace(best, dense_blocks=work.dense_blocks(best))
    date = datetime.date.today().isoformat()
    command = f"dmoe tune --model {args.model} --repeats {args.repeats}"
    entry = {field.name: getattr(best, field.name) for field in dataclasses.fields(best)}
    entry |= dict(measured_by=f"{name}, {date}: {command}")
    del entry["shared_memory"], entry["processors"]
    print(f"{name}: {entry}")
    if not args.dry_run:
        print(f"kept in {tiles.save(name, entry)}")
    return 0


def plan():
    """(tokens, field of `Tiles`, changes to try), the costliest kernels first."""
    up = product(rows=(16, 32, 64), depth=(64, 128), stages=(3, 5), warps=(4, 8), per_processor=(1, 2))
    down = product(rows=(16, 32), depth=(128, 256, 512), stages=(4, 6, 8), warps=(4, 8))
    yield LATENCY_TOKENS, "dense_up", up
    yield LATENCY_TOKENS, "dense_down", down
    yield LATENCY_TOKENS, "route", product(tokens=(8, 16, 32), warps=(8, 16))
    yield LATENCY_TOKENS, "gate", product(experts=(16, 32), hidden=(128, 256, 512), stages=(3, 4), warps=(4, 8))
    grouped = product(rows=(32, 64, 128), depth=(32, 64, 128), stages=(3, 4), warps=(4, 8))
    yield THROUGHPUT_TOKENS, "gathered_up", grouped
    yield THROUGHPUT_TOKENS, "gathered_down", grouped


def product(**choices) -> list[dict]:
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


class Work:
    """Times the layer of a model under given tiles."""

    def __init__(self, model, device, repeats: int):
        from .bench import cases

        self.device, self.repeats = device, repeats
        routing = model.routing("dmoe")
        self.weights = [cases.random_weights(model, torch.bfloat16, device, seed) for seed in range(LAYERS)]
        self.cases = {
            tokens: cases.calibrated_case("tune", model, routing, tokens, torch.bfloat16, device, 0)
            for tokens in (LATENCY_TOKENS, 64, 128, 256, 512, THROUGHPUT_TOKENS)
        }

    def time(self, tiles_, tokens: int) -> float:
        """Microseconds of one layer, the median of the repeats; inf where the tiles do not fit this GPU."""
        from triton.runtime.errors import OutOfResources, PTXASError

        from .triton_kernels import tiles

        case = self.cases[tokens]

        def layers():
            for w in self.weights:
                torch.ops.dmoe.block_moe(case.x, *w[:6], None, case.x.shape[0], *case.routing.args())

        try:
            with tiles.using(tiles_), backend("triton"), torch.no_grad():
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):  # compiles; nothing of that may be captured
                    layers()
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    layers()
        except (OutOfResources, PTXASError):
            return float("inf")
        samples = []
        for turn in range(self.repeats + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                samples.append(begin.elapsed_time(end) * 1e3 / LAYERS)
        return statistics.median(samples)

    def improve(self, best, tokens: int, field: str, candidates: list[dict]):
        """`best`, or with `field` changed to the candidate that makes the layer fastest."""
        first, again = self.time(best, tokens), self.time(best, tokens)
        noise, fastest = abs(first - again), min(first, again)
        limit = fastest - noise
        print(f"{field}, T={tokens}: {first:.1f} and {again:.1f} us with {getattr(best, field)}", flush=True)
        for changes in candidates:
            tried = dataclasses.replace(best, **{field: dataclasses.replace(getattr(best, field), **changes)})
            if tried == best:
                continue
            taken = self.time(tried, tokens)
            if taken < limit:
                best, limit = tried, taken
                print(f"  {taken:.1f} us with {changes}", flush=True)
        return best

    def dense_blocks(self, best) -> int:
        """Up to how many blocks the dense form is the faster one."""
        blocks = 0
        for tokens in (LATENCY_TOKENS, 64, 128, 256, 512):
            count = self.cases[tokens].routing.block_size
            count = -(-tokens // count)
            dense = self.time(dataclasses.replace(best, dense_blocks=count), tokens)
            gathered = self.time(dataclasses.replace(best, dense_blocks=0), tokens)
            print(f"T={tokens}: dense {dense:.1f} us, gathered {gathered:.1f} us", flush=True)
            if dense > gathered:
                break
            blocks = count
        return blocks


@contextlib.contextmanager
def backend(name: str):
    """DMOE_BACKEND for a while."""
    before = os.environ.get("DMOE_BACKEND")
    os.environ["DMOE_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("DMOE_BACKEND")
        if before is not None:
            os.environ["DMOE_BACKEND"] = before
