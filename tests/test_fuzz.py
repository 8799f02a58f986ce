"""tools/fuzz.py: a few of its cases, and that it notices what it is for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmoe_ops import reference

FILE = Path(__file__).resolve().parents[1] / "tools" / "fuzz.py"


@pytest.fixture
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_cases_end_without_a_finding():
    done = subprocess.run(
        [sys.executable, FILE, "--count", "1500", "--workers", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "routing: 1500 cases from 0 on, 0 findings" in done.stdout
    assert "checkpoint: 30 cases from 0 on, 0 findings" in done.stdout


def test_a_wrong_backend_is_found(monkeypatch, fuzz):
    choose = reference.choose
    monkeypatch.setattr(reference, "choose", lambda *args: tuple(part.flip(1) for part in choose(*args)))
    assert any("ids of reference" in (fuzz.check_routing(seed) or "") for seed in range(5))


def test_a_loader_that_takes_anything_is_found(monkeypatch, fuzz):
    model = fuzz.LLaDA2ForDiffusion(fuzz.CONFIG).init_weights(0)
    monkeypatch.setattr(fuzz.LLaDA2ForDiffusion, "from_pretrained", lambda folder: model)
    assert any(fuzz.check_checkpoint(seed) for seed in range(5))


def test_a_crash_is_a_finding_and_the_rest_goes_on(monkeypatch, fuzz):
    def check(seed):
        if seed == 3:
            os.abort()
        if seed == 5:
            raise KeyError("key")
        return "odd" if seed == 6 else None

    monkeypatch.setitem(fuzz.CHECKS, "routing", check)
    assert sorted(fuzz.run("routing", 8, 0, workers=2)) == [
        "routing 3: the process ended with SIGABRT",
        "routing 5: KeyError: 'key'",
        "routing 6: odd",
    ]
