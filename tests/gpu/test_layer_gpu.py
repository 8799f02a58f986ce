"""What the Triton and the CUDA backend have in common on a real GPU, at LLaDA2.0-mini's size. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from mini_on_gpu import POLICIES, E, activations, calibrated, distance, expert_sum, same_routing, weights, why_no_cuda

from dmoe_ops import BlockRouting, block_moe, block_route, moe_experts, reference

__all__ = ["weights"]  # a fixture
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; there is none here"),
    pytest.mark.usefixtures("gpu_backend"),
]


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request, monkeypatch):
    if request.param == "cuda" and (why := why_no_cuda()):
        pytest.skip(why)
    monkeypatch.setenv("DMOE_BACKEND", request.param)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_routing_of_the_models_size(name, seed):
    routing = BlockRouting.policy(name)
    for tokens in (1, 32, 45, 512, 2048):
        logits = calibrated(tokens, seed=seed)
        bias = torch.randn(E, generator=torch.Generator().manual_seed(seed)) * 0.1
        if seed == 2:  # ties, NaN and the infinite
            logits = (logits * 2).round() / 2
            logits[::7, ::5], logits[::3, 1], logits[::4, 2] = float("nan"), float("inf"), float("-inf")
        got = block_route(logits.cuda(), bias.cuda(), routing=routing)
        same_routing(got, reference.block_route(logits, bias, routing=routing))


def test_ragged_blocks():
    offsets = torch.tensor([0, 1, 33, 40, 72, 100], dtype=torch.int32)
    logits, routing = calibrated(100), BlockRouting()
    got = block_route(logits.cuda(), routing=routing, block_offsets=offsets.cuda())
    same_routing(got, reference.block_route(logits, routing=routing, block_offsets=offsets))


@pytest.mark.parametrize(
    "settings", [dict(choose="pool"), dict(pool_capacity=48), dict(pool_capacity=48, choose="pool")]
)
def test_a_layer_whose_blocks_share_a_pool(weights, settings):
    """`cuda` leaves these to Triton."""
    routing, domains = BlockRouting(**settings), torch.tensor([0, 1, 5, 5, 8])
    x = activations(256)
    y, routed, logits = block_moe(x, *weights, routing=routing, domain_offsets=domains.cuda())
    same_routing(routed, reference.block_route(logits.cpu(), weights[1].cpu(), routing=routing, domain_offsets=domains))
    same_routing(routed, block_route(logits, weights[1], routing=routing, domain_offsets=domains.cuda()))
    given = block_moe(x, *weights, routing=routing, coreset_ids=routed.coreset_ids)
    same_routing(given[1], routed)
    assert torch.equal(given[0], y)


@pytest.mark.parametrize("tokens", [1, 19, 32, 45, 64, 128, 512, 1024, 2048])
@pytest.mark.parametrize("name", ["dmoe", "token"])
def test_layer(weights, tokens, name):
    """Against float32, at most twice as far as torch in bf16; the routing is that of the logits that came out. Above 64
    tokens cuda leaves the experts to Triton."""
    x, routing = activations(tokens), BlockRouting.policy(name)
    y, routed, logits = block_moe(x, *weights, routing=routing)
    torch.testing.assert_close(logits, x.float() @ weights[0].float().T, rtol=1e-4, atol=1e-4)
    same_routing(routed, reference.block_route(logits.cpu(), weights[1].cpu(), routing=routing))
    ids, scale = routed.topk_ids, routed.topk_weights
    want = expert_sum(x, weights, ids, scale, torch.float32)
    torch_bf16 = expert_sum(x, weights, ids, scale, torch.bfloat16)
    assert distance(y, want) <= 2 * distance(torch_bf16, want)
    alone = moe_experts(x, weights[2], weights[3], ids, scale)
    assert distance(alone, expert_sum(x, (*weights[:4], None, None), ids, scale, torch.float32)) <= 0.01


@pytest.mark.parametrize("tokens", [1, 32, 64, 512])
def test_gelu_tanh(weights, tokens):
    """As `test_layer`; ids in int64 give the bits of int32."""
    x, how = activations(tokens), dict(activation="gelu_tanh")
    y, routed, _ = block_moe(x, *weights, routing=BlockRouting(), **how)
    ids, scale = routed.topk_ids, routed.topk_weights
    want = expert_sum(x, weights, ids, scale, torch.float32, **how)
    torch_bf16 = expert_sum(x, weights, ids, scale, torch.bfloat16, **how)
    assert distance(y, want) <= 2 * distance(torch_bf16, want)
    alone = [moe_experts(x, weights[2], weights[3], i, scale, **how) for i in (ids, ids.long())]
    assert torch.equal(*alone)
    assert distance(alone[0], expert_sum(x, (*weights[:4], None, None), ids, scale, torch.float32, **how)) <= 0.01


def test_compile_without_graph_breaks(weights):
    routing, x = BlockRouting(), activations(32)

    def layer(x):
        return block_moe(x, *weights, routing=routing)[0] * 2

    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
