"""A denoising step: fixed shapes, and no decision of the host inside.

What it reads and writes lies on the device (`Batch`): the text, where the block begins, the number of the step, which
sequences go on, and all counts. So a step can be captured once and replayed for every prefix.
"""

from __future__ import annotations

import dataclasses

import torch

from .attention import KVCache
from .sampling import choose, ended, sample

KINDS = ("prefill", "commit", "denoising")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tokens are unmasked; `generate` says what each means. every_row: the head and the sampling of all positions, not
    only of those that are masked."""

    block_length: int
    mask_id: int
    eos_id: int | None
    eos_early_stop: bool
    threshold: float
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None


class Counter:
    """Counts on the device of the model: nothing is read back before the end.

    forwards, blocks: int64 [kinds]; unique: int64 [kinds, layers], sums over blocks.
    """

    def __init__(self, num_experts: int, block_length: int, layers: int = 1, device=None):
        self.num_experts, self.block_length = num_experts, block_length
        self.forwards = torch.zeros(len(KINDS), dtype=torch.int64, device=device)
        self.blocks = torch.zeros_like(self.forwards)
        self.unique = torch.zeros(len(KINDS), layers, dtype=torch.int64, device=device)

    def add(self, kind: str, topk_ids, rows, forwards=True) -> None:
        """A forward of the sequences that `rows` bool [n] picks. topk_ids: int [layers, n, T, k]. forwards: whether it is
        one of its own, or goes on with one that was counted."""
        layers, n, tokens, _ = topk_ids.shape
        blocks, at = tokens // self.block_length, KINDS.index(kind)
        # Slots without an expert (-1) are counted in a bin of their own.
        used = topk_ids.new_zeros(layers, n, blocks, self.num_experts + 1, dtype=torch.bool)
        used.scatter_(3, topk_ids.reshape(layers, n, blocks, -1).long() % (self.num_experts + 1), True)
        self.unique[at] += (used[..., :-1].sum((2, 3)) * rows).sum(1)
        sequences = rows.sum()
        self.blocks[at] += sequences * blocks
        if forwards:
            self.forwards[at] += sequences

    def mean(self, *kinds: str) -> tuple[float, ...]:
        """Unique experts per block, layer by layer."""
        at = [KINDS.index(kind) for kind in kinds]
        return tuple((self.unique[at].sum(0).double() / self.blocks[at].sum()).tolist())


@dataclasses.dataclass
class Batch:
    """What a decode holds on the device.

    x: int64 [bsz, capacity], prompts, answers and masks; new: bool [bsz, capacity], where answers may stand.
    length: int64 [bsz], of the prompts; steps: int64 [bsz], denoising steps per block; active: bool [bsz], the sequences
    that this block still has to unmask. begin, step: int64 [1], the block's first position and the number of the step.
    """

    x: torch.Tensor
    new: torch.Tensor
    length: torch.Tensor
    steps: torch.Tensor
    active: torch.Tensor
    begin: torch.Tensor
    step: torch.Tensor
    cache: KVCache
    counter: Counter


def denoise(model, batch: Batch, rule: Rule, cache: KVCache, rows, masks: int, rides: bool) -> torch.Tensor:
    """One step for the sequences `rows`, int64 [n]; returns int64 [n, 3]: the masks that are left in the block (0 where the
    text has ended), whether an eos stands in the answer, and whether all numbers were finite.

    cache: where it goes on, for these rows. rides: the block before this one, finished, comes along to be committed, and
    `cache` begins in front of it. masks: at most so many positions are masked; the head is applied to no more.
    """
    size = rule.block_length
    x = batch.x.index_select(0, rows)
    new, active = batch.new.index_select(0, rows), batch.active.index_select(0, rows)
    position = batch.begin + torch.arange(size, device=x.device)
    block = x.index_select(1, position)
    ids = torch.cat([x.index_select(1, position - size), block], 1) if rides else block
    hidden, routed = model.hidden_states(ids, kv_cache=cache, block_length=size)
    topk_ids = torch.stack([ids for _, ids in routed])
    if rides:
        prompt = batch.length.index_select(0, rows) >= batch.begin
        count_committed(batch.counter, topk_ids[:, :, :size], prompt, active)
    batch.counter.add("denoising", topk_ids[:, :, -size:], active)

    masked = (block == rule.mask_id) & active[:, None]
    logits, at = hidden[:, -size:].flatten(0, 1), None
    if masks < masked.numel():
        at = masked.flatten().sort(descending=True, stable=True).indices[:masks]
        logits = logits.index_select(0, at)
    logits = model.logits(logits)
    tokens, confidence = sample(logits, rule.temperature, rule.top_k, rule.top_p, rule.generator)
    if at is not None:
        tokens = block.flatten().index_copy(0, at, tokens)
        confidence = confidence.new_zeros(masked.numel()).index_copy(0, at, confidence)
    steps = batch.steps.index_select(0, rows)[:, None]
    share = size // steps + (batch.step < size % steps)
    chosen = choose(confidence.view(block.shape), masked, rule.threshold, share)
    block = torch.where(chosen, tokens.view(block.shape), block)

    batch.x.index_put_((rows[:, None], position), block)
    batch.step.add_(1)
    left = (block == rule.mask_id).sum(1)
    over = torch.zeros_like(active)
    if rule.eos_id is not None:
        x = x.index_copy(1, position, block)
        over = (new & (x == rule.eos_id)).any(1)
        if rule.eos_early_stop:
            left = left.masked_fill(ended(x, new, rule.eos_id, rule.mask_id), 0)
    left = (left * active).masked_fill(batch.step >= steps[:, 0], 0)  # a mask may be what the model predicts
    batch.active.index_copy_(0, rows, left > 0)
    return torch.stack([left, over.long(), finite(logits, routed).long().expand_as(left)], 1)


def count_committed(counter: Counter, topk_ids, prompt, rows, forwards=True) -> None:
    """Blocks that become part of the prefix: of a prompt, or finished ones."""
    counter.add("prefill", topk_ids, rows & prompt, forwards)
    counter.add("commit", topk_ids, rows & ~prompt, forwards)


def finite(logits, routed) -> torch.Tensor:
    """bool []: a softmax of other logits has no most probable token, and an expert with a score of NaN is never chosen."""
    # The largest of a row is NaN where the row holds one.
    return logits.amax(-1).isfinite().all() & ~torch.stack([router for router, _ in routed]).isnan().any()
