"""`make gpu-check` (= python -m dmoe_ops.gpu_check, in the repository): every GPU test, then the benchmarks, within ten
minutes, on a machine that may have no network. Leaves one JSON: bench/results/<gpu>-<date>-<commit>.json, written anew after
every step, so that an interrupted run leaves what it has."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

# Compiling is most of the tests' time, so three processes share the work. What is small enough for Triton's interpreter runs
# compiled here; a selection, as every case compiles kernels of its own.
TESTS = {
    "gpu": ["tests/gpu"],
    "router": ["tests/test_triton_router.py", "-k", "golden or named or hard or ends or scarce or nan"],
    "experts": ["tests/test_triton_experts.py"],
}
TEST_SECONDS = 270
# The questions of the project's goals, the most important first.
BENCHES = {
    "layer_peers": "layer --tokens 32 --unique 15,70 --peers all --seconds 15",
    "layer_roofline": "layer --tokens 32,128,512,2048 --unique 8,15,32,70,256 --no-baseline --seconds 8",
    "layer_cuda": "layer --backend cuda --tokens 32,64 --unique 8,15,32,70 --no-baseline --seconds 8",
    "experts_peers": "experts --tokens 32 --unique 15,70 --peers all --no-baseline --seconds 10",
    "route_peers": "route --tokens 32 --peers all --seconds 5",
    "route_cuda": "route --backend cuda --tokens 32,1024 --seconds 5",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.split(":")[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER", help="for the JSON")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: there is no GPU here; what it would confirm stays unconfirmed", file=sys.stderr)
        return 2
    if not Path("tests/gpu").is_dir():
        print("gpu-check: run it in the repository, where tests/gpu is", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes
    result = machine()
    path = args.out / f"{slug(result['gpu'])}-{result['date']}-{result['commit']}.json"
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(kind: str, name: str, value: dict) -> None:
        result[kind][name] = value
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"== {kind} {name}: {value['summary']}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name, value in run_tests(Path(folder), min(TEST_SECONDS, deadline - time.monotonic())):
            keep("tests", name, value)
        for name, arguments in BENCHES.items():
            keep("bench", name, run_bench(Path(folder) / f"{name}.json", arguments, deadline - time.monotonic()))
    bad = [f"{kind} {name}" for kind in ("tests", "bench") for name, value in result[kind].items() if not value["ok"]]
    print(f"{path}: " + (f"not well: {', '.join(bad)}" if bad else "all well"))
    return 1 if bad else 0


def machine() -> dict:
    import triton

    from . import __version__

    properties = torch.cuda.get_device_properties(0)
    return dict(
        gpu=properties.name,
        capability=list(torch.cuda.get_device_capability(0)),
        processors=properties.multi_processor_count,
        date=datetime.date.today().isoformat(),
        commit=commit(),
        dmoe_ops=__version__,
        torch=torch.__version__,
        triton=triton.__version__,
        python=sys.version.split()[0],
        tests={},
        bench={},
    )


def commit() -> str:
    """Of the working tree; DMOE_COMMIT where git is not at hand (a copy without .git)."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        found = done.stdout.strip()
    except OSError:
        found = ""
    return found or os.environ.get("DMOE_COMMIT", "unknown")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def run_tests(folder: Path, seconds: float):
    """Yields (name, result) of each group of tests; they run side by side."""
    begin, running = time.monotonic(), {}
    for name, arguments in TESTS.items():
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "--tb=short", "-p", "no:cacheprovider"]
        command.append(f"--junitxml={folder / name}.xml")
        if importlib.util.find_spec("xdist"):
            command += ["-n", "4"]
        log = open(folder / f"{name}.log", "w")  # noqa: SIM115
        running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log
    for name, (process, log) in running.items():
        try:
            code = process.wait(max(1.0, begin + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        log.close()
        output = (folder / f"{name}.log").read_text()
        counts = counted(folder / f"{name}.xml")
        summary = f"did not end within {seconds:.0f} s" if code is None else json.dumps(counts)
        if code != 0:
            print(output[-4000:])
        ran = counts.get("tests", 0) > counts.get("skipped", 0)
        yield name, dict(ok=code == 0 and ran, summary=summary, **counts, output=output[-20000:] if code != 0 else "")


def counted(path: Path) -> dict:
    if not path.exists():
        return {}
    suite = ElementTree.parse(path).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time"))}


def run_bench(path: Path, arguments: str, seconds: float) -> dict:
    command = [sys.executable, "-m", "dmoe_ops", "bench", *arguments.split(), "--device", "cuda", "--json", str(path)]
    if seconds < 20:
        return dict(ok=False, summary="no time left", command=arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = None, str(error.stdout or "")
    if code != 0:
        print(output[-4000:])
    print(output if code == 0 else "", flush=True)
    data = json.loads(path.read_text()) if path.exists() else None
    summary = "done" if code == 0 else "out of time" if code is None else f"exit status {code}"
    return dict(ok=code == 0, summary=summary, command=arguments, result=data, output=output[-4000:] if code else "")


if __name__ == "__main__":
    sys.exit(main())
