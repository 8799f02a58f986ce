"""`dmoe bench memory`: decoding with experts in files, a budget of memory against speed, hits and bytes."""

from __future__ import annotations

import resource
import sys
import time

from ..expert_memory import MemorySettings, parse_bytes
from ..models import DiffusionModel, families
from . import results, timing


class Contender:
    """A policy under a budget (None: all experts in memory). samples: seconds per token of each decode that counts."""

    def __init__(self, policy: str, label: str, model: DiffusionModel, decode):
        self.policy, self.label, self.model, self.decode = policy, label, model, decode
        self.samples: list[float] = []
        self.stats: list = []

    def run(self, turn: int) -> float:
        self.model.set_routing(self.policy)
        begin = time.perf_counter()
        stats = self.decode(self.model).stats
        self.stats.append(stats)
        return (time.perf_counter() - begin) / stats.tokens


def budget_of(text: str, experts_used: float, all_bytes: int) -> int:
    """Bytes of "1.3W" (W: the experts that a forward of policy dmoe uses, all layers), "4GB" or "25%"."""
    if text.endswith("W"):
        return round(float(text[:-1]) * experts_used)
    return parse_bytes(text, all_bytes, "--budgets")


def run(
    out: dict, folder, policies: list[str], budgets: list[str], rounds: int, decode, resident: bool, options
) -> None:
    """Contenders of one policy take turns, after a decode each that is not counted; adds a row per contender to `out`.
    decode: a function of a model; options: of `MemorySettings`."""
    base = load(folder, None if resident else MemorySettings("10%", **options))
    base.set_routing("dmoe")
    used = decode(base).stats.expert_bytes_per_step
    whole = len(base.moe_layers) * base.config.num_experts * base.bytes_per_expert
    base = base if resident else None
    out["settings"].update(bytes_used=used, bytes_all=whole, options=str(options))
    for policy in policies:
        contenders = [Contender(policy, "resident", base, decode)] if resident else []
        for text in budgets:
            size = budget_of(text, used, whole)
            contenders.append(Contender(policy, text, load(folder, MemorySettings(size, **options)), decode))
        for contender in contenders:
            contender.run(0)
            contender.stats.clear()
        timing.take_turns(contenders, rounds, policy)
        first = contenders[0] if resident else None
        out["rows"] += [row(contender, first, out) for contender in contenders]
        del contenders


def load(folder, settings: MemorySettings | None) -> DiffusionModel:
    return families.load(folder, policy="dmoe", device="cpu", expert_memory=settings)


def row(mine: Contender, resident: Contender | None, out: dict) -> dict:
    """Of all rounds. ratios: tokens/s over the resident model's, within each round."""
    stats, memory = mine.stats[0], [each.expert_memory for each in mine.stats]
    forwards = sum(each.forwards for each in mine.stats)
    counted = {}
    if memory[0] is not None:
        asked = sum(each.hits + each.misses for each in memory)
        counted = dict(
            hit_rate=sum(each.hits for each in memory) / asked,
            misses_per_forward=sum(each.misses for each in memory) / forwards,
            read_per_forward=sum(each.bytes_read for each in memory) / forwards,
            stall=sum(each.stall_seconds for each in memory) / (sum(mine.samples) * stats.tokens),
            kept_mass=mine.model.expert_memory.stats().kept_mass,
        )
    budget = out["settings"]["bytes_all"] if memory[0] is None else memory[0].pool_bytes
    return dict(
        op="memory",
        key=f"{mine.policy}, {mine.label}",
        policy=mine.policy,
        budget=budget,
        in_used=budget / out["settings"]["bytes_used"],
        tokens=stats.tokens,
        forwards=stats.forwards,
        unique=stats.unique_experts_denoising,
        bytes=round(stats.expert_bytes_per_step),
        tokens_per_s=timing.spread([1 / seconds for seconds in mine.samples]),
        samples=len(mine.samples),
        peak_bytes=peak_memory(),
        ratios={} if resident in (None, mine) else dict(resident=timing.ratio(resident.samples, mine.samples)),
        **counted,
    )


def peak_memory() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_rows(out: dict) -> None:
    results.print_header(out)
    settings = out["settings"]
    print(
        f"checkpoint {settings['model']}; W: {settings['bytes_used'] / 1e9:.2f} of {settings['bytes_all'] / 1e9:.2f} GB"
    )
    header = [
        "",
        "GB",
        "W",
        "tokens/s",
        "p10–p90",
        "of resident",
        "hits",
        "GB/forward",
        "waiting",
        "unique",
        "mass kept",
    ]
    lines = []
    for row in out["rows"]:
        rate, of = row["tokens_per_s"], row["ratios"].get("resident")
        kept = row.get("kept_mass")
        lines.append(
            [
                row["key"],
                results.number(row["budget"] / 1e9),
                f"{row['in_used']:.2f}",
                results.number(rate["median"]),
                f"{results.number(rate['p10'])}–{results.number(rate['p90'])}",
                results.ratio(of) if of else "",
                f"{row['hit_rate']:.0%}" if "hit_rate" in row else "",
                f"{row['read_per_forward'] / 1e9:.3f}" if "hit_rate" in row else "",
                f"{row['stall']:.0%}" if "hit_rate" in row else "",
                f"{row['unique']:.1f}",
                f"{kept:.3f}" if kept else "",
            ]
        )
    print("\n" + results.table(header, lines))
    print(
        "\nW: bytes of the experts that a forward of policy dmoe uses, all layers. of resident: tokens/s over those with\n"
        f"all experts in memory, within each round. peak memory of the process: {out['rows'][-1]['peak_bytes'] / 1e9:.2f} GB"
    )
