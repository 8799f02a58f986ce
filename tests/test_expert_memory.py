"""The pool of experts that stay in files: whole experts or errors, nothing left behind, and counts of real reads."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import weakref
from pathlib import Path

import numpy
import pytest
import torch

from dmoe_ops import _backends
from dmoe_ops.expert_memory import ExpertMemory, Extents, MemorySettings, parse_bytes, wanted
from dmoe_ops.formats import NOT_LOADED

ROOT = Path(__file__).resolve().parents[1]
LAYERS, EXPERTS, INNER, HIDDEN = 3, 8, 4, 6
if "cpp" in _backends.missing():
    pytest.skip(f"the pool is C++: {_backends.missing()['cpp']}", allow_module_level=True)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_random_faults_under_a_sanitizer(sanitizer, tmp_path):
    """200 pools whose reads fail, end early or come in parts: tests/cpp/expert_pool.cpp."""
    if shutil.which("g++") is None:
        pytest.skip("tests/cpp needs g++")
    program = tmp_path / "pool"
    sources = [ROOT / "csrc/cpu/expert_pool.cpp", ROOT / "tests/cpp/expert_pool.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizer}", "-pthread"]
    subprocess.run(["g++", *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True)
    done = subprocess.run([program, tmp_path, "200"], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is unknown to the thread sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = dict(zip(done.stdout.split()[::2], map(int, done.stdout.split()[1::2])))
    assert min(said["good"], said["failed"], said["refused"]) > 100


@pytest.fixture
def stored(tmp_path):
    """(the experts' tensors, the `Extents` of a file that has them behind 3 bytes of something else)."""
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(LAYERS, EXPERTS, 2 * INNER, HIDDEN, generator=generator)
    w2 = torch.randn(LAYERS, EXPERTS, HIDDEN, INNER, generator=generator)
    data, pieces = bytearray(b"abc"), []
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            gate, up = w13[layer, expert].chunk(2)
            for part, at, weight in ((1, 0, w2[layer, expert]), (0, 0, gate), (0, gate.nbytes, up)):
                pieces.append([0, part, len(data), weight.nbytes, at])
                data += weight.numpy().tobytes()
    path = tmp_path / "experts"
    path.write_bytes(data)
    return (w13, w2), Extents([str(path)], numpy.array(pieces).reshape(LAYERS, EXPERTS, 3, 5))


def memory_of(stored, experts: int, **settings) -> ExpertMemory:
    (w13, w2), extents = stored
    one = w13[0, 0].nbytes + w2[0, 0].nbytes
    settings = MemorySettings(experts * one, **settings)
    return ExpertMemory(extents, (w13[0, 0], w2[0, 0], None, None), settings)


def check(stored, memory, layer, expert_map, ids) -> None:
    (w13, w2), _ = stored
    for expert in range(EXPERTS):
        slot = int(expert_map[expert])
        assert (slot >= 0) == (expert in ids) and slot >= NOT_LOADED
        if slot >= 0:
            assert torch.equal(memory.weights[0][slot], w13[layer, expert])
            assert torch.equal(memory.weights[1][slot], w2[layer, expert])


def test_what_a_gate_wants_ahead():
    """By an eighth of the tokens, here two of sixteen; -1 is no expert."""
    topk_ids = torch.full((16, 2), -1)
    topk_ids[:3, 0], topk_ids[:2, 1], topk_ids[2:4, 1], topk_ids[5, 0] = 4, 6, 1, 0
    assert wanted(topk_ids, 8).tolist() == [4, 1, 6]
    assert wanted(topk_ids[:6], 8).tolist() == [4, 1, 6, 0]
    assert wanted(topk_ids[:0], 8).tolist() == []


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("ahead", [None, "previous"])
def test_a_visit_holds_what_it_names(stored, direct, ahead):
    memory = memory_of(stored, 7, direct=direct, ahead=ahead)
    one = memory.bytes_per_expert
    for round_ in range(6):
        for layer in range(LAYERS):
            topk_ids = torch.tensor([[round_ % 4, 7], [-1, layer]], dtype=torch.int32)
            with memory.visit(layer, topk_ids) as (expert_map, waves):
                assert waves is None
                check(stored, memory, layer, expert_map, {round_ % 4, 7, layer})
    stats = memory.stats()
    asked = sum(len({round_ % 4, 7, layer}) for round_ in range(6) for layer in range(LAYERS))
    assert stats.hits + stats.misses == asked and stats.hits > 0 and stats.pool_bytes == 7 * one
    assert stats.bytes_read == (stats.misses + stats.ahead) * one or ahead
    assert (stats.ahead > 0) == (ahead is not None)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_waves_cover_the_experts_in_order(stored, slots):
    memory = memory_of(stored, slots)
    used, end, seen = [0, 1, 3, 4, 6, 7], 0, []
    with memory.visit(1, torch.tensor([used], dtype=torch.int32)) as (expert_map, waves):
        for begin, stop in waves:
            assert begin == end < stop
            end = stop
            held = [e for e in used if begin <= e < stop]
            assert held
            check(stored, memory, 1, expert_map, set(held))
            seen += held
    assert end == EXPERTS and seen == used
    assert memory.pool.counts()["pinned"] == 0


def test_a_visit_that_is_left_in_the_middle_holds_nothing(stored):
    memory = memory_of(stored, 2)
    with pytest.raises(RuntimeError), memory.visit(0, torch.tensor([[0, 1, 2, 3]])) as (_, waves):
        next(waves)
        raise RuntimeError
    assert memory.pool.counts()["pinned"] == 0
    with memory.visit(0, torch.tensor([[2]])) as (expert_map, _):
        check(stored, memory, 0, expert_map, {2})


def test_a_truncated_file_is_an_error_that_names_it(stored):
    memory = memory_of(stored, 4)
    path, size = stored[1].files[0], os.path.getsize(stored[1].files[0])
    whole = Path(path).read_bytes()
    os.truncate(path, size // 2)
    with pytest.raises(OSError, match=rf"at byte \d+ \(expert 7 of MoE layer 2\): '{path}'") as caught:  # noqa: SIM117
        with memory.visit(2, torch.tensor([[7]])):
            pass
    assert caught.value.filename == path and memory.pool.counts()["pinned"] == 0
    with pytest.raises(OSError, match="the file has changed since it was opened, at byte"):  # noqa: SIM117
        with memory.visit(0, torch.tensor([[0]])):
            pass
    with pytest.raises(OSError, match=rf"the file ends at byte {size // 2}, before an expert does"):
        memory_of(stored, 4)
    Path(path).write_bytes(whole)
    with memory_of(stored, 4).visit(2, torch.tensor([[7]])) as (expert_map, _):
        assert expert_map[7] >= 0
    os.unlink(path)
    with pytest.raises(FileNotFoundError, match=path):
        memory_of(stored, 4)


def test_nothing_outlives_the_pool(stored):
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    gc.collect()
    before, files = threads(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        memory = memory_of(stored, 4, readers=3)
        with memory.visit(0, torch.tensor([[1, 2]])):
            pass
        assert threads() == before + 3
        weights = [weakref.ref(part) for part in memory.weights[:2]]
        del memory
        gc.collect()
        assert threads() == before and not any(part() is not None for part in weights)
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    ["value", "bytes_"], [(7, 7), ("4GB", 4 * 10**9), ("1.5MiB", 3 * 2**19), ("25%", 250), (" 100 % ", 1000), ("8B", 8)]
)
def test_budgets(value, bytes_):
    assert parse_bytes(value, 1000) == bytes_


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "", "4", "4TB", "0%", "101%", "GB", "-1GB", "nan%", "0GB"])
def test_budgets_that_are_none(value):
    with pytest.raises(ValueError, match="expert_memory must be a number of bytes"):
        parse_bytes(value, 1000)


def test_a_budget_below_one_expert_is_refused(stored):
    (w13, w2), extents = stored
    with pytest.raises(ValueError, match="expert_memory must hold an expert of 288 bytes, got 287"):
        ExpertMemory(extents, (w13[0, 0], w2[0, 0], None, None), MemorySettings(287))
    for wrong in (dict(readers=0), dict(ahead="gates"), dict(ahead_budget="much")):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            MemorySettings("1GB", **wrong)
