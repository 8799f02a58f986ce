"""Expert memory: the routed experts of a model stay in their files, and a pool with a budget of bytes holds those in use.

A layer is route -> `ExpertMemory.visit(layer, topk_ids)` -> experts. The pool and its reader threads are C++
(csrc/cpu/expert_pool.h); what it gives out is a map from expert ids to slots, which the kernels take as `expert_map`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch

from ._library import _C, WHY_NO_C
from .formats import NOT_LOADED
from .routing import is_int, is_number

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
AHEAD = (None, "previous", "gate")
IN_FILES = "the routed experts are in the checkpoint's files (expert_memory)"


class Extents(NamedTuple):
    """Where experts lie in files. pieces: int64 [layers, experts, n, 5], for each run of bytes: the number of its file, the
    number of the tensor that it is a part of (the order of `ExpertMemory.weights`), its offset and bytes in the file, and
    where it goes, in bytes from the beginning of the expert."""

    files: list[str]
    pieces: numpy.ndarray


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """How experts are held. budget: bytes, or a text such as "4GB" or "25%" (of all experts), for the experts in memory.
    readers: threads that read. ahead: what is read while one layer computes, at most ahead_budget at a time, and never in
    place of what is in use: nothing (None), what the next layer used at its last visit ("previous"), or what its gate would
    choose for the input of this one ("gate"). direct: past the page cache.
    resident_bias: see `reference.block_route_resident`; with one above 0, what is decoded depends on what came before.

    Raises ValueError that names the field.
    """

    budget: int | str
    readers: int = 2
    ahead: str | None = None
    ahead_budget: int | str = "64MB"
    direct: bool = True
    resident_bias: float = 0.0

    def __post_init__(self):
        for name in ("budget", "ahead_budget"):
            parse_bytes(getattr(self, name), 1, "expert_memory" if name == "budget" else name)
        if not is_int(self.readers) or not 1 <= self.readers <= 64:
            raise ValueError(f"readers must be an integer from 1 to 64, got {self.readers!r}")
        if self.ahead not in AHEAD:
            raise ValueError(f"ahead must be None, 'previous' or 'gate', got {self.ahead!r}")
        if not is_number(self.resident_bias) or not 0 <= self.resident_bias < math.inf:
            raise ValueError(f"resident_bias must be a number of at least 0, got {self.resident_bias!r}")

    @classmethod
    def of(cls, value: MemorySettings | int | str) -> MemorySettings:
        """Of a budget alone, too."""
        return value if isinstance(value, cls) else cls(value)


def parse_bytes(value: int | str, whole: int, name: str = "expert_memory") -> int:
    """A number of bytes, or a text: "4GB" ("500MB", "1.5GiB"), or "25%" of `whole`. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(%|[kMG]B|[KMG]iB|B)\s*", value) if isinstance(value, str) else None
    if match and match[2] == "%" and 0 < float(match[1]) <= 100:
        return int(whole * float(match[1]) / 100)
    if match and match[2] != "%" and float(match[1]) > 0:
        return int(float(match[1]) * UNITS[match[2]])
    if is_int(value) and value > 0:
        return int(value)
    raise ValueError(f'{name} must be a number of bytes, "4GB" or "25%", got {value!r}')


@dataclasses.dataclass(frozen=True)
class MemoryStats:
    """What a pool has done. hits, misses: experts that a layer asked for, once a visit, that were in memory or had to be
    read; stall_seconds: waited for them. ahead_used of `ahead` experts that were read ahead were used in time. pool_bytes:
    of the experts that fit in memory, all_bytes: of all. mass, blocks: of `resident_bias`, see `kept_mass`."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0
    ahead: int = 0
    ahead_used: int = 0
    mass: float = 0.0
    blocks: int = 0
    pool_bytes: int = 0
    all_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def kept_mass(self) -> float | None:
        """With a resident_bias: a coreset's share of the scores over that of the coreset without it, mean over blocks."""
        return self.mass / self.blocks if self.blocks else None

    def since(self, before: MemoryStats) -> MemoryStats:
        """What came in between."""
        counted = [field.name for field in dataclasses.fields(self)][:-2]
        return dataclasses.replace(self, **{name: getattr(self, name) - getattr(before, name) for name in counted})

    def __str__(self) -> str:
        kept = "" if self.kept_mass is None else f", {self.kept_mass:.1%} of the coresets' mass kept"
        return (
            f"{self.pool_bytes / 1e9:.2g} of {self.all_bytes / 1e9:.2g} GB of experts in memory, {self.hit_rate:.0%} hits, "
            f"{self.bytes_read / 1e9:.3g} GB read, {self.stall_seconds:.1f} s waited{kept}"
        )


class ExpertMemory:
    """The experts of `layers` MoE layers of one shape, in files.

    weights: one expert's (w13 [2I, H], w2 [H, I], w13_scale, w2_scale; scales None where it has none), of any device: their
    shapes and dtypes count. After that, `weights` are the pool's: [slots, ...] each.

    Raises ValueError for a budget below one expert, OSError for a file that can't be opened or ends too early.
    """

    def __init__(self, extents: Extents, weights: tuple, settings: MemorySettings):
        if _C is None:
            raise ValueError(f"expert_memory needs the extension module, which {WHY_NO_C}")
        self.settings, self.layers, self.experts = settings, *extents.pieces.shape[:2]
        self.bytes_per_expert = sum(part.nbytes for part in weights if part is not None)
        self.all_bytes = self.layers * self.experts * self.bytes_per_expert
        budget = parse_bytes(settings.budget, self.all_bytes)
        if budget < self.bytes_per_expert:
            raise ValueError(
                f"expert_memory must hold an expert of {self.bytes_per_expert} bytes, got {settings.budget!r}"
                + (f" ({budget} bytes)" if isinstance(settings.budget, str) else "")
            )
        self.slots = min(budget // self.bytes_per_expert, self.layers * self.experts)
        ahead = parse_bytes(settings.ahead_budget, self.all_bytes) if settings.ahead else 0
        self.weights = tuple(
            part if part is None else torch.empty((self.slots, *part.shape), dtype=part.dtype) for part in weights
        )
        self.kept_mass = [0.0, 0]  # its sum, blocks
        held = [part for part in self.weights if part is not None]
        self.pool = _C.ExpertPool(
            memory=held,
            files=extents.files,
            parts=[(part.data_ptr(), part[0].nbytes) for part in held],
            slots=self.slots,
            pieces=extents.pieces,
            readers=settings.readers,
            ahead_slots=math.ceil(ahead / self.bytes_per_expert),
            direct=settings.direct,
        )

    @contextlib.contextmanager
    def visit(self, layer: int, topk_ids, expected=None) -> Iterator[tuple[torch.Tensor, Iterator | None]]:
        """Holds the experts that topk_ids int32 [T, k] name while a layer computes: (expert_map int32 [E], waves). waves is
        None where all fit at once. Else it yields (begin, end), ranges of ids that cover [0, E) in order; after each, the
        map has the experts of that range, until the next is asked for. expected: for ahead="gate", gives the topk_ids that
        the next layer may have; it is called while this layer's experts are read.

        Raises OSError, which names the file and the offset, where one can't be read; nothing stays held then.
        """
        used = distinct(topk_ids, self.experts)
        expert_map = torch.full((self.experts,), NOT_LOADED, dtype=torch.int32)
        if len(used) > self.slots:
            with contextlib.closing(self._waves(layer, used, expert_map.numpy())) as waves:
                yield expert_map, waves
            return
        lease = self.pool.request(layer, used)
        try:
            if self.settings.ahead:
                self._read_ahead((layer + 1) % self.layers, expected)
            lease.wait(expert_map.numpy())
            yield expert_map, None
        finally:
            lease.release()

    def _waves(self, layer: int, used, expert_map) -> Iterator[tuple[int, int]]:
        """Half the pool computes while the other half is read."""
        size = max(1, self.slots // 2)
        parts = [used[at : at + size] for at in range(0, len(used), size)]
        ends = [int(part[0]) for part in parts[1:]] + [self.experts]
        double, begin = self.slots > 1, 0
        leases = [self.pool.request(layer, parts[0])]
        try:
            for i, end in enumerate(ends):
                leases[-1].wait(expert_map)
                now = leases.pop()
                if double and i + 1 < len(parts):
                    leases.append(self.pool.request(layer, parts[i + 1], False))
                try:
                    yield begin, end
                finally:
                    now.release()
                if not double and i + 1 < len(parts):
                    leases.append(self.pool.request(layer, parts[i + 1], False))
                begin = end
        finally:
            for lease in leases:
                lease.release()

    def _read_ahead(self, layer: int, expected) -> None:
        if self.settings.ahead == "previous":
            self.pool.ahead(layer, numpy.array(self.pool.last_used(layer), dtype=numpy.int32))
        elif expected is not None:
            self.pool.ahead(layer, wanted(expected(), self.experts))

    def resident(self, layer: int) -> torch.Tensor:
        """bool [E]: which experts of a layer are in memory."""
        return torch.from_numpy(self.pool.resident(layer))

    def check_move(self, fn) -> None:
        """Raises ValueError where fn, of `torch.nn.Module._apply`, would cast the experts or move them elsewhere."""
        part = self.weights[0][:0]
        probe = part if self.weights[2] is None else part.view(torch.uint8)  # which no cast changes
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise ValueError(f"load the model anew to cast or move it: {IN_FILES}, as {part.dtype} for {part.device}")

    def add_kept_mass(self, kept) -> None:
        """kept: float [n_blocks], from `reference.block_route_resident`."""
        self.kept_mass[0] += float(kept.double().sum())
        self.kept_mass[1] += len(kept)

    def stats(self) -> MemoryStats:
        """Since the beginning."""
        counts, (mass, blocks) = self.pool.counts(), self.kept_mass
        return MemoryStats(
            **{name: counts[name] for name in ("hits", "misses", "bytes_read", "ahead", "ahead_used")},
            stall_seconds=counts["stall_ns"] / 1e9,
            pool_bytes=self.slots * self.bytes_per_expert,
            all_bytes=self.all_bytes,
            mass=mass,
            blocks=blocks,
        )


def distinct(topk_ids, experts: int) -> numpy.ndarray:
    """The experts that topk_ids name, int32, ascending. Waits for a GPU."""
    return _tokens_of(topk_ids, experts).nonzero()[0].astype(numpy.int32)


def wanted(topk_ids, experts: int) -> numpy.ndarray:
    """The experts that at least an eighth of the tokens name, int32, those that most name first: of the others so many turn
    out not to be used that reading them costs more than waiting (bench/NOTES.md, expert memory)."""
    tokens = _tokens_of(topk_ids, experts)
    order = numpy.argsort(-tokens, kind="stable")
    least = max(1, topk_ids.reshape(-1, topk_ids.shape[-1]).shape[0] // 8)
    return order[: (tokens >= least).sum()].astype(numpy.int32)


def _tokens_of(topk_ids, experts: int) -> numpy.ndarray:
    return numpy.bincount(topk_ids.detach().cpu().numpy().ravel() + 1, minlength=experts + 1)[1:]
