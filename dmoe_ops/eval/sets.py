"""The four sets: where their items come from, what is asked of each, and what scores the answer.

Prompts: those of dMoE's released evaluation (fscdc/dMoE, evaluations/evaluation/*/prompt.py), to the letter; zero-shot, one
message of the user, no system prompt. Both protocols ask the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import _files
from . import grader, scoring

SAMPLE = Path(__file__).resolve().parent / "data"  # a few items of our own, in the data sets' fields
ENDINGS = ("jsonl", "json", "parquet")
CALCULATE = "Please answer the question step by step and put the answer in \\boxed{{}}. {question}"
CHOICES = "\n\n{question}\n\nA) {a}\nB) {b}\nC) {c}\nD) {d}"
CHOOSE_BOXED = (
    "Answer the following multiple choice question. Think step by step and then give the final answer of the following "
    "format: \\boxed{{$LETTER}} where LETTER is one of ABCD." + CHOICES
)
CHOOSE_LAST_LINE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering." + CHOICES
)


class Set(NamedTuple):
    """hub: name, configuration and split of the data set there; fields: those that are read, with their types; prompt: of an
    item; target: of an item, what the scorer compares with (by the authors, or mended); score: see `scoring`."""

    title: str
    hub: tuple[str, str | None, str]
    fields: dict[str, type]
    prompt: Callable[[dict], str]
    target: Callable[[dict, bool], str]
    score: Callable[[str, str, bool], scoring.Score]


def _choices_of(template: str, question: str, texts: list[str]) -> str:
    a, b, c, d = (texts + ["NA"] * 4)[:4]
    return template.format(question=question, a=a, b=b, c=c, d=d)


def _arc_letter(item: dict, authors: bool) -> str:
    """Keys are letters or, in some items, numbers. The authors read the key, and not what the labels say."""
    key, labels = item["answerKey"], item["choices"].get("label")
    if authors or not labels or key not in labels:
        return dict(zip("1234", "ABCD")).get(key, key)
    return "ABCDE"[labels.index(key)]


SETS = {
    "gsm8k": Set(
        "GSM8K",
        ("openai/gsm8k", "main", "test"),
        dict(question=str, answer=str),
        lambda item: CALCULATE.format(question=item["question"]),
        lambda item, authors: item["answer"],
        scoring.gsm8k,
    ),
    "math500": Set(
        "MATH-500",
        ("HuggingFaceH4/MATH-500", None, "test"),
        dict(problem=str, answer=str),
        lambda item: CALCULATE.format(question=item["problem"]),
        lambda item, authors: item["answer"],
        scoring.math500,
    ),
    "arc-c": Set(
        "ARC-C",
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        dict(question=str, choices=dict, answerKey=str),
        lambda item: _choices_of(CHOOSE_BOXED, item["question"], item["choices"]["text"]),
        _arc_letter,
        scoring.arc,
    ),
    "mmlu": Set(
        "MMLU, high-school mathematics",
        ("cais/mmlu", "high_school_mathematics", "test"),
        dict(question=str, choices=list, answer=int),
        lambda item: _choices_of(CHOOSE_LAST_LINE, item["question"], item["choices"]),
        lambda item, authors: "ABCD"[item["answer"]],
        scoring.mmlu,
    ),
}


def load(name: str, folder: Path | None) -> list[dict]:
    """The items of a set: of FOLDER/NAME.jsonl, .json or .parquet, or of the hub without a folder.

    Raises ValueError, one line, where they can't be had, or where an item lacks a field.
    """
    items, where = _from_hub(SETS[name]) if folder is None else _from_folder(name, folder)
    if not items:
        raise ValueError(f"{where} holds no items")
    for number, item in enumerate(items):
        _check(SETS[name], item, f"{where}, item {number}")
    if name == "math500":
        grader.check_installed()
    return items


def _from_folder(name: str, folder: Path) -> tuple[list, str]:
    if not folder.is_dir():
        raise ValueError(f"--data must be a folder, got {_files.short(folder)}")
    path = next((p for end in ENDINGS if _files.is_file(p := folder / f"{name}.{end}")), None)
    if path is None:
        names = ", ".join(f"{name}.{end}" for end in ENDINGS)
        raise ValueError(f"none of {names} is in {_files.short(folder)}; --sets names those to run")
    where = _files.short(path)
    if path.suffix == ".parquet":
        return _parquet(path), where
    if path.suffix == ".json":
        items = _files.read_json(path)
        if not isinstance(items, list):
            raise ValueError(f"{where} must hold a list of items, got a {type(items).__name__}")
        return items, where
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            items += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{where}, line {number} is not valid JSON: {error}") from None
    return items, where


def _parquet(path: Path) -> list[dict]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path.name} takes the package pyarrow: {grader.INSTALL}") from None
    return parquet.read_table(path).to_pylist()


def _from_hub(which: Set) -> tuple[list, str]:
    name, configuration, split = which.hub
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{name} takes the package datasets: {grader.INSTALL}; or --data FOLDER") from None
    try:
        return list(load_dataset(name, configuration, split=split)), name
    except Exception as error:  # a dozen kinds, of several packages: offline, unknown, a full disk
        why = " ".join(str(error).split())
        raise ValueError(f"the Hugging Face hub did not give {name} ({why[:200]}); --data FOLDER reads files") from None


def _check(which: Set, item: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object, got a {type(item).__name__}")
    for field, kind in which.fields.items():
        if not isinstance(item.get(field), kind):
            raise ValueError(f"{where} must have {field}, a {kind.__name__}, got {str(item.get(field))[:80]!r}")
    try:
        which.prompt(item)
        which.score("", which.target(item, False), False)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{where} can't be asked or scored: {type(error).__name__}: {error}") from None
