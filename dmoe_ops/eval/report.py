"""Answers scored and summed up: the JSON of a run, and its table beside the paper's figures."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ..routing import BlockRouting
from . import paper
from .sets import SETS

SCHEMA = 1


def summary(settings: dict, items: dict[str, list[dict]], answers: dict, machine: dict, processes: int) -> dict:
    """schema, settings, sets (of each: counts, means and every answer) and timing. Runs with the same settings and items
    differ in timing alone."""
    authors = settings["protocol"] == "authors"
    routing = BlockRouting(**settings["routing"])
    reported = paper.reported(settings["policy"], routing, settings["block_length"])
    sets: dict[str, dict] = {}
    timing: dict[str, Any] = dict(processes=processes, machine=machine, sets={})
    for name, asked in items.items():
        found = [_scored(name, item, answers[name, index], authors) for index, item in enumerate(asked)]
        seconds = [answers[name, index]["seconds"] for index in range(len(asked))]
        sets[name] = dict(
            items=len(found),
            strict=_share(found, "strict"),
            soft=_share(found, "soft"),
            unique_experts=fmean(answer["unique_experts"] for answer in found),
            tokens=fmean(answer["tokens"] for answer in found),
            forwards=fmean(answer["forwards"] for answer in found),
            cut_off=sum(answer["cut"] > 0 for answer in found),
            paper=reported.get(name),
            answers=found,
        )
        timing["sets"][name] = dict(
            seconds=sum(seconds),
            tokens_per_second=sum(answer["tokens"] for answer in found) / sum(seconds),
            answers=seconds,
        )
    return dict(schema=SCHEMA, settings=settings, sets=sets, timing=timing)


def _scored(name: str, item: dict, answer: dict, authors: bool) -> dict:
    which = SETS[name]
    target = which.target(item, authors)
    score = which.score(answer["scored"], target, authors)
    left_out = ("set", "seconds") if answer["cut"] else ("set", "seconds", "scored")  # where that is the output
    kept = {key: value for key, value in answer.items() if key not in left_out}
    return {**kept, "target": target, **score._asdict()}


def _share(answers: list[dict], kind: str) -> dict:
    right = sum(answer[kind] for answer in answers)
    return dict(right=right, share=right / len(answers), interval=paper.wilson(right, len(answers)))


def table(report: dict) -> str:
    settings = report["settings"]
    rows = [("", "items", "strict %", "soft %", "paper %", "experts", "paper", "tokens", "forwards", "tokens/s")]
    for name, found in report["sets"].items():
        experts, accuracy = found["paper"] or ("", "")
        speed = report["timing"]["sets"][name]["tokens_per_second"]
        means = [f"{found[key]:.1f}" for key in ("tokens", "forwards")]
        shares = [_percent(found["strict"]), _percent(found["soft"])]
        unique = f"{found['unique_experts']:.2f}"
        rows.append((name, str(found["items"]), *shares, str(accuracy), unique, str(experts), *means, f"{speed:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([*lines, *notes(report, settings)])


def notes(report: dict, settings: dict) -> list[str]:
    said = [
        f"protocol {settings['protocol']}, policy {settings['policy']}; in brackets 95 % intervals (Wilson); experts: "
        "unique ones per block, over denoising forwards; tokens and forwards per answer; tokens/s of one process",
        "paper: LLaDA2.0-mini, arXiv 2605.30876, tables 2 to 4; blank where they have no such row",
    ]
    dmoe = settings["policy"] == "dmoe" and settings["routing"]["top_p"] == 0.6 and settings["block_length"] == 32
    for name in [*report["sets"]] if dmoe else []:
        if name in paper.RELEASED:
            experts, strict, soft = paper.RELEASED[name]
            said.append(f"{name}, the authors' released run: strict {strict}, soft {soft}, {experts} experts")
    cut = sum(found["cut_off"] for found in report["sets"].values())
    if settings["protocol"] == "authors":
        said.append(f"{cut} answers did not end early and lost their first tokens, as many as the prompt has")
    return said


def _percent(share: dict) -> str:
    low, high = share["interval"]
    return f"{100 * share['share']:.1f} ({100 * low:.1f}–{100 * high:.1f})"
