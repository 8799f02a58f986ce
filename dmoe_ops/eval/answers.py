"""Prompts decoded as a protocol asks, and what each answer cost.

authors: as dMoE's released code does it (fscdc/dMoE, evaluations/llada_distributed_moe.py and the `generate` of its model),
with its defects: a temperature of 0 that draws all the same, as at 1; and answers that are cut off. `generate` returns
prompt and answer where it ends early, the answer alone where it ends with a block, and the caller takes the prompt's length
off the front of both.
mended: the most probable tokens, and whole answers.
"""

from __future__ import annotations

import time
import zlib

import torch

from ..models import DiffusionModel, TextCodec
from ..models.text import padded

TEMPERATURE = {"authors": 1.0, "mended": 0.0}
PROTOCOLS = tuple(TEMPERATURE)


class EarlyEnds:
    """For `generate(stream=…, every_step=True, eos_early_stop=False)`: ends a text early where the released code does: after
    a step that has itself written an eos, with no mask left in front of the first eos. lengths: of the prompts.

    `early`: whether each text has ended so; else it ended with a block, or at its full length.
    """

    def __init__(self, lengths: list[int], mask_id: int | None, eos_id: int | None):
        self.lengths, self.mask_id, self.eos_id = lengths, mask_id, eos_id
        self.early = [False] * len(lengths)
        self.texts: list[list[int | None]] = [[] for _ in lengths]  # in front of the block under way
        self.blocks: list[list[int | None]] = [[] for _ in lengths]
        self.begin = -1

    def __call__(self, block) -> bool:
        rows = block.tokens.tolist()
        for row, length in enumerate(self.lengths):
            now = rows[row][max(0, length - block.begin) :]
            if block.begin != self.begin:
                self.texts[row] += self.blocks[row]
                self.blocks[row] = [self.mask_id] * len(now)
            wrote = any(new == self.eos_id != old for old, new in zip(self.blocks[row], now))
            self.blocks[row] = now
            text = self.texts[row] + now
            if wrote and self.mask_id not in text[: text.index(self.eos_id)]:
                self.early[row] = True
        self.begin = block.begin
        return all(early or self.eos_id in text for early, text in zip(self.early, self.texts))


def decode(
    model: DiffusionModel, codec: TextCodec, prompts: list[list[int]], *, authors: bool, seed: int, **options
) -> list[dict]:
    """Answers to prompts, decoded as one batch; options: those of `generate`.

    Of each answer: output, the whole text; scored, what a protocol that cuts answers off leaves of it; tokens, with the eos;
    cut, how many of them were lost; forwards, of all kinds, and unique_experts, over denoising forwards (both are means over
    the batch); seconds, its share of the time.
    """
    input_ids, lengths = padded(prompts)
    eos_id, mask_id = model.config.eos_token_id, model.config.mask_token_id
    watch = EarlyEnds(lengths.tolist(), mask_id, eos_id) if authors else None
    drawn = dict(generator=torch.Generator(model.device).manual_seed(seed)) if options["temperature"] else {}
    begin = time.perf_counter()
    decoded = model.generate(
        input_ids.to(model.device),
        prompt_lengths=lengths,
        eos_early_stop=not authors,
        stream=watch,
        every_step=authors,
        **drawn,
        **options,
    )
    seconds = (time.perf_counter() - begin) / len(prompts)
    found = []
    for row, (tokens, prompt) in enumerate(zip(decoded.tokens.tolist(), prompts)):
        ended = eos_id in tokens
        tokens = tokens[: tokens.index(eos_id)] if ended else tokens
        count = len(tokens) + ended
        cut = min(len(prompt), count) if watch and not watch.early[row] else 0
        found.append(
            dict(
                output=codec.decode(tokens),
                scored=codec.decode(tokens[cut:]),
                tokens=count,
                cut=cut,
                forwards=decoded.stats.forwards / len(prompts),
                unique_experts=decoded.stats.unique_experts_denoising,
                seconds=seconds,
            )
        )
    return found


def seed_of(seed: int, name: str, index: int) -> int:
    """Of the batch that begins with an item: neither an interruption nor the number of processes changes it."""
    return zlib.crc32(f"{seed} {name} {index}".encode())
