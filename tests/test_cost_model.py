"""The cost model: what it reads from machine code, its arithmetic on cases computed by hand, and its predictions."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from cost import facts, forward, machine_code, machines, model  # noqa: E402

H100 = machines.MACHINES["H100"]
TOOL = [sys.executable, str(TOOLS / "cost_model.py")]
# Under the one nothing is compiled; the other, which make PY=python3 sets, would hide the modules beside the script.
ENV = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}


# --- machine code

SASS = """
        /*0000*/                   MOV R2, 0x4 ;                        /* 0x000 */
        /*0010*/                   LDS R0, [R1] ;                       /* 0x000 */
        /*0020*/                   FADD R3, R0, R0 ;                    /* 0x000 */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;        /* 0x000 */
        /*0040*/                   VIADD R2, R2, 0xffffffff ;           /* 0x000 */
        /*0050*/                   DADD R4, R4, R6 ;                    /* 0x000 */
        /*0060*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ; /* 0x000 */
        /*0070*/                   ISETP.NE.U32.AND P0, PT, R2, RZ, PT ; /* 0x000 */
        /*0080*/              @P0 BRA 0x30 ;                            /* 0x000 */
        /*0090*/                   EXIT ;                               /* 0x000 */
        /*00a0*/                   BRA 0xa0;                            /* 0x000 */
"""


def test_loops_of_sass():
    outside, loop = machine_code.analyse(SASS)
    # MOV; LDS; FADD after 29 cycles; EXIT
    assert (outside.instructions, outside.latency, outside.barriers) == (4, 1 + 1 + 29 + 1, 0)
    assert (loop.instructions, loop.trips, loop.barriers, loop.matrix, loop.fp64) == (6, 4, 1, 1, 1)
    # Each turn the product waits for the last one's: 33 cycles.
    assert loop.latency == 33
    assert loop.issue == 6  # as many instructions; the two of the integer units take 4


@pytest.mark.parametrize(
    "lines, turns",
    [
        (["MOV R2, 0x0", "VIADD R2, R2, 0x8", "ISETP.GE.U32.AND P0, PT, R2, 0xf8, PT", "@!P0 BRA 0x10"], 31),
        (["MOV R2, 0xfffffff8", "VIADD R2, R2, 0x40", "ISETP.GE.U32.AND P0, PT, R2, 0xf8, PT", "@!P0 BRA 0x10"], 4),
        (["UMOV UR6, 0x8", "UIADD3 UR6, UR6, -0x1, URZ", "ISETP.NE.AND P3, PT, RZ, UR6, PT", "@P3 BRA 0x10"], 8),
        (["LDG.E R2, [R4]", "VIADD R2, R2, 0x1", "ISETP.NE.U32.AND P0, PT, R2, 0x8, PT", "@P0 BRA 0x10"], None),
    ],
)
def test_turns(lines, turns):
    text = "".join(f"        /*{16 * n:04x}*/   {line} ;\n" for n, line in enumerate([*lines, "EXIT"]))
    assert machine_code.analyse(text)[1].trips == turns


def test_what_is_rare_is_left_out():
    lines = ["ISETP.NE.AND P1, PT, R9, RZ, PT", "@P1 BRA 0x70", "MOV R2, 0x8", "FADD R3, R3, R3", "VIADD R2, R2, -0x1"]
    lines += ["ISETP.NE.U32.AND P0, PT, R2, RZ, PT", "@P0 BRA 0x30", "EXIT"]
    text = "".join(f"        /*{16 * n:04x}*/   {line} ;\n" for n, line in enumerate(lines))
    assert [loop.instructions for loop in machine_code.analyse(text)] == [4, 4]
    assert [loop.instructions for loop in machine_code.analyse(text, rare=True)] == [3]


# --- a whole step


def test_a_step_is_its_layers_and_all_other_launches():
    parts = {part.name: part for part in forward.parts(H100, 50.0, 2)}
    assert parts["MoE"].us == 19 * 50
    # 156 ops of a step in tests/test_step.py, of which 19 are layers, 20 attention, and two others, of two launches.
    assert sum(part.launches for part in parts.values()) == 156 + 19 + 20 + 2
    start = H100.launch + H100.dram_us
    assert parts["head"].us == pytest.approx(2 * 157184 * 2048 / 3e6 + start)
    assert parts["qkv"].us == pytest.approx(20 * (2 * 3072 * 2048 / 3e6 + start))
    assert parts["norms"].us == pytest.approx(41 * (start + forward.SMALL_US))


# --- the model, by hand


def loops(**main) -> list:
    return [machine_code.Loop(0, 0, -1, 1), machine_code.Loop(0, 0, 0, **main)]


def kernel(**main) -> facts.Facts:
    return facts.Facts(
        registers=64, shared=0, warps=4, width=32, kind="wgmma", loops=loops(**main) if main else loops()[:1]
    )


def test_bytes_by_hand():
    """300 MB over 132 programs, one wave: launch, a latency, and 100 us."""
    work = model.Work("copy", kernel(), tiles=132, programs=132, hbm=300e6)
    assert model.estimate(work, H100).us == pytest.approx(1.3 + 0.39 + 100.0)
    early = dataclasses.replace(work, early=True)
    assert model.estimate(early, H100).us == pytest.approx(0.9 + 0.39 + 100.0)


def test_instructions_by_hand():
    """One program of 8 warps, two per scheduler: 10 turns of 100 issue slots, latency 150, two barriers."""
    found = dataclasses.replace(kernel(trips=10, instructions=100, issue=100, latency=150, barriers=2, fp64=5), warps=8)
    work = model.Work("route", found, tiles=1, programs=1)
    cycles = 10 * ((100 + 5 * 2) * 2 + 2 * 30)
    assert model.estimate(work, H100).parts["waves"] == pytest.approx(cycles / 1755)
    # One warp per scheduler: its latency decides.
    alone = dataclasses.replace(work, facts=dataclasses.replace(found, warps=4))
    assert model.estimate(alone, H100).parts["waves"] == pytest.approx(10 * (150 + 60) / 1755)


def test_waves_by_hand():
    """One tile more than fits at once costs a second wave, in which one multiprocessor works."""
    found = kernel(trips=1, latency=17550)
    assert model.residency(found, H100) == 8  # 65536 registers / (64 x 128)
    one, two = (model.estimate(model.Work("", found, n, n), H100).parts["waves"] for n in (8 * 132, 8 * 132 + 1))
    assert one == pytest.approx(10.0) and two == pytest.approx(20.0)


def test_latency_in_flight_by_hand():
    """64 KB per program, 16 KB of it in flight: four latencies of DRAM."""
    work = model.Work("", kernel(), 1, 1, hbm=1.0, l2=65536, ahead=16384)
    found = model.estimate(work, H100)
    assert found.limits["flight"] == pytest.approx(4 * 0.39) and found.bound == "flight"
    assert found.limits["port"] == pytest.approx(65536 / 64 / 1755)


def test_products_by_hand():
    work = model.Work("", kernel(), 132, 132, products=2048 * 1755)
    assert model.estimate(work, H100).limits["matrix"] == pytest.approx(1.0)
    narrow = dataclasses.replace(work, facts=dataclasses.replace(work.facts, kind="mma.sync"))
    assert model.estimate(narrow, H100).limits["matrix"] == pytest.approx(1 / 0.62)


def test_residency():
    big = dataclasses.replace(kernel(), registers=122, shared=98304)
    assert model.residency(big, H100) == 2  # 228 KB
    assert model.residency(big, machines.MACHINES["A100"]) == 1  # 164 KB
    assert model.residency(dataclasses.replace(kernel(), registers=255, warps=16), H100) == 1


def test_mean():
    assert model.mean([3.0]) == pytest.approx(3.0) and model.mean([]) == 0.0
    assert max(3.0, 2.0) < model.mean([3.0, 2.0]) < 3.2
    assert model.mean([1.0, 1.0]) == pytest.approx(2**0.25)


def test_every_machine_says_where_its_numbers_are_from():
    for machine in machines.MACHINES.values():
        assert "assumed" in machine.sources and ("datasheet" in machine.sources or "whitepaper" in machine.sources)
    assert machines.of("NVIDIA H100 80GB HBM3").name == "H100"
    with pytest.raises(ValueError, match="Quadro is not in the table"):
        machines.of("Quadro")


# --- predictions


def tool(*arguments: str) -> list[dict]:
    done = subprocess.run([*TOOL, *arguments], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows():
    """Predictions of the tool by (GPU, weights, tokens, experts, backend)."""
    arguments = ["--json", "--gpu", *machines.MACHINES]
    arguments += ["--tokens", "1", "8", "32", "64", "128", "512", "2048", "--unique", "8", "14.6", "32", "70", "256"]
    quantised = ["--json", "--gpu", *machines.MACHINES, "--tokens", "32", "--unique", "14.6", "70"]
    found = tool(*arguments) + tool(*quantised, "--weights", "fp8", "int8", "int4")
    return {(row["gpu"], row["weights"], row["tokens"], row["unique"], row["backend"]): row for row in found}


def test_never_below_the_floor(rows):
    assert len({key[0] for key in rows}) == len(machines.MACHINES)
    for key, row in rows.items():
        assert 0 < row["roofline"] < 1, key
        for launch in row["launches"]:
            assert launch["us"] > launch["limits"].get("HBM", 0.0), (key, launch["name"])
            assert launch["us"] == pytest.approx(sum(launch["parts"].values()))


def limit(row: dict, name: str) -> float:
    return sum(launch["limits"].get(name, 0.0) for launch in row["launches"])


def test_more_bytes_take_longer(rows):
    for (gpu, weights, tokens, unique, backend), row in rows.items():
        if weights != "bf16":
            wider = rows[gpu, "bf16", tokens, unique, "triton"]
            assert row["floor_us"] < wider["floor_us"]
            assert limit(row, "HBM") < limit(wider, "HBM")
        more = [other for key, other in rows.items() if key[:3] == (gpu, weights, tokens) and key[4] == backend]
        if tokens <= 128:  # the dense form reads an expert whatever its tokens; the gathered one also counts its tiles
            assert all(other["us"] > row["us"] for other in more if other["unique"] > unique)


def test_independent_estimates(rows):
    """For T = 32 with 14.6 experts. Triton's up by hand, from the same machine code: 26 us. CUDA's experts by stamps in the
    kernel on an H200 (bench/NOTES.md), with 10.4 us more for an H100's memory: 49 us, of which no rule explains 5."""
    for backend, name, us in (("triton", "up", 26), ("cuda", "experts", 44)):
        launches = rows["H100", "bf16", 32, 14.6, backend]["launches"]
        assert next(one["us"] for one in launches if one["name"] == name) == pytest.approx(us, rel=0.1)


def test_bandwidth_bound_where_it_must_be(rows):
    """All experts at T = 32: weights decide on every GPU with enough programs in flight."""
    for gpu in ("H100", "A100"):
        launches = rows[gpu, "bf16", 32, 256, "triton"]["launches"]
        assert collections.Counter(one["name"] for one in launches) == dict(gate=1, route=1, up=1, down=1)
        assert next(one for one in launches if one["name"] == "up")["bound"] == "HBM"


@pytest.mark.parametrize("which", ["sm_80", "sm_90", "sm_100", "gfx942", "cuda"])
def test_facts_are_those_of_the_kernels(which):
    """tools/cost/facts.json is what compiles here. After a change to a kernel: python tools/cost_model.py --facts"""
    kept = json.loads(facts.FILE.read_text())["compilers"]
    tool = "nvcc" if which == "cuda" else "triton"
    if facts.compilers()[tool] != kept[tool]:
        pytest.skip(f"facts.json is from {tool} {kept[tool]}, here is {facts.compilers()[tool] or 'none'}")
    done = subprocess.run([*TOOL, "--check", which], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
