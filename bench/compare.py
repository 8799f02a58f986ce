"""`dmoe bench compare`: what changed between two results of the same command, with their noise taken into account."""

from __future__ import annotations

from . import measure, results

SAME = ("device", "cpu", "gpu", "threads")


def rows_by_key(out: dict) -> dict[tuple, dict]:
    timed = [row for row in out["rows"] if "median_us" in row]
    return {(row["op"], row.get("model", ""), row.get("tokens"), row["key"]): row for row in timed}


def how(before: dict, after: dict) -> str:
    """By times on the same machine; by ratios between machines, whose times say nothing about each other."""
    same = all(before["machine"][name] == after["machine"][name] for name in SAME)
    return "time" if same else "ratio"


def compare(before: dict, after: dict, by: str) -> list[dict]:
    """One entry per row that both have and that `by` ("time" or "ratio") covers. By ratio: a peer's time over that of
    dmoe_ops with the same weights, and ours with quantised weights over ours with plain ones. A change counts when the
    p10–p90 ranges of before and after do not overlap; worse: it is a loss for us."""
    old, new, found = rows_by_key(before), rows_by_key(after), []
    for key in old.keys() & new.keys():
        for name, a, b, good in _values(old[key], new[key], by):
            apart = b["p10"] > a["p90"] or b["p90"] < a["p10"]
            better = (b["median"] > a["median"]) == good
            verdict = "same" if not apart else "better" if better else "worse"
            found.append(dict(key=key, name=name, before=a, after=b, change=b["median"] / a["median"], verdict=verdict))
    return sorted(found, key=lambda entry: (str(entry["key"]), entry["name"]))


def _values(old: dict, new: dict, by: str):
    """(name, before, after, whether more is better)."""
    if by == "time":
        times = [{part: row[f"{part}_us"] for part in ("median", "p10", "p90")} for row in (old, new)]
        yield f"{old['key']}, µs", *times, False
    elif "impl" in old:  # a sweep's rows have none, and no ratios
        mine = old["impl"] == measure.OURS
        # A peer against ours with the same weights; our quantised weights against our plain ones.
        ours = f"{measure.OURS} @ {old['case']}" if mine else measure.own_key(old)
        if ours in old["ratios"] and ours in new["ratios"]:
            yield f"{old['key']} / {ours.split(' @ ')[0]}", old["ratios"][ours], new["ratios"][ours], not mine


def run(before: dict, after: dict, by: str) -> int:
    """Prints the changes; 1 when one of ours is a regression."""
    entries = compare(before, after, by)
    lines = [
        [
            f"{entry['key'][2]} tokens, {entry['name']}",
            results.number(entry["before"]["median"]),
            f"{results.number(entry['before']['p10'])}–{results.number(entry['before']['p90'])}",
            results.number(entry["after"]["median"]),
            f"{results.number(entry['after']['p10'])}–{results.number(entry['after']['p90'])}",
            f"{100 * (entry['change'] - 1):+.1f} %",
            "" if entry["verdict"] == "same" else entry["verdict"],
        ]
        for entry in entries
    ]
    header = [f"by {by}", "before", "p10–p90", "after", "p10–p90", "change", ""]
    print(results.table(header, lines))
    print("\nbetter, worse: the p10–p90 ranges do not overlap.")
    lost = [entry for entry in entries if entry["verdict"] == "worse" and is_ours(entry, by)]
    if lost:
        print(f"{len(lost)} regressions beyond the noise")
    return 1 if lost else 0


def is_ours(entry: dict, by: str) -> bool:
    """A peer that became slower is no regression of ours; any ratio to ours is."""
    return by == "ratio" or entry["key"][0] in ("sweep", "decode") or entry["key"][3].startswith(measure.OURS)
