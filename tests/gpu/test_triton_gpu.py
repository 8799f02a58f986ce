"""The Triton backend on a real GPU: real shapes; races in test_races_gpu.py. Skipped without one."""

from __future__ import annotations

import itertools

import pytest
import torch

from dmoe_ops import BlockRouting, _library, block_moe, block_route, moe_experts, reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; there is none here"),
    pytest.mark.usefixtures("triton_backend"),
]

H, I, E = 2048, 512, 256  # LLaDA2.0-mini
POLICIES = ("dmoe", "token", "top4", "des_seq", "des_vote", "capacity")


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", "triton")


@pytest.fixture(scope="module")
def weights():
    """gate, bias, w13, w2, shared_w13, shared_w2 in bf16."""
    torch.manual_seed(0)

    def filled(*shape):
        return (torch.randn(shape, device="cuda", dtype=torch.bfloat16)) * shape[-1] ** -0.5

    bias = torch.randn(E, device="cuda") * 0.05
    return filled(E, H), bias, filled(E, 2 * I, H), filled(E, H, I), filled(2 * I, H), filled(H, I)


def calibrated(tokens, block=32, seed=0):
    """Logits with the statistics of LLaDA2.0-mini, [T, E] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block)
    common = torch.randn(blocks, 1, E, generator=generator)
    return (-1 + 1.2 * common + torch.randn(blocks, block, E, generator=generator)).flatten(0, 1)[:tokens]


def activations(tokens, seed=0):
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def same_routing(got, want):
    """ids and coresets to the bit. The GPU's exp in float64 may differ from the CPU's in its last bit, which moves a
    float32 score once in about 2^29."""
    for name in ("coreset_sizes", "coreset_ids", "topk_ids"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name).cpu()), name
    torch.testing.assert_close(got.topk_weights.cpu(), want.topk_weights.cpu(), rtol=1e-6, atol=1e-9)


def distance(got, want):
    assert got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_routing_of_the_models_size(name, seed):
    routing = BlockRouting.policy(name)
    for tokens in (1, 32, 45, 512):
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


@pytest.mark.parametrize("tokens", [1, 32, 45, 128, 512, 2048])
@pytest.mark.parametrize("name", ["dmoe", "token"])
def test_layer(weights, tokens, name):
    """Against float32, at most twice as far as torch in bf16; the routing is that of the logits that came out."""
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


def expert_sum(x, weights, ids, scale, dtype):
    """The experts by plain torch in a dtype."""
    x = x.to(dtype)
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        if e >= 0:
            rows, slots = (ids == e).nonzero(as_tuple=True)
            out = reference.mlp(x[rows], weights[2][e], weights[3][e])
            y.index_add_(0, rows, out * scale[rows, slots, None].to(dtype))
    return y if weights[4] is None else y + reference.mlp(x, weights[4], weights[5])


@pytest.mark.parametrize("tokens", [1, 45, 512])
def test_gradients(weights, tokens):
    """Against autograd in float32, at most twice as far as autograd in bf16."""
    x = activations(tokens)
    routed = reference.block_route(calibrated(tokens), routing=BlockRouting())
    ids, scale, d_y = routed.topk_ids.cuda(), routed.topk_weights.cuda(), activations(tokens, seed=1)

    def gradients(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weights[2], weights[3])]
        leaves.append(scale.clone().requires_grad_())
        function(*leaves).backward(d_y.to(dtype))
        return [leaf.grad for leaf in leaves]

    def plain(x, w13, w2, scale):
        return expert_sum(x, (None, None, w13, w2, None, None), ids, scale, x.dtype)

    want, torch_bf16 = gradients(plain, torch.float32), gradients(plain, torch.bfloat16)
    for _ in range(2):  # the second time, its launches are repeated
        got = gradients(lambda x, w13, w2, scale: moe_experts(x, w13, w2, ids, scale), torch.bfloat16)
        for mine, truth, other in zip(got, want, torch_bf16):
            assert distance(mine, truth) <= 2 * distance(other, truth)


def all_ops(x, weights, routing):
    y, routed, logits = block_moe(x, *weights, routing=routing)
    alone = moe_experts(x, weights[2], weights[3], routed.topk_ids, routed.topk_weights)
    return y, *routed, logits, alone, *block_route(logits, weights[1], routing=routing)


def test_repeated_launches(weights, monkeypatch):
    """Shapes that take turns, on two streams and in a CUDA graph: to the bit what Triton's own launches give."""
    from dmoe_ops.triton_kernels import launch

    routing, xs = BlockRouting(), [activations(tokens, seed) for seed, tokens in enumerate((32, 45, 512, 32))]
    assert launch.REPEATS and _library.nobody_listens(*xs, *weights)
    with monkeypatch.context() as plain:
        plain.setattr(launch, "REPEATS", False)
        want = [all_ops(x, weights, routing) for x in xs]
    launch._plans.clear()
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()]
    torch.cuda.synchronize()
    got = []
    for x, stream in zip(xs * 6, itertools.cycle(streams)):
        with torch.cuda.stream(stream):
            got.append(all_ops(x, weights, routing))
    torch.cuda.synchronize()
    for mine, theirs in zip(got, itertools.cycle(want)):
        assert all(map(torch.equal, mine, theirs))
    assert len(launch._plans) == 3 * 3 and all(launch._plans.values())

    x, graph = torch.zeros_like(xs[0]), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_ops(x, weights, routing)
    for given, theirs in ((xs[0], want[0]), (xs[3], want[3])):
        x.copy_(given)
        graph.replay()
        assert all(map(torch.equal, captured, theirs))


def test_compile_without_graph_breaks(weights):
    routing, x = BlockRouting(), activations(32)

    def layer(x):
        return block_moe(x, *weights, routing=routing)[0] * 2

    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("tokens, kernels", [(32, 4), (512, 5)])
def test_launches(weights, tokens, kernels):
    """The profiler sees two kernels of the router, two of the experts, one that adds up their rows, and nothing else."""
    x, routing = activations(tokens), BlockRouting()
    block_moe(x, *weights, routing=routing)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        block_moe(x, *weights, routing=routing)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [name for name in names if not name.startswith(("Memcpy", "Activity"))]
    assert len(names) == kernels, names
