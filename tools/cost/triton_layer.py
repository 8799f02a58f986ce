"""The work of every Triton kernel of a layer, from the launches that triton_kernels itself makes."""

from __future__ import annotations

import dataclasses
import functools
import math

import triton_resources

from .facts import Store
from .model import Work


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer call. unique: experts that its tokens use, in every block the same ones; weights: a key of BYTES."""

    tokens: int
    unique: float
    model: str = "mini"
    weights: str = "bf16"

    @property
    def weight_bytes(self) -> float:
        return BYTES[self.weights]

    @property
    def shape(self) -> tuple:
        """H, I, I of the shared expert, routing."""
        return triton_resources.MODELS[self.model]

    @property
    def expert_bytes(self) -> float:
        hidden, intermediate = self.shape[:2]
        return 3 * hidden * intermediate * self.weight_bytes

    @property
    def shared_bytes(self) -> float:
        return 3 * self.shape[0] * self.shape[2] * self.weight_bytes


# Of a weight with its share of the scales: one in fp32 per 128 x 128 (fp8), per row (int8), per 128 (int4).
BYTES = {"bf16": 2.0, "fp8": 1 + 4 / (128 * 128), "int8": 1 + 4 / 512, "int4": 0.5 + 4 / 128}


@functools.lru_cache(maxsize=64)
def recorded(chip: str, model: str, tokens: int, weights: str) -> tuple:
    stored = None if weights == "bf16" else weights
    return tuple(triton_resources.launches(triton_resources.CHIPS[chip], model, tokens, stored=stored))


def works(case: Case, chip: str, store: Store) -> list[Work]:
    """The launches of a layer, in their order."""
    result = []
    for call in recorded(chip, case.model, case.tokens, case.weights):
        facts = store.triton(call, triton_resources.CHIPS[chip])
        work = KERNELS[call.fn.__name__](call, case, facts)
        result.append(dataclasses.replace(work, early=bool(call.options.get("launch_pdl"))))
    return result


def gate(call, case: Case, facts) -> Work:
    a, size = call.args, 2
    programs = call.grid[0] * call.grid[1]
    stage = (a["BLOCK_E"] + a["BLOCK_T"]) * a["BLOCK_H"] * size
    steps = -(-a["H"] // a["BLOCK_H"])
    return Work(
        "gate", facts, programs, programs,
        hbm=a["E"] * a["H"] * size, l2=programs * steps * stage, ahead=(a["STAGES"] - 1) * stage, steps=steps,
        products=a["BLOCK_E"] * a["BLOCK_T"] * a["H"],
    )  # fmt: skip


def route(call, case: Case, facts) -> Work:
    """Too high: stage 3 is there twice, for few members and for all experts, and both count."""
    a = call.args
    programs = call.grid[0]
    trips = {}
    if a["SCHEDULE"] == "gathered":  # the last loops are those of `order`, which one program runs at the end
        words = -(-programs * a["N_WORDS"] // a["ROWS"])
        tiles = -(-case.tokens * a["K"] // max(1, round(case.unique)) // a["TILE"])
        slots = -(-case.tokens * a["K"] // a["SLOTS"])
        trips = dict(zip(range(len(facts.loops) - 4, len(facts.loops)), (words, tiles, words, slots)))
    return Work("route", facts, programs, programs, l2=case.tokens * a["E"] * 8, trips=trips)


def dense(call, case: Case, facts, name: str, rows: int, depth: int, length: int, n_rows: int) -> Work:
    """What both products of the dense form have in common: rows and depth of a tile, length of the sum, rows of the output
    per expert. A tile is one expert's; the last number of the grid counts blocks."""
    a = call.args
    n_tokens = a["BLOCK_N"]
    weights = (case.unique + a["SHARED_I"] / a["I"]) * n_rows * length
    stage = rows * depth * case.weight_bytes + n_tokens * depth * 2
    return Work(
        name, facts, tiles=0, programs=math.prod(call.grid),
        hbm=weights * case.weight_bytes,
        l2=call.grid[-1] * weights / (rows * depth) * stage,
        ahead=(a["STAGES"] - 1) * stage,
        steps=-(-length // depth),
        products=rows * n_tokens * length,
    )  # fmt: skip


def dense_up(call, case: Case, facts) -> Work:
    a = call.args
    work = dense(call, case, facts, "up", 2 * a["BLOCK_I"], a["BLOCK_H"], a["H"], 2 * a["I"])
    tiles = call.grid[1] * -(-round(case.unique * a["I"] + a["SHARED_I"]) // a["BLOCK_I"])
    return dataclasses.replace(work, tiles=tiles, copies=2 if a["SHARED_I"] else 1)


def dense_down(call, case: Case, facts) -> Work:
    """One tile per program: its share of the members. Their parts are written and read once more."""
    a, splits = call.args, call.grid[1]
    work = dense(call, case, facts, "down", a["BLOCK_H"], a["BLOCK_I"], a["I"], a["H"])
    share = (case.unique + a["SHARED_I"] / a["I"]) / splits
    parts = 2 * 4 * work.programs * a["BLOCK_H"] * a["BLOCK_N"] if splits > 1 else 0
    return dataclasses.replace(
        work,
        tiles=work.programs,
        l2=work.l2 + parts,
        steps=math.ceil(share * work.steps),
        products=share * work.products,
    )


def gathered(call, case: Case, facts, name: str, rows: int, depth: int, length: int, n_rows: int) -> Work:
    """Both products of the gathered form, with tokens spread evenly over the experts; see `dense`."""
    a = call.args
    tile, k = a["BLOCK_N"], case.shape[3].top_k
    unique = max(1, round(case.unique))
    token_tiles = unique * -(-case.tokens * k // unique // tile or 1)
    shared = -(-case.tokens // tile) if a["SHARED_I"] else 0
    tiles = (token_tiles + shared) * -(-n_rows // rows)
    stage = rows * depth * case.weight_bytes + tile * depth * 2
    steps = -(-length // depth)
    written = case.tokens * (k + 1) * (a["I"] if name == "up" else a["H"]) * 2
    return Work(
        name, facts, tiles, tiles,
        hbm=(case.unique + a["SHARED_I"] / a["I"]) * n_rows * length * case.weight_bytes + written,
        l2=tiles * steps * stage + written,
        ahead=(a["STAGES"] - 1) * stage,
        steps=steps,
        products=rows * tile * length,
        copies=2 if a["SHARED_I"] else 1,
        empty=max(0, call.grid[0] - tiles),
    )  # fmt: skip


def gathered_up(call, case: Case, facts) -> Work:
    a = call.args
    return gathered(call, case, facts, "up", 2 * a["BLOCK_I"], a["BLOCK_H"], a["H"], 2 * a["I"])


def gathered_down(call, case: Case, facts) -> Work:
    a = call.args
    return gathered(call, case, facts, "down", a["BLOCK_H"], a["BLOCK_I"], a["I"], a["H"])


def combine(call, case: Case, facts) -> Work:
    a, programs = call.args, math.prod(call.grid)
    moved = case.tokens * (a["K"] + 2) * a["H"] * 2
    return Work("combine", facts, programs, programs, l2=moved)


KERNELS = dict(
    gate_kernel=gate,
    route_kernel=route,
    dense_up_kernel=dense_up,
    dense_down_kernel=dense_down,
    gathered_up_kernel=gathered_up,
    gathered_down_kernel=gathered_down,
    combine_kernel=combine,
)
