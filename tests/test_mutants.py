"""tools/mutants.py names what is there: it must not fall behind the sources."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
mutants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)


@pytest.mark.parametrize("file, test", mutants.HAND)
def test_a_mutant_by_hand_changes_one_place(file, test):
    source, entries = (ROOT / file).read_text(), mutants.HAND[file, test]
    assert (ROOT / "tests" / f"{test}.py").is_file()
    assert {old: source.count(old) for old, _ in entries} == {old: 1 for old, _ in entries}
    assert all(old != new for old, new in entries)


@pytest.mark.parametrize("file", mutants.TESTS)
def test_the_tests_of_a_module_are_there(file):
    assert (ROOT / file).is_file()
    assert [name for name in mutants.TESTS[file] if not (ROOT / "tests" / f"{name}.py").is_file()] == []


def test_explanations_are_of_modules_in_the_table():
    assert {*mutants.EQUIVALENT} <= {*mutants.TESTS, *(file for file, _ in mutants.HAND)}
