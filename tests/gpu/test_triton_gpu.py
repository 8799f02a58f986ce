"""The Triton backend on a real GPU: gradients and launches. Layers: test_layer_gpu.py; races: test_races_gpu.py."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from mini_on_gpu import activations, calibrated, distance, expert_sum, kernels_of, weights

from dmoe_ops import BlockRouting, _library, block_moe, block_route, moe_experts, reference

__all__ = ["weights"]  # a fixture
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; there is none here"),
    pytest.mark.usefixtures("triton_backend"),
]


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", "triton")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 45, 512])
def test_gradients(weights, tokens, activation):
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
        return expert_sum(x, (None, None, w13, w2, None, None), ids, scale, x.dtype, activation)

    def ours(x, w13, w2, scale, **how):
        return moe_experts(x, w13, w2, ids, scale, **how)

    want, torch_bf16 = gradients(plain, torch.float32), gradients(plain, torch.bfloat16)
    for _ in range(2):  # the second time, its launches are repeated
        got = gradients(functools.partial(ours, activation=activation), torch.bfloat16)
        for mine, truth, other in zip(got, want, torch_bf16):
            assert distance(mine, truth) <= 2 * distance(other, truth)


def all_ops(x, weights, routing):
    y, routed, logits = block_moe(x, *weights, routing=routing)
    alone = moe_experts(x, weights[2], weights[3], routed.topk_ids, routed.topk_weights)
    return y, *routed, logits, alone, *block_route(logits, weights[1], routing=routing)


def test_repeated_launches(weights, monkeypatch):
    """Shapes that take turns, on two streams and in a CUDA graph: to the bit what Triton's own launches give."""
    from dmoe_ops.triton_kernels import launch

    routing, xs = BlockRouting(), [activations(tokens, seed=seed) for seed, tokens in enumerate((32, 45, 512, 32))]
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


@pytest.mark.parametrize("tokens, kernels", [(32, 4), (512, 5)])
def test_launches(weights, tokens, kernels):
    """The profiler sees two kernels of the router, two of the experts, one that adds up their rows, and nothing else."""
    x, routing = activations(tokens), BlockRouting()
    names = kernels_of(lambda: block_moe(x, *weights, routing=routing))
    names = [name for name in names if not name.startswith("Memcpy")]
    assert len(names) == kernels, names
