"""The answer that a text gives, and whether it is right: strict (as the prompt asked for it) and soft (anywhere in the
text).

With `authors` the rules of dMoE's released evaluation, to the letter, with their defects: the first digits of "1,000", minus
signs that are lost, boxes that end at their first brace, doubled backslashes. Without it, these are mended.
Source: fscdc/dMoE, evaluations/evaluation/{gsm8k,math500,arc,mmlu}.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from . import grader

FIRST_BRACE = re.compile(r"\\boxed\{([^}]*)\}")
NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)|\d[\d,]*(?:\.\d+)?")
FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
# Of MATH, where no box is: the first that matches counts, its last match.
TAGS = (
    r"<answer>(.*?)</answer>",
    r"</answer>(.*?)</answer>",
    r"<answer>(.*?)<answer>",
    r"\*\*Answer:\*\* ([\d\.]+)",
    r"[-+]?\d*\.\d+|\d+",
)
TAG = r"answer\s*:\s*\**\s*"
PHRASES = (
    r"correct\s+answer\s+is\s*:?\s*\**",
    r"answer\s+is\s*:?\s*\**",
    r"I\s+(?:would\s+)?(?:choose|select|pick)\s+:?\s*\**",
)
# Where a letter is looked for, in order; what the last two find counts as soft.
GUESSES = ("weak pattern", "last letter")
ARC = ("boxed", "answer tag", "phrase", *GUESSES)
MMLU = ("last line", "answer tag", "boxed", "phrase", *GUESSES)
WEAK = (r"is\s+option\s*:?\s*", r"option\s+")


class Score(NamedTuple):
    """extracted: the answer that was found, or None; how: where; strict, soft: whether it is right."""

    extracted: str | None
    how: str | None
    strict: bool
    soft: bool


NOTHING = Score(None, None, False, False)


def as_a_list(text: str) -> str:
    """What the authors score of MATH and MMLU: Python's notation of a list that holds the text. Backslashes are doubled, and
    a new line is a backslash and an n."""
    return str([text])


def boxes(text: str) -> list[str]:
    r"""The contents of every \boxed{} whose braces are balanced, in order; of boxes in a box, the outer one."""
    found, at = [], 0
    while (begin := text.find(r"\boxed{", at)) >= 0:
        at = _closing_brace(text, begin + len(r"\boxed"))
        if at < 0:
            break
        found.append(text[begin + len(r"\boxed{") : at])
    return found


def _closing_brace(text: str, begin: int) -> int:
    """Where the brace that opens at `begin` is closed, or -1."""
    depth = 0
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    return -1


def gsm8k(text: str, answer: str, authors: bool) -> Score:
    """answer: the data's, with the number behind ####."""
    target = int(answer.split("#### ")[-1].replace(",", ""))
    return _gsm8k_by_authors(text, target) if authors else _gsm8k_mended(text, target)


def _gsm8k_by_authors(text: str, target: int) -> Score:
    found = FIRST_BRACE.findall(text)
    boxed = re.findall(r"[\d.]+", found[-1]) if found else []
    anywhere = boxed if len(found) == 1 else re.findall(r"\b\d+\.?\d*\b", text)[-1:]
    extracted = (boxed or anywhere or [None])[0]
    how = "boxed" if boxed else "last number" if anywhere else None
    try:
        if boxed and float(boxed[0]) == target:
            return Score(extracted, how, True, True)
        if anywhere and float(anywhere[0]) == target:
            return Score(anywhere[0], "last number", False, True)
    except ValueError:  # "1.2.3"; what else the text says is not looked at then
        pass
    return Score(extracted, how, False, False)


def _gsm8k_mended(text: str, target: int) -> Score:
    found = boxes(text)
    numbers = numbers_in(found[-1].rpartition("=")[2]) if found else []
    if numbers:
        right = numbers[0] == target
        return Score(str(numbers[0]), "boxed", right, right)
    numbers = numbers_in(text)
    return Score(str(numbers[-1]), "last number", False, numbers[-1] == target) if numbers else NOTHING


def numbers_in(text: str) -> list[Fraction]:
    r"""The numbers of a text, in order: with thousands' commas, signs, decimals, and LaTeX's \frac."""
    text = re.sub(r"\\[,!;: ]|(?<=\d)\{,\}", lambda found: "," if "{" in found[0] else "", text)
    text = FRACTION.sub(lambda found: _quotient(*found.groups()), text)
    found = re.findall(rf"({NUMBER.pattern})(?:/(\d+))?", text)
    values = [(Fraction(number.replace(",", "")), int(below or 1)) for number, below in found]
    return [value / below for value, below in values if below]


def _quotient(sign: str, above: str, below: str) -> str:
    negative = (sign + above + below).count("-") % 2
    return f"{'-' * negative}{above.lstrip('-')}/{below.lstrip('-')}"


def math500(text: str, answer: str, authors: bool) -> Score:
    """answer: the data's, in LaTeX."""
    if authors:
        text = as_a_list(text)
    found = _boxes_by_authors(text) if authors else boxes(text)
    if found:
        right = grader.equal(found[-1], answer)
        return Score(found[-1], "boxed", right, right)
    for pattern in TAGS:
        if matches := re.findall(pattern, text):
            how = "last number" if pattern == TAGS[-1] else "tag"
            return Score(matches[-1], how, False, grader.equal(matches[-1], answer))
    return NOTHING


def _boxes_by_authors(text: str) -> list[str]:
    """A box that is never closed reaches to the end of the text, but for its last character."""
    found = boxes(text)
    begin = 0
    for _ in found:
        begin = _closing_brace(text, text.find(r"\boxed{", begin) + len(r"\boxed"))
    if (unclosed := text.find(r"\boxed{", begin)) >= 0:
        found.append(text[unclosed + len(r"\boxed{") : -1])
    return [content.replace(r"\boxed{", "") for content in found]


def arc(text: str, target: str, authors: bool) -> Score:
    """target: a letter."""
    return _choice(text, target, authors, ARC)


def mmlu(text: str, target: str, authors: bool) -> Score:
    """target: a letter."""
    return _choice(as_a_list(text) if authors else text, target, authors, MMLU)


def _choice(text: str, target: str, authors: bool, places: tuple[str, ...]) -> Score:
    for how in places:
        if letter := LETTER_OF[how](text, authors):
            right = letter.upper() == target
            return Score(letter.upper(), how, right and how not in GUESSES, right)
    return NOTHING


def _letters(phrase: str, text: str, authors: bool) -> list[str]:
    """The letters that follow a phrase in any case. The authors' may be small: "the answer is a prime" says A."""
    return re.findall(rf"(?i:{phrase})({'(?i:[A-D])' if authors else '[A-D]'})\b", text)


def _boxed_letter(text: str, authors: bool) -> str | None:
    found = FIRST_BRACE.findall(text)[:1] if authors else boxes(text)[-1:]
    letters = re.findall(r"\b[A-D]\b", found[0]) if found else []
    return letters[0] if letters else None


def _tagged_letter(text: str, authors: bool) -> str | None:
    return next(reversed(_letters(TAG, text, authors)), None)


def _letter_of_last_line(text: str, authors: bool) -> str | None:
    return next(iter(_letters(TAG, text.strip().split("\n")[-1], authors)), None)


def _phrased_letter(text: str, authors: bool) -> str | None:
    found = (_letters(phrase, text, authors) for phrase in PHRASES)
    return next((letters[-1] for letters in found if letters), None)


def _weak_letter(text: str, authors: bool) -> str | None:
    is_right = rf"\b({'(?i:[A-D])' if authors else '[A-D]'})\s+(?i:is\s+(?:correct|right)\b)"
    found = [_letters(phrase, text, authors) for phrase in WEAK]
    found += [re.findall(pattern, text) for pattern in (r"\(([A-D])\)", is_right)]
    return next((letters[-1] for letters in found if letters), None)


def _last_letter(text: str, authors: bool) -> str | None:
    return next(reversed(re.findall(r"\b[A-D]\b", text)), None)


LETTER_OF = {
    "last line": _letter_of_last_line,
    "answer tag": _tagged_letter,
    "boxed": _boxed_letter,
    "phrase": _phrased_letter,
    "weak pattern": _weak_letter,
    "last letter": _last_letter,
}
