"""What a run leaves behind: one dictionary, printed as a table and written as JSON.

schema      SCHEMA; a reader refuses any other
command     the command line
machine     processor, instruction set of the C++ kernels, GPU, threads, versions, commit, backend
settings    seed, seconds per case, dtype, how many layers of weights took turns
ceilings    read (bytes/s), gemm (FLOP/s), gemm_dtype
rows        one per contender and case, see `measure.row`
absent      peer -> why it did not run
complete    false when the run was interrupted
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .. import __version__, _backends, _files, _library
from . import schema

SCHEMA = 1
# A run that follows another is of the same code, whatever that one wrote here.
LEFT_BEHIND = ("bench/results", "docs")


class BadFile(Exception):
    """A results file that can't be used, in one line."""


def new(command: str, device: str, **settings) -> dict:
    return dict(
        schema=SCHEMA,
        command=command,
        machine=machine(device),
        settings=settings,
        ceilings=None,
        rows=[],
        absent={},
        complete=True,
    )


def machine(device: str) -> dict:
    return dict(
        device=device,
        cpu=_cpu_model(),
        isa=_library._C.cpu_isa() if _library._C else None,
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        load=os.getloadavg()[0],
        python=platform.python_version(),
        torch=torch.__version__,
        dmoe_ops=__version__,
        commit=_commit(),
        backend=backend(device),
    )


def backend(device: str) -> str:
    """The one of dmoe_ops that serves the device. ValueError when DMOE_BACKEND asks for one that can't."""
    return _backends.name_for(device)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    """DMOE_COMMIT, which is for a copy that git knows nothing of, or knows wrongly; else that of the checkout, with -dirty
    behind it where anything but results was changed."""
    if given := os.environ.get("DMOE_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/", *(f":/!{place}" for place in LEFT_BEHIND)]
    try:
        commit, dirty = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "--short=12", "HEAD"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if dirty else commit


def check_writable(path: str) -> None:
    """Makes the folder of a file that is to be written. BadFile where that, or the file, can't be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _files.check_writable(Path(path))
    except (OSError, ValueError) as error:
        raise BadFile(str(error)) from None


def write(results: dict, path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {path}", file=sys.stderr)


def read(path: str) -> dict:
    """BadFile, naming the file and the place in it, unless it holds what `compare` and `report` read."""
    try:
        results = _files.read_json(Path(path))
    except ValueError as error:
        raise BadFile(str(error)) from None
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        found = found if isinstance(found, (int, str)) else type(found).__name__
        need = f"schema {_files.short(found)}, need {SCHEMA}"
        raise BadFile(f"{_files.short(path)}: not a result of this version of dmoe bench ({need})")
    fault = schema.fault(results)
    if fault:
        raise BadFile(f"{_files.short(path)}: {fault}")
    return results


def print_header(results: dict) -> None:
    machine, settings, ceilings = results["machine"], results["settings"], results["ceilings"]
    isa = f" (kernels: {machine['isa']})" if machine.get("isa") else ""
    where = machine["gpu"] or f"{machine['cpu']}{isa}, {machine['threads']} threads"
    print(f"machine    {where}; torch {machine['torch']}; dmoe_ops at {machine['commit'] or machine['dmoe_ops']}")
    slow = ": plain torch, the times of dmoe_ops are not those of a kernel" if machine["backend"] == "reference" else ""
    print(f"backend    {machine['backend']}{slow}")
    if (machine["commit"] or "").endswith("-dirty"):
        print(
            "changed    the checkout has changes that are in no commit: nobody can repeat this run, so don't quote it"
        )
    if machine["load"] > 0.5 * machine["cores"]:
        print(f"busy       {machine['load']:.1f} processes on {machine['cores']} cores before the start: expect noise")
    if settings.get("weights"):
        print(f"weights    {settings['weights']}")
    if ceilings:
        print(
            f"ceilings   read {ceilings['read'] / 1e9:.4g} GB/s, "
            f"GEMM {ceilings['gemm'] / 1e9:.4g} GFLOP/s in {ceilings['gemm_dtype']}, measured in this run"
        )
    for name, why in results["absent"].items():
        print(f"absent     {name}: {why}")


def number(value: float) -> str:
    """Four digits, never an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def ratio(value: dict) -> str:
    return f"{value['median']:.2f} ({value['p10']:.2f}–{value['p90']:.2f})"


def table(header: list[str], lines: list[list[str]]) -> str:
    """Columns as wide as they need; the first is left-aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rows = []
    for line in [header, *lines]:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        rows.append("  ".join(cells).rstrip())
    return "\n".join([rows[0], "-" * (sum(widths) + 2 * len(widths) - 2), *rows[1:]])


def progress(items, label: str, unit: str):
    return tqdm(items, desc=label, unit=unit, leave=False, disable=None)
