"""Predicted time of one launch: the slowest of HBM, L2, multiprocessors and latency decides, wave by wave.

A launch is tiles of equal work over programs. Of every wave (as many tiles as programs fit on the chip at once) these times
are taken, and the slowest decides, softened by the power mean (SHARPNESS):

    HBM, L2      bytes of the wave / rate
    port         bytes of one multiprocessor's tiles at 64 B per cycle
    flight       steps that each wait for memory's latency, as far as the pipeline's stages do not hide it
    code         instructions: max(issue slots x warps of a scheduler, latency of one warp), and barriers
    matrix       multiply-adds / rate of the matrix units

The first wave also fills the pipeline (one latency of DRAM). Code that did not run lately is fetched at the pace of one
multiprocessor (`fetch`), whatever it then does. In front of a launch stands the time from its predecessor's end.
"""

from __future__ import annotations

import dataclasses
import math

from .facts import Facts
from .machines import EMPTY_BLOCK_US, SHARPNESS, Machine


@dataclasses.dataclass(frozen=True)
class Work:
    """One launch. tiles: in use; programs: that run, tiles are given out among them; empty: programs without a tile.
    steps: turns of the main loop per tile; hbm, l2: bytes of the launch that come from there; ahead: bytes of l2 that a
    program has in flight; products: multiply-adds per tile; copies: how often the code of a tile is compiled in (one runs);
    trips: of loops that do not say their own, by index; busy: the part of the warps in a loop, by index, where it is not
    all; early: by programmatic dependent launch; resident: programs per multiprocessor, where that is known."""

    name: str
    facts: Facts
    tiles: int
    programs: int
    hbm: float = 0.0
    l2: float = 0.0
    ahead: float = 0.0
    steps: int = 1
    products: float = 0.0
    copies: int = 1
    empty: int = 0
    early: bool = False
    resident: int | None = None
    trips: dict[int, int] = dataclasses.field(default_factory=dict)
    busy: dict[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Estimate:
    """us in all; parts: what they add up of; limits: what each resource alone would take in the waves; bound: the largest of
    those."""

    name: str
    us: float
    parts: dict[str, float]
    limits: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.limits, key=self.limits.get)


def estimate(work: Work, machine: Machine) -> Estimate:
    resident = work.resident or residency(work.facts, machine)
    slots = min(work.programs, machine.sms * resident)
    waves, limits = 0.0, {}
    for left in range(work.tiles, 0, -slots):
        wave = of_wave(work, machine, min(left, slots))
        waves += mean(wave.values())
        for name, us in wave.items():
            limits[name] = limits.get(name, 0.0) + us
    parts = dict(
        start=machine.early if work.early else machine.launch,
        fill=machine.dram_us if work.hbm else machine.l2_us,
        waves=waves,
        empty=math.ceil(work.empty / (machine.sms * resident)) * EMPTY_BLOCK_US,
        fetch=work.facts.instructions / work.copies / machine.fetch,
    )
    return Estimate(work.name, sum(parts.values()), parts, limits)


def residency(facts: Facts, machine: Machine) -> int:
    """Programs of a kernel that fit on a multiprocessor at once."""
    threads = facts.warps * facts.width
    registers = machine.registers // (-(-facts.registers // 8) * 8 * threads)
    shared = machine.shared // (facts.shared + 1024) if facts.shared else registers
    return max(1, min(registers, shared, machine.threads // threads, 32))


def of_wave(work: Work, machine: Machine, active: int) -> dict[str, float]:
    """Times in us of a wave with so many tiles at work."""
    each = -(-active // machine.sms)  # on the fullest multiprocessor
    share = active / work.tiles
    cycles = dict(
        port=each * work.l2 / work.tiles / 64,
        code=code(work, machine, each),
        matrix=each * work.products / (machine.products * (machine.narrow if work.facts.kind == "mma.sync" else 1)),
    )
    result = {name: n / machine.clock for name, n in cycles.items()}
    result["HBM"] = work.hbm * share / machine.hbm / 1e6
    result["L2"] = work.l2 * share / machine.l2 / 1e6
    if work.ahead:
        result["flight"] = work.l2 / work.tiles / work.ahead * (machine.dram_us if work.hbm else machine.l2_us)
    return result


def code(work: Work, machine: Machine, programs: int) -> float:
    """Cycles of one tile's instructions, `programs` of them on one multiprocessor. The main loop is the fastest of the
    innermost ones with products: a kernel may hold several copies of it, of which a tile passes one."""
    warps = max(1.0, work.facts.warps * programs / 4)  # of one scheduler

    def of(n: int) -> float:
        loop = loops[n]
        issue = (loop.issue + loop.fp64 * machine.fp64) * max(1.0, warps * work.busy.get(n, 1.0))
        return max(issue, loop.latency) + loop.barriers * machine.barrier

    loops = work.facts.loops
    around = {loop.inside for loop in loops}
    main = [n for n, loop in enumerate(loops) if n and loop.matrix and n not in around]
    turns, total = [], 0.0
    for n, loop in enumerate(loops):
        turns.append(turns[loop.inside] * work.trips.get(n, loop.trips or 1) if n else 1)
        total += 0 if n in main else turns[n] * of(n)
    return total / work.copies + work.steps * min((of(n) for n in main), default=0.0)


def mean(values) -> float:
    values = [value for value in values if value > 0]
    return sum(value**SHARPNESS for value in values) ** (1 / SHARPNESS) if values else 0.0
