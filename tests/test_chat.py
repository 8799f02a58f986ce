"""`dmoe chat`: what it says and draws; only a real terminal shows the rest."""

from __future__ import annotations

import argparse
import io
import os
import signal

import pytest
import torch

pytest.importorskip("tokenizers")

from dmoe_ops import chat, demo
from dmoe_ops.__main__ import main
from dmoe_ops.models import LLaDA2ForDiffusion, TextCodec
from dmoe_ops.models.text import before


@pytest.fixture(scope="module")
def shipped():
    folder = demo.shipped_checkpoint()
    return LLaDA2ForDiffusion.from_pretrained(folder, dtype=torch.float32), TextCodec(folder)


@pytest.fixture
def talk(shipped):
    settings = dict(policy="own", gen_length=64, threshold=0.95, temperature=0.0, stop=[])
    return chat.Chat(*shipped, argparse.Namespace(**settings))


def lines(monkeypatch, *given):
    """Typed in, one after the other; an exception is raised."""
    given = iter([*given, EOFError()])

    def typed(prompt=""):
        line = next(given)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)


def test_a_conversation(talk, shipped, monkeypatch, capsys):
    lines(
        monkeypatch,
        "sort 39,58,15,21,62:",
        KeyboardInterrupt(),
        "",
        "/nonsense 1",
        "/policy token",
        "/policy best",
        "/new",
    )
    talk.loop()
    said = capsys.readouterr().out
    model, codec = shipped
    ids = torch.tensor([codec.encode("sort 39,58,15,21,62:")])
    want = codec.decode(model.generate(ids, gen_length=64).tokens[0].tolist()[:-1])
    assert want in said and "tokens/s" in said and "experts per block" in said
    assert "/quit leaves." in said
    assert "/nonsense 1 is no command; /help lists them" in said
    assert "policy token" in said and "error: policy must be one of" in said and "a new conversation" in said
    assert talk.messages == []


def test_commands(talk):
    assert "/policy NAME" in talk.command("/help") and "dmoe" in talk.command("/help")
    assert talk.command("/length", "12") == "answers of up to 12 tokens" and talk.gen_length == 12
    for wrong in (("/length",), ("/length", "0"), ("/length", "x"), ("/policy",), ("/",)):
        assert "is no command" in talk.command(*wrong)


def test_a_prompt_that_is_too_long_is_told_and_forgotten(talk, monkeypatch, capsys):
    lines(monkeypatch, "1" * 40000)
    talk.loop()
    assert "error: gen_length must leave prompt and answer within max_position_embeddings" in capsys.readouterr().out
    assert talk.messages == []


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(talk, monkeypatch, capsys):
    drawn, draw = [], chat.Screen.draw

    def interrupts(self, text, status):
        drawn.append(text)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        draw(self, text, status)

    monkeypatch.setattr(chat.Screen, "draw", interrupts)
    talk.options["threshold"] = 1.0  # one token a step
    before_it = signal.getsignal(signal.SIGINT)
    lines(monkeypatch, "sort 39,58,15,21,62:")
    talk.loop()
    assert signal.getsignal(signal.SIGINT) is before_it
    assert "stopped" in capsys.readouterr().out and len(drawn) == 3
    assert talk.messages[-1]["content"] == drawn[-1].replace(chat.MASK, "")


def test_stop_strings(talk, monkeypatch, capsys):
    assert before("a;b,c", [",", ";"]) == ("a", True)
    assert before("abc", ["", "x"]) == ("abc", False)
    talk.stop = [","]
    lines(monkeypatch, "sort 39,58,15,21,62:")
    talk.loop()
    assert talk.messages[-1]["content"] == "15"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_screen_draws_over_what_it_drew(monkeypatch):
    size = [20, 10]
    monkeypatch.setattr(chat.shutil, "get_terminal_size", lambda: os.terminal_size(size))
    out = Terminal()
    screen = chat.Screen(out)
    screen.draw("x" * 50, "status")
    assert "\x1b[" not in out.getvalue().split("status")[0].replace(chat.DIM, "")
    screen.draw("y", "status")
    assert out.getvalue().count("\x1b[3A\x1b[J") == 1  # three rows of text and one of status, less the one it stands on
    screen.draw("x" * 50, "status")
    size[0] = 10  # wrapped anew: five rows, and the status
    screen.draw("y", "status")
    assert "\x1b[5A\x1b[J" in out.getvalue()
    screen.draw("z" * 1000, "a long status")
    assert out.getvalue().rsplit("\x1b[J", 1)[1].count("z") == 10 * 7
    assert chat.rows_of("漢" * 6, 10) == 2 and chat.rows_of("", 10) == 1


def test_without_a_terminal_the_answer_is_written_once():
    out = io.StringIO()
    screen = chat.Screen(out)
    screen.draw("half", "1 tokens/s")
    screen.draw("whole", "2 tokens/s")
    screen.leave()
    assert out.getvalue() == "whole\n2 tokens/s\n"


def test_masks_and_the_end_of_a_text(talk):
    config = talk.model.config
    ids = talk.codec.encode("12")[:2]
    shown = talk.text([config.mask_token_id, *ids, config.mask_token_id, config.eos_token_id, *ids])
    assert shown == chat.MASK + talk.codec.decode(ids) + chat.MASK


def test_what_can_not_be_chatted_with(tmp_path, capsys):
    assert main(["chat", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("dmoe chat: tokenizer.json is missing in")
