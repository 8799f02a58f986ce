"""The check for a GPU, rehearsed without one: its own way from the plan to the table, and what it says of planted faults."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
from dmoe_ops.bench import results

from dmoe_ops import _library
from dmoe_ops.gpu_check import __main__ as gpu_check
from dmoe_ops.gpu_check import kernels, plan, steps

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def check(tmp_path, monkeypatch, capfd):
    """check(steps, *arguments) rehearses with steps in place of the usual ones; gives exit status, JSON and the output."""
    monkeypatch.chdir(ROOT)
    if _library._C and not _library._C.cuda_architectures:  # built without nvcc: planted steps need none
        built = types.SimpleNamespace(cuda_architectures="90a", why_no_cuda="", compiler=_library._C.compiler)
        monkeypatch.setattr(_library, "_C", built)

    def run(planned=None, *arguments):
        code = gpu_check.main(["--rehearse", "--out", str(tmp_path / "out"), *arguments], planned)
        files = list((tmp_path / "out").glob("*.json"))
        return code, json.loads(files[0].read_text()) if files else None, capfd.readouterr().out

    return run


@pytest.fixture
def planted(tmp_path):
    """planted(source, seconds) makes a step of the tests in a source."""

    def make(source: str, seconds: float = 60.0, name: str = "cuda tests: planted") -> steps.Step:
        file = tmp_path / f"test_{re.sub(r'[^a-z]+', '_', name)}.py"
        file.write_text(source)
        # Without the plugins of the environment, which take seconds to start.
        return plan.tests_step(name, "cuda", [str(file)], seconds, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})

    return make


def row(output: str, name: str) -> str:
    """The line of a step in the table at the end."""
    table = output[output.rindex("rehearsal, torch") :]
    return next(line for line in table.splitlines() if line.startswith(name))


def test_rehearsal(check, monkeypatch):
    """Every kind of step once, in the plan's order, and every figure that a GPU run would have."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as make PY=python3 has it
    code, result, output = check()
    assert code == 0, output
    names = [step.name for step in plan.rehearsal()]
    assert list(result["steps"]) == names
    backends = [name.split()[0] for name in names]
    assert backends == sorted(backends)  # CUDA before Triton
    for name in names:
        assert result["steps"][name]["result"] == "ok" and re.search(rf"{name} +ok", row(output, name))
    for backend, parts in (("cuda", 7), ("triton", 3)):
        rows = result["steps"][f"{backend} times"]["data"]
        assert len(rows) == parts and all(r["same"] and r["kernels"] and r["median_us"] > 0 for r in rows)
        # On the CPU, of an H100: that the way from the cost model into the table works.
        foreseen = {r["what"]: r["predicted_us"] for r in rows if r["predicted_us"]}
        assert len(foreseen) == {"cuda": 3, "triton": 2}[backend] and min(foreseen.values()) > 1
        assert re.search(rf"{backend} layer .* {results.number(foreseen['layer'])} ", output)
    assert {r["key"] for r in result["steps"]["cuda bench decode"]["data"]["rows"]} == {"token", "dmoe"}
    kept = json.dumps(result)
    assert os.getcwd() not in kept and sys.executable not in kept and tempfile.gettempdir() not in kept


def test_a_hang_is_named_and_killed_whole(check, planted, tmp_path):
    child = tmp_path / "child"
    source = f"""
import subprocess, time
def test_before(): pass
def test_that_hangs():
    process = subprocess.Popen(["sleep", "600"])
    open({str(child)!r}, "w").write(str(process.pid))
    time.sleep(600)
def test_after(): pass
"""
    code, result, output = check([planted(source, 8.0), planted("def test_next(): pass", name="cuda tests: next")])
    assert code == 1
    assert re.search(r"HUNG .*no end after 8 s in .*::test_that_hangs$", row(output, "cuda tests: planted"))
    found = result["steps"]["cuda tests: planted"]
    assert found["passed"] == 1 and "in test_that_hangs" in found["output"]  # where it stood
    assert re.search(r"ok .*1 passed", row(output, "cuda tests: next"))
    pid, until = int(child.read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_illegal_access_ends_its_class_alone(check, planted):
    source = """
def test_before(): pass
def test_bad():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_poisoned():
    raise RuntimeError("must not run")
"""
    code, result, output = check([planted(source), planted("def test_next(): pass", name="cuda tests: next")])
    assert code == 1
    assert re.search(r"FAILED .*illegal memory access in .*::test_bad", row(output, "cuda tests: planted"))
    assert "must not run" not in output and result["steps"]["cuda tests: planted"]["failed"] == 1
    assert re.search(r"ok .*1 passed", row(output, "cuda tests: next"))


def test_a_crash_leaves_the_name_of_its_test(check, planted):
    source = "import os, signal\ndef test_crash(): os.kill(os.getpid(), signal.SIGSEGV)"
    code, _, output = check([planted(source)])
    assert code == 1
    assert re.search(r"FAILED .*killed by SIGSEGV in .*::test_crash", row(output, "cuda tests: planted"))


def test_a_missing_nvcc_is_lost_by_name(check, planted, monkeypatch):
    why = "nvcc was not found when the package was built"
    without = types.SimpleNamespace(cuda_architectures="", why_no_cuda=why, compiler="GNU")
    monkeypatch.setattr(_library, "_C", without)
    triton = plan.tests_step("triton tests", "triton", planted("def test_next(): pass").command[2:3], 60.0)
    code, result, output = check([planted("def test_next(): pass"), triton])
    assert code == 1
    assert re.search(rf"nvcc +LOST .*{why}", row(output, "nvcc"))
    assert list(result["steps"]) == ["triton tests"]  # the rest goes on


def test_skipped_tests_fail_but_for_want_of_golden_files(check, planted):
    skip = "import pytest\ndef test_some(): pytest.skip({!r})\ndef test_other(): pass"
    code, _, output = check([planted(skip.format("needs a GPU; there is none here"))])
    assert code == 1
    assert re.search(r"SKIPPED .*needs a GPU", row(output, "cuda tests: planted"))
    assert check([planted(skip.format("the golden files (../shared/golden) are not there"))])[0] == 0


def test_a_failure_and_a_broken_file_are_named(check, planted):
    broken = planted("import nothing_of_that_name", name="cuda tests: broken")
    code, _, output = check([planted("def test_bad(): assert 1 == 2"), broken])
    assert code == 1
    assert re.search(r"1 failed, the first: .*::test_bad: (assert|AssertionError)", row(output, "cuda tests: planted"))
    assert "nothing_of_that_name" in row(output, "cuda tests: broken")


def test_out_of_time(check, planted):
    code, _, output = check([planted("def test_next(): pass")], "--minutes", "0.01")
    assert code == 1 and re.search(r"LOST .*no time left", row(output, "cuda tests: planted"))


def test_racecheck_informs(check):
    def tool(name, information):
        say = "print('========= Error: Race reported\\n========= ERROR SUMMARY: 3 errors'); raise SystemExit(9)"
        return steps.Step(name, "sanitizer", "cuda", (plan.PYTHON[0], "-c", say), 30.0, information=information)

    code, _, output = check([tool("cuda racecheck", True)])
    assert code == 0 and re.search(
        "info .*exit status 9: 3 errors / Error: Race reported", row(output, "cuda racecheck")
    )
    assert check([tool("cuda memcheck", False)])[0] == 1


def test_every_test_for_a_gpu_is_in_one_class(monkeypatch):
    monkeypatch.chdir(ROOT)
    chosen = [part for step in plan.test_steps(Path("tests/gpu")) for part in step.command if "::" in part]
    named = [
        f"{file.relative_to(ROOT)}::{name}"
        for file in (ROOT / "tests/gpu").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    ]
    assert sorted(set(chosen)) == sorted(named) and chosen
    # Those of both backends in two processes: one takes the tests of cuda, the other all others.
    halves = [
        step.command[step.command.index("-k") + 1]
        for step in plan.test_steps(Path("tests/gpu"))
        if "-k" in step.command
    ]
    assert halves == ["cuda", "not cuda"] * (len(halves) // 2)


def test_the_plan_for_a_gpu(monkeypatch):
    """CUDA before Triton, the sanitizers where they are, and every benchmark's arguments are such."""
    from dmoe_ops.bench.__main__ import Parser, add_arguments

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plan, "sanitizer", lambda: "compute-sanitizer")
    planned = plan.on_gpu(["cuda", "triton"])
    assert [step.alone for step in planned] == sorted(step.alone for step in planned)
    for alone in (False, True):
        order = [step.backend for step in planned if step.backend != "all" and step.alone == alone]
        assert order == sorted(order)
    names = [step.name for step in planned]
    assert len(set(names)) == len(names)
    for backend in ("cuda", "triton"):
        assert {f"{backend} {tool}" for tool in plan.TOOLS} <= set(names)
        assert f"{backend} times" in names and f"{backend} bench decode" in names
    parser = Parser()
    add_arguments(parser)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for step in planned:
        if step.kind == "bench":
            assert parser.parse_args(step.command[4:]).device == "cuda"
    assert {step.backend for step in plan.on_gpu(["triton"])} <= {"triton", "all"}


def test_names_of_kernels():
    said = "void dmoe::cuda::(anonymous namespace)::route_entry<8, true>(dmoe::cuda::Router)"
    assert kernels.short(said) == "route_entry"
    assert kernels.short("dense_up_kernel") == "dense_up_kernel"
    assert kernels.short("Memcpy DtoD (Device -> Device)") == "Memcpy DtoD"


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err
    monkeypatch.chdir(os.sep)
    assert gpu_check.main(["--rehearse"]) == 2
    assert "run it in the repository" in capsys.readouterr().err
