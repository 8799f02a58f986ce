"""Predicted microseconds of a layer, launch by launch, from the compiled kernels: no GPU needed. All of it is unconfirmed.

    python tools/cost_model.py [--gpu H100 …] [--tokens 32 …] [--unique 14.6 …] [--weights bf16 …] [--detail | --json]
    python tools/cost_model.py --forward [--gpu H100 …]    a whole step of LLaDA2.0-mini as one graph, with these layers
    python tools/cost_model.py --facts     after a change to a kernel: compiles all anew into tools/cost/facts.json
    python tools/cost_model.py --check …   compiles most and compares with that file: sm_80, sm_90, sm_100, gfx942, cuda

The model's rules stand in tools/cost/model.py, its constants with their sources in tools/cost/machines.py.
"""

from __future__ import annotations

import argparse
import json
import sys

import triton_resources
from cost import cuda_layer, facts, forward, machines, triton_layer
from cost.model import Estimate, estimate

TOKENS, UNIQUE = (32, 128, 512, 2048), (8, 15, 32, 70)


def layer(backend: str, case: triton_layer.Case, machine: machines.Machine, store: facts.Store) -> list[Estimate]:
    """The launches of one layer call."""
    if backend == "cuda" and cuda_layer.serves(case, machine):
        return cuda_layer.estimates(case, machine, store)
    return [estimate(work, machine) for work in triton_layer.works(case, machine.chip, store)]


def floor(case: triton_layer.Case, machine: machines.Machine) -> float:
    """us that the roofline of bench/roofline.py leaves: weights read once, or the FLOPs of the experts that tokens chose."""
    hidden, intermediate, shared, routing = case.shape
    read = (case.unique * case.expert_bytes + case.shared_bytes) / machine.hbm / 1e6
    flops = 6 * hidden * (intermediate * routing.top_k + shared) * case.tokens
    return max(read, flops / machine.gemm / 1e6)


def predictions(args, store: facts.Store):
    """A dict per GPU, weights, tokens, experts and backend."""
    for machine in args.gpu:
        for weights in args.weights:
            for tokens in args.tokens:
                for unique in args.unique:
                    case = triton_layer.Case(tokens, unique, args.model, weights)
                    for backend in args.backend:
                        if backend == "cuda" and not cuda_layer.serves(case, machine):
                            continue
                        launches = layer(backend, case, machine, store)
                        us, least = sum(launch.us for launch in launches), floor(case, machine)
                        at = dict(gpu=machine.name, weights=weights, tokens=tokens, unique=unique, backend=backend)
                        parts = [dict(vars(launch), bound=launch.bound) for launch in launches]
                        yield dict(at, us=us, floor_us=least, roofline=least / us, launches=parts)


def print_forward(args, store: facts.Store) -> None:
    for row in predictions(args, store):
        parts = forward.parts(machines.of(row["gpu"]), row["us"], len(row["launches"]))
        us = sum(part.us for part in parts)
        said = ", ".join(f"{part.name} {part.us:.0f} ({part.launches})" for part in parts)
        print(
            f"{row['gpu']}, {row['backend']}, U = {row['unique']:g}: {us / 1e3:.2f} ms; us (launches): {said}",
            flush=True,
        )


def line(row: dict, detail: bool) -> str:
    launches = " + ".join(
        f"{one['name']} {one['us']:.1f}" + (f" ({one['bound']})" if detail else "") for one in row["launches"]
    )
    cells = (
        row["gpu"],
        row["weights"],
        f"{row['tokens']}",
        f"{row['unique']:g}",
        row["backend"],
        f"{row['floor_us']:.1f}",
    )
    return "| " + " | ".join((*cells, f"{row['us']:.1f}", f"{row['roofline']:.2f}", launches)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", type=gpu, default=[machines.of("H100")], help="by (parts of) names")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--unique", nargs="+", type=float, default=list(UNIQUE))
    parser.add_argument("--weights", nargs="+", choices=triton_layer.BYTES, default=["bf16"])
    parser.add_argument("--backend", nargs="+", choices=["triton", "cuda"], default=["triton", "cuda"])
    parser.add_argument("--model", choices=triton_resources.MODELS, default="mini")
    parser.add_argument("--detail", action="store_true", help="what bounds each launch, and its parts")
    parser.add_argument("--json", action="store_true", help="one row per line, as JSON")
    parser.add_argument("--forward", action="store_true", help="a whole step; T = 32, U = 14.6 unless said")
    parser.add_argument(
        "--facts", action="store_true", help="compile anew and keep: registers, instructions, latencies"
    )
    parser.add_argument(
        "--check", nargs="+", choices=[*triton_resources.CHIPS, "cuda"], help="compile anew and compare"
    )
    args = parser.parse_args()
    if args.check:
        store = all_facts([chip for chip in args.check if chip != "cuda"], (32, 2048), "cuda" in args.check)
        differing = store.differing()
        print(
            f"{len(store.used) - len(differing)} of {len(store.used)} kernels are as in {facts.FILE}",
            *differing,
            sep="\n",
        )
        return 1 if differing else 0
    if args.facts:
        store = all_facts()
        store.write()
        print(f"{len(store.used)} kernels in {facts.FILE}")
        return 0
    store = facts.Store()
    if args.forward:
        args.tokens = [forward.TOKENS]
        args.unique = [14.6] if args.unique == list(UNIQUE) else args.unique
        print_forward(args, store)
        return 0
    if not args.json:
        print("| GPU | weights | T | U | backend | floor us | us | roofline | launches, us |\n" + "|---" * 9 + "|")
    for row in predictions(args, store):
        print(json.dumps(row) if args.json else line(row, args.detail), flush=True)
        if args.detail:
            for one in row["launches"]:
                print(
                    "    ", one["name"], *(f"{key} {us:.1f}" for key, us in {**one["parts"], **one["limits"]}.items())
                )
    return 0


def gpu(name: str) -> machines.Machine:
    try:
        return machines.of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def all_facts(
    chips=tuple(triton_resources.CHIPS), tokens=(1, 32, 128, 512, 1024, 2048), cuda: bool = True
) -> facts.Store:
    """Compiles every kernel of LLaDA2.0-mini's layer."""
    store = facts.Store(None)
    for chip in chips:
        for count in tokens:
            triton_layer.works(triton_layer.Case(count, 15), chip, store)
        for weights in triton_layer.BYTES:
            triton_layer.works(triton_layer.Case(32, 15, weights=weights), chip, store)
    for count in (32, 64) if cuda else ():
        for kernel in ("router", "experts"):
            store.cuda(kernel, count, 8)
    return store


if __name__ == "__main__":
    sys.exit(main())
