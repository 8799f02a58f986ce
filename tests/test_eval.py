"""`dmoe eval`: scorers against answers written by hand, the authors' defects, and whole runs on the miniature."""

from __future__ import annotations

from fractions import Fraction

import pytest

from dmoe_ops import BlockRouting
from dmoe_ops.eval import grader, paper, scoring, sets

BOTH, AUTHORS, MENDED = (True, False), (True,), (False,)

# Scorers ---------------------------------------------------------------------------------------------------------------

# text, target, whose rules, extracted, strict, soft
GSM8K = [
    (r"Three and four: \boxed{7}", "#### 7", BOTH, "7", True, True),
    (r"\boxed{7} no, wait: \boxed{8}", "#### 8", BOTH, "8", True, True),
    (r"\boxed{18.0}", "#### 18", BOTH, None, True, True),
    (r"It is \boxed{18 \text{ dollars}}, for 2 days.", "#### 18", BOTH, "18", True, True),
    (r"\boxed{$42}", "#### 42", BOTH, "42", True, True),
    ("so the total is 42.", "#### 42", BOTH, "42", False, True),
    ("no number at all", "#### 42", BOTH, None, False, False),
    ("", "#### 42", BOTH, None, False, False),
    (r"\boxed{}, as 12 - 5 = 7", "#### 7", MENDED, "7", False, True),
    (r"\boxed{}, as 12 - 5 = 7", "#### 7", AUTHORS, None, False, False),  # an empty box hides the text
    (r"\boxed{9}, or 7", "#### 7", BOTH, "9", False, False),  # a box that is wrong counts
    (r"\boxed{9} \boxed{9}, or 7", "#### 7", AUTHORS, "7", False, True),  # unless there are two
    (r"\boxed{9} \boxed{9}, or 7", "#### 7", MENDED, "9", False, False),
    (r"\boxed{1,000}", "#### 1,000", AUTHORS, "1", False, False),
    (r"\boxed{1,000}", "#### 1,000", MENDED, "1000", True, True),
    (r"\boxed{1{,}000}", "#### 1000", MENDED, "1000", True, True),
    (r"\boxed{-5}", "#### -5", AUTHORS, "5", False, False),
    (r"\boxed{-5}", "#### -5", MENDED, "-5", True, True),
    ("14,400 a year", "#### 14400", AUTHORS, "400", False, False),
    ("14,400 a year", "#### 14400", MENDED, "14400", False, True),
    ("so 12-5", "#### 5", MENDED, "5", False, True),
    (r"\boxed{\frac{14}{2}}", "#### 7", AUTHORS, "14", False, False),  # the box ends at its first brace
    (r"\boxed{\frac{14}{2}}", "#### 7", MENDED, "7", True, True),
    (r"\boxed{\frac{-14}{2}}", "#### -7", MENDED, "-7", True, True),
    (r"\boxed{3 \times 6 = 18}", "#### 18", AUTHORS, "3", False, False),
    (r"\boxed{3 \times 6 = 18}", "#### 18", MENDED, "18", True, True),
    (r"\boxed{1.2.3} 7", "#### 7", AUTHORS, "1.2.3", False, False),
    (r"\boxed{7", "#### 7", BOTH, "7", False, True),
]


@pytest.mark.parametrize("text, target, whose, extracted, strict, soft", GSM8K)
def test_gsm8k(text, target, whose, extracted, strict, soft):
    for authors in whose:
        score = scoring.gsm8k(text, target, authors)
        assert (score.strict, score.soft) == (strict, soft), authors
        assert extracted is None or score.extracted == extracted
        assert (score.how is None) == (score.extracted is None)


def test_numbers():
    found = scoring.numbers_in(r"1,234.5 -.25 (-3) x-4 \$5 10\% \frac{-1}{-2} -\frac{3}{4} 1/0 2\!000 v1.5")
    assert found[:9] == [Fraction(n) for n in ("1234.5", "-1/4", "-3", "4", "5", "10", "1/2", "-3/4", "2000")]


MATH = [
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", BOTH, True, True),
    (r"\boxed{\dfrac{1}{2}}", r"\frac12", BOTH, True, True),
    (r"\boxed{0.5}", r"\frac{1}{2}", BOTH, True, True),
    (r"\boxed{1/2}", r"\frac{1}{2}", BOTH, True, True),
    (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", BOTH, False, False),  # not in lowest terms
    (r"\boxed{-\frac{3}{4}}", r"-\frac{3}{4}", BOTH, True, True),
    (r"\boxed{x^{2}+1}", "x^{2}+1", BOTH, True, True),
    (r"\boxed{1+x^2}", "x^2+1", BOTH, True, True),
    (r"\boxed{x=5}", "5", BOTH, True, True),
    (r"\boxed{-5}", "5", BOTH, False, False),
    (r"\boxed{1,000}", "1000", BOTH, True, True),
    (r"\boxed{10,\!000}", "10000", MENDED, True, True),
    (r"\boxed{90^\circ}", "90", BOTH, True, True),
    (r"\boxed{5 \text{ cm}}", "5", BOTH, True, True),
    (r"\boxed{5 cm}", "5", BOTH, True, True),
    (r"\boxed{40\%}", "40", BOTH, True, True),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", MENDED, True, True),
    (r"\boxed{(3, -1)}", "(3,-1)", BOTH, True, True),
    (r"\boxed{[3, -1)}", "(3,-1)", BOTH, False, False),
    (r"\boxed{(3, -1, 0)}", "(3,-1)", BOTH, False, False),
    (r"\boxed{7\frac{3}{4}}", r"7\frac{3}{4}", BOTH, True, True),
    (r"\boxed{\text{(C)}}", r"\text{(C)}", MENDED, True, True),
    (r"\boxed{3} and then \boxed{4}", "4", BOTH, True, True),
    (r"\boxed{3} and then \boxed{4}", "3", BOTH, False, False),
    (r"\boxed{\boxed{4}}", "4", BOTH, None, None),  # one box, whatever is in it
    ("<answer>7</answer> of 9", "7", BOTH, False, True),
    ("**Answer:** 7.5 of 9", "7.5", BOTH, False, True),
    ("it is 3, no, 4", "4", BOTH, False, True),
    ("nothing", "4", BOTH, False, False),
    (r"\boxed{4", "4", MENDED, False, True),  # a number of the text
    (r"\boxed{4", "4", AUTHORS, False, False),  # the list's notation ends the box: 4'
    # The doubled backslashes: what the normaliser does not halve stays wrong.
    (r"\boxed{\text{(C)}}", r"\text{(C)}", AUTHORS, False, False),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", AUTHORS, False, False),
    (r"\boxed{10,\!000}", "10000", AUTHORS, False, False),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", AUTHORS, False, False),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", MENDED, True, True),
    (r"\boxed{\begin{pmatrix} -2 \\ 7 \end{pmatrix}}", r"\begin{pmatrix} -2 \\ 7 \end{pmatrix}", AUTHORS, False, False),
    (r"\boxed{\begin{pmatrix} -2 \\ 7 \end{pmatrix}}", r"\begin{pmatrix} -2 \\ 7 \end{pmatrix}", MENDED, True, True),
]


@pytest.mark.parametrize("text, target, whose, strict, soft", MATH)
def test_math500(text, target, whose, strict, soft):
    pytest.importorskip("pylatexenc")
    for authors in whose:
        score = scoring.math500(text, target, authors)
        assert strict is None or (score.strict, score.soft) == (strict, soft), (authors, score)


def test_boxes():
    assert scoring.boxes(r"\boxed{a{b}c} \boxed{} \boxed{\boxed{d}} \boxed{e") == ["a{b}c", "", r"\boxed{d}"]
    assert scoring.boxes("none") == []


def test_the_authors_score_the_notation_of_a_list():
    text = "so\n\\boxed{\\frac{1}{2}}"
    assert scoring.as_a_list(text) == r"['so\n\\boxed{\\frac{1}{2}}']"
    pytest.importorskip("pylatexenc")
    assert scoring.math500(text, "3", True).extracted == r"\\frac{1}{2}"
    assert scoring.math500(text, "3", False).extracted == r"\frac{1}{2}"


@pytest.mark.parametrize(
    "given, target, same",
    [
        (None, "4", False),
        ("", "4", False),
        (r"2 \text{ million}", "2000000", False),
        ("2 million", "2000000", False),  # nor is a whole number computed
        ("2 million", "2*10^6", True),
        ("x+y", "y+x", True),
        ("x+y+z", "z+y+x", False),  # three letters are a text, not an expression
        ("3!", "6", False),
        ("720!/719!", "720.0", False),
        ("9**9", "387420489", False),
        ("2^{10}", "1024", False),
        ("(((2)^2)^2)^2", "256", False),  # a whole number has to be written as one
        (r"\frac", "4", False),
        ("p - q", "p-q", True),
        (r"\left(3, \frac{\pi}{2}\right)", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("10:30", "10.30", False),
    ],
)
def test_equal_answers_of_math(given, target, same):
    pytest.importorskip("pylatexenc")
    assert grader.equal(given, target) is same


def test_what_might_never_end_is_not_computed():
    for endless in ("9^9^9^9*x", "99999999!*x", "9**9**9*x", "((((9)^9)^9)^9)^9*x", "9^99*x", "9" * 50 + "*x"):
        assert not grader.equal(endless, "x")


CHOICES = [  # text, letter, whose, how
    (r"\boxed{B}", "B", BOTH, "boxed"),
    (r"\boxed{\text{B}}", "B", BOTH, "boxed"),
    (r"\boxed{B) the root}", "B", BOTH, "boxed"),
    ("Answer: C", "C", BOTH, "answer tag"),
    ("**Answer:** C", "C", BOTH, "answer tag"),
    ("answer: A ... Answer: D", "D", BOTH, "answer tag"),
    ("Thus, the answer is **B**.", "B", BOTH, "phrase"),
    ("The correct answer is: A", "A", BOTH, "phrase"),
    ("I would choose D", "D", BOTH, "phrase"),
    ("It must be option C, not Option A", "A", BOTH, "weak pattern"),
    ("(B) looks best", "B", BOTH, "weak pattern"),
    ("C is correct, D is not", "C", BOTH, "weak pattern"),
    ("Either A or B", "B", BOTH, "last letter"),
    ("ABCD, 5 and E", None, BOTH, None),
    ("", None, BOTH, None),
    ("the answer is a prime, 7: C", "A", AUTHORS, "phrase"),
    ("the answer is a prime, 7: C", "C", MENDED, "last letter"),
]


@pytest.mark.parametrize("text, letter, whose, how", CHOICES)
def test_letters(text, letter, whose, how):
    for score in [scoring.arc, scoring.mmlu]:
        for authors in whose:
            found = score(text, letter or "A", authors)
            where = "last line" if score is scoring.mmlu and how == "answer tag" else how
            # On a line of its own the first of two tags counts.
            if (score, text) == (scoring.mmlu, "answer: A ... Answer: D"):
                assert found.extracted == "A" and found.how == "last line" and not found.soft
                continue
            assert (found.extracted, found.how) == (letter, where), (score, authors)
            assert found.soft is (letter is not None)
            assert found.strict is (letter is not None and how not in scoring.GUESSES)
            assert not score(text, "E", authors).soft


def test_a_box_goes_before_a_tag_in_arc_and_behind_it_in_mmlu():
    text = "\\boxed{A}\nAnswer: B\nThat is all."
    assert scoring.arc(text, "A", False) == ("A", "boxed", True, True)
    assert scoring.mmlu(text, "B", False) == ("B", "answer tag", True, True)
    text = r"\boxed{A} \boxed{B}"
    assert scoring.arc(text, "A", True).strict and scoring.arc(text, "B", False).strict


def test_doubled_backslashes_hide_letters_of_mmlu():
    """A letter behind a new line follows an n in the list's notation."""
    text = "Let me think.\nC"
    assert scoring.mmlu(text, "C", True) == (None, None, False, False)
    assert scoring.mmlu(text, "C", False) == ("C", "last letter", False, True)
    text = "Answer: A\nAnswer: B"  # one line in that notation, whose first tag counts
    assert scoring.mmlu(text, "B", True).extracted == "A" and scoring.mmlu(text, "B", False).strict


# Sets and the paper ----------------------------------------------------------------------------------------------------


def test_the_sample_is_asked_and_answered():
    pytest.importorskip("pylatexenc")
    right = {"gsm8k": r"\boxed{%s}", "math500": r"\boxed{%s}", "arc-c": r"\boxed{%s}", "mmlu": "So\nAnswer: %s"}
    for name, which in sets.SETS.items():
        items = sets.load(name, sets.SAMPLE)
        assert len(items) >= 3
        for item in items:
            target = which.target(item, False)
            assert which.score(right[name] % target.split("#### ")[-1], target, False).strict
            assert which.prompt(item).count("step by step") == 1


def test_prompts():
    ask = {
        name: which.prompt(sets.load(name, sets.SAMPLE)[-1]) for name, which in sets.SETS.items() if name != "math500"
    }
    assert ask["gsm8k"].startswith(
        r"Please answer the question step by step and put the answer in \boxed{}. At noon it"
    )
    assert ask["arc-c"].endswith(
        "format: \\boxed{$LETTER} where LETTER is one of ABCD.\n\nWhich part of a plant takes up water from the soil?\n\n"
        "A) the flower\nB) the root\nC) the seed\nD) NA"
    )
    assert "'Answer: $LETTER' (without quotes)" in ask["mmlu"] and ask["mmlu"].endswith("C) 2\nD) -7")


def test_keys_of_arc():
    item = dict(question="?", choices=dict(text=list("wxyz"), label=["E", "F", "G", "H"]), answerKey="G")
    assert sets.SETS["arc-c"].target(item, False) == "C" and sets.SETS["arc-c"].target(item, True) == "G"
    item = dict(item, choices=dict(text=list("wxyz"), label=list("1234")), answerKey="3")
    assert sets.SETS["arc-c"].target(item, False) == sets.SETS["arc-c"].target(item, True) == "C"


@pytest.mark.parametrize(
    "policy, changes, block_length, gsm8k",
    [
        ("dmoe", {}, 32, (14.7, 88.6)),
        ("dmoe", dict(top_p=0.8), 32, (28.1, 91.7)),
        ("dmoe", dict(top_p=0.65), 32, None),
        ("dmoe", dict(top_p=0.8), 16, None),
        ("dmoe", {}, 16, (16.5, 90.6)),
        ("token", {}, 8, (32.2, 90.1)),
        ("token", {}, 64, None),
        ("top4", {}, 32, (44.3, 72.4)),
        ("des_seq", dict(union_k=1), 32, (13.2, 74.0)),
        ("des_vote", {}, 32, (37.0, 90.5)),
        ("capacity", {}, 32, None),
    ],
)
def test_what_the_paper_reports(policy, changes, block_length, gsm8k):
    routing = BlockRouting.policy(policy, **changes)
    assert paper.reported(policy, routing, block_length).get("gsm8k") == gsm8k
