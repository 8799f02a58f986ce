"""What a results file must hold for `compare` and `report` to read it, as data: a name and a kind for each value."""

from __future__ import annotations

TOP = dict(command="text", machine="object", settings="object", absent="object", rows="list", complete="flag")
MACHINE = dict(
    device="text",
    cpu="text",
    gpu="text or null",
    threads="number",
    torch="text",
    dmoe_ops="text",
    commit="text or null",
)
CEILINGS = dict(read="positive number", gemm="positive number", gemm_dtype="text")
SPREAD = dict(median="positive number", p10="positive number", p90="positive number")
TIMES = {f"{part}_us": kind for part, kind in SPREAD.items()}
CASE = dict(  # files from before there were forms of weights have none
    weights="text or null",
    key="text",
    impl="text",
    case="text",
    tokens="number",
    unique="number",
    bytes="positive number",
    ratios="spreads",
)
MICRO = dict(
    **TIMES, **CASE, model="text", floor_us="positive number", roofline="number", error="error", allowed_error="error"
)
PARTS = {f"{part}_ms": "number" for part in ("total", "moe", "attention", "rest")}
# The fields of a row, by its op.
ROWS = {
    "route": MICRO,
    "experts": MICRO,
    "layer": MICRO,
    "decode": dict(**TIMES, **CASE, **PARTS, tokens_per_s="spread"),
    "prefill": dict(**TIMES, **CASE),
    "served": dict(key="text", tokens="number", tokens_per_s="spread", unique="number or null", ratios="spreads"),
    "memory": dict(key="text", policy="text", budget="number", tokens_per_s="spread", unique="number", ratios="spreads"),
    "sweep": dict(
        key="text", model="text", vary="text", p="number or null", block_size="number", unique="number",
        bytes="positive number", paper="numbers or null", paper_source="text",
    ),
}  # fmt: skip
SWEEP_TIMES = dict(**TIMES, timed_unique="number", floor_us="positive number", roofline="number", error="error")


def fault(results: dict) -> str | None:
    """The first value that is missing or of another kind, in one line; None where all is well."""
    return next(_faults(results), None)


def _faults(results: dict):
    """Lazy: what comes after a fault relies on its absence."""
    yield from _missing(results, TOP, "")
    yield from _missing(results["machine"], MACHINE, "machine.")
    yield from _missing(results["settings"], dict(model="text or null"), "settings.")
    if results.get("ceilings") is not None:
        yield from _missing(results, dict(ceilings="object"), "")
        yield from _missing(results["ceilings"], CEILINGS, "ceilings.")
    for i, row in enumerate(results["rows"]):
        where = f"rows[{i}]"
        if not is_a("object", row) or not is_a("text", row.get("op")) or row["op"] not in ROWS:
            yield f"{where}.op must be one of {', '.join(ROWS)}"
        yield from _missing(row, ROWS[row["op"]], f"{where}.")
        if row["op"] == "sweep" and "median_us" in row:
            yield from _missing(row, SWEEP_TIMES, f"{where}.")


def _missing(holder: dict, kinds: dict[str, str], where: str):
    return (f"{where}{name} must be {kind}" for name, kind in kinds.items() if not is_a(kind, holder.get(name)))


def is_a(kind: str, value) -> bool:
    if kind.endswith(" or null"):
        return value is None or is_a(kind.removesuffix(" or null"), value)
    if kind in ("number", "positive number", "error"):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind == "error":  # infinite where an output was not finite
            return fits and (value == float("inf") or 0 <= value < 1e300)
        return fits and -1e300 < value < 1e300 and (kind == "number" or value > 1e-300)
    if kind == "numbers":
        return isinstance(value, list) and len(value) > 0 and all(is_a("number", each) for each in value)
    if kind == "spread":
        return isinstance(value, dict) and not any(_missing(value, SPREAD, ""))
    if kind == "spreads":
        return isinstance(value, dict) and all(is_a("spread", each) for each in value.values())
    return isinstance(value, dict(text=str, object=dict, list=list, flag=bool)[kind])
