"""The two launches of csrc/cuda. Their facts are of probe.cu, which compiles the kernels for one call."""

from __future__ import annotations

import math

from .facts import Store
from .machines import Machine
from .model import Estimate, Work, estimate, mean
from .triton_layer import Case

MAX_TOKENS = 64  # more goes to Triton
CHUNK = 256
WIDE, NARROW = (128, 2), (64, 3)  # rows of a tile, stages: csrc/cuda/experts.h, `experts_form` for LLaDA2.0-mini
COPY_CYCLES = 40  # in which a warp hands a lane's copy over; assumed
# The router's loops by index: turns where it is not one and the code does not say it (k of the gate in steps of 1024; pairs
# of fours among 72 experts with votes; members in fours; none of the unrolled form of copies that are shorter), and the part
# of the warps that has a token.
TURNS = {3: 2, 5: 0, 7: 9, 9: 0, 12: 4}
BUSY = {4: 0.5, 10: 0.5, 11: 0.5, 12: 0.5}


def serves(case: Case, machine: Machine) -> bool:
    return case.tokens <= MAX_TOKENS and machine.chip in ("sm_90", "sm_100") and case.weights == "bf16"


def estimates(case: Case, machine: Machine, store: Store) -> list[Estimate]:
    return [router(case, machine, store), experts(case, machine, store)]


def router(case: Case, machine: Machine, store: Store) -> Estimate:
    """One cluster of 8 thread blocks per block of tokens. Its gate passes a port before the rest begins, so it is added."""
    hidden, _, _, routing = case.shape
    blocks = -(-case.tokens // routing.block_size)
    facts = store.cuda("router", 32 * blocks, 8)
    size = routing.num_experts * hidden * 2
    launch = dict(early=True, resident=1, steps=TURNS[3], trips=TURNS, busy=BUSY)
    work = Work("router", facts, 8 * blocks, 8 * blocks, hbm=size, **launch)
    found = estimate(work, machine)
    tokens = min(case.tokens, routing.block_size)
    port = (size / 8 + 2 * tokens * hidden) / 64 / machine.clock
    product = TURNS[3] * facts.loops[3].latency / machine.clock
    found.parts["extra"] = max(0.0, port - product) + (TURNS[3] - 1) * (machine.dram_us - machine.l2_us)
    found.us += found.parts["extra"]
    return found


def experts(case: Case, machine: Machine, store: Store) -> Estimate:
    """Persistent thread blocks whose ring of copies never drains: the whole launch is one wave. h and then the parts of y
    are handed over; at the end each thread block adds up a piece of y."""
    facts = store.cuda("experts", 32 * -(-case.tokens // 32), 8)
    rows, stages = WIDE if case.tokens <= 48 else NARROW
    weights = case.unique * case.expert_bytes + case.shared_bytes
    chunks = weights / (rows * CHUNK * 2)
    each = chunks / machine.sms
    moved = weights + chunks * case.tokens * CHUNK * 2
    loops = facts.loops
    turn = max((n for n in range(len(loops)) if loops[n].matrix), key=lambda n: loops[n].matrix)  # a whole chunk
    tile = loops[turn].inside
    adding = max(n for n in range(len(loops)) if loops[n].inside == tile)  # the last parts are added up last
    cycles = dict(
        port=moved / machine.sms / 64,
        code=each * loops[turn].latency + math.ceil(each / 8) * loops[tile].latency / 2,
        copies=each * COPY_CYCLES * (rows + case.tokens) / 8,
    )
    limits = {name: n / machine.clock for name, n in cycles.items()}
    limits["HBM"] = (weights - case.shared_bytes) / machine.hbm / 1e6
    limits["L2"] = moved / machine.l2 / 1e6
    limits["flight"] = moved / machine.sms / (stages * (rows + case.tokens) * CHUNK * 2) * machine.dram_us
    parts = dict(
        start=machine.early,
        fill=machine.dram_us,
        waves=mean(limits.values()),
        extra=2 * machine.handover + (loops[tile].latency / 2 + loops[adding].latency) / machine.clock,
        fetch=facts.instructions / machine.fetch,
    )
    return Estimate("experts", sum(parts.values()), parts, limits)
