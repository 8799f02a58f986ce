"""The schedule that the expert kernels read, built on the device from the experts that each block's tokens chose.

Dense form, per block: `used` [n_blocks, width], the experts with at least one token, ascending, and `counts` [n_blocks].

Gathered form: every (token, expert) pair has a position, sorted by expert, then by token. `token_at` [T * top_k] is the
token of a position, `position_of` [T, top_k] the position of a slot (-1: the slot adds nothing), and tile i of the grouped
products is the positions from `tiles[i, 1]` up to `tiles[i, 2]`, all of expert `tiles[i, 0]`; `n_tiles` counts them.

Positions need totals over all blocks. The blocks leave bit masks ("words" of up to 32 tokens per expert); the last
program to finish adds them up. Which one is last is decided by an integer counter, what it computes does not depend on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import early

MAX_WORD = 32  # tokens in one bit mask


@triton.jit
def block_range(block, offsets_ptr, seq_len, BLOCK_SIZE: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """First token of a block and how many it has."""
    if HAS_OFFSETS:
        start = tl.load(offsets_ptr + block)
        length = tl.load(offsets_ptr + block + 1) - start
    else:
        per_sequence = tl.cdiv(seq_len, BLOCK_SIZE)
        within = block % per_sequence * BLOCK_SIZE
        start = block // per_sequence * seq_len + within
        length = tl.minimum(seq_len - within, BLOCK_SIZE)
    return start, length


@triton.jit
def popcount(x):
    """Bits set in each uint32. (libdevice has one, but not for AMD nor for the interpreter.)"""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def local_only(chosen, expert, real, map_ptr, HAS_MAP: tl.constexpr):
    """Drops the experts that live on another rank."""
    if HAS_MAP:
        chosen = chosen & (tl.load(map_ptr + expert, mask=real, other=-1) >= 0)
    return chosen


@triton.jit
def store_used(used, expert, block, used_ptr, counts_ptr, WIDTH: tl.constexpr):
    """`used` [EP] as the ascending list of its experts, then zeros: kernels load from there before they know its length."""
    place = tl.cumsum(used.to(tl.int32), 0) - 1
    count = tl.sum(used.to(tl.int32), 0)
    row = used_ptr + block.to(tl.int64) * WIDTH
    tl.store(row + place, expert, mask=used)
    behind = count + tl.arange(0, triton.next_power_of_2(WIDTH))
    tl.store(row + behind, tl.zeros(behind.shape, tl.int32), mask=behind < WIDTH)
    tl.store(counts_ptr + block, count)


@triton.jit
def store_word(
    chosen, word, start, length, t, expert, real, words_ptr, token_word_ptr, E: tl.constexpr, SOME: tl.constexpr
):
    """`chosen` [<= 32 tokens, chunks, lanes] as one bit mask per expert [chunks, lanes], and the place of each token in the
    masks. `start` is the word's first token, `length` how many it has, t [tokens] counts them. SOME: not all experts have
    a column; the others' masks are 0."""
    if SOME:
        e = tl.arange(0, triton.next_power_of_2(E))
        tl.store(words_ptr + word.to(tl.int64) * E + e, tl.zeros(e.shape, tl.int32), mask=e < E)
        tl.debug_barrier()  # in front of the members' masks
    bit = t.to(tl.uint32)
    bits = tl.sum(chosen.to(tl.uint32) << bit[:, None, None], 0)
    tl.store(words_ptr + word.to(tl.int64) * E + expert, bits.to(tl.int32, bitcast=True), mask=real)
    tl.store(token_word_ptr + start + t, word * 32 + t, mask=t < length)


@triton.jit
def order(
    n_words,
    n_tokens,
    ids_ptr,
    words_ptr,
    base_ptr,
    token_word_ptr,
    token_at_ptr,
    position_ptr,
    tiles_ptr,
    n_tiles_ptr,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    DUPLICATES: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Positions and tiles of the gathered form, by one program. DUPLICATES: a token may name an expert twice."""
    e = tl.arange(0, EP)
    row = tl.arange(0, ROWS)
    total = tl.zeros([EP], tl.int32)
    for first in range(0, n_words, ROWS):
        at = (first + row).to(tl.int64)[:, None] * E + e[None, :]
        inside = ((first + row) < n_words)[:, None] & (e < E)[None, :]
        bits = tl.load(words_ptr + at, mask=inside, other=0, cache_modifier=".cg")
        total += tl.sum(popcount(bits.to(tl.uint32, bitcast=True)), 0)
    begin = tl.cumsum(total, 0) - total

    n_tiles = tl.cdiv(total, TILE)
    first_tile = tl.cumsum(n_tiles, 0) - n_tiles
    tl.store(n_tiles_ptr, tl.sum(n_tiles, 0))
    for i in range(0, tl.max(n_tiles, 0)):
        there = i < n_tiles
        tile = tiles_ptr + (first_tile + i) * 3
        tl.store(tile, e, mask=there)
        tl.store(tile + 1, begin + i * TILE, mask=there)
        tl.store(tile + 2, tl.minimum(begin + (i + 1) * TILE, begin + total), mask=there)

    running = begin
    for first in range(0, n_words, ROWS):
        at = (first + row).to(tl.int64)[:, None] * E + e[None, :]
        inside = ((first + row) < n_words)[:, None] & (e < E)[None, :]
        bits = tl.load(words_ptr + at, mask=inside, other=0, cache_modifier=".cg")
        count = popcount(bits.to(tl.uint32, bitcast=True))
        tl.store(base_ptr + at, running[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        running += tl.sum(count, 0)
    tl.debug_barrier()  # base is read below by other threads than those that wrote it

    lane = tl.arange(0, SLOTS)
    for first in range(0, n_tokens * K, SLOTS):
        slot = first + lane
        inside = slot < n_tokens * K
        token = slot // K
        expert = tl.load(ids_ptr + slot, mask=inside, other=-1, cache_modifier=".cg")
        if DUPLICATES:
            for j in range(K):
                same = tl.load(ids_ptr + token * K + j, mask=inside & (j < slot % K), other=-1) == expert
                expert = tl.where(same, -1, expert)
        named = inside & (expert >= 0) & (expert < E)
        place = tl.load(token_word_ptr + token, mask=inside, other=0, cache_modifier=".cg")
        at = (place >> 5).to(tl.int64) * E + expert
        bits = tl.load(words_ptr + at, mask=named, other=0, cache_modifier=".cg").to(tl.uint32, bitcast=True)
        bit = (place & 31).to(tl.uint32)
        chosen = named & (((bits >> bit) & 1) != 0)  # not set where the expert lives on another rank
        one = tl.full([SLOTS], 1, tl.uint32)
        position = tl.load(base_ptr + at, mask=chosen, other=0) + popcount(bits & ((one << bit) - 1))
        tl.store(position_ptr + slot, tl.where(chosen, position, -1), mask=inside)
        tl.store(token_at_ptr + position, token, mask=chosen)


@triton.jit
def load_positions(tile, tiles_ptr, TILE: tl.constexpr):
    """A tile of the gathered form: its expert; its positions [TILE], and which of them there are."""
    expert = tl.load(tiles_ptr + tile * 3)
    position = tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, TILE)
    return expert, position, position < tl.load(tiles_ptr + tile * 3 + 2)


@triton.jit
def load_tile(tile, tiles_ptr, token_at_ptr, TILE: tl.constexpr):
    """`load_positions`, and their tokens."""
    expert, position, there = load_positions(tile, tiles_ptr, TILE)
    return expert, position, there, tl.load(token_at_ptr + position, mask=there, other=0)


@triton.jit(do_not_specialize=["n_tokens"])
def mark_kernel(
    ids_ptr,
    map_ptr,
    used_ptr,
    counts_ptr,
    words_ptr,
    token_word_ptr,
    n_tokens,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHERED: tl.constexpr,
    HAS_MAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """The schedule's first half for ids that come without blocks: one program per chunk of CHUNK tokens."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    e = tl.arange(0, EP)
    t = tl.arange(0, WORD)
    used = tl.zeros([EP], tl.int32)
    for w in tl.static_range(0, CHUNK // WORD):
        start = chunk * CHUNK + w * WORD
        chosen = tl.zeros([WORD, EP], tl.int1)
        for j in range(K):
            expert = tl.load(ids_ptr + (start + t).to(tl.int64) * K + j, mask=start + t < n_tokens, other=-1)
            chosen = chosen | (expert[:, None] == e[None, :])
        chosen = local_only(chosen & (e < E)[None, :], e[None, :], (e < E)[None, :], map_ptr, HAS_MAP)
        used = used | tl.max(chosen.to(tl.int32), 0)
        if GATHERED:
            store_word(
                chosen[:, None, :], chunk * (CHUNK // WORD) + w, start, n_tokens - start, t, e[None, :], (e < E)[None, :],
                words_ptr, token_word_ptr, E, False,
            )  # fmt: skip
    if not GATHERED:
        store_used(used > 0, e, chunk, used_ptr, counts_ptr, WIDTH)


@triton.jit(do_not_specialize=["n_words", "n_tokens"])
def order_kernel(
    ids_ptr,
    words_ptr,
    base_ptr,
    token_word_ptr,
    token_at_ptr,
    position_ptr,
    tiles_ptr,
    n_tiles_ptr,
    n_words,
    n_tokens,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The schedule's second half for ids that come without blocks: one program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    order(
        n_words,
        n_tokens,
        ids_ptr,
        words_ptr,
        base_ptr,
        token_word_ptr,
        token_at_ptr,
        position_ptr,
        tiles_ptr,
        n_tiles_ptr,
        E,
        EP,
        K,
        TILE,
        True,
        ROWS,
        SLOTS,
    )


class Dense(NamedTuple):
    """Workspace of the dense form. used int32 [n_blocks, width], counts int32 [n_blocks], done int32 [1]."""

    used: torch.Tensor
    counts: torch.Tensor
    done: torch.Tensor

    form = "dense"
    tile = 1

    @property
    def width(self) -> int:
        return self.used.shape[1]

    def dense_args(self) -> tuple:
        return self.used, self.counts

    def gathered_args(self) -> tuple:
        return (None,) * 7 + (self.done,)

    @classmethod
    def empty(cls, n_blocks: int, width: int, device) -> Dense:
        used, counts, done = _int32(device, n_blocks * width, n_blocks, 1)
        return cls(used.view(n_blocks, width), counts, done)


class Gathered(NamedTuple):
    """Workspace of the gathered form, all int32; sizes follow from T, E, k and the block size alone.

    words, base [n_words, E]; token_word [T]; token_at [T * k]; position_of [T, k]; tiles [n, 3]; n_tiles, done [1].
    """

    words: torch.Tensor
    base: torch.Tensor
    token_word: torch.Tensor
    token_at: torch.Tensor
    position_of: torch.Tensor
    tiles: torch.Tensor
    n_tiles: torch.Tensor
    done: torch.Tensor
    tile: int

    form = "gathered"
    width = 1

    def dense_args(self) -> tuple:
        return None, None

    def gathered_args(self) -> tuple:
        return (
            self.words,
            self.base,
            self.token_word,
            self.token_at,
            self.position_of,
            self.tiles,
            self.n_tiles,
            self.done,
        )

    @classmethod
    def empty(cls, n_tokens: int, n_experts: int, top_k: int, n_words: int, tile: int, device) -> Gathered:
        slots = n_tokens * top_k
        # Every expert may end in a partial tile, and a tile holds at least one slot.
        max_tiles = min(slots, slots // tile + n_experts)
        sizes = (n_words * n_experts, n_words * n_experts, n_tokens, slots, slots, max_tiles * 3, 1, 1)
        words, base, token_word, token_at, position_of, tiles, n_tiles, done = _int32(device, *sizes)
        return cls(
            words.view(n_words, n_experts),
            base.view(n_words, n_experts),
            token_word,
            token_at,
            position_of.view(n_tokens, top_k),
            tiles.view(max_tiles, 3),
            n_tiles,
            done,
            tile,
        )


def _int32(device, *sizes: int) -> list[torch.Tensor]:
    """Empty int32 tensors of these sizes, in one allocation, each aligned to 64 bytes."""
    padded = [-(-size // 16) * 16 for size in sizes]
    whole = torch.empty(sum(padded), dtype=torch.int32, device=device)
    return [part[:size] for part, size in zip(whole.split(padded), sizes)]


def mark(topk_ids, n_experts: int, chunk: int, schedule, expert_map) -> None:
    """First half of the schedule from topk_ids [T, k] alone; tokens are taken in chunks of `chunk`, a power of two."""
    n_tokens, top_k = topk_ids.shape
    gathered = schedule.form == "gathered"
    mark_kernel[(triton.cdiv(n_tokens, chunk),)](
        topk_ids,
        expert_map,
        *(schedule.dense_args()),
        schedule.words if gathered else None,
        schedule.token_word if gathered else None,
        n_tokens,
        E=n_experts,
        EP=triton.next_power_of_2(n_experts),
        K=top_k,
        CHUNK=chunk,
        WORD=min(chunk, MAX_WORD),
        WIDTH=schedule.width,
        GATHERED=gathered,
        HAS_MAP=expert_map is not None,
        PDL=False,
        num_warps=8,
    )


def order_all(topk_ids, n_experts: int, schedule, pdl: bool) -> None:
    """Second half of the gathered schedule, behind `mark`."""
    n_tokens, top_k = topk_ids.shape
    columns = triton.next_power_of_2(n_experts)
    order_kernel[(1,)](
        topk_ids,
        *schedule.gathered_args()[:-1],
        schedule.words.shape[0],
        n_tokens,
        E=n_experts,
        EP=columns,
        K=top_k,
        TILE=schedule.tile,
        ROWS=max(1, 4096 // columns),
        SLOTS=1024,
        num_warps=8,
        **early(pdl),
    )
