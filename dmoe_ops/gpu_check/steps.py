"""Runs the steps of a check: each in its own process group with its own time limit, killed whole at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SHORTEST = 5.0  # seconds; with less left a step is not begun
KEPT = 20000  # characters of output that stay in the result


@dataclasses.dataclass(frozen=True)
class Step:
    """name: "cuda tests races". kind: tests, sanitizer, times or bench. In command, {json} is a file to write results to.
    seconds: its limit. alone: nothing runs beside it, as it measures time. information: its failure is none of the whole."""

    name: str
    kind: str
    backend: str
    command: tuple[str, ...]
    seconds: float
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    alone: bool = False
    information: bool = False


def run(steps: list[Step], folder: Path, left: Callable[[], float], width: int, keep) -> None:
    """Calls keep(step, result) for each as it ends; up to `width` run side by side. left(): seconds that remain."""
    waiting, running = list(steps), []
    try:
        while waiting or running:
            while waiting and has_room(waiting[0], running, width):
                step = waiting.pop(0)
                limit = min(step.seconds, left())
                if limit < min(SHORTEST, step.seconds):
                    keep(step, dict(ok=False, result="LOST", seconds=0.0, summary="no time left"))
                else:
                    running.append(Running(step, folder, limit))
            for one in [one for one in running if one.has_ended()]:
                running.remove(one)
                keep(one.step, one.result())
            time.sleep(0.02)
    finally:
        for one in running:
            one.kill()


def has_room(step: Step, running: list[Running], width: int) -> bool:
    if step.alone or any(one.step.alone for one in running):
        return not running
    return len(running) < width


class Running:
    def __init__(self, step: Step, folder: Path, limit: float):
        stem = folder / re.sub(r"\W+", "-", step.name)
        self.step, self.limit, self.late, self.stuck = step, limit, False, False
        self.log, self.json, self.record = (stem.with_suffix(f".{kind}") for kind in ("log", "json", "record"))
        env = {**os.environ, **step.env, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        env["DMOE_GPU_CHECK_RECORD"] = str(self.record)
        command = [part.replace("{json}", str(self.json)) for part in step.command]
        self.begin = time.monotonic()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, preexec_fn=os.setpgrp
            )

    def has_ended(self) -> bool:
        if self.process.poll() is None:
            if time.monotonic() - self.begin < self.limit:
                return False
            self.late = True
        self.took = time.monotonic() - self.begin
        self.kill()
        return True

    def kill(self) -> None:
        """The whole group. First Python may say where it stands: faulthandler prints that at SIGABRT."""
        for number, patience in ((signal.SIGABRT, 2.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self.stuck = self.process.poll() is None  # in the driver, where no signal reaches it

    def result(self) -> dict:
        output = self.log.read_text(errors="replace")
        data = None
        if self.json.exists():
            with contextlib.suppress(json.JSONDecodeError):  # killed while it wrote
                data = json.loads(self.json.read_text())
        if self.step.kind == "tests":
            found = tests_result(self.events(), self.process.returncode)
        else:
            found = dict(ok=self.process.returncode == 0, summary=ended(self.process.returncode, output))
        if self.late:
            where = f" in {', '.join(found['unfinished'])}" if found.get("unfinished") else ""
            stuck = "; it could not be killed" if self.stuck else ""
            found.update(ok=False, result="HUNG", summary=f"no end after {self.limit:.0f} s{where}{stuck}")
        found.setdefault("result", "ok" if found["ok"] else "FAILED")
        if self.step.information and not found["ok"]:
            found["result"] = "info"
        kept = output[-KEPT:] if not found["ok"] else ""
        return dict(found, seconds=round(self.took, 1), command=" ".join(self.step.command), data=data, output=kept)

    def events(self) -> list[dict]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


def ended(code: int | None, output: str) -> str:
    """How a process ended, with the line of its output that tells most."""
    said = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", output, re.M)
    if code == 0:
        return said[-1] if said else "done"
    first = re.search(
        r"^=+ ((?:Invalid|Uninitialized|Barrier|Error|Warning|Race|Program hit|Potential).*)", output, re.M
    )
    error = re.findall(r"^\w*(?:Error|Exception|error)\b.*", output, re.M)
    why = " / ".join([*said[-1:], first.group(1)] if first else error[-1:] or output.strip().splitlines()[-1:])
    return f"{exit_of(code)}: {why}"[:300]


def exit_of(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"


def tests_result(events: list[dict], code: int | None) -> dict:
    """From the lines of record.py."""
    ends: dict[str, dict] = {}
    for event in events:
        if "outcome" in event and (event["end"] not in ends or event["outcome"] == "failed"):
            ends[event["end"]] = event
    names = {
        kind: [test for test, e in ends.items() if e["outcome"] == kind] for kind in ("passed", "failed", "skipped")
    }
    unfinished = [event["start"] for event in events if "start" in event and event["start"] not in ends]
    reasons: dict[str, int] = {}
    for test in names["skipped"]:
        reasons[ends[test]["reason"]] = reasons.get(ends[test]["reason"], 0) + 1
    lost = next((event for event in events if "lost" in event), None)
    parts = [f"{len(found)} {kind}" for kind, found in names.items() if found]
    if lost:
        parts.insert(0, f"{lost['lost']} in {lost['end']}")
    elif code not in (0, 1, 5) and unfinished:
        parts.insert(0, f"{exit_of(code)} in {', '.join(unfinished)}")
    elif code not in (0, 1):
        parts.insert(0, "no test was selected" if code == 5 else exit_of(code))
    if names["failed"] and not lost:
        first = names["failed"][0]
        parts.append(f"the first: {first}: {ends[first]['reason']}")
    return dict(
        ok=code == 0 and bool(names["passed"] or names["skipped"]),
        summary=", ".join(parts),
        **{kind: len(found) for kind, found in names.items()},
        failures=[f"{test}: {ends[test]['reason']}" for test in names["failed"][:20]],
        skip_reasons=reasons,
        unfinished=unfinished,
    )
