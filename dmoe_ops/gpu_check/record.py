"""pytest with a plugin that keeps what happens as it happens, so that a hang or a crash leaves the name of its test.
Run as a file, by its path, so that it imports nothing of the package: conftest.py has to be the first.

One JSON per line in the file DMOE_GPU_CHECK_RECORD: {"start": test}, {"end": test, "outcome", "reason"}, {"lost": why}.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

# After one of these every later call of the process fails, Triton's included.
LOST = re.compile(
    r"illegal memory access|illegal instruction|misaligned address|unspecified launch failure|device-side assert"
    r"|invalid program counter|hardware stack error",
    re.I,
)
session = None


def write(**event) -> None:
    with open(os.environ["DMOE_GPU_CHECK_RECORD"], "a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_sessionstart(session):
    globals()["session"] = session


def pytest_runtest_logstart(nodeid):
    write(start=nodeid)


def pytest_runtest_logreport(report):
    if report.failed or report.skipped:
        write(end=report.nodeid, outcome=report.outcome, reason=reason(report))
    elif report.when == "call":
        write(end=report.nodeid, outcome="passed", reason="")
    if report.failed and (found := LOST.search(report.longreprtext)):
        write(lost=found.group(0).lower(), end=report.nodeid)
        session.shouldstop = f"the GPU is lost to this process: {found.group(0)}"


def pytest_collectreport(report):
    if report.failed:
        write(end=report.nodeid, outcome="failed", reason=reason(report))


def reason(report) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, why
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = report.longreprtext.strip().splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1] if lines else "")[:300]


if __name__ == "__main__":
    here = Path(__file__).resolve().parent  # the script's folder, whose modules are no top-level ones
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    sys.exit(pytest.main(sys.argv[1:], plugins=[sys.modules[__name__]]))
