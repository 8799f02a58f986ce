"""The library without Python: it installs, CMake finds it, and the example computes what the reference does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dmoe_ops import BlockRouting, reference

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the example prints, linked to the installed library. Without CUDA: test_cuda_build.py compiles that."""
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"the C++ library needs {tool}")
    folder = tmp_path_factory.mktemp("cpp")
    env = {**os.environ, "DMOE_BUILD_CUDA": "0"}

    def run(*command):
        done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("cmake", "-S", ROOT, "-B", folder / "library", "-GNinja", "-DDMOE_PYTHON=OFF")
    run("cmake", "--build", folder / "library")
    run("cmake", "--install", folder / "library", "--prefix", folder / "prefix")
    run(
        "cmake",
        "-S",
        ROOT / "examples/cpp",
        "-B",
        folder / "example",
        "-GNinja",
        f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}",
    )
    run("cmake", "--build", folder / "example")
    return run(folder / "example" / "layer").splitlines()


def test_the_example_runs_the_layer(said):
    tokens, hidden, inner, experts, k = 32, 64, 32, 16, 4

    def wave(step, *shape):
        return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().view(shape)

    routing = BlockRouting(num_experts=experts, top_k=k, block_size=tokens, n_group=4, topk_group=2, min_experts=6)
    y, routed, _ = reference.block_moe(
        wave(0.7, tokens, hidden),
        wave(1.3, experts, hidden),
        None,
        wave(0.9, experts, 2 * inner, hidden),
        wave(1.1, experts, hidden, inner),
        None,
        None,
        routing=routing,
    )
    coreset = routed.coreset_ids[0, : routed.coreset_sizes[0]].tolist()
    assert said[0].split() == ["coreset:", *map(str, coreset)]
    assert float(said[1].removeprefix("mean |y|:")) == pytest.approx(y.abs().mean().item(), rel=1e-4)
