"""Where the time of a layer goes: its launches together, alone and with a part left out, twenty calls in one graph, and the
time of every kernel in it. python -m dmoe_ops.gpu_check.kernels --backend cuda --json FILE"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from .. import _backends, _library, block_moe, block_route, moe_experts, router
from ..bench import cases, results, timing
from ..formats import ExpertWeights

CALLS = 20  # in one graph, so that a launch's share of it is measured and not the replay's start
LAYERS = 4  # of weights, which take turns: what one call reads of one of them passes the L2
# T, unique experts: the design's goal and token routing's.
WORK = ((32, 15), (32, 70), (64, 15))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check kernels")
    parser.add_argument("--backend", choices=PARTS, required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, for each number of tokens and experts")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, with stand-ins")
    args = parser.parse_args(argv)
    model, work, device, dtype = cases.MODELS["llada2-mini"], WORK, "cuda", torch.bfloat16
    os.environ["DMOE_BACKEND"] = args.backend
    if args.rehearse:
        # 4 tokens and 4 experts: Triton's interpreter takes its time.
        model = dataclasses.replace(cases.MODELS["tiny"], hidden=32, intermediate=16, num_experts=8, top_k=2, shared=16)
        work, device, timing.MIN_ROUNDS, args.seconds = ((4, 4),), "cpu", 2, 0.1
        if args.backend == "cuda":
            os.environ["DMOE_BACKEND"] = "cpp"
            stand_in()
    weights = [cases.random_weights(model, dtype, device, seed) for seed in range(LAYERS)]
    rows = []
    for tokens, unique in work:
        case = cases.forced_case("", model, model.routing("dmoe"), tokens, unique, dtype, device, 0)
        found = measured(args.backend, case, weights, device, args.seconds, unique)
        said = predicted(args.backend, "H100" if args.rehearse else torch.cuda.get_device_name(), tokens, unique)
        rows += [{**row, "predicted_us": said.get(row["what"])} for row in found]
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    wrong = [row["what"] for row in rows if not row["same"]]
    if wrong:
        print(f"error: other bits than the whole layer's: {', '.join(wrong)}")
    return 1 if wrong else 0


def measured(backend: str, case: cases.Case, weights: list, device: str, seconds: float, unique: int) -> list[dict]:
    parts = [PARTS[backend](case, each) for each in weights]
    want = parts[0]["layer"]().clone()
    rows, contenders = [], []
    for what in parts[0]:
        got = parts[0][what]()
        # A part that gives the layer's output has to give its bits.
        same = "layer" not in what or torch.equal(got, want)
        calls = [part[what] for part in parts] * (CALLS // LAYERS)
        contenders.append(timing.Contender(calls, device))
        rows.append(dict(backend=backend, what=what, tokens=len(case.x), unique=unique, same=same))
    timing.interleave(contenders, seconds, f"{backend}, {len(case.x)} tokens")
    for row, contender in zip(rows, contenders):
        row.update({f"{name}_us": 1e6 * value for name, value in timing.spread(contender.samples).items()})
        row["kernels"] = kernels_of(contender, device)
    return rows


def predicted(backend: str, gpu: str, tokens: int, unique: int) -> dict[str, float]:
    """us of the parts that the cost model knows, for LLaDA2.0-mini on that GPU; nothing where its table has no such GPU."""
    command = [sys.executable, "tools/cost_model.py", "--json", "--gpu", gpu, "--backend", backend]
    command += ["--tokens", str(tokens), "--unique", str(unique)]
    # PYTHONSAFEPATH would hide the modules beside the script.
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"no predictions: {done.stderr.strip().splitlines()[-1]}")
        return {}
    row = json.loads(done.stdout)
    alone = {PREDICTED[launch["name"]]: launch["us"] for launch in row["launches"] if launch["name"] in PREDICTED}
    return {"layer": row["us"], **alone}


# Launches that the cost model names, and the parts that consist of one.
PREDICTED = {
    "router": "router",
    "experts": "experts, schedule ready-made (and copied)",
    "route": "routing of given logits",
}


def cuda_parts(case: cases.Case, w: cases.Weights) -> dict:
    """The two launches of csrc/cuda, called as `_backends.Cuda` calls them, with what a part leaves out left out."""
    x, routing, tokens = case.x, case.routing, len(case.x)
    out = router.allocate_routing(tokens, tokens, None, routing, x)
    logits = x.new_empty(tokens, routing.num_experts, dtype=torch.float32)
    schedule = _backends._cuda_schedule(x, len(w.w13))
    y = torch.empty_like(x)

    def route(schedule=schedule):
        packed = _library.packed_routing(routing)
        torch.ops.dmoe._gate_route_out(x, w.gate_weight, w.expert_bias, None, tokens, *packed, logits, *out, schedule)

    def experts(scheduled: bool, shared: bool = True):
        given = ExpertWeights(w.w13, w.w2, *((w.shared_w13, w.shared_w2) if shared else ()))
        _backends.Cuda._experts(x, given, out.topk_ids, out.topk_weights, schedule, scheduled, y)
        return y

    def ready_made():
        schedule.copy_(made)  # the experts use its counters up
        return experts(True)

    route()
    made = schedule.clone()
    return {
        "layer": lambda: block_moe(x, **w._asdict(), routing=routing)[0],
        "router": route,
        "router, no schedule": lambda: route(None),
        "routing of given logits": lambda: block_route(logits, w.expert_bias, routing=routing),
        "experts, schedule ready-made (and copied)": ready_made,
        "experts, schedule of their own": lambda: experts(False),
        "experts, none shared": lambda: experts(False, False),
    }


def triton_parts(case: cases.Case, w: cases.Weights) -> dict:
    x, routing = case.x, case.routing
    _, routed, logits = block_moe(x, **w._asdict(), routing=routing)
    return {
        "layer": lambda: block_moe(x, **w._asdict(), routing=routing)[0],
        "routing of given logits": lambda: block_route(logits, w.expert_bias, routing=routing),
        "experts, schedule of their own": lambda: moe_experts(x, w.w13, w.w2, routed.topk_ids, routed.topk_weights),
    }


PARTS = {"cuda": cuda_parts, "triton": triton_parts}


def stand_in() -> None:
    """C++ under the names of the CUDA ops, so that a rehearsal takes the way of a GPU."""
    library = stand_in.library = torch.library.Library("dmoe", "IMPL")  # it lasts as long as it is held

    def gate_route(x, gate, bias, offsets, seq_len, ints, floats, logits, ids, weights, coreset_ids, sizes, *_):
        torch.ops.dmoe._gate_out(x, gate, logits)
        torch.ops.dmoe._block_route_out(logits, bias, offsets, seq_len, ints, floats, ids, weights, coreset_ids, sizes)

    def block_dense(x, *rest):
        *weights, expert_map, activation, ids, topk_weights, _schedule, _workspace, _scheduled, y = rest
        torch.ops.dmoe._moe_experts_out(x, *weights, False, expert_map, activation, ids, topk_weights, y)

    library.impl("_gate_route_out", gate_route, "CPU")
    library.impl("_block_dense_out", block_dense, "CPU")


def kernels_of(contender: timing.Contender, device: str, named=None) -> list[dict]:
    """Each kernel of a call by the profiler, in order: how often, and its mean time in µs. Kernels of programmatic dependent
    launch overlap, so they may add up to more than the call takes. On the CPU the ops stand for them. named: what a
    kernel is called here, from the profiler's name; by default `short`."""
    kind = torch.profiler.ProfilerActivity
    runs = 3 if device == "cuda" else 1
    with torch.profiler.profile(activities=[kind.CUDA if device == "cuda" else kind.CPU]) as profile:
        for turn in range(runs):
            contender.run(turn)
        if device == "cuda":
            torch.cuda.synchronize()
    calls = runs * (len(contender.calls) if device == "cuda" else 1)
    found: dict[str, list[float]] = {}
    for event in profile.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if (on_gpu and not event.name.startswith("Activity")) or (device == "cpu" and event.name.startswith("dmoe::")):
            found.setdefault((named or short)(event.name), []).append(event.time_range.elapsed_us())
    return [dict(name=name, per_call=len(us) / calls, us=sum(us) / len(us)) for name, us in found.items()]


def short(name: str) -> str:
    """A kernel's name without its namespace, template and arguments."""
    plain = re.sub(r"\(anonymous namespace\)::", "", name)
    return re.split(r"[<(]", plain.removeprefix("void "))[0].removeprefix("dmoe::").removeprefix("cuda::").strip()


def table(rows: list[dict]) -> str:
    lines = [
        [
            f"{row['backend']} {row['what']}",
            str(row["tokens"]),
            str(row["unique"]),
            results.number(row["predicted_us"]) if row["predicted_us"] else "-",
            results.number(row["median_us"]),
            f"{results.number(row['p10_us'])}–{results.number(row['p90_us'])}",
            " + ".join(
                f"{each['name']} {results.number(each['us'])}"
                + (f" x {each['per_call']:g}" if each["per_call"] != 1 else "")
                for each in row["kernels"]
            ),
        ]
        for row in rows
    ]
    return results.table(["a call of", "tokens", "unique", "predicted", "µs", "p10–p90", "kernels, µs"], lines)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
