"""All test prompts of the miniature with a fifth of its experts in memory: the same answers as with all of them?

python -m examples.miniature.memory [--expert-memory 20%] [--resident-bias 1] [--batch 1]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from tokenizers import Tokenizer

from dmoe_ops.expert_memory import MemorySettings
from dmoe_ops.models import LLaDA2ForDiffusion

from . import tasks
from .model import BASE, BLOCKS, DMOE, answer
from .table import SEED


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=BASE.parent)
    parser.add_argument("--per-task", type=int, default=400, help="prompts of each task (default: 400)")
    parser.add_argument("--batch", type=int, default=40, help="prompts at a time (default: 40)")
    parser.add_argument("--expert-memory", default="20%", help='bytes, "4GB" or "25%%" (default: 20%%)')
    parser.add_argument("--resident-bias", type=float, default=0.0)
    args = parser.parse_args(argv)
    settings = MemorySettings(args.expert_memory, resident_bias=args.resident_bias)
    others = 0
    for checkpoint, policy in ((BASE, "token"), (DMOE, "dmoe")):
        folder = args.checkpoints / checkpoint.name
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        pooled = LLaDA2ForDiffusion.from_pretrained(folder, policy=policy, expert_memory=settings)
        whole = LLaDA2ForDiffusion.from_pretrained(folder, policy=policy)
        for task in tasks.TASKS:
            examples = tasks.examples(task, random.Random(SEED), args.per_task, test=True)
            prompts = [example.prompt for example in examples]
            expected, got = (
                answer(net, tokenizer, prompts, BLOCKS[task], batch=args.batch)[0] for net in (whole, pooled)
            )
            same = sum(a == b for a, b in zip(got, expected))
            right = sum(text == example.answer for text, example in zip(got, examples))
            others += len(examples) - same
            print(f"{checkpoint.name}, {policy}, {task}: {same} of {len(examples)} the same, {right} right", flush=True)
        print(f"{checkpoint.name}, {policy}: {pooled.expert_memory.stats()}")
    return int(others > 0 and not args.resident_bias)


if __name__ == "__main__":
    raise SystemExit(main())
