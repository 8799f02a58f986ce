"""`dmoe bench sweep`: expert counts and times over p and over block sizes, beside the paper's tables."""

from __future__ import annotations

import dataclasses

import torch

import dmoe_ops

from ..routing import BlockRouting
from . import cases, measure, results

PS = [round(0.3 + 0.05 * i, 2) for i in range(14)]
BLOCK_SIZES = [8, 16, 24, 32, 48, 64]
# Mean unique experts on MATH500, GSM8K, ARC-C and MMLU, LLaDA2.0-mini: arXiv 2605.30876, tables 3 (p_train = 0.6, block
# 32) and 4 (p = 0.6); None is token routing.
PAPER = "arXiv 2605.30876, tables 3 and 4"
TABLE_3 = {
    None: (70.0, 71.5, 65.9, 70.6),
    0.4: (10.3, 10.3, 10.5, 10.3),
    0.5: (11.5, 11.7, 11.9, 11.6),
    0.6: (14.1, 14.7, 15.0, 14.5),
    0.7: (19.0, 19.9, 20.2, 19.6),
    0.8: (27.1, 28.1, 28.2, 27.9),
}
TABLE_4 = {
    (8, None): (31.5, 32.2, 31.1, 32.3),
    (8, 0.6): (14.2, 14.6, 15.1, 14.6),
    (16, None): (48.6, 49.8, 47.0, 49.6),
    (16, 0.6): (15.9, 16.5, 16.8, 16.4),
    (24, None): (60.7, 62.2, 57.8, 61.6),
    (24, 0.6): (15.4, 16.0, 16.4, 15.8),
    (32, None): (70.0, 71.5, 65.9, 70.6),
    (32, 0.6): (14.1, 14.7, 15.0, 14.5),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """p None: token routing."""

    vary: str
    p: float | None
    block_size: int

    def routing(self, model: cases.Model, min_experts: int) -> BlockRouting:
        if self.p is None:
            return model.routing("token", block_size=self.block_size)
        return model.routing("dmoe", top_p=self.p, block_size=self.block_size, min_experts=min_experts)

    @property
    def name(self) -> str:
        how = "token" if self.p is None else f"p = {self.p:.2f}"
        return how if self.vary == "p" else f"block {self.block_size}, {how}"

    @property
    def paper(self) -> tuple | None:
        return TABLE_3.get(self.p) if self.vary == "p" else TABLE_4.get((self.block_size, self.p))


def points() -> list[Point]:
    by_p = [Point("p", p, 32) for p in [None, *PS]]
    return by_p + [Point("block", p, size) for size in BLOCK_SIZES for p in (None, 0.6)]


def counts(model: cases.Model, routing: BlockRouting, n_blocks: int, seed: int) -> tuple[float, float]:
    """Mean unique experts and mean coreset size over calibrated blocks."""
    generator = torch.Generator().manual_seed(seed)
    logits = cases.calibrated_logits(n_blocks, routing.block_size, routing.num_experts, generator)
    result = dmoe_ops.block_route(logits, torch.zeros(routing.num_experts), routing=routing)
    ids = result.topk_ids.view(n_blocks, -1).long()
    used = torch.zeros(n_blocks, routing.num_experts + 1, dtype=torch.bool)
    used.scatter_(1, ids % (routing.num_experts + 1), True)  # -1, no expert, goes to the last column
    return used[:, :-1].sum(1).float().mean().item(), result.coreset_sizes.float().mean().item()


def count_rows(model: cases.Model, n_blocks: int, min_experts: int, seed: int, dtype) -> list[dict]:
    made = []
    for point in results.progress(points(), "counting experts", "point"):
        unique, coreset = counts(model, point.routing(model, min_experts), n_blocks, seed)
        made.append(
            dict(
                op="sweep",
                model=model.name,
                vary=point.vary,
                key=point.name,
                p=point.p,
                block_size=point.block_size,
                blocks=n_blocks,
                min_experts=min_experts,
                unique=unique,
                unique_min12=counts(model, point.routing(model, 12), n_blocks, seed)[0],
                coreset=coreset,
                bytes=round(unique * model.expert_bytes(dtype)),
                # The paper's counts are of the real LLaDA2.0-mini.
                paper=point.paper if model.name == "llada2-mini" else None,
                paper_source=PAPER,
            )
        )
    return made


def run(
    out: dict, model: cases.Model, make_weights, n_blocks: int, min_experts: int, seed: int, seconds, dtype
) -> None:
    """Fills `out` with the counts, then (`make_weights` not None) with the times of the layer at one block each."""
    rows = count_rows(model, n_blocks, min_experts, seed, dtype)
    out["rows"] += rows
    if make_weights is None:
        return
    weights, device = make_weights(), out["machine"]["device"]

    def case(point: Point) -> cases.Case:
        routing = point.routing(model, min_experts)
        return cases.calibrated_case(point.name, model, routing, point.block_size, dtype, device, seed)

    for vary in ("p", "block"):
        timed = dict(out, rows=[])
        try:
            measure.run(timed, "layer", [[case(p) for p in points() if p.vary == vary]], [weights], [], seconds / 2)
        finally:
            out["ceilings"] = timed["ceilings"]
            by_case = {row["case"]: row for row in timed["rows"]}
            for row in rows:
                if row["vary"] == vary and row["key"] in by_case:
                    found = by_case[row["key"]]
                    for name in ("median_us", "p10_us", "p90_us", "floor_us", "roofline", "error", "allowed_error"):
                        row[name] = found[name]
                    row["timed_unique"] = found["unique"]


def print_rows(out: dict) -> None:
    results.print_header(out)
    rows = out["rows"]
    low = rows[0]["min_experts"]
    timed = any("median_us" in row for row in rows)
    for vary, title in (("p", "threshold p, block 32"), ("block", "block size")):
        header = ["", "unique", "coreset", "unique, min 12", "paper", "MB"]
        header += ["µs", "p10–p90", "of a block with"] if timed else []
        lines = [_line(row, timed) for row in rows if row["vary"] == vary]
        print(
            f"\n{title}: {rows[0]['model']}, calibrated workload, {rows[0]['blocks']} blocks, coresets of at least {low}"
        )
        print(results.table(header, lines))
    print(
        "\nunique: distinct experts of a block, mean. MB: their weights. µs: the whole layer on one block (the shared "
        "expert in).\nunique, min 12: the same with coresets of at least 12, the paper's setting in training."
        f"\npaper: range over its four benchmarks, {PAPER}."
    )


def _line(row: dict, timed: bool) -> list[str]:
    cells = [
        row["key"],
        f"{row['unique']:.1f}",
        f"{row['coreset']:.1f}",
        f"{row['unique_min12']:.1f}",
        f"{min(row['paper']):.1f}–{max(row['paper']):.1f}" if row["paper"] else "",
        results.number(row["bytes"] / 1e6),
    ]
    if timed and "median_us" in row:
        spread = f"{results.number(row['p10_us'])}–{results.number(row['p90_us'])}"
        cells += [results.number(row["median_us"]), spread, f"{row['timed_unique']} unique"]
    return cells + [""] * (3 * timed - len(cells) + 6)


def wrong(out: dict) -> list[str]:
    return [row["key"] for row in out["rows"] if row.get("error", 0) > row.get("allowed_error", 0)]
