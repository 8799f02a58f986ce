"""`dmoe bench report`: results as pictures, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import statistics
from pathlib import Path

from . import measure, results

OURS_COLOUR, PEER_COLOURS = "#c1121f", ["#577590", "#90be6d", "#f9c74f", "#9d4edd", "#4d908e", "#f8961e", "#adb5bd"]
MARKERS = "osD^vP*X"
GREY = "#6c757d"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #212529; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #dee2e6; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.note { color: #6c757d; font-size: 14px; }
"""


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise results.BadFile("matplotlib is not installed: pip install 'dmoe-ops[report]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    return plt


def run(files: list[str], html_path: str) -> list[Path]:
    """Writes the page and a PNG beside it for every picture that the files hold data for; returns what it wrote."""
    found = [(path, results.read(path)) for path in files]
    plt = pyplot()
    target = Path(html_path)
    results.check_writable(html_path)
    pictures = []
    for path, out in found:
        for name, title, draw in (
            ("roofline", "Distance from the roofline", roofline),
            ("unique", "Time against unique experts", unique),
            ("ratios", "Against the peers", ratios),
            ("sweep", "Expert counts and time over p and block size", sweep),
            ("decode", "Decoding, end to end", decode),
            ("memory", "Expert memory against speed", memory),
        ):
            figure = draw(plt, out)
            if figure is not None:
                png = target.with_name(f"{target.stem}-{Path(path).stem}-{name}.png")
                figure.savefig(png, dpi=150, bbox_inches="tight")
                plt.close(figure)
                pictures.append((out, title, png))
    if not pictures:
        raise results.BadFile("the files hold no finished rows to draw")
    target.write_text(page(found, pictures))
    return [target, *(png for _, _, png in pictures)]


def timed(out: dict, *ops: str) -> list[dict]:
    return [row for row in out["rows"] if row["op"] in ops and "median_us" in row]


def colours(rows: list[dict]) -> dict[str, str]:
    names = dict.fromkeys(map(measure.of_row, rows))
    ours = {measure.OURS: OURS_COLOUR} if measure.OURS in names else {}
    peers = [name for name in names if name not in ours]
    return ours | {name: PEER_COLOURS[i % len(PEER_COLOURS)] for i, name in enumerate(peers)}


def milliseconds(row: dict, part: str = "median") -> float:
    return row[f"{part}_us"] / 1e3


def roofline(plt, out: dict):
    """Time over floor against the bytes to read: 1 is the roofline."""
    rows = timed(out, "layer", "experts")
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, (name, colour) in enumerate(colours(rows).items()):
        mine = sorted((row for row in rows if measure.of_row(row) == name), key=lambda row: row["bytes"])
        x, y = [row["bytes"] / 1e6 for row in mine], [100 * row["roofline"] for row in mine]
        ends = [(100 * row["floor_us"] / row["p90_us"], 100 * row["floor_us"] / row["p10_us"]) for row in mine]
        axes.errorbar(
            x, y, _whiskers(y, ends), fmt=MARKERS[i % len(MARKERS)], color=colour, capsize=3, label=name, markersize=7
        )
    axes.axhline(100, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="weights to read, MB", ylabel="% of roofline", ylim=(0, None), xscale="log")
    axes.set_title(title(out, "fraction of the roofline"))
    plain_ticks(plt, axes, sorted({row["bytes"] / 1e6 for row in rows}))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def plain_ticks(plt, axes, values: list[float]) -> None:
    """Ticks at the measured places, as numbers, leaving out any that would overlap."""
    kept = [value for i, value in enumerate(values) if i == 0 or value / values[i - 1] > 1.12]
    axes.set_xticks(kept, [results.number(value) for value in kept])
    axes.minorticks_off()


def unique(plt, out: dict):
    """A straight line per contender: its slope is the cost of one expert, its intercept the fixed cost."""
    rows = [row for row in timed(out, "layer", "experts") if row["error"] <= row["allowed_error"]]
    rows += swept(out)
    tokens = most_counts(rows)
    rows = [row for row in rows if row["tokens"] == tokens]
    if len({row["unique"] for row in rows}) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, (name, colour) in enumerate(colours(rows).items()):
        mine = sorted((row for row in rows if measure.of_row(row) == name), key=lambda row: row["unique"])
        x, y = [row["unique"] for row in mine], [milliseconds(row) for row in mine]
        label = name
        if len(set(x)) > 1:
            slope, intercept = statistics.linear_regression(x, y)
            fixed = f"{'+' if intercept >= 0 else '−'} {abs(intercept):.3g} ms"
            slope_text = f"{1e3 * slope:,.0f} µs per expert"
            label = f"{name}: {slope_text} {fixed}"
            ends = [min(x), max(x)]
            axes.plot(ends, [intercept + slope * end for end in ends], color=colour, linewidth=1)
        error = _whiskers(y, [(milliseconds(row, "p10"), milliseconds(row, "p90")) for row in mine])
        axes.errorbar(x, y, error, fmt=MARKERS[i % len(MARKERS)], color=colour, capsize=3, label=label)
    floors = sorted({(row["unique"], row["floor_us"] / 1e3) for row in rows})
    axes.plot(*zip(*floors), color=GREY, linestyle="--", linewidth=1, label="roofline")
    axes.set(xlabel="unique experts of the block", ylabel="ms per layer", ylim=(0, None), xlim=(0, None))
    axes.set_title(title(out, f"{tokens} tokens"))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def swept(out: dict) -> list[dict]:
    """The rows of a sweep over p, as the layer's."""
    found = [row for row in timed(out, "sweep") if row["vary"] == "p"]
    return [dict(row, impl=measure.OURS, tokens=row["block_size"], unique=row["timed_unique"]) for row in found]


def most_counts(rows: list[dict]) -> int | None:
    """The number of tokens with most different unique counts."""
    counts: dict[int, set] = {}
    for row in rows:
        counts.setdefault(row["tokens"], set()).add(row["unique"])
    return max(counts, key=lambda tokens: len(counts[tokens])) if counts else None


def ratios(plt, out: dict):
    """How many times longer each peer takes, in each case."""
    rows = [row for row in timed(out, "route", "experts", "layer") if row["impl"] != measure.OURS]
    bars = []
    for row in rows:
        ratio = row["ratios"].get(measure.own_key(row))
        if ratio:
            bars.append((f"{row['key']}, {row['tokens']} tokens", ratio, measure.of_row(row)))
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(bars)))
    paint = colours(rows)
    for i, (_, ratio, name) in enumerate(bars):
        error = [[ratio["median"] - ratio["p10"]], [ratio["p90"] - ratio["median"]]]
        axes.barh(i, ratio["median"], xerr=error, color=paint[name], ecolor=GREY, capsize=3, height=0.65)
        axes.text(ratio["p90"], i, f"  {ratio['median']:.1f}x", va="center")
    axes.axvline(1, color=OURS_COLOUR, linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="time over that of dmoe_ops in the same case; bars: median, whiskers: p10–p90")
    axes.set_xlim(0, 1.15 * max(ratio["p90"] for _, ratio, _ in bars))
    axes.grid(axis="y", visible=False)
    axes.set_title(title(out, rows[0]["op"]))
    return figure


def sweep(plt, out: dict):
    rows = [row for row in out["rows"] if row["op"] == "sweep"]
    if not rows:
        return None
    timed_rows = [row for row in rows if "median_us" in row]
    figure, grid = plt.subplots(1 + bool(timed_rows), 2, figsize=(10, 7 if timed_rows else 4), squeeze=False)
    for column, (vary, x_of, label) in enumerate(
        [("p", lambda row: row["p"], "threshold p (block 32)"), ("block", lambda row: row["block_size"], "block size")]
    ):
        for token in (False, True):
            mine = [row for row in rows if row["vary"] == vary and (row["p"] is None) == token]
            style = dict(color=PEER_COLOURS[0] if token else OURS_COLOUR, label="token routing" if token else "dMoE")
            if vary == "p" and token:
                grid[0, column].axhline(mine[0]["unique"], linestyle="--", **style)
                if "median_us" in mine[0]:
                    grid[1, column].axhline(milliseconds(mine[0]), linestyle="--", **style)
                continue
            x = [x_of(row) for row in mine]
            grid[0, column].plot(x, [row["unique"] for row in mine], "o-", **style)
            printed = [row for row in mine if row["paper"]]
            middle = [statistics.mean(row["paper"]) for row in printed]
            error = _whiskers(middle, [(min(row["paper"]), max(row["paper"])) for row in printed])
            places = [x_of(row) for row in printed]
            if printed:
                grid[0, column].errorbar(places, middle, error, fmt="x", color="black", capsize=4, label="the paper's")
            if all("median_us" in row for row in mine):
                y = [milliseconds(row) for row in mine]
                error = _whiskers(y, [(milliseconds(row, "p10"), milliseconds(row, "p90")) for row in mine])
                grid[1, column].errorbar(x, y, error, fmt="o-", capsize=3, **style)
        for axes in grid[:, column]:
            axes.set(xlabel=label, ylim=(0, None))
    grid[0, 0].set_ylabel("unique experts per block")
    if timed_rows:
        grid[1, 0].set_ylabel("ms per layer, one block")
    handles = {text: handle for handle, text in zip(*grid[0, 1].get_legend_handles_labels())}
    figure.suptitle(
        f"{rows[0]['model']}, dMoE at p = 0.6 where p does not vary; paper: {rows[0]['paper_source']}", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=3, frameon=False)
    return figure


def _whiskers(middle: list[float], ends: list[tuple[float, float]]) -> list[list[float]]:
    """Distances below and above, as errorbar wants them."""
    return [[m - low for m, (low, _) in zip(middle, ends)], [high - m for m, (_, high) in zip(middle, ends)]]


def decode(plt, out: dict):
    rows = [row for row in out["rows"] if row["op"] == "decode"]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.5 * len(rows)))
    begin = [0.0] * len(rows)
    for part, colour in (("moe", OURS_COLOUR), ("attention", PEER_COLOURS[0]), ("rest", "#adb5bd")):
        width = [row[f"{part}_ms"] for row in rows]
        name = {"moe": "MoE"}.get(part, part)
        axes.barh(range(len(rows)), width, left=begin, color=colour, label=name, height=0.6)
        begin = [a + b for a, b in zip(begin, width)]
    for i, row in enumerate(rows):
        text = f"  {results.number(row['tokens_per_s']['median'])} tokens/s, {row['unique']:.0f} experts"
        axes.text(begin[i], i, text, va="center")
    axes.set_yticks(range(len(rows)), [row["key"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="ms per forward, medians", xlim=(0, 1.55 * max(begin)))
    axes.grid(axis="y", visible=False)
    axes.set_title(title(out, "decode"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / (1.5 + 0.5 * len(rows))), ncol=3, frameon=False)
    return figure


def memory(plt, out: dict):
    """A line per policy over the budgets; where all experts were in memory, a level."""
    rows = [row for row in out["rows"] if row["op"] == "memory"]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        colour = OURS_COLOUR if policy == "dmoe" else PEER_COLOURS[i % len(PEER_COLOURS)]
        mine = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["budget"])
        pooled = [row for row in mine if "hit_rate" in row]
        middle = [row["tokens_per_s"]["median"] for row in pooled]
        ends = [(row["tokens_per_s"]["p10"], row["tokens_per_s"]["p90"]) for row in pooled]
        budgets = [row["budget"] / 1e9 for row in pooled]
        axes.errorbar(budgets, middle, _whiskers(middle, ends), color=colour, marker="o", label=policy, capsize=3)
        for row in mine:
            if row not in pooled:
                level = row["tokens_per_s"]["median"]
                axes.axhline(level, color=colour, linestyle="--", label=f"{policy}, all experts in memory")
    axes.set(xlabel="GB of experts in memory", ylabel="tokens/s", ylim=(0, None), xlim=(0, None))
    axes.set_title(title(out, "expert memory"))
    axes.legend(frameon=False)
    return figure


def title(out: dict, what: str) -> str:
    machine = out["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    model = next(
        (row["model"] for row in out["rows"] if "model" in row), (out["settings"].get("model") or "").split(",")[0]
    )
    return f"{model}, {what} on {where}"


def page(found: list[tuple[str, dict]], pictures: list[tuple[dict, str, Path]]) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>dmoe bench</title>",
        f"<style>{STYLE}</style>",
    ]
    parts.append("<h1>dmoe bench</h1>")
    for path, out in found:
        parts += [f"<h2>{html.escape(Path(path).name)}</h2>", about(out)]
        for owner, heading, png in pictures:
            if owner is out:
                data = base64.b64encode(png.read_bytes()).decode()
                parts += [f"<h3>{heading}</h3>", f"<img alt='{heading}' src='data:image/png;base64,{data}'>"]
        parts.append(rows_table(out))
    return "\n".join(parts) + "\n</html>\n"


def about(out: dict) -> str:
    machine, ceilings = out["machine"], out["ceilings"]
    facts = [
        f"<code>{html.escape(out['command'])}</code>",
        html.escape(f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, dmoe_ops at {machine['commit']}"),
    ]
    if ceilings:
        facts.append(
            f"measured ceilings: read {ceilings['read'] / 1e9:.4g} GB/s, GEMM {ceilings['gemm'] / 1e9:.4g} GFLOP/s "
            f"in {ceilings['gemm_dtype']}"
        )
    facts += [html.escape(f"{out['settings'][name]}") for name in ("weights", "model") if out["settings"].get(name)]
    facts += [html.escape(f"{name}: {why}") for name, why in out["absent"].items()]
    facts += [] if out["complete"] else ["the run was interrupted"]
    return "<p class='note'>" + "<br>".join(facts) + "</p>"


def rows_table(out: dict) -> str:
    rows = [row for row in out["rows"] if "median_us" in row]
    if not rows:
        return ""
    header = ["", "tokens", "unique", "µs", "p10–p90", "MB", "roofline", "error", "× dmoe_ops"]
    lines = []
    for row in rows:
        ratio = row.get("ratios", {}).get(measure.own_key(row))
        lines.append(
            [
                row["key"],
                str(row.get("tokens", row.get("block_size"))),
                results.number(row["unique"]),
                results.number(row["median_us"]),
                f"{results.number(row['p10_us'])}–{results.number(row['p90_us'])}",
                results.number(row["bytes"] / 1e6),
                f"{row['roofline']:.2f}" if "roofline" in row else "",
                f"{row['error']:.1e}" if "error" in row else "",
                results.ratio(ratio) if ratio else "",
            ]
        )
    kept = [i for i in range(len(header)) if i == 0 or any(line[i] for line in lines)]
    header, lines = [header[i] for i in kept], [[line[i] for i in kept] for line in lines]
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"
