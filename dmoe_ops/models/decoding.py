"""Block diffusion: decoding block by block, each unmasked in parallel over a few denoising steps."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..routing import is_int, is_number
from .checkpoint import is_finite

FROM_CONFIG = object()


class KVCache:
    """Keys and values of the committed tokens, in buffers of full length: a forward writes behind them, and only `commit`
    makes what it wrote part of the prefix. keys, values: [layers, bsz, kv_heads, capacity, head_dim]."""

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, head_dim: int, *, dtype=None, device=None):
        shape = (layers, batch, heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def check(self, input_ids) -> None:
        _, batch, _, capacity, _ = self.keys.shape
        if input_ids.shape[0] != batch:
            raise ValueError(f"input_ids must have the batch size of kv_cache, {batch}, got {input_ids.shape[0]}")
        if self.length + input_ids.shape[1] > capacity:
            raise ValueError(
                f"kv_cache has room for {capacity} tokens, got {self.length} and {input_ids.shape[1]} more"
            )

    def extend(self, layer: int, keys, values) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values [bsz, kv_heads, T, head_dim] behind the prefix; returns views of prefix and both.
        Raises ValueError where they have a gradient, which the buffers would keep from then on."""
        if keys.requires_grad:
            raise ValueError("kv_cache must be used under torch.no_grad(), got keys with a gradient")
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def commit(self, tokens: int) -> None:
        self.length += tokens

    def of(self, rows) -> KVCache:
        """A cache of its own with the committed tokens of some sequences, int64 [n] or bool [bsz], and the same capacity."""
        part = object.__new__(KVCache)
        part.length = self.length
        for name in ("keys", "values"):
            whole = getattr(self, name)
            kept = whole[:, rows, :, : self.length]
            copy = whole.new_empty(kept.shape[:3] + whole.shape[3:])
            copy[:, :, :, : self.length] = kept
            setattr(part, name, copy)
        return part


@dataclasses.dataclass(frozen=True)
class DecodingStats:
    """What a decode cost, all its sequences together. A forward is one run of all layers for one sequence: the prefill of
    the prompt's full blocks (in a batch: those of the shortest prompt at once, then one at a time), the denoising steps, and
    the commit of each finished block (its keys and values have to be those of its final tokens).

    tokens_per_forward: new tokens over all forwards.
    unique_experts: distinct experts that a block's tokens were routed to, averaged over layers and over the blocks of all
    forwards; unique_experts_denoising: the paper's count, over denoising forwards alone. `_by_layer` keeps the layers
    apart (MoE layers, in order).
    expert_bytes_per_step: routed expert weights that a block reads in a denoising forward, on average, all layers together.
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


class Decoded(NamedTuple):
    """tokens: int64 [bsz, n], the new tokens up to and with the first eos; n is at most gen_length. A sequence that ends
    earlier than another is filled up with eos."""

    tokens: torch.Tensor
    stats: DecodingStats


class _Counter:
    """Counts on the device of the model: nothing is read back before the end."""

    def __init__(self, num_experts: int, block_length: int):
        self.num_experts, self.block_length = num_experts, block_length
        self.forwards = dict(prefill=0, commit=0, denoising=0)
        self.blocks = dict(self.forwards)
        self.unique = dict.fromkeys(self.forwards, 0)  # [layers]: sums over blocks

    def add(self, kind: str, routed, rows=slice(None)) -> None:
        """A forward, or those of its sequences that `rows` picks."""
        sequences = len(routed[0][1][rows])
        if not sequences:
            return
        topk_ids = torch.stack([ids[rows] for _, ids in routed]).flatten(1, 2)  # [layers, tokens, k]
        layers, tokens, _ = topk_ids.shape
        blocks = tokens // self.block_length
        # Slots without an expert (-1) are counted in a bin of their own.
        used = torch.zeros(layers, blocks, self.num_experts + 1, dtype=torch.bool, device=topk_ids.device)
        used.scatter_(2, topk_ids.reshape(layers, blocks, -1) % (self.num_experts + 1), True)
        self.forwards[kind] += sequences
        self.blocks[kind] += blocks
        self.unique[kind] = self.unique[kind] + used[:, :, :-1].sum((1, 2))

    def mean(self, *kinds: str) -> tuple[float, ...]:
        """Unique experts per block, layer by layer."""
        blocks = sum(self.blocks[kind] for kind in kinds)
        total = sum(self.unique[kind] for kind in kinds)
        return tuple((total.double() / blocks).tolist())

    def stats(self, tokens: int, bytes_per_expert: int) -> DecodingStats:
        every, denoising = self.mean(*self.forwards), self.mean("denoising")
        forwards = sum(self.forwards.values())
        return DecodingStats(
            tokens=tokens,
            forwards=forwards,
            **{f"{kind}_forwards": count for kind, count in self.forwards.items()},
            tokens_per_forward=tokens / forwards,
            unique_experts=sum(every) / len(every),
            unique_experts_denoising=sum(denoising) / len(denoising),
            unique_experts_by_layer=every,
            unique_experts_denoising_by_layer=denoising,
            expert_bytes_per_step=sum(denoising) * bytes_per_expert,
        )


@torch.no_grad()
def generate(
    self,
    input_ids,
    *,
    gen_length: int,
    prompt_lengths=None,
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
) -> Decoded:
    """Decodes up to `gen_length` new tokens by block diffusion.

    input_ids: int64 [bsz, T], the prompts; they may end inside a block, and may be empty.
    prompt_lengths: int64 [bsz], where they differ: of each row of input_ids the first so many tokens, the rest is padding.
    Every sequence comes out as if it were alone: it is its own blocks, and leaves the batch when it is done.
    gen_length: new tokens at most. block_length: tokens that are unmasked in parallel, by default config.block_length;
    blocks start at position 0.
    steps: denoising steps per block (at most gen_length of them). Each unmasks every token whose confidence is
    above `threshold`, or, where those are fewer than the step's share of the block, that many of the most confident.
    temperature: 0 takes the most probable token, else the token is drawn (`generator`). top_k, top_p: restrict the choice
    to the k most probable tokens, and to the fewest whose probabilities sum to more than top_p. The confidence of a token
    is its probability among those that remain.
    eos_id: ends the text (None: nothing does); by default config.eos_token_id. mask_id: by default config.mask_token_id.
    eos_early_stop: stop as soon as no mask is left before an eos, not only at the end of its block.
    progress: show a progress bar.

    Returns `Decoded`. Raises ValueError that names the argument and its value, or says that the logits are not finite.
    Source: generate() of the released LLaDA2 code, its greedy form taking the most probable token.
    """
    config = self.config
    eos_id = config.eos_token_id if eos_id is FROM_CONFIG else eos_id
    mask_id = config.mask_token_id if mask_id is None else mask_id
    block_length = config.block_length if block_length is None else block_length
    _check(config, input_ids, gen_length, block_length, steps, threshold, temperature, top_k, top_p, eos_id, mask_id)
    lengths = _lengths(input_ids, prompt_lengths)
    _check_prompts(config, input_ids, lengths, gen_length, mask_id)
    input_ids, lengths = input_ids.to(self.device), lengths.to(self.device)
    steps = min(steps, gen_length)
    first, last = int(lengths.min()), int(lengths.max())
    position = torch.arange(-(-(last + gen_length) // block_length) * block_length, device=self.device)
    x = input_ids.new_full((len(input_ids), len(position)), mask_id)
    x[:, :last] = torch.where(position[:last] < lengths[:, None], input_ids[:, :last], mask_id)
    new = (position >= lengths[:, None]) & (position < lengths[:, None] + gen_length)
    cache = self.new_cache(x.shape[1], len(x))
    counter = _Counter(config.num_experts, block_length)
    alive = torch.arange(
        len(x), device=self.device
    )  # the sequences that go on; row i of the cache is sequence alive[i]

    def forward(tokens, cache):
        return self.hidden_states(tokens, kv_cache=cache, block_length=block_length)

    def unmask(block, logits, step):
        tokens, confidence = sample(logits.flatten(0, 1), temperature, top_k, top_p, generator)
        share = block_length // steps + (step < block_length % steps)
        chosen = choose(confidence.view(block.shape), block == mask_id, threshold, share)
        return torch.where(chosen, tokens.view(block.shape), block)

    bar = tqdm(total=len(x) * gen_length, unit="token", disable=not progress)
    with bar:
        for begin in range(first // block_length * block_length, x.shape[1], block_length):
            end = begin + block_length
            if begin > cache.length:
                # The prompts' full blocks at first, then the block that has just been finished, in a longer prompt or new.
                _, routed = forward(x[alive, cache.length : begin], cache)
                cache.commit(begin - cache.length)
                prompt = lengths[alive] >= begin
                counter.add("prefill", routed, prompt)
                counter.add("commit", routed, ~prompt)
            active, prefix = alive, cache
            for step in range(steps):
                done = ~(x[active, begin:end] == mask_id).any(1)
                if eos_early_stop and eos_id is not None and step:
                    done |= _ended(x[active], new[active], eos_id, mask_id)
                if done.any():
                    active, prefix = active[~done], prefix.of(~done)
                if not len(active):
                    break
                block = x[active, begin:end]
                hidden, routed = forward(block, prefix)
                counter.add("denoising", routed)
                logits = self.logits(hidden)
                _check_finite(self, logits, routed, begin)
                x[active, begin:end] = unmask(block, logits, step)
                bar.update(int((new & (x != mask_id)).sum()) - bar.n)
            done = position[end - 1] + 1 >= lengths[alive] + gen_length
            if eos_id is not None:
                done |= (new[alive, :end] & (x[alive, :end] == eos_id)).any(1)
            if done.any():
                alive, cache = alive[~done], cache.of(~done)
            if not len(alive):
                break
    return _decoded(x, lengths, gen_length, eos_id, counter, self.bytes_per_expert)


def _decoded(x, lengths, gen_length: int, eos_id: int | None, counter: _Counter, bytes_per_expert: int) -> Decoded:
    answers = [row[length : length + gen_length] for row, length in zip(x, lengths.tolist())]
    if eos_id is not None:
        ends = [(answer == eos_id).nonzero() for answer in answers]
        answers = [answer[: int(end[0]) + 1] if len(end) else answer for answer, end in zip(answers, ends)]
    tokens = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=eos_id or 0)
    return Decoded(tokens, counter.stats(sum(map(len, answers)), bytes_per_expert))


def _check_finite(model, logits, routed, begin: int) -> None:
    """A softmax of such logits has no most probable token, and an expert with such a score is never chosen."""
    # The largest of a row is NaN where the row holds one.
    finite = logits.amax(-1).isfinite().all() & ~torch.stack([router.isnan().any() for router, _ in routed]).any()
    if not finite:
        broken = (name for name, value in model.state_dict().items() if not is_finite(value))
        name = next(broken, None)
        why = f"weight {name} is not" if name else f"all weights are, so {model.dtype} is too narrow for this model"
        raise ValueError(f"logits of the block at position {begin} must be finite: {why}".replace("torch.", ""))


def sample(logits, temperature: float = 0.0, top_k=None, top_p=None, generator=None):
    """A token for every row of logits [T, V], int64 [T], and its probability float32 [T] after the filters."""
    if temperature > 0:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        beyond = F.pad(ordered.softmax(1).cumsum(1)[:, :-1], (1, 0)) > top_p  # what all that are more probable sum to
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    probability = logits.softmax(1)
    if temperature > 0:
        token = torch.multinomial(probability, 1, generator=generator)
    else:
        token = logits.argmax(1, keepdim=True)
    return token[:, 0], probability.gather(1, token)[:, 0]


def choose(confidence, active, threshold: float, share: int) -> torch.Tensor:
    """Which tokens a step unmasks, bool [..., B]: the active ones above the threshold, or, in a block where those are
    fewer, the `share` most confident ones."""
    confidence = confidence.masked_fill(~active, -torch.inf)
    sure = confidence > threshold
    best = confidence.sort(descending=True, stable=True).indices[..., :share]
    best = torch.zeros_like(active).scatter(-1, best, True) & active
    return torch.where(sure.sum(-1, keepdim=True) >= share, sure, best)


def _ended(x, new, eos_id: int, mask_id: int) -> torch.Tensor:
    """bool [bsz]: whether an eos stands in the new tokens with no mask before it."""
    eos, masks = new & (x == eos_id), new & (x == mask_id)
    return eos.any(1) & (masks.cumsum(1).gather(1, eos.int().argmax(1, keepdim=True))[:, 0] == 0)


def _check(config, input_ids, gen_length, block_length, steps, threshold, temperature, top_k, top_p, eos_id, mask_id):
    for name, value in (("gen_length", gen_length), ("block_length", block_length), ("steps", steps)):
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
        return torch.full((bsz,), tokens)
    if (
        not isinstance(prompt_lengths, torch.Tensor)
        or prompt_lengths.shape != (bsz,)
        or prompt_lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"prompt_lengths must be an int64 tensor [bsz={bsz}], got {prompt_lengths!r}")
    if bsz and not 0 <= int(prompt_lengths.min()) <= int(prompt_lengths.max()) <= tokens:
        raise ValueError(f"prompt_lengths must be in [0, T={tokens}], got {prompt_lengths.tolist()}")
    return prompt_lengths.long()


def _check_prompts(config, input_ids, lengths, gen_length: int, mask_id: int) -> None:
    if input_ids.shape[0] == 0:
        raise ValueError(f"input_ids must hold a prompt, [bsz, T], got {list(input_ids.shape)}")
    padding = torch.arange(input_ids.shape[1], device=input_ids.device) >= lengths.to(input_ids.device)[:, None]
    prompts = input_ids.masked_fill(padding, 0)
    check_ids(prompts, config.vocab_size)
    if ((prompts == mask_id) & ~padding).any():
        raise ValueError(f"input_ids must not hold mask_id={mask_id}")
    length = int(lengths.max()) + gen_length
    if length > config.max_position_embeddings:
        raise ValueError(
            f"gen_length must leave prompt and answer within max_position_embeddings="
            f"{config.max_position_embeddings} tokens, got {int(lengths.max())} + {gen_length}"
        )


def check_ids(ids, vocab_size: int, name: str = "input_ids") -> None:
    check_token_tensor(ids, name)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{name} must be in [0, vocab_size={vocab_size}), got {int(ids.min())} to {int(ids.max())}")


def check_token_tensor(ids, name: str = "input_ids") -> None:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else ids
        raise ValueError(f"{name} must be an int64 tensor [bsz, T], got {got}")
