"""Micro-cases of the ops for pytest-benchmark: `make bench`. For ratios and rooflines see `dmoe bench`."""

from __future__ import annotations

import pytest
import torch
from dmoe_ops.bench import cases

import dmoe_ops

MODEL = cases.MODELS["llada2-mini"]


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def weights():
    return cases.random_weights(MODEL, torch.bfloat16, "cpu", seed=0)


@pytest.mark.parametrize("policy", ["token", "dmoe", "capacity"])
@pytest.mark.parametrize("tokens", [32, 256])
def test_route(benchmark, policy, tokens):
    case = cases.calibrated_case(policy, MODEL, MODEL.routing(policy), tokens, torch.bfloat16, "cpu", seed=0)
    benchmark(lambda: dmoe_ops.block_route(case.logits, case.expert_bias, routing=case.routing))


@pytest.mark.parametrize("unique", [8, 15, 70])
def test_experts(benchmark, weights, unique):
    case = cases.forced_case("", MODEL, MODEL.routing("dmoe"), 32, unique, torch.bfloat16, "cpu", seed=0)
    routed = dmoe_ops.block_route(case.logits, case.expert_bias, routing=case.routing)
    benchmark(lambda: dmoe_ops.moe_experts(case.x, weights.w13, weights.w2, *routed[:2]))


@pytest.mark.parametrize("policy", ["token", "dmoe"])
def test_layer(benchmark, weights, policy):
    case = cases.calibrated_case(policy, MODEL, MODEL.routing(policy), 32, torch.bfloat16, "cpu", seed=0)
    benchmark(lambda: dmoe_ops.block_moe(case.x, **weights._asdict(), routing=case.routing))
