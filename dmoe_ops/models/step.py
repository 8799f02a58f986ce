"""A denoising step: fixed shapes, and no decision of the host inside.

What it reads and writes lies on the device (`Batch`): the text, where the block begins, the number of the step, which
sequences go on, and all counts. So a step can be captured once and replayed for every prefix.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import decoder, reference, unmasking
from .attention import KVCache
from .sampling import sample

KINDS = ("prefill", "commit", "denoising")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tokens are unmasked; `generate` says what each means."""

    block_length: int
    mask_id: int
    eos_id: int | None
    eos_early_stop: bool
    threshold: float
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None
    refresh_every: int | None = None

    def sample(self, logits) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [T] and their probabilities float32 [T], for logits [T, V]; NaN where a logit is NaN or infinite,
        as there is no most probable token then."""
        if self.temperature == 0 and self.top_k is None and self.top_p is None:
            return decoder.greedy(logits)
        return sample(logits.float(), self.temperature, self.top_k, self.top_p, self.generator)


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
        at = KINDS.index(kind)
        found = reference.unique_experts(topk_ids, self.num_experts, self.block_length)
        self.unique[at] += (found.sum(2) * rows).sum(1)
        sequences = rows.sum()
        self.blocks[at] += sequences * found.shape[2]
        if forwards:
            self.forwards[at] += sequences

    def clear(self) -> None:
        for counts in (self.forwards, self.blocks, self.unique):
            counts.zero_()

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
    coresets: None, or int32 [MoE layers, bsz, blocks of the routing, width], those that the block under way has kept.
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
    coresets: torch.Tensor | None = None

    @classmethod
    def empty(cls, model, block_length: int, sequences: int, capacity: int, keeps_coresets: bool = False) -> Batch:
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=model.device)

        layers, routing = len(model.moe_layers), model.routing
        blocks = block_length // routing.block_size, routing.coreset_width
        return cls(
            x=zeros(sequences, capacity),
            new=zeros(sequences, capacity, dtype=torch.bool),
            length=zeros(sequences),
            steps=zeros(sequences) + 1,
            active=zeros(sequences, dtype=torch.bool),
            begin=zeros(1),
            step=zeros(1),
            cache=model.new_cache(0 if model.config.sees_all else capacity, sequences),
            counter=Counter(model.config.num_experts, block_length, layers, model.device),
            coresets=zeros(layers, sequences, *blocks, dtype=torch.int32) if keeps_coresets else None,
        )

    def fill(self, input_ids, lengths, gen_lengths, steps, mask_id: int) -> None:
        """Begins a decode: prompts input_ids [n, T] of int64 [n] tokens, gen_lengths int64 [n] new ones at most, steps
        int64 [n] per block. Sequences behind the first n stay without anything to do."""
        n, tokens = input_ids.shape
        tokens = min(tokens, self.x.shape[1])
        input_ids, lengths, gen_lengths, steps = (t.to(self.x.device) for t in (input_ids, lengths, gen_lengths, steps))
        position = torch.arange(self.x.shape[1], device=self.x.device)
        self.x.fill_(mask_id)
        prompt = position[:tokens] < lengths[:, None]
        self.x[:n, :tokens] = torch.where(prompt, input_ids[:, :tokens], mask_id)
        self.new.zero_()
        self.active.zero_()  # a decode that was cancelled leaves some
        self.new[:n] = (position >= lengths[:, None]) & (position < (lengths + gen_lengths)[:, None])
        self.length[:n], self.steps[:n] = lengths, steps
        self.cache.length = 0
        self.counter.clear()


def denoise(
    model, batch: Batch, rule: Rule, rows, masks: int, rides: bool, fixed: bool = False, fresh: bool = True
) -> torch.Tensor:
    """One step for the sequences `rows`, int64 [n]; returns int64 [n, 3]: the masks that are left in the block (0 where the
    text has ended), whether an eos stands in the answer, and whether all numbers were finite.

    masks: at most so many positions are masked; the head is applied to no more. rides: the block before this one, finished,
    comes along to be committed; the cache ends in front of it. fixed: the length of the cache is read on the device too, and
    `rows` are all; so the step serves any block. fresh: coresets are selected, and kept where the batch has room for them;
    else those that were kept serve again. A model whose tokens see all others computes the whole text.
    """
    size, whole = rule.block_length, model.config.sees_all
    if fixed:
        cache, x = batch.cache.select(length=batch.begin - size if rides else batch.begin), batch.x
    else:
        cache = batch.cache.select(None if len(rows) == len(batch.x) else rows)
        x = batch.x.index_select(0, rows)
    position = batch.begin + torch.arange(size, device=x.device)
    block = x.index_select(1, position)
    ids = torch.cat([x.index_select(1, position - size), block], 1) if rides else block
    coresets = kept_coresets(batch, rows, ids.shape[1] // size, fresh)
    ids, cache = (x, None) if whole else (ids, cache)
    hidden, routed = model.hidden_states(ids, kv_cache=cache, block_length=size, **coresets)
    if fresh and batch.coresets is not None:
        found = coresets["coresets_out"].unflatten(1, (len(rows), -1))
        batch.coresets.index_copy_(1, rows, found[:, :, -batch.coresets.shape[2] :])
    router_logits, topk_ids = (torch.stack(each) for each in zip(*routed))
    if whole:  # only the block is unmasked, and counted
        hidden = hidden.index_select(1, position)
        router_logits, topk_ids = router_logits.index_select(2, position), topk_ids.index_select(2, position)
    counter = batch.counter
    counts = counter.forwards, counter.blocks, counter.unique
    broken = unmasking.count_step(topk_ids, router_logits, rows, batch.active, batch.length, batch.begin, size, *counts)
    hidden, at = hidden[:, -size:].flatten(0, 1), None
    if masks < block.numel():
        masked = (block == rule.mask_id) & batch.active.index_select(0, rows)[:, None]
        at = masked.flatten().sort(descending=True, stable=True).indices[:masks]
        hidden = hidden.index_select(0, at)
    tokens, confidence = rule.sample(model.head(hidden))
    if at is not None:
        tokens = block.flatten().index_copy(0, at, tokens)
        confidence = confidence.new_zeros(block.numel()).index_copy(0, at, confidence)
    return unmasking.unmask(
        tokens.view(block.shape),
        confidence.view(block.shape),
        broken,
        rows,
        batch.x,
        batch.new,
        batch.steps,
        batch.active,
        batch.begin,
        batch.step,
        rule.mask_id,
        rule.eos_id,
        rule.eos_early_stop,
        rule.threshold,
    )


def kept_coresets(batch: Batch, rows, n: int, fresh: bool) -> dict[str, torch.Tensor]:
    """What `hidden_states` gets for n blocks of each sequence: the coresets that were kept, or room for new ones."""
    if batch.coresets is None:
        return {}
    if not fresh:
        return dict(coreset_ids=batch.coresets.index_select(1, rows).flatten(1, 2))
    layers, _, blocks, width = batch.coresets.shape
    return dict(coresets_out=batch.coresets.new_empty(layers, len(rows) * n * blocks, width))


def count_committed(counter: Counter, topk_ids, prompt, rows, forwards=True) -> None:
    """Blocks that become part of the prefix: of a prompt, or finished ones."""
    counter.add("prefill", topk_ids, rows & prompt, forwards)
    counter.add("commit", topk_ids, rows & ~prompt, forwards)
