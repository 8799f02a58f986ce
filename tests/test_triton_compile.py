"""Every Triton kernel compiles ahead of time for every chip, without spills and within the chip's shared memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOL = Path(__file__).resolve().parents[1] / "tools" / "triton_resources.py"
CHIPS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
LAYER = {
    32: ["gate_kernel", "route_kernel", "dense_up_kernel", "dense_down_kernel"],
    2048: ["gate_kernel", "route_kernel", "gathered_up_kernel", "gathered_down_kernel", "combine_kernel"],
}


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """resources(*arguments of the tool) -> rows. In its own process: under TRITON_INTERPRET nothing compiles here."""
    cache = str(tmp_path_factory.mktemp("triton"))  # kernels that two models share are compiled once

    def run(*arguments):
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, str(TOOL), "--json", *map(str, arguments)]
        done = subprocess.run(command, env={**env, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert rows and done.returncode in (0, 1), done.stderr
        return rows

    return run


# Bytes that a newer compiler spills where Triton 3.6's has none: by Triton's version, chip and kernel.
SPILLED = {
    ("3.8", "sm_80", "gate_kernel"): 8,
    ("3.8", "sm_80", "hidden_gradient_kernel"): 168,  # of int4
}


def check(rows):
    print(f"\n{'chip':7} {'model':8} {'tokens':>6} {'kernel':22} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>7}")
    for row in rows:
        print("{chip:7} {model:8} {tokens:6} {kernel:22} {warps:5} {registers:5} {spills:6} {shared:7}".format(**row))
    version = importlib.metadata.version("triton").rsplit(".", 1)[0]
    assert [row for row in rows if row["spills"] > SPILLED.get((version, row["chip"], row["kernel"]), 0)] == []
    assert [row for row in rows if row["shared"] > row["limit"]] == []


@pytest.mark.parametrize("model", ["mini", "flash"])
@pytest.mark.parametrize("chip", CHIPS)
def test_layer(resources, chip, model):
    """Latency and throughput form of the layer: four launches and five, two of them the router's."""
    rows = resources("--target", chip, "--model", model, "--tokens", *LAYER)
    for tokens, kernels in LAYER.items():
        assert [row["kernel"] for row in rows if row["tokens"] == tokens] == kernels
    check(rows)
    products = [row for row in rows if row["kernel"].endswith(("up_kernel", "down_kernel"))]
    assert all(row["mma"] for row in products)
    if chip == "sm_90":
        assert all("wgmma" in row["mma"] for row in products)


@pytest.mark.parametrize("chip", CHIPS)
def test_quantised_weights(resources, chip):
    formats = ["fp8", "int8", "int4"]
    rows = resources("--target", chip, "--weights", *formats, "--tokens", *LAYER)
    products = [row for row in rows if row["kernel"].endswith(("up_kernel", "down_kernel"))]
    assert [row["weights"] for row in products] == [form for _ in LAYER for form in formats for _ in "ud"]
    assert all(row["mma"] for row in products)
    check(rows)


GRADIENT = {"hidden_gradient_kernel", "token_gradient_kernel", "combine_gradient_kernel", "weight_gradient_kernel"}


def test_ops(resources):
    """block_route, and moe_experts with its gradient, by themselves."""
    rows = resources("--target", "sm_90", "--ops", "--tokens", 32, 2048)
    assert {"mark_kernel", "order_kernel", "route_kernel"} | GRADIENT <= {row["kernel"] for row in rows}
    assert all(row["mma"] for row in rows if row["kernel"] in GRADIENT - {"combine_gradient_kernel"})
    check(rows)


def test_pools(resources):
    """Blocks that share a pool, two launches, and blocks with coresets passed in, one."""
    rows = resources("--target", "sm_90", "--pools", "--tokens", 128)
    assert [row["kernel"] for row in rows] == ["votes_kernel", "route_kernel"] * 3 + ["route_kernel"]
    check(rows)


@pytest.mark.parametrize("chip, dtype", [("sm_80", "float16"), ("gfx942", "bfloat16"), ("sm_90", "float32")])
def test_gradient(resources, chip, dtype):
    rows = resources("--target", chip, "--ops", "--tokens", 2048, "--dtype", dtype)
    check([row for row in rows if row["kernel"] in GRADIENT])


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_gradient_of_quantised_weights(resources, chip):
    rows = resources("--target", chip, "--ops", "--weights", "fp8", "int8", "int4", "--tokens", 2048)
    check([row for row in rows if row["kernel"] in GRADIENT])


def test_other_routings(resources):
    """Softmax, no groups, a block of 256 tokens; 512 experts and 32 of them per token; float32."""
    check(resources("--target", "sm_90", "--model", "llada_moe", "gemma", "--tokens", 256))
    check(resources("--target", "sm_90", "--model", "wide", "--tokens", 128))
    check(resources("--target", "sm_90", "--dtype", "float32", "--tokens", 32))


@pytest.mark.parametrize("chip", CHIPS)
def test_decoder_ops(resources, chip):
    """A launch for each norm and for each layer's heads; two for attention of few heads, and for the choice of tokens."""
    rows = resources("--target", chip, "--decoder", "--tokens", 32)
    names = [row["kernel"] for row in rows]
    attention = ["attention_kernel", "combine_kernel", "attention_kernel"]
    heads = ["qk_norm_rope_kernel"] * 2
    step = ["count_kernel", "unmask_kernel", "greedy_kernel", "greedy_merge_kernel"]
    assert names == ["add_rms_norm_kernel", *heads, *attention, *step]
    check(rows)
