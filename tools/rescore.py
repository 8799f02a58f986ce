"""Scores answers that dMoE's authors released, by their rules and mended: python tools/rescore.py gsm8k FILE...

FILE: of fscdc/dMoE, evaluations/result_summary_be_adaptive/SET, one JSON object per line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dmoe_ops.eval.sets import SETS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    args = parser.parse_args(argv)
    which = SETS[args.set]
    answers = [json.loads(line) for path in args.files for line in path.read_text(encoding="utf-8").splitlines()]
    for name in ("authors", "mended"):
        authors = name == "authors"
        scores = [which.score(each["answer"][0], which.target(each["task"], authors), authors) for each in answers]
        strict, soft = (sum(getattr(score, kind) for score in scores) for kind in ("strict", "soft"))
        print(f"{name}: {strict} strict, {soft} soft of {len(scores)}")


if __name__ == "__main__":
    main()
