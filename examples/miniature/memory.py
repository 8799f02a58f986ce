"""All test prompts of the miniature with a fifth of its experts in memory: the same tokens as with all of them?

python -m examples.miniature.memory [--expert-memory 20%] [--resident-bias 1]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tqdm import tqdm

from dmoe_ops.expert_memory import MemorySettings
from dmoe_ops.models import LLaDA2ForDiffusion
from dmoe_ops.models.text import TextCodec

from . import tasks
from .model import BASE, BLOCK, BLOCKS, DMOE
from .table import SEED


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=BASE.parent)
    parser.add_argument("--per-task", type=int, default=500, help="prompts of each task (default: 500)")
    parser.add_argument("--expert-memory", default="20%", help='bytes, "4GB" or "25%%" (default: 20%%)')
    parser.add_argument("--resident-bias", type=float, default=0.0)
    args = parser.parse_args(argv)
    settings = MemorySettings(args.expert_memory, resident_bias=args.resident_bias)
    other_tokens = 0
    for checkpoint, policy in ((BASE, "token"), (DMOE, "dmoe")):
        folder = args.checkpoints / checkpoint.name
        codec = TextCodec(folder)
        whole = LLaDA2ForDiffusion.from_pretrained(folder, policy=policy)
        pooled = LLaDA2ForDiffusion.from_pretrained(folder, policy=policy, expert_memory=settings)
        for task in tasks.TASKS:
            examples = tasks.examples(task, random.Random(SEED), args.per_task, test=True)
            same = right = 0
            for example in tqdm(examples, desc=f"{checkpoint.name}, {policy}, {task}"):
                ids = torch.tensor([codec.encode(example.prompt)])
                length = BLOCKS[task] * BLOCK - ids.shape[1]
                expected = whole.generate(ids, gen_length=length).tokens
                got = pooled.generate(ids, gen_length=length).tokens
                same += torch.equal(got, expected)
                right += codec.decode(got[0].tolist()).split(tasks.EOS)[0] == example.answer
            other_tokens += len(examples) - same
            print(f"{checkpoint.name}, {policy}, {task}: {same} of {len(examples)} the same, {right} right", flush=True)
        print(f"{checkpoint.name}, {policy}: {pooled.expert_memory.stats()}")
    return int(other_tokens > 0 and not args.resident_bias)


if __name__ == "__main__":
    raise SystemExit(main())
