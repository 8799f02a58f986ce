"""Answers on the disk, one JSON line each, appended as they come: what an interrupted run goes on from.

Every process writes a file of its own beside the output, whose first line holds the settings; all processes read all files.
"""

from __future__ import annotations

import json
from pathlib import Path

from .. import _files

ADVICE = "take another --out, or remove that file"


class Store:
    """out: the JSON that a run writes in the end. found: the answers that are there, by (set, index).

    Raises ValueError, naming the file, where it holds answers of other settings or can't be written.
    """

    def __init__(self, out: Path, settings: dict, rank: int = 0):
        self.out, self.settings = out, json.loads(json.dumps(settings))
        self.path = out.with_name(f"{out.stem}.answers-{rank}.jsonl")
        if not out.parent.is_dir():
            raise ValueError(f"--out must lie in a folder that exists, got {_files.short(out)}")
        _files.check_writable(out)
        _files.check_writable(self.path)
        self.found = self.read()

    def read(self) -> dict[tuple[str, int], dict]:
        """The answers of all processes."""
        found = {}
        for path in sorted(self.out.parent.glob(f"{glob_of(self.out.stem)}.answers-*.jsonl")):
            lines = whole_lines(path)
            for number, line in enumerate(lines, 1):
                try:
                    value = json.loads(line)
                    if number == 1:
                        self._agree(path, value["settings"])
                    else:
                        found[value["set"], value["index"]] = value
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                    raise ValueError(f"line {number} of {_files.short(path)} is no answer; {ADVICE}") from None
        return found

    def _agree(self, path: Path, theirs: dict) -> None:
        for name in {**self.settings, **theirs}:
            ours, other = self.settings.get(name), theirs.get(name)
            if ours != other:
                was = f"{_files.short(json.dumps(other))}, and this run has {_files.short(json.dumps(ours))}"
                raise ValueError(f"{_files.short(path)} has answers with {name} = {was}; {ADVICE}")

    def add(self, answers: list[dict]) -> None:
        """Appends answers, behind whatever an interruption has left whole."""
        kept = whole_lines(self.path) if self.path.exists() else []
        with open(self.path, "ab") as file:
            file.truncate(sum(map(len, kept)))
            lines = ([] if kept else [dict(settings=self.settings)]) + answers
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self.found.update({(answer["set"], answer["index"]): answer for answer in answers})


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, but for a last one that was not written to its end."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def glob_of(name: str) -> str:
    """A pattern that matches the name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
