"""What nvcc makes of csrc/cuda, without a GPU: registers, spills, stack, shared memory (ptxas), instructions (PTX, SASS)."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# tools/take_out.py names a copy from which it took a barrier.
SOURCES = Path(os.environ.get("DMOE_CSRC") or Path(__file__).resolve().parents[1] / "csrc") / "cuda"
BUILDS = [("router", arch) for arch in ("sm_80", "sm_90a", "sm_100", "sm_120")]
BUILDS += [("experts", arch) for arch in ("sm_90a", "sm_100", "sm_120")]

# What each kernel is ordered by, in PTX: at least so many of each, as one lost is one barrier of device.h lost.
HOPPER = {"griddepcontrol.launch_dependents": 1, "griddepcontrol.wait": 1}
ROUTE = {"bar.warp.sync": 3, "atom.acq_rel.gpu": 1}
ORDER = {
    ("gate_entry", "sm_80"): {"bar.sync": 2},
    ("schedule_entry", "sm_80"): {"bar.sync": 2},
    ("route_entry", "sm_80"): {"bar.sync": 12, **ROUTE},
    ("gate_entry", "sm_90a"): {"bar.sync": 2},
    ("schedule_entry", "sm_90a"): {"bar.sync": 2, **HOPPER},
    ("route_entry", "sm_90a"): {
        "bar.sync": 11,
        "barrier.cluster.arrive.relaxed": 1,
        "barrier.cluster.arrive.release": 3,
        "barrier.cluster.wait.acquire": 4,
        **ROUTE,
        **HOPPER,
    },
    ("experts_entry", "sm_90a"): {
        "bar.sync": 8,
        "bar.warp.sync": 11,  # one behind each of the six waits for a barrier of copies
        "mbarrier.try_wait.parity": 6,
        "fence.mbarrier_init.release.cluster": 1,
        "fence.proxy.async.global": 2,
        "atom.acq_rel.gpu": 2,
        "ld.acquire.gpu": 1,
        "griddepcontrol.wait": 1,
    },
}
# And what ptxas has to make of it.
MADE_OF = {
    "bar.sync": "BAR.SYNC",
    "barrier.cluster.arrive.release": "UCGABAR_ARV",
    "barrier.cluster.wait.acquire": "UCGABAR_WAIT",
    "griddepcontrol.launch_dependents": "PREEXIT",
    "griddepcontrol.wait": "ACQBULK",
    "atom.acq_rel.gpu": "MEMBAR.ALL",
    "ld.acquire.gpu": "CCTL.IVALL",
    "fence.proxy.async.global": "FENCE.VIEW",
    "mbarrier.try_wait.parity": "SYNCS.PHASECHK",
}


def tool(name: str) -> str:
    """cuobjdump comes with the package triton as well."""
    places = [Path(os.environ[v]) / "bin" / name for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    spec = importlib.util.find_spec("triton")
    places += [Path(spec.origin).parent / "backends/nvidia/bin" / name] if spec else []
    found = shutil.which(name) or next((str(p) for p in places if p.is_file()), None)
    if found is None:
        pytest.skip(f"{name} was not found")
    return found


@pytest.fixture(scope="module", params=BUILDS, ids=["-".join(b) for b in BUILDS])
def build(request, tmp_path_factory):
    """(file, architecture, what ptxas says per kernel, counts of instructions per kernel, PTX per kernel)"""
    name, arch = request.param
    folder = tmp_path_factory.mktemp("cubin")
    cubin = folder / f"{name}.cubin"
    done = subprocess.run(
        [
            tool("nvcc"),
            "-std=c++17",
            "-O3",
            f"-arch={arch}",
            "-cubin",
            "-Xptxas",
            "-v",
            "--keep",
            f"--keep-dir={folder}",
            SOURCES / f"{name}.cu",
            "-o",
            cubin,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sass = subprocess.run([tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    ptx = (folder / f"{name}.ptx").read_text().split(".entry ")[1:]
    return name, arch, resources(done.stderr), instructions(sass), {kernel_of(part): part for part in ptx}


def kernel_of(text: str) -> str:
    return re.search(r"\d+((?:gate|route|schedule|experts)_entry(?:I(?:L\w\d+E)+)?)E", text).group(1)


def resources(text: str) -> dict[str, dict[str, int]]:
    result = {}
    for part in text.split("Compiling entry function")[1:]:
        number = {
            what: int(found.group(1)) if (found := re.search(pattern, part)) else 0
            for what, pattern in {
                "stack": r"(\d+) bytes stack frame",
                "spill_stores": r"(\d+) bytes spill stores",
                "spill_loads": r"(\d+) bytes spill loads",
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        result[kernel_of(part)] = number
    return result


def instructions(sass: str) -> dict[str, collections.Counter]:
    """Counts per kernel, of instructions without their modifiers and, as "A.B", with the first one."""
    result = {}
    for part in sass.split("Function : ")[1:]:
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part, re.M)
        count = collections.Counter(i.split(".")[0] for i in found)
        count.update(".".join(i.split(".")[:2]) for i in found if "." in i)
        result[kernel_of(part)] = count
    return result


def test_nothing_spills(build):
    name, _, resource, sass, _ = build
    kernels = {"router": 5, "experts": 32}[name]
    assert len(resource) == len(sass) == kernels
    for kernel, used in resource.items():
        print(kernel, used)
        assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, kernel
        assert 0 < used["registers"] <= 255 and used["shared"] <= 48 * 1024
    for kernel, count in sass.items():
        assert count["LDL"] == count["STL"] == 0, kernel


def test_the_instructions_that_were_meant(build):
    name, arch, _, sass, ptx = build
    if name == "experts":
        for kernel, count in sass.items():
            assert (
                count["UBLKCP"] and count["SYNCS.PHASECHK"] and count["UBLKPF"]
            )  # bulk copies, their barriers, prefetch
            fp8 = "ELb1ELi" in kernel
            # Fragments from shared memory, wide loads and the conversion of two numbers at a time where they are in fp8.
            assert bool(count["LDSM"]) != fp8 and count["HMMA"] and (count["LDS.128"] >= 16) == fp8
            assert ("cvt.rn.f16x2.e4m3x2" in ptx[kernel]) == fp8
            assert count["ACQBULK"]  # waits for the launch before
        return
    assert sass["gate_entry"]["HMMA"] and sass["gate_entry"]["LDG"]
    for kernel, count in sass.items():
        if kernel.startswith("route_entry"):
            assert count["DFMA"]  # scores and sums in double
            # The gate and the cluster are in the same launch, where the chip has clusters.
            hopper = arch != "sm_80"
            assert bool(count["HMMA"]) == bool(count["UCGABAR_ARV"]) == bool(count["UCGABAR_WAIT"]) == hopper
            assert bool(count["PREEXIT"]) == bool(count["ACQBULK"]) == hopper  # programmatic dependent launch


def test_what_orders_memory(build):
    """Every barrier, wait and fence is in the PTX, and ptxas kept it. The emulator of tests/cpp has its own instead."""
    _, arch, _, sass, ptx = build
    for kernel, text in ptx.items():
        wanted = ORDER[re.match(r"[a-z]+_entry", kernel)[0], "sm_80" if arch == "sm_80" else "sm_90a"]
        for what, n in wanted.items():
            assert len(re.findall(re.escape(what) + r"(?![a-z_])", text)) >= n, (kernel, what)
            if what in MADE_OF:
                assert sass[kernel][MADE_OF[what]] >= n, (kernel, what)
