"""`dmoe eval`: scorers against answers written by hand, the authors' defects, and whole runs on the miniature."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
import types
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from dmoe_ops import BlockRouting, demo
from dmoe_ops.__main__ import main
from dmoe_ops.eval import answers, command, grader, paper, scoring, sets
from dmoe_ops.models import Block, LLaDA2ForDiffusion, TextCodec

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


def test_a_model_may_write_anything():
    """Scorers find no answer in nonsense, or a wrong one; they don't raise, and say nothing."""
    pytest.importorskip("pylatexenc")
    parts = [
        *"{}^()[],=+-*/!.2x'\\$%&٣_@A ",
        r"\boxed{",
        r"\frac",
        r"\sqrt",
        r"\text{",
        "1,000",
        "inf",
        "1e9",
        "Answer: ",
    ]
    draw = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            text = "".join(draw.choices(parts, k=draw.randint(0, 14)))
            for authors in BOTH:
                for score, target in (("gsm8k", "#### 7"), ("math500", r"\frac{1}{7}"), ("arc", "A"), ("mmlu", "A")):
                    getattr(scoring, score)(rf"\boxed{{{text}}}", target, authors)


def test_released_answers_are_scored_again(tmp_path, capsys):
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools/rescore.py"))
    answers = [r"\boxed{1,000}", r"\boxed{1000}", "1000"]
    lines = [json.dumps(dict(answer=[text], task=dict(question="?", answer="#### 1,000"))) for text in answers]
    (tmp_path / "all.json").write_text("\n".join(lines))
    tool["main"](["gsm8k", str(tmp_path / "all.json")])
    assert capsys.readouterr().out == "authors: 1 strict, 2 soft of 3\nmended: 2 strict, 3 soft of 3\n"


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


# Decoding --------------------------------------------------------------------------------------------------------------

MASK, EOS = 1, 0


def watched(lengths, *steps) -> tuple[list[bool], list[bool]]:
    """What `EarlyEnds` says after each step, and which texts it takes for ended early. A step: (begin, rows, done)."""
    watch = answers.EarlyEnds(lengths, MASK, EOS)
    return [watch(Block(begin, torch.tensor(rows), True)) for begin, rows in steps], watch.early


def test_an_early_end_takes_a_step_that_writes_an_eos():
    assert watched([0], (0, [[5, 5, 0, 1]])) == ([True], [True])
    assert watched([0], (0, [[5, 1, 0, 1]]), (0, [[5, 5, 0, 0]])) == ([False, True], [True])
    # The last mask in front of an eos is filled by a step that writes none: the released code goes on.
    assert watched([0], (0, [[5, 1, 0, 0]]), (0, [[5, 5, 0, 0]])) == ([False, False], [False])
    # Eos ids of the prompt are not the answer's, and later blocks see earlier ones.
    assert watched([2], (0, [[0, 0, 5, 1]]), (0, [[0, 0, 5, 5]]), (4, [[0, 1, 1, 1]])) == ([False, False, True], [True])
    assert watched([6], (4, [[0, 0, 1, 5]]), (4, [[0, 0, 0, 5]])) == ([False, True], [True])


def test_a_batch_ends_with_its_last_text():
    steps = [(0, [[5, 0, 1, 1], [1, 1, 0, 0]]), (0, [[5, 0, 5, 5], [5, 5, 0, 0]]), (4, [[1] * 4, [1] * 4])]
    assert watched([0, 0], *steps) == ([False, False, True], [True, False])


@pytest.fixture(autouse=True)
def one_thread(threads):
    """As torchrun has it; and threads that wait for each other cost the miniature more than they bring."""
    threads(1)


@pytest.fixture(scope="module")
def miniature():
    pytest.importorskip("tokenizers")
    folder = demo.shipped_checkpoint()
    return LLaDA2ForDiffusion.from_pretrained(folder, policy="dmoe", dtype=torch.float32), TextCodec(folder)


def test_the_authors_cut_answers_off(miniature):
    """As many tokens as the prompt has, where an answer did not end early: at its full length, or with a block."""
    model, codec = miniature
    prompts = ["work 86+23:", "sort 83,54,78,84,62:", "sort 39,58,15,21,62:"]
    ids = [codec.encode(prompt) for prompt in prompts]
    assert [len(row) for row in ids] == [8, 17, 17]
    options = dict(seed=1, gen_length=32, temperature=0.0)
    (work, sort, early), mended = (answers.decode(model, codec, ids, authors=a, **options) for a in (True, False))
    assert (work["output"], work["scored"]) == ("6+3+0=09;8+2+0=10;109", ";8+2+0=10;109")
    assert (sort["output"], sort["scored"], sort["cut"], sort["tokens"]) == ("54,62,78,83,84", "", 15, 15)
    assert (early["scored"], early["cut"]) == ("15,21,39,58,62", 0)
    assert [answer["output"] for answer in mended] == [answer["output"] for answer in (work, sort, early)]
    assert all(answer["scored"] == answer["output"] and answer["cut"] == 0 for answer in mended)
    short = dict(options, gen_length=10)
    assert answers.decode(model, codec, ids[:1], authors=True, **short)[0]["scored"] == "6+3+0=09;8"[8:]
    assert answers.decode(model, codec, ids[:1], authors=False, **short)[0]["scored"] == "6+3+0=09;8"


def test_one_answer_costs_what_generate_counts(miniature):
    model, codec = miniature
    ids = codec.encode("work 86+23:")
    alone = model.generate(torch.tensor([ids]), gen_length=32)
    (answer,) = answers.decode(model, codec, [ids], authors=False, seed=1, gen_length=32, temperature=0.0)
    assert answer["tokens"] == alone.stats.tokens == len(alone.tokens[0])
    assert (answer["forwards"], answer["unique_experts"]) == (
        alone.stats.forwards,
        alone.stats.unique_experts_denoising,
    )


# Whole runs ------------------------------------------------------------------------------------------------------------

SMALL = ["eval", "--sample", "--sets", "gsm8k", "arc-c", "--gen-length", "32", "--device", "cpu"]


@pytest.fixture
def run(tmp_path, capsys):
    """run(*arguments, out=NAME) gives the exit code, the JSON where there is one, stdout and stderr."""
    pytest.importorskip("tokenizers")

    def run_eval(*arguments: str, out: str = "eval.json", start=SMALL):
        path = tmp_path / out
        code = main([*start, "--out", str(path), *arguments])
        said = capsys.readouterr()
        return code, json.loads(path.read_text()) if path.exists() else None, said.out, said.err

    return run_eval


def untimed(found: dict) -> str:
    return json.dumps({key: value for key, value in found.items() if key != "timing"})


def test_a_run(run):
    code, found, said, _ = run()
    assert code == 0 and found["settings"]["protocol"] == "mended" and found["settings"]["temperature"] == 0
    assert found["settings"]["routing"]["top_p"] == 0.6 and found["settings"]["block_length"] == 32
    assert list(found["sets"]) == ["gsm8k", "arc-c"]
    for name, part in found["sets"].items():
        items = sets.load(name, sets.SAMPLE)
        assert part["items"] == len(part["answers"]) == len(items)
        assert [answer["prompt"] for answer in part["answers"]] == [sets.SETS[name].prompt(item) for item in items]
        for answer in part["answers"]:
            fields = "prompt output target extracted how strict soft tokens cut forwards unique_experts"
            assert set(fields.split()) == set(answer) - {"index"}
            assert answer["tokens"] >= 1 and 4 <= answer["unique_experts"] <= 64 and answer["forwards"] >= 2
        assert part["unique_experts"] == pytest.approx(
            sum(a["unique_experts"] for a in part["answers"]) / part["items"]
        )
        assert part["strict"]["interval"][0] <= part["strict"]["share"] <= part["strict"]["interval"][1]
        timed = found["timing"]["sets"][name]
        assert timed["tokens_per_second"] == pytest.approx(
            sum(answer["tokens"] for answer in part["answers"]) / timed["seconds"]
        )
    assert found["sets"]["gsm8k"]["answers"][0]["output"].endswith("73")  # 437, had it read the question
    assert found["sets"]["gsm8k"]["paper"] == [14.7, 88.6]
    assert "no chat template" in said and "strict 86.96, soft 87.57, 14.72 experts" in said
    row = next(line for line in said.splitlines() if line.strip().startswith("gsm8k "))
    assert row.split()[1:4] == ["4", "0.0", "(0.0–49.0)"] and " 88.6 " in row


@pytest.mark.parametrize("changes", [[], ["--protocol", "authors", "--batch", "3"]])
def test_interrupted_and_resumed_runs_give_the_same(run, tmp_path, monkeypatch, changes):
    _, whole, _, _ = run(*changes, out="whole.json")
    decode, turns = answers.decode, iter([False, True])

    def interrupted(*args, **options):
        if next(turns):
            raise KeyboardInterrupt
        return decode(*args, **options)

    monkeypatch.setattr(answers, "decode", interrupted)
    code, found, _, said = run(*changes)
    assert code == 130 and found is None and said.splitlines()[-1].startswith("dmoe eval: stopped; the same command")
    file = tmp_path / "eval.answers-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == (4 if changes else 2)
    # Killed in the middle of a line; of a batch of three, the last is lost.
    file.write_bytes(b"".join(lines[:-1] if changes else lines) + lines[-1][:-9])
    decoded = []
    monkeypatch.setattr(answers, "decode", lambda *args, **options: decoded.append(1) or decode(*args, **options))
    code, found, said, _ = run(*changes)
    assert code == 0 and untimed(found) == untimed(whole)
    assert f"{2 if changes else 1} answers are there already" in said
    assert len(decoded) == (3 if changes else 6)
    code, found, said, _ = run(*changes)
    assert code == 0 and untimed(found) == untimed(whole) and "loading" not in said and len(decoded) < 7


def test_a_limit_may_rise(run):
    _, whole, _, _ = run("--batch", "2", out="whole.json")
    _, part, _, _ = run("--batch", "2", "--limit", "1")
    assert [part["sets"][name]["items"] for name in part["sets"]] == [1, 1]
    _, found, _, _ = run("--batch", "2")
    assert untimed(found) == untimed(whole)


# What torchrun starts, forked, as torch and sympy (for torch's meta device) take seconds to import.
TWO_PROCESSES = """
import multiprocessing, os, sys, sympy
from dmoe_ops.__main__ import main

def process(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    sys.exit(main(sys.argv[2:]))

both = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in (0, 1)]
for one in both:
    one.start()
for one in both:
    one.join()
sys.exit(max(one.exitcode for one in both))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_give_what_one_gives(run, tmp_path):
    changes = ["--protocol", "authors", "--batch", "2"]
    _, whole, said, _ = run(*changes, out="whole.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two.json"
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, str(port), *SMALL, *changes, "--out", str(out)],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads(out.read_text())
    assert untimed(two) == untimed(whole) and two["timing"]["processes"] == 2
    written = [len((tmp_path / f"two.answers-{rank}.jsonl").read_text().splitlines()) - 1 for rank in (0, 1)]
    assert written == [4, 3] and done.stdout.count("strict %") == 1
    # One process goes on from the answers of two.
    code, found, said, _ = run(*changes, out="two.json")
    assert code == 0 and untimed(found) == untimed(whole) and "loading" not in said


def test_policies_and_their_settings(run):
    for arguments, settings in {
        ("--policy", "dmoe", "--top-p", "0.4", "--min-experts", "5"): dict(top_p=0.4, min_experts=5),
        ("--policy", "des_vote", "--capacity", "6"): dict(capacity=6),
        ("--policy", "des_seq", "--union-k", "1", "--block-length", "16"): dict(union_k=1, block_size=16),
        ("--policy", "token"): dict(select="all"),
    }.items():
        _, found, _, _ = run("--sets", "gsm8k", "--limit", "1", *arguments, out=f"{arguments[1]}.json")
        assert settings.items() <= found["settings"]["routing"].items()
        assert found["settings"]["policy"] == arguments[1]


def test_files_of_every_kind(run, tmp_path):
    """A folder is enough: no network is asked."""
    folder = tmp_path / "data"
    folder.mkdir()
    gsm8k, arc = (sets.load(name, sets.SAMPLE) for name in ("gsm8k", "arc-c"))
    (folder / "gsm8k.json").write_text(json.dumps(gsm8k))
    shutil.copy(sets.SAMPLE / "arc-c.jsonl", folder)
    _, sample, _, _ = run(out="sample.json")
    start = [argument for argument in SMALL if argument != "--sample"]
    _, found, _, _ = run("--data", str(folder), start=start)
    assert untimed(found) == untimed(sample)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(arc), folder / "arc-c.parquet")
    (folder / "arc-c.jsonl").unlink()
    assert sets.load("arc-c", folder) == arc


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch", "-2"], "--batch must be at least 1, got -2"),
        (["--threshold", "1.5"], "--threshold must be in [0, 1], got 1.5"),
        (["--temperature", "nan"], "--temperature must be a number of at least 0, got nan"),
        (["--sets", "gsm8k", "gsm8k"], "--sets must name each set once, got gsm8k gsm8k"),
        (["--policy", "token", "--top-p", "0.5"], "--top-p is no setting of policy token, got 0.5"),
        (["--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["--gen-length", "2048"], "--gen-length must leave prompt and answer within max_position_embeddings=1024"),
        (["--out", "nowhere/eval.json"], "--out must lie in a folder that exists"),
        (["--device", "nowhere"], "device must be one that torch can use here, got 'nowhere'"),
        (["--model", "nowhere"], "config.json is missing in nowhere"),
    ],
)
def test_bad_arguments_are_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"dmoe eval: {says}") and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"question": "?", "answer": "#### 1"}\n{"question', "gsm8k.jsonl, line 2 is not valid JSON: "),
        ('{"question": "?"}', "gsm8k.jsonl, item 0 must have answer, a str, got 'None'"),
        ('{"question": 3, "answer": "#### 1"}', "gsm8k.jsonl, item 0 must have question, a str, got '3'"),
        ("[1]", "gsm8k.jsonl, item 0 must be an object, got a list"),
        ('{"question": "?", "answer": "one"}', "gsm8k.jsonl, item 0 can't be asked or scored: ValueError: "),
        ("\n", "gsm8k.jsonl holds no items"),
        (None, "none of gsm8k.jsonl, gsm8k.json, gsm8k.parquet is in "),
    ],
)
def test_bad_data_is_one_line(content, says, tmp_path):
    if content is not None:
        (tmp_path / "gsm8k.jsonl").write_text(content)
    with pytest.raises(ValueError) as error:
        sets.load("gsm8k", tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--data must be a folder"):
        sets.load("gsm8k", tmp_path / "nowhere")


def test_bad_items_of_choices_are_one_line(tmp_path):
    (tmp_path / "arc-c.json").write_text('[{"question": "?", "choices": {"label": ["A"]}, "answerKey": "A"}]')
    with pytest.raises(ValueError, match=r"arc-c.json, item 0 can't be asked or scored: KeyError: 'text'"):
        sets.load("arc-c", tmp_path)
    (tmp_path / "mmlu.json").write_text('[{"question": "?", "choices": ["1", "2"], "answer": 7}]')
    with pytest.raises(ValueError, match=r"mmlu.json, item 0 can't be asked or scored: IndexError"):
        sets.load("mmlu", tmp_path)
    (tmp_path / "gsm8k.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of items, got a dict"):
        sets.load("gsm8k", tmp_path)


@pytest.mark.parametrize("package, name", [("datasets", "gsm8k"), ("pylatexenc.latex2text", "math500")])
def test_a_missing_package_is_one_line(package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"takes the package \S+.* pip install 'dmoe-ops\[eval\]'"):
        sets.load(name, None if package == "datasets" else sets.SAMPLE)


def test_the_hub_is_asked_for_what_the_authors_take(monkeypatch):
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return iter(sets.load("gsm8k", sets.SAMPLE))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert sets.load("gsm8k", None) == sets.load("gsm8k", sets.SAMPLE) and asked == [("openai/gsm8k", "main", "test")]

    def offline(*name, split):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"the Hugging Face hub did not give allenai/ai2_arc \(no network\); --data FOLDER"
    ):
        sets.load("arc-c", None)


def test_answers_of_another_run_are_one_line(run, tmp_path):
    few = ["--sets", "gsm8k", "--limit", "1"]
    assert run(*few)[0] == 0
    code, _, _, said = run(*few, "--steps", "16")
    assert code == 2 and said.startswith("dmoe eval: ") and said.count("\n") == 1
    assert "eval.answers-0.jsonl has answers with steps = 32, and this run has 16; take another --out" in said
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "gsm8k.jsonl").write_text('{"question": "Another?", "answer": "#### 1"}')
    start = [argument for argument in SMALL if argument != "--sample"]
    code, _, _, said = run(*few, "--data", str(folder), start=start)
    assert code == 2 and "eval.answers-0.jsonl answers another question than item 0 of gsm8k: take another" in said
    file = tmp_path / "eval.answers-0.jsonl"
    for broken in (b"[]\n", b"{}\n", b"nothing\n", b"\xff\n"):
        file.write_bytes(file.read_bytes().splitlines(keepends=True)[0] + broken)
        code, _, _, said = run(*few)
        assert code == 2 and "line 2 of" in said and "is no answer; take another --out" in said


def test_the_chat_template_is_used(run, tmp_path):
    folder = Path(shutil.copytree(demo.shipped_checkpoint(), tmp_path / "model"))
    template = "{% for m in messages %}work 86+23:{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=template)))
    few = ["--model", str(folder), "--dtype", "float32", "--sets", "gsm8k", "--limit", "1"]
    _, found, said, _ = run(*few)
    assert found["sets"]["gsm8k"]["answers"][0]["output"] == "6+3+0=09;8+2+0=10;109" and "no chat template" not in said
    _, raw, said, _ = run(*few, "--raw", out="raw.json")
    assert raw["sets"]["gsm8k"]["answers"][0]["output"].endswith("73") and not raw["settings"]["chat_template"]


def test_settings_of_a_policy_are_known():
    for policy, names in command.SETTINGS.items():
        BlockRouting.policy(policy, **{name: 0.5 if name == "top_p" else 8 for name in names})


# lm-eval ---------------------------------------------------------------------------------------------------------------

TASK = """
task: sorted
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{asked}}"
doc_to_target: "{{wanted}}"
generation_kwargs: {until: [";"], max_gen_toks: 32, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dmoe-ops[eval]'")


def test_a_task_of_lm_eval(lm_eval, miniature, tmp_path, caplog):
    from lm_eval.tasks import TaskManager

    from dmoe_ops.eval.harness import LM

    asked = {"sort 39,58,15,21,62:": "15,21,39,58,62", "work 86+23:": "6+3+0=09", "sort 93,73,16,72,12:": "no"}
    lines = [json.dumps(dict(asked=prompt, wanted=answer)) for prompt, answer in asked.items()]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "sorted.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = LM(*miniature, batch=2)
    found = lm_eval.simple_evaluate(model=lm, tasks=["sorted"], task_manager=tasks, bootstrap_iters=0)
    assert [sample["filtered_resps"][0] for sample in found["samples"]["sorted"]] == [
        "15,21,39,58,62",
        "6+3+0=09",
        "12,16,72,73,93",
    ]
    assert found["results"]["sorted"]["exact_match,none"] == pytest.approx(2 / 3) and lm.cut_short == 0


def test_an_lm(lm_eval, miniature, tmp_path, caplog):
    from lm_eval.api.instance import Instance

    from dmoe_ops.eval.harness import LM

    def asked(prompt, **wanted):
        return Instance(request_type="generate_until", doc={}, arguments=(prompt, wanted), idx=0)

    lm = LM(*miniature, batch=8)
    most = dict(max_gen_toks=32)
    requests = [
        asked("work 86+23:", max_gen_toks=10),
        asked("work 86+23:", until="+2", **most),
        asked("sort 39,58,15,21,62:", **most),
    ]
    assert lm.generate_until(requests) == ["6+3+0=09;8", "6+3+0=09;8", "15,21,39,58,62"]
    assert lm.cut_short == 1 and "1 of 3 answers were cut off at their length" in caplog.text
    lm.gen_length = 9
    assert lm.generate_until(requests[:1]) == ["6+3+0=09;"]
    for refused in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match="has no likelihood of a text from left to right"):
            refused([])
    with pytest.raises(ValueError, match="has no chat template"):
        lm.apply_chat_template([dict(role="user", content="?")])
    folder = Path(shutil.copytree(demo.shipped_checkpoint(), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}work {{ m['content'] }}:{% endfor %}")
    lm = LM.from_pretrained(folder, dtype="float32", device="cpu", policy="des_vote", routing=dict(capacity=8))
    assert lm.model.routing.capacity == 8 and lm.chat_template(True) and lm.tokenizer_name.endswith("model")
    assert lm.apply_chat_template([dict(role="user", content="86+23")]) == "work 86+23:"
