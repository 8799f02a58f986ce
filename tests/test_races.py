"""Races in csrc/cuda that no run of a GPU has to hit: layers in a stream, on few thread blocks, run by the emulator, which
knows of any two accesses whether something orders them. tools/take_out.py takes out every barrier, wait and fence, and
expects `check` to fail. tests/cpp/faults.cpp holds a planted fault of every kind that the emulator is there to find."""

from __future__ import annotations

import ctypes

import emulated
import pytest
import torch

from dmoe_ops import BlockRouting, reference
from dmoe_ops.quantize import quantize

ROUTE = dict(top_k=3, n_group=4, topk_group=2, min_experts=6)
# hidden, inner, shared, experts; offsets of the blocks; settings of the routing; how it is launched
LAYERS = {
    # Two tiles of tokens and of experts per thread block of the gate, more members than lanes, several tokens per warp;
    # one block, so no launch between the layers.
    "one block": (
        (64, 32, 32, 72),
        [0, 34],
        dict(block_size=34, score="softmax") | ROUTE | dict(min_experts=40),
        dict(cluster=2, ctas=3),
    ),
    # The blocks add up their experts; two clusters at a time, and fewer thread blocks than tiles.
    "many blocks": (
        (128, 64, 0, 40),
        [0, 7, 8, 14, 20],
        dict(block_size=8, aggregate="max", select="top_n", capacity=4, **ROUTE),
        dict(cluster=2, ctas=3, rows=128, splits=3, resident=4),
    ),
    "more blocks than fit": (
        (64, 32, 64, 48),
        [0, 3, 6, 9],
        dict(block_size=4, select="nonzero", aggregate="union", union_k=2, **ROUTE),
        dict(cluster=1, two_launches=True, ctas=2, splits=8, stages=2, resident=1),
    ),
}
BARE = {
    "bare ids": (dict(ctas=3, splits=3, resident=2), torch.float16),
    "ids of one block": (dict(ctas=1), torch.bfloat16),
}


def normal(*shape, dtype=torch.bfloat16):
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def within(y, want):
    """Within a few roundings of y's dtype."""
    assert y.isfinite().all()
    assert (y.double() - want).norm() <= 2 * torch.finfo(y.dtype).eps * want.norm()


def check_layers(emulator, name: str, seed: int) -> None:
    """Two layers in a stream on one schedule and one workspace, each on what the one before it wrote. With several
    blocks one layer: a launch that clears what they add up keeps layers apart."""
    (hidden, inner, shared, experts), offsets, settings, how = LAYERS[name]
    torch.manual_seed(seed)
    routing, tokens, n = BlockRouting(num_experts=experts, **settings), offsets[-1], 2 if len(offsets) == 2 else 1
    bias, offsets = torch.randn(experts) * 0.05, torch.tensor(offsets, dtype=torch.int32)
    x = [normal(tokens, hidden) * hidden**0.5, *(torch.full((tokens, hidden), torch.nan).bfloat16() for _ in range(n))]
    weights = []
    for _ in range(n):
        of_shared = (normal(2 * shared, hidden), normal(hidden, shared)) if shared else (None, None)
        w13, w2 = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner) * 2  # h comes out small
        weights.append((normal(experts, hidden), w13, w2, *of_shared))
    logits = [torch.full((tokens, experts), torch.nan) for _ in range(n)]
    out = [emulated.outputs(tokens, len(offsets) - 1, routing) for _ in range(n)]
    schedule, workspace, routers, layers = emulator.schedule_of(experts), None, [], []
    for i, (gate, *of_experts) in enumerate(weights):
        tensors = x[i], *of_experts, out[i].topk_ids, out[i].topk_weights, schedule
        if workspace is None:
            workspace = emulator.workspace_of(emulator.experts(*tensors))
        routers.append(emulator.router(logits[i], bias, offsets, out[i], schedule, tokens, x[i], gate))
        layers.append(emulator.experts(*tensors, workspace, x[i + 1]))
    emulator.run_layers(routers, layers, routing, emulated.form(seed=seed, **how))
    for i, (gate, w13, w2, shared_w13, shared_w2) in enumerate(weights):
        exact, size = x[i].double() @ gate.double().T, x[i].double().abs() @ gate.double().abs().T
        assert ((logits[i] - exact).abs() <= 2e-6 * size).all()
        routed = reference.block_route(logits[i], bias, routing=routing, block_offsets=offsets)
        for field in ("coreset_sizes", "coreset_ids", "topk_ids"):
            assert torch.equal(getattr(out[i], field), getattr(routed, field)), field
        wide = [t.double() for t in (x[i], w13, w2)]
        want = reference.moe_experts(*wide, routed.topk_ids, routed.topk_weights.double())
        within(x[i + 1], want if not shared else want + reference.mlp(wide[0], shared_w13.double(), shared_w2.double()))


def check_bare(emulator, name: str, seed: int) -> None:
    """Experts on ids that came without the router: -1, twice the same, out of range."""
    how, dtype = BARE[name]
    torch.manual_seed(seed)
    x, w13, w2 = normal(5, 64, dtype=dtype), normal(7, 64, 64, dtype=dtype), normal(7, 64, 32, dtype=dtype)
    ids, weights = torch.tensor([[0, 4], [6, 6], [-1, -1], [99, 4], [-7, 0]], dtype=torch.int32), torch.rand(5, 2)
    schedule, y = emulator.schedule_of(7), torch.full_like(x, torch.nan)
    tensors = x, w13, w2, None, None, ids, weights, schedule
    workspace = emulator.workspace_of(emulator.experts(*tensors))
    emulator.run_experts(emulator.experts(*tensors, workspace, y), False, emulated.form(seed=seed, **how))
    valid = torch.where((ids >= 0) & (ids < 7), ids, -1)
    within(y, reference.moe_experts(x.double(), w13.double(), w2.double(), valid, weights.double()))


def check_fp8(emulator, seed: int) -> None:
    """Experts in fp8: stages, and the scales in them, that are used again."""
    torch.manual_seed(seed)
    x, w13, w2 = normal(5, 1088), normal(7, 64, 1088), normal(7, 1088, 32)
    ids, weights = torch.tensor([[0, 4], [6, 6], [-1, -1], [2, 4], [3, 0]], dtype=torch.int32), torch.rand(5, 2)
    (w13, of_w13), (w2, of_w2) = quantize(w13, "fp8", halves=2), quantize(w2, "fp8")
    of_w13 *= torch.rand(of_w13.shape) + 0.5
    schedule, y, scales = emulator.schedule_of(7), torch.full_like(x, torch.nan), (of_w13, of_w2, None, None)
    tensors = x, w13, w2, None, None, ids, weights, schedule
    workspace = emulator.workspace_of(emulator.experts(*tensors))
    how = emulated.form(seed=seed, ctas=2, stages=2, splits=3)
    emulator.run_experts(emulator.experts(*tensors, workspace, y, scales), False, how)
    wide = reference.dequantize(w13, of_w13, halves=2).double(), reference.dequantize(w2, of_w2).double()
    within(y, reference.moe_experts(x.double(), *wide, ids, weights.double()))


def check(emulator, seeds=(0, 1)) -> None:
    """All of it; raises AssertionError. For tools/take_out.py."""
    for seed in seeds:
        check_fp8(emulator, seed)
        for name in BARE:
            check_bare(emulator, name, seed)
        for name in LAYERS:
            check_layers(emulator, name, seed)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(2))
def test_layers_in_a_stream(emulator, name, seed):
    check_layers(emulator, name, seed)


def test_experts_in_fp8(emulator):
    check_fp8(emulator, 0)


@pytest.mark.parametrize("name", BARE)
def test_ids_without_the_router(emulator, name):
    check_bare(emulator, name, 0)


FAULTS = {
    "none": None,
    "no barrier": "nothing orders this after thread",
    "shuffle for a barrier": "nothing orders this after thread",
    "write after read": "nothing orders this after thread",
    "atomic without order": "nothing orders this after thread",
    "no wait for the launch before": "nothing orders this after thread",
    "remote before start": "nothing orders this after the start of block",
    "remote after exit": "leaves while thread",
    "waits for a block that does not fit": "deadlock",
    "copy of what no fence followed": "without a fence for the copy engine",
    "copy that nobody waits for": "a copy into block 0",
    "barrier without its fence": "whose initialisation no fence followed",
    "past the end": "past the end of shared memory",
    "lanes apart": "lanes of a warp meet in different instructions",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    if emulated.compiler() is None:
        pytest.skip("tests/cpp needs a C++ compiler")
    library = emulated.build(tmp_path_factory.mktemp("faults"), "faults.cpp")
    library.run_fault.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_emulator_finds(faults, name, seed):
    found = faults.run_fault(name.encode(), seed)
    if FAULTS[name] is None:
        assert found is None
    else:
        assert found is not None and FAULTS[name] in found.decode()
