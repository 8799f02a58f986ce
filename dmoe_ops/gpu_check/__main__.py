"""The command: plans, runs, keeps one JSON that is written anew after every step, and ends with a table."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .. import __version__, _library
from ..bench import results
from . import __doc__ as ABOUT
from . import kernels, plan, steps

MINUTES = 8.5  # the build before takes one, where a machine is lent for ten


def main(argv: list[str] | None = None, planned: list[steps.Step] | None = None) -> int:
    """planned: in place of the usual steps. Exit status 0: all well; 1: something was not well, or lost though this GPU
    could have run it; 2: nothing could be done."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=ABOUT)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything (default: {MINUTES})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the JSON (default: bench/results)")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the steps' names, such as '^cuda'")
    parser.add_argument("--rehearse", action="store_true", help="the same way without a GPU, tiny, with stand-ins")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check: there is no GPU here; what it would confirm stays unconfirmed", file=sys.stderr)
        return 2
    if not Path("tests/gpu").is_dir():
        print("gpu-check: run it in the repository, where tests/gpu is", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes
    capable = ["cuda", "triton"] if args.rehearse or torch.cuda.get_device_capability()[0] in (9, 10) else ["triton"]
    lost = losses(_library._C, capable)
    planned = planned or (plan.rehearsal() if args.rehearse else plan.on_gpu(capable))
    absent = {loss["of"] for loss in lost if loss["of"]}
    planned = [step for step in planned if re.search(args.only, step.name) and step.backend not in absent]
    result = dict(machine(args.rehearse), lost=lost, steps={})
    out = args.out or Path("build/gpu-check" if args.rehearse else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{slug(result['gpu'])}-{result['date']}-{result['commit']}.json"

    def keep(step: steps.Step, found: dict) -> None:
        if skipped := skipped_in_vain(step, found, capable):
            found.update(ok=False, result="SKIPPED", summary=f"{found['summary']}: {skipped}")
        found["fails"] = not found["ok"] and not step.information
        result["steps"][step.name] = found
        path.write_text(portable(json.dumps(result, indent=1), folder) + "\n")
        print(f"== {step.name}: {found['result']}, {found['summary']} ({found['seconds']:.0f} s)", flush=True)
        if found.get("output"):
            print(found["output"][-3000:], flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the steps are killed with it
    width = max(1, min(12, (os.cpu_count() or 1) - 2))  # most of the time goes into compilation
    with tempfile.TemporaryDirectory() as folder:
        steps.run(planned, Path(folder), lambda: deadline - time.monotonic(), width, keep)
    print("\n" + summary(result), flush=True)
    bad = [name for name, found in result["steps"].items() if found["fails"]]
    bad += [loss["what"] for loss in lost if loss["fails"]]
    print(f"\n{path}: " + (f"NOT WELL: {', '.join(bad)}" if bad else "all well"))
    return 1 if bad else 0


def portable(text: str, folder: str) -> str:
    """A result without the paths of the machine that made it."""
    for path, name in ((folder, "tmp"), (sys.executable, "python"), (os.getcwd(), "."), (sys.prefix, "prefix")):
        text = text.replace(path, name)
    return text


def machine(rehearsal: bool) -> dict:
    about = dict(gpu="rehearsal", capability=None, processors=None)
    if not rehearsal:
        properties = torch.cuda.get_device_properties(0)
        about = dict(
            gpu=properties.name,
            capability=[properties.major, properties.minor],
            processors=properties.multi_processor_count,
        )
    has_triton = importlib.util.find_spec("triton")
    return dict(
        about,
        date=datetime.date.today().isoformat(),
        commit=commit(),
        dmoe_ops=__version__,
        extension=_library._C.compiler if _library._C else None,
        torch=torch.__version__,
        triton=importlib.metadata.version("triton") if has_triton else None,
        python=sys.version.split()[0],
    )


def losses(extension, capable: list[str]) -> list[dict]:
    """What this run can't show, and why: {what, why, of: the backend that nothing is run of then, fails}."""
    found = []

    def lose(what: str, why: str, of: str = "") -> None:
        found.append(dict(what=what, why=why, of=of, fails=bool(of)))

    if extension is None:
        lose("the extension", f"it {_library.WHY_NO_C}", "cuda")
    elif "cuda" in capable and not extension.cuda_architectures:
        lose("nvcc", f"the CUDA kernels were not built: {extension.why_no_cuda}", "cuda")
    if "cuda" not in capable:
        lose("CUDA kernels", "they are for compute capability 9.0 and 10.x")
    if not importlib.util.find_spec("triton"):
        lose("triton", "the package is not installed", "triton")
    if plan.sanitizer() is None:
        lose("memcheck, synccheck, initcheck, racecheck", "compute-sanitizer is not installed")
    if not Path("../shared/golden").is_dir():
        lose("golden files", "../shared/golden is not there: the released code's outputs were not compared with")
    return found


def skipped_in_vain(step: steps.Step, found: dict, capable: list[str]) -> str | None:
    """A reason why tests were skipped that this machine could have run."""
    if step.backend not in (*capable, "all"):
        return None
    return next((why for why in found.get("skip_reasons", {}) if "golden" not in why), None)


def commit() -> str:
    """Of the working tree: DMOE_COMMIT, which is for a copy that git knows nothing of, or knows wrongly; else git's word."""
    if given := os.environ.get("DMOE_COMMIT"):
        return given
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def summary(result: dict) -> str:
    """The tables a person reads: times per kernel, benchmarks, then every step and what was lost."""
    found = result["steps"]
    times = [row for step in found.values() for row in step.get("data") or [] if "kernels" in row]
    parts = [kernels.table(times)] if times else []
    benches = [
        bench_line(name, row)
        for name, step in found.items()
        if isinstance(step.get("data"), dict)
        for row in step["data"].get("rows", [])
        if row["impl"] in ("dmoe_ops", row["key"])  # ours, and the policies of a decode
    ]
    if benches:
        parts.append(results.table(["benchmark", "tokens", "case", "µs", "roofline or tokens/s"], benches))
    lines = [[loss["what"], "LOST", "", loss["why"]] for loss in result["lost"]] + [
        [name, step["result"], f"{step['seconds']:.0f}", step["summary"]] for name, step in found.items()
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(3)] if lines else []
    rows = ["  ".join([cell.ljust(width) for cell, width in zip(line, widths)] + line[3:]) for line in lines]
    head = f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}, commit {result['commit']}"
    return "\n\n".join([*parts, "\n".join([head, "-" * len(head), *rows])])


def bench_line(name: str, row: dict) -> list[str]:
    rate = row.get("tokens_per_s")
    last = f"{results.number(rate['median'])} tokens/s" if rate else f"{row['roofline']:.2f}"
    return [name, str(row["tokens"]), row["key"], results.number(row["median_us"]), last]


if __name__ == "__main__":
    sys.exit(main())
