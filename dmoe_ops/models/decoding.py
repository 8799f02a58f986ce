"""Block diffusion: decoding block by block, each unmasked in parallel over a few denoising steps."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..expert_memory import MemoryStats
from ..routing import is_int, is_number
from . import graphs
from .checkpoint import is_finite
from .step import KINDS, Batch, Counter, Rule, count_committed, denoise

FROM_CONFIG: Any = object()
PREFILL_TOKENS = 2048  # of all sequences together, at a time


@dataclasses.dataclass(frozen=True)
class DecodingStats:
    """What a decode cost, all its sequences together. A forward is one run of all layers for one sequence: the prefill of
    the prompt's full blocks (in a batch: those of the shortest prompt at once, then one at a time), the denoising steps, and
    the commit of each finished block (its keys and values have to be those of its final tokens), which may ride with a step
    of the next block.

    tokens_per_forward: new tokens over all forwards.
    unique_experts: distinct experts that a block's tokens were routed to, averaged over layers and over the blocks of all
    forwards; unique_experts_denoising: the paper's count, over denoising forwards alone. `_by_layer` keeps the layers
    apart (MoE layers, in order).
    expert_bytes_per_step: routed expert weights that a block reads in a denoising forward, on average, all layers together.
    expert_memory: what the pool of a model with expert_memory did meanwhile, else None.
    """

    tokens: int
    forwards: int
    prefill_forwards: int
    commit_forwards: int
    denoising_forwards: int
    tokens_per_forward: float
    unique_experts: float
    unique_experts_denoising: float
    unique_experts_by_layer: tuple[float, ...]
    unique_experts_denoising_by_layer: tuple[float, ...]
    expert_bytes_per_step: float
    expert_memory: MemoryStats | None = None


class Decoded(NamedTuple):
    """tokens: int64 [bsz, n], the new tokens up to and with the first eos; n is at most gen_length. A sequence that ends
    earlier than another is filled up with eos, with 0 where nothing ends a text."""

    tokens: torch.Tensor
    stats: DecodingStats


@torch.no_grad()
def generate(
    self,
    input_ids: torch.Tensor,
    *,
    gen_length: int | torch.Tensor,
    prompt_lengths: torch.Tensor | None = None,
    block_length: int | None = None,
    steps: int = 32,
    threshold: float = 0.95,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = FROM_CONFIG,
    mask_id: int | None = None,
    eos_early_stop: bool = True,
    progress: bool = False,
    generator: torch.Generator | None = None,
    use_graphs: bool | None = None,
    stream: Callable[[Block], bool | None] | None = None,
    every_step: bool = False,
    refresh_every: int | None = None,
) -> Decoded:
    """Decodes up to `gen_length` new tokens by block diffusion.

    input_ids: int64 [bsz, T], the prompts; they may end inside a block, and may be empty.
    prompt_lengths: int64 [bsz], where they differ: of each row of input_ids the first so many tokens, the rest is padding.
    Every sequence comes out as if it were alone: it is its own blocks, and leaves the batch when it is done.
    gen_length: new tokens at most, an integer or int64 [bsz].
    block_length: tokens that are unmasked in parallel, by default config.block_length; blocks start at position 0. Where
    every token sees all others (LLaDA-MoE), they start behind the prompts, which are of one length, gen_length is a number
    of whole blocks, and the counts of experts are those of the blocks, though each step computes the whole text.
    steps: denoising steps per block (at most gen_length of them). Each unmasks every token whose confidence is
    above `threshold`, or, where those are fewer than the step's share of the block, that many of the most confident.
    temperature: 0 takes the most probable token, else the token is drawn (`generator`). top_k, top_p: restrict the choice
    to the k most probable tokens, and to the fewest whose probabilities sum to more than top_p. The confidence of a token
    is its probability among those that remain.
    eos_id: ends the text (None: nothing does); by default config.eos_token_id. mask_id: by default config.mask_token_id.
    eos_early_stop: stop as soon as no mask is left before an eos, not only at the end of its block.
    progress: show a progress bar.
    stream: a function that is given a `Block` as soon as it is finished, and, with every_step, after every step; where it
    returns True, the decode ends there, with the tokens in front of the first mask. `DiffusionModel.stream` iterates.
    use_graphs: replay the steps as CUDA graphs; by default where that is possible. True where it isn't is an error.
    refresh_every: a block's coresets are selected at its first step and every so many steps, and serve the steps in between
    too; None: at every step. More steps than a block takes: once per block, as Epoch (arXiv 2609.09748) does.

    Returns `Decoded`. Raises ValueError that names the argument and its value, or says that the logits are not finite.
    Source: generate() of the released LLaDA2 code, its greedy form taking the most probable token.
    """
    decode = start(**locals())
    total = sum(decode.stops) - sum(decode.lengths)
    with tqdm(total=total, unit="token", disable=not progress) as bar:
        for begin, done in decode.steps():
            if progress:
                bar.update(decode.unmasked() - bar.n)
                if said := decode.memory_stats():
                    bar.set_postfix_str(str(said), refresh=False)
            if stream is not None and (done or every_step) and stream(decode.block(begin, done)):
                decode.cut_short = True
                break
    return decode.result()


def stream(self, input_ids: torch.Tensor, *, every_step: bool = False, **options) -> Generator[Block, None, Decoded]:
    """Iterates over what `generate` decodes: a `Block` as soon as it is finished, and, with every_step, after every step.
    The options and errors are generate's. To stop iterating is to cancel. The generator returns `Decoded`."""
    bound = inspect.signature(generate).bind(self, input_ids, **options)
    bound.apply_defaults()

    @torch.no_grad()
    def blocks(decode):
        for begin, done in decode.steps():
            if done or every_step:
                yield decode.block(begin, done)
        return decode.result()

    return blocks(start(**bound.arguments))


@torch.no_grad()
def start(
    self, input_ids, *, gen_length, prompt_lengths, block_length, steps, threshold, temperature, top_k, top_p, eos_id,
    mask_id, eos_early_stop, generator, use_graphs, refresh_every, **_,
) -> Decode:  # fmt: skip
    """The decode that arguments of `generate` ask for, checked, with nothing computed yet."""
    config = self.config
    eos_id = config.eos_token_id if eos_id is FROM_CONFIG else eos_id
    mask_id = config.mask_token_id if mask_id is None else mask_id
    block_length = config.block_length if block_length is None else block_length
    _check(config, input_ids, block_length, steps, threshold, temperature, top_k, top_p, eos_id, mask_id)
    if refresh_every is not None and (not is_int(refresh_every) or refresh_every < 1):
        raise ValueError(f"refresh_every must be None or an integer of at least 1, got {refresh_every!r}")
    if refresh_every is not None and config.sees_all:
        raise ValueError(f"refresh_every must be None for a model whose tokens see all others, got {refresh_every}")
    lengths, gen_lengths = _lengths(input_ids, prompt_lengths), _gen_lengths(gen_length, len(input_ids))
    _check_prompts(config, input_ids, lengths, gen_lengths, mask_id)
    sampling = temperature, top_k, top_p, generator
    rule = Rule(block_length, mask_id, eos_id, eos_early_stop, threshold, *sampling, refresh_every)
    return Decode(self, rule, input_ids, lengths, gen_lengths, steps, use_graphs)


class Block(NamedTuple):
    """A block under way. tokens: int64 [bsz, block_length], from position `begin` on; where there is none yet, mask_id. A
    text that has ended keeps its masks. done: whether this is the block's last step."""

    begin: int
    tokens: torch.Tensor
    done: bool


class Decode:
    """A decode under way. The host knows where blocks begin and end; whatever depends on tokens lies on the device
    (`Batch`), but for one small tensor a step, which says how many masks each sequence has left."""

    def __init__(self, model, rule: Rule, input_ids, lengths, gen_lengths, steps: int, use_graphs: bool | None):
        size = rule.block_length
        self.model, self.rule = model, rule
        self.lengths = lengths.tolist()
        self.stops = (lengths + gen_lengths).tolist()
        self.cut_short = False
        self.memory_before = None if model.expert_memory is None else model.expert_memory.stats()
        capacity = -(-max(self.stops) // size) * size
        if model.config.sees_all:
            capacity = _whole_text(self.lengths, self.stops, size)
        model.use_block_length(size)
        self.graphs = graphs.of(model, rule, len(lengths), capacity, use_graphs)
        keeps = rule.refresh_every is not None
        self.batch = self.graphs.batch if self.graphs else Batch.empty(model, size, len(lengths), capacity, keeps)
        self.batch.fill(input_ids, lengths, gen_lengths, gen_lengths.clamp(max=steps), rule.mask_id)

    def steps(self):
        """Yields (where the block begins, whether it is done) after every step."""
        try:
            yield from self._steps()
        finally:
            if self.graphs:
                graphs.keep(self.model, self.graphs)

    def _steps(self):
        size, batch = self.rule.block_length, self.batch
        going = list(range(len(self.lengths)))  # the sequences whose texts have not ended
        whole = self.model.config.sees_all
        first = min(self.lengths)
        for begin in range(first if whole else first // size * size, max(self.stops), size):
            end = begin + size
            active = [row for row in going if self.lengths[row] < end]
            pending = 0 if whole else begin - batch.cache.length
            rides = pending == size and active == going
            if pending and not rides:
                self.prefill(going, begin)
            masks = sum(end - max(begin, self.lengths[row]) for row in active)
            over = dict.fromkeys(going, False)
            batch.begin.fill_(begin)
            batch.step.zero_()
            batch.active[: len(self.lengths)] = torch.tensor(
                [row in active for row in range(len(self.lengths))], device=batch.x.device
            )
            number = 0
            while active:
                flags = self.step(active, masks, rides, number % (self.rule.refresh_every or 1) == 0)
                number += 1
                if rides:
                    batch.cache.commit(size)
                    rides = False
                if not all(finite for _, _, finite in flags):
                    _raise_not_finite(self.model, begin)
                over.update((row, bool(eos)) for row, (_, eos, _) in zip(active, flags))
                active = [row for row, (left, _, _) in zip(active, flags) if left]
                masks = sum(left for left, _, _ in flags)
                yield begin, not active
            going = [row for row in going if end < self.stops[row] and not over[row]]
            if not going:
                break

    def step(self, active: list[int], masks: int, rides: bool, fresh: bool) -> list[list[int]]:
        """`denoise` for some sequences, and what it returns, read."""
        if self.graphs:
            flags = self.graphs.step(rides, fresh).tolist()
            return [flags[row] for row in active]
        x, rule = self.batch.x, self.rule
        rows = torch.tensor(active, device=x.device)
        if x.device.type != "cpu" or rule.temperature > 0:  # what is drawn for a row depends on all rows before it
            masks = len(active) * rule.block_length
        return denoise(self.model, self.batch, rule, rows, masks, rides, False, fresh).tolist()

    def prefill(self, going: list[int], end: int) -> None:
        """Commits everything before `end`: the prompts' full blocks at first, then the block that has just been finished,
        in a longer prompt or new. A chunk at a time, so that memory is bounded."""
        batch, first = self.batch, True
        rows = torch.tensor(going, device=batch.x.device)
        cache = batch.cache.select(None if len(going) == len(batch.x) else rows)
        prompt = batch.length[rows] >= end
        size = self.rule.block_length
        chunk = max(1, PREFILL_TOKENS // (len(going) * size)) * size
        for begin in range(cache.length, end, chunk):
            ids = batch.x[rows, begin : min(begin + chunk, end)]
            _, routed = self.model.hidden_states(ids, kv_cache=cache, block_length=size)
            count_committed(batch.counter, torch.stack([ids for _, ids in routed]), prompt, prompt | True, first)
            cache.commit(ids.shape[1])
            first = False
        batch.cache.length = end

    def block(self, begin: int, done: bool) -> Block:
        return Block(begin, self.batch.x[: len(self.lengths), begin : begin + self.rule.block_length].clone(), done)

    def unmasked(self) -> int:
        return int((self.batch.new & (self.batch.x != self.rule.mask_id)).sum())

    def memory_stats(self) -> MemoryStats | None:
        return None if self.memory_before is None else self.model.expert_memory.stats().since(self.memory_before)

    def result(self) -> Decoded:
        x, rule = self.batch.x, self.rule
        stops = self.stops
        if self.cut_short:  # in front of the first mask
            masks = (self.batch.new & (x == rule.mask_id)).long()
            first = torch.where(masks.any(1), masks.argmax(1), x.shape[1]).tolist()
            stops = [min(stop, mask) for stop, mask in zip(stops, first)]
        decoded = _decoded(x, self.lengths, stops, rule.eos_id, self.batch.counter, self.model.bytes_per_expert)
        return decoded._replace(stats=dataclasses.replace(decoded.stats, expert_memory=self.memory_stats()))


def _whole_text(lengths: list[int], stops: list[int], size: int) -> int:
    """Tokens of a text that is computed whole. What stands behind it would be seen, so all are of one length, and of whole
    blocks behind the prompt."""
    if len(set(lengths)) > 1:
        raise ValueError(f"prompt_lengths must be equal for a model whose tokens see all others, got {lengths}")
    new = [stop - lengths[0] for stop in stops]
    if len(set(new)) > 1 or new[0] % size:
        raise ValueError(
            f"gen_length must be a multiple of block_length={size}, and one for all, for a model whose tokens see all "
            f"others, got {new}"
        )
    return stops[0]


def _decoded(x, lengths, stops, eos_id: int | None, counter: Counter, bytes_per_expert: int) -> Decoded:
    answers = [row[length:stop] for row, length, stop in zip(x.tolist(), lengths, stops)]
    answers = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in answers]
    rows = [torch.tensor(row, device=x.device) for row in answers]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos_id or 0)
    return Decoded(tokens, _stats(counter, sum(map(len, answers)), bytes_per_expert))


def _stats(counter: Counter, tokens: int, bytes_per_expert: int) -> DecodingStats:
    every, denoising = counter.mean(*KINDS), counter.mean("denoising")
    counts = dict(zip(KINDS, counter.forwards.tolist()))
    forwards = sum(counts.values())
    return DecodingStats(
        tokens=tokens,
        forwards=forwards,
        **{f"{kind}_forwards": count for kind, count in counts.items()},
        tokens_per_forward=tokens / forwards,
        unique_experts=sum(every) / len(every),
        unique_experts_denoising=sum(denoising) / len(denoising),
        unique_experts_by_layer=every,
        unique_experts_denoising_by_layer=denoising,
        expert_bytes_per_step=sum(denoising) * bytes_per_expert,
    )


def _raise_not_finite(model, begin: int) -> None:
    weights = itertools.chain(model.named_parameters(), model.named_buffers())
    name = next((name for name, value in weights if not is_finite(value)), None)
    known = "all weights" if model.expert_memory is None else "all weights but those of experts, which lie in files,"
    why = f"weight {name} is not" if name else f"{known} are, so {model.dtype} is too narrow for this model"
    raise ValueError(f"logits of the block at position {begin} must be finite: {why}".replace("torch.", ""))


def _check(config, input_ids, block_length, steps, threshold, temperature, top_k, top_p, eos_id, mask_id):
    for name, value in (("block_length", block_length), ("steps", steps)):
        if not is_int(value) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold!r}")
    if not is_number(temperature) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}")
    if top_k is not None and (not is_int(top_k) or top_k < 1):
        raise ValueError(f"top_k must be None or an integer of at least 1, got {top_k!r}")
    if top_p is not None and (not is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p must be None or in (0, 1], got {top_p!r}")
    if mask_id is None:
        raise ValueError("mask_id must be given where config.json has no mask_token_id, got None")
    for name, value in (("mask_id", mask_id), ("eos_id", eos_id)):
        if value is not None and (not is_int(value) or not 0 <= value < config.vocab_size):
            raise ValueError(f"{name} must be a token id below vocab_size={config.vocab_size}, got {value!r}")
    if eos_id == mask_id:
        raise ValueError(f"eos_id must differ from mask_id, got {eos_id} for both")
    check_token_tensor(input_ids)


def _lengths(input_ids, prompt_lengths) -> torch.Tensor:
    bsz, tokens = input_ids.shape
    if prompt_lengths is None:
        return torch.full((bsz,), tokens, device="cpu")
    if (
        not isinstance(prompt_lengths, torch.Tensor)
        or prompt_lengths.shape != (bsz,)
        or prompt_lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"prompt_lengths must be an int64 tensor [bsz={bsz}], got {prompt_lengths!r}")
    if bsz and not 0 <= int(prompt_lengths.min()) <= int(prompt_lengths.max()) <= tokens:
        raise ValueError(f"prompt_lengths must be in [0, T={tokens}], got {prompt_lengths.tolist()}")
    return prompt_lengths.long().cpu()


def _gen_lengths(gen_length, bsz: int) -> torch.Tensor:
    if isinstance(gen_length, torch.Tensor):
        fits = gen_length.shape == (bsz,) and gen_length.dtype in (torch.int32, torch.int64) and (gen_length >= 1).all()
        if not fits:
            raise ValueError(f"gen_length must be an int64 tensor [bsz={bsz}] of at least 1 each, got {gen_length!r}")
        return gen_length.long().cpu()
    if not is_int(gen_length) or gen_length < 1:
        raise ValueError(f"gen_length must be an integer of at least 1, got {gen_length!r}")
    return torch.full((bsz,), int(gen_length), device="cpu")


def _check_prompts(config, input_ids, lengths, gen_lengths, mask_id: int) -> None:
    if input_ids.shape[0] == 0:
        raise ValueError(f"input_ids must hold a prompt, [bsz, T], got {list(input_ids.shape)}")
    padding = torch.arange(input_ids.shape[1], device=input_ids.device) >= lengths.to(input_ids.device)[:, None]
    prompts = input_ids.masked_fill(padding, 0)
    check_ids(prompts, config.vocab_size)
    if ((prompts == mask_id) & ~padding).any():
        raise ValueError(f"input_ids must not hold mask_id={mask_id}")
    longest = int((lengths + gen_lengths).argmax())
    length, more = int(lengths[longest]), int(gen_lengths[longest])
    if length + more > config.max_position_embeddings:
        raise ValueError(
            f"gen_length must leave prompt and answer within max_position_embeddings="
            f"{config.max_position_embeddings} tokens, got {length} + {more}"
        )


def check_ids(ids, vocab_size: int, name: str = "input_ids") -> None:
    check_token_tensor(ids, name)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{name} must be in [0, vocab_size={vocab_size}), got {int(ids.min())} to {int(ids.max())}")


def check_token_tensor(ids, name: str = "input_ids") -> None:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else ids
        raise ValueError(f"{name} must be an int64 tensor [bsz, T], got {got}")
