"""Takes each barrier, wait and fence out of the kernels of csrc/cuda in turn, and shows that a test notices.

    python tools/take_out.py [--only TEXT] [--jobs 2] [--device] [--json FILE]

What the kernels call is taken out of a copy of their source, which the emulator then runs (tests/test_races.py: check).
--device takes out of device.h what those calls are made of, and looks whether the pins of tests/test_cuda_build.py fail:
the emulator does not run those instructions; it needs nvcc. A line that ends in a comment "not shown: REASON" is one whose
absence no test here can show; everything else that goes unnoticed makes this program fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.pool
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ["cuda/router_*.h", "cuda/experts_*.h", "select.h"]
CALLS = (
    "sync|sync_some|sync_warp|cluster_arrive|cluster_arrive_relaxed|cluster_wait|wait_for_primary|barrier_init_done|"
    "barrier_expect|barrier_arrive|barrier_wait|fence_copies"
)
# What is replaced by what; the first group of a pattern stays.
RULES = [
    ("taken out", re.compile(rf"\bdev::({CALLS})\([^;]*\);"), "(void)0;"),
    ("without its order", re.compile(r"\bdev::atomic_add_ordered\("), "dev::atomic_add("),
    ("without its order", re.compile(r"\bdev::load_acquire\("), "dev::load_relaxed("),
    ("without its order", re.compile(r"\bdev::cluster_arrive\("), "dev::cluster_arrive_relaxed("),
    ("not waited for", re.compile(r"\bwhile \(dev::load_acquire\("), "while (false && dev::load_acquire("),
    ("taken out", re.compile(r"\bdev::cluster_arrive\(\);\n\s*dev::cluster_wait\(\);"), "(void)0;"),
]
# In device.h: the lines of assembly and the intrinsics that order something.
DEVICE = re.compile(
    r"(?:asm volatile\(\"(?:bar\.sync|barrier\.cluster|griddepcontrol|fence\.)[^;]*;\"[^;]*;|(?<=\{ )__sync\w+\(\);|"
    r"(?<=  )__sync\w+\(\);)"
)
WEAKER = re.compile(r"\.acq_rel|\.acquire(?=\.gpu)")
BROKEN = "it does not compile"
REASON = re.compile(r"not shown: (.*)")


@dataclasses.dataclass
class Site:
    file: str
    line: int
    text: str  # what is taken out
    how: str
    begin: int
    end: int
    instead: str
    reason: str | None  # why no test can show it
    result: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def sites(csrc: Path, device: bool) -> list[Site]:
    found = []
    for path in [path for pattern in (["cuda/device.h"] if device else KERNELS) for path in csrc.glob(pattern)]:
        file, source = str(path.relative_to(csrc)), path.read_text()
        rules = [("taken out", DEVICE, "(void)0;"), ("without its order", WEAKER, ".relaxed")] if device else RULES
        for how, pattern, instead in rules:
            for match in pattern.finditer(source):
                line = source.count("\n", 0, match.start()) + 1
                rest = source[match.end() : source.index("\n", match.end())]
                reason = REASON.search(rest)
                text = " ".join(match.group().split()).rstrip("(")
                found.append(Site(file, line, text, how, *match.span(), instead, reason.group(1) if reason else None))
    return sorted(found, key=lambda site: (site.file, site.line))


def copy_without(site: Site, folder: Path) -> Path:
    csrc = Path(tempfile.mkdtemp(dir=folder)) / "csrc"
    shutil.copytree(folder / "csrc", csrc)
    source = (csrc / site.file).read_text()
    (csrc / site.file).write_text(source[: site.begin] + site.instead + source[site.end :])
    return csrc


def notice(site: Site, folder: Path) -> str:
    """What a test said, or "" if none noticed."""
    csrc = copy_without(site, folder)
    if site.file == "cuda/device.h":
        return pins(csrc)
    return in_child(emulate, csrc, folder)


def pins(csrc: Path) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-rN", "tests/test_cuda_build.py"]
    env = {**os.environ, "DMOE_CSRC": str(csrc)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    said = re.findall(r"^E  +(.*)", done.stdout, re.M)
    return "" if done.returncode == 0 else said[0] if said else done.stdout[-300:]


def emulate(csrc: Path, folder: Path) -> str:
    import emulated
    import test_races

    try:
        test_races.check(emulated.Emulator(emulated.build(folder, "host.cpp", csrc, "-w")))
    except AssertionError as error:
        return str(error).strip().splitlines()[0]
    except subprocess.CalledProcessError:
        return BROKEN
    return ""


def in_child(function, *args, seconds: float = 300) -> str:
    """Its answer from its own process: without a barrier a kernel may do anything."""
    here, there = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        there.send(function(*args))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else f"did not end in {seconds:.0f} s"
    except EOFError:
        child.join()
        return f"ended with exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="take_out", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="of the sites whose file:line or text has it")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: 1)")
    parser.add_argument("--device", action="store_true", help="out of device.h, under nvcc, instead of the kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table, to a file too")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "csrc", folder / "csrc")  # whoever edits meanwhile does not disturb
        chosen = [s for s in sites(folder / "csrc", args.device) if args.only in f"{s} {s.text}"]
        if not args.device:
            import torch

            torch.set_num_threads(1)
            if said := in_child(emulate, folder / "csrc", folder):
                print(f"take_out: the tests fail before anything is taken out: {said}", file=sys.stderr)
                return 2
            import emulated

            emulated.machine(folder)  # compiled once, for all
        with multiprocessing.pool.ThreadPool(args.jobs) as pool:
            for site, said in zip(chosen, pool.imap(lambda s: notice(s, folder), chosen)):
                site.result = said
                verdict = (
                    "BROKEN" if said == BROKEN else "caught" if said else "not shown" if site.reason else "UNNOTICED"
                )
                print(f"{verdict:9} {site!s:28} {site.text} {site.how}: {said or site.reason or ''}", flush=True)
    missed = [s for s in chosen if s.result == BROKEN or not (s.result or s.reason)]
    caught = [s for s in chosen if s.result and s.result != BROKEN]
    listed = [s for s in chosen if not s.result and s.reason]
    print(f"{len(chosen)} sites: {len(caught)} caught, {len(listed)} not shown, {len(missed)} unnoticed")
    for site in caught:
        if site.reason:
            print(f'{site}: caught now; its "not shown" is out of date')
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(s) for s in chosen], indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
