"""What nvcc makes of csrc/cuda, without a GPU: registers, spills, stack, shared memory (ptxas) and instructions (SASS)."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
BUILDS = [("router", "sm_80"), ("router", "sm_90a"), ("experts", "sm_90a")]


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
    """(file, architecture, what ptxas says per kernel, counts of instructions per kernel)"""
    name, arch = request.param
    cubin = tmp_path_factory.mktemp("cubin") / f"{name}.cubin"
    done = subprocess.run(
        [
            tool("nvcc"),
            "-std=c++17",
            "-O3",
            f"-arch={arch}",
            "-cubin",
            "-Xptxas",
            "-v",
            SOURCES / f"{name}.cu",
            "-o",
            cubin,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sass = subprocess.run([tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return name, arch, resources(done.stderr), instructions(sass)


def resources(text: str) -> dict[str, dict[str, int]]:
    result = {}
    for part in text.split("Compiling entry function")[1:]:
        kernel = re.search(r"\d+((?:gate|route|schedule|experts)_entry\w*?)E", part).group(1)
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
        result[kernel] = number
    return result


def instructions(sass: str) -> dict[str, collections.Counter]:
    """Counts per kernel, of instructions without their modifiers and, as "A.B", with the first one."""
    result = {}
    for part in sass.split("Function : ")[1:]:
        kernel = re.search(r"\d+((?:gate|route|schedule|experts)_entry\w*?)E", part).group(1)
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part, re.M)
        count = collections.Counter(i.split(".")[0] for i in found)
        count.update(".".join(i.split(".")[:2]) for i in found if "." in i)
        result[kernel] = count
    return result


def test_nothing_spills(build):
    name, _, resource, sass = build
    kernels = {"router": 4, "experts": 2}[name]
    assert len(resource) == len(sass) == kernels
    for kernel, used in resource.items():
        print(kernel, used)
        assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, kernel
        assert 0 < used["registers"] <= 255 and used["shared"] <= 48 * 1024
    for kernel, count in sass.items():
        assert count["LDL"] == count["STL"] == 0, kernel


def test_the_instructions_that_were_meant(build):
    name, arch, _, sass = build
    if name == "experts":
        for count in sass.values():
            assert (
                count["UBLKCP"] and count["SYNCS.PHASECHK"] and count["UBLKPF"]
            )  # bulk copies, their barriers, prefetch
            assert count["LDSM"] and count["HMMA"]  # fragments from shared memory, tensor cores
            assert count["ACQBULK"]  # waits for the launch before
        return
    assert sass["gate_entry"]["HMMA"] and sass["gate_entry"]["LDG"]
    for kernel, count in sass.items():
        if kernel.startswith("route_entry"):
            assert count["DFMA"]  # scores and sums in double
            # The gate and the cluster are in the same launch, where the chip has clusters.
            hopper = arch == "sm_90a"
            assert bool(count["HMMA"]) == bool(count["UCGABAR_ARV"]) == bool(count["UCGABAR_WAIT"]) == hopper
            assert bool(count["PREEXIT"]) == bool(count["ACQBULK"]) == hopper  # programmatic dependent launch
