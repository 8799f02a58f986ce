"""How far trainings differ: what the policies keep in each stored one, and where a new one is expected to land.

    python -m examples.miniature.trainings                   # the stored trainings
    python -m examples.miniature.trainings F/results.json    # and whether that one lands inside

The intervals of `table` count the test prompts and hold for its checkpoints; these count the trainings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from .model import HERE
from .table import aligned

STORED = {"seed 0": "results.json", "seed 1": "seed-1.json", "seed 2": "seed-2.json", "seed 3": "seed-3.json"}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantile, 1 to 9 degrees of freedom


def expected(values: list[float]) -> tuple[float, float, float]:
    """The mean of 2 to 10 trainings, and the interval that one more falls into 19 times of 20 (prediction interval of a
    normal distribution: mean ± t s sqrt(1 + 1 / n))."""
    n = len(values)
    if not 2 <= n <= len(STUDENT) + 1:
        raise ValueError(f"values must be 2 to {len(STUDENT) + 1}, got {n}")
    mean = statistics.mean(values)
    half = STUDENT[n - 2] * statistics.stdev(values) * (1 + 1 / n) ** 0.5
    return mean, mean - half, mean + half


def compare(title: str, trainings: dict[str, dict[str, float]], new: dict[str, float] | None) -> str:
    """A line per policy: every training, their mean, the interval of a new one, and where `new` is."""
    lines = [["", *trainings, "mean", "a new one (95 %)", *(["this one", ""] if new else [])]]
    for name in next(iter(trainings.values())):
        values = [training[name] for training in trainings.values()]
        mean, low, high = expected(values)
        line = [name, *(f"{value:.1%}" for value in values), f"{mean:.1%}", f"{low:.1%} to {high:.1%}"]
        if new:
            line += [f"{new[name]:.1%}", "inside" if low <= new[name] <= high else "OUTSIDE"]
        lines.append(line)
    return aligned(title, lines) + "\n"


def rows(file: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Of a results.json of `table`: what is kept of the base's accuracy (for the base, the answers that are right), and the
    unique experts as a share of the base's."""
    table_2 = json.loads(file.read_text())["table_2"]
    kept = {name: row["of_base"][0] if name != "base" else row["right"] for name, row in table_2.items()}
    base = table_2["base"]["experts"]
    return kept, {name: row["experts"] / base for name, row in table_2.items() if name != "base"}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.miniature.trainings", description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path, nargs="?", help="results.json of a training that is not one of the stored")
    args = parser.parse_args(argv)
    stored = {name: rows(HERE / "results" / file) for name, file in STORED.items()}
    new = rows(args.new) if args.new else (None, None)
    titles = ("Accuracy, of the base's (base: answers that are right)", "Unique experts, of the base's")
    for i, title in enumerate(titles):
        print(compare(title, {name: found[i] for name, found in stored.items()}, new[i]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
