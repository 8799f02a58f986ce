"""The CUDA expert kernel's own code, run thread by thread on the CPU (tests/cpp/emulate.h), against the reference."""

from __future__ import annotations

import ctypes

import emulated
import pytest
import torch
from pools import in_a_pool

from dmoe_ops import BlockRouting, reference
from dmoe_ops import layer as layers
from dmoe_ops.formats import NOT_LOADED, ExpertWeights
from dmoe_ops.quantize import quantize


def layer(tokens, hidden, inner, experts, top_k, shared, dtype=torch.bfloat16, used=None):
    """x, w13, w2, shared_w13, shared_w2, ids, weights; only the first `used` experts are chosen."""
    w13 = torch.randn(experts, 2 * inner, hidden).to(dtype) / hidden**0.5
    w2 = torch.randn(experts, hidden, inner).to(dtype) / inner**0.5
    shared_w13 = torch.randn(2 * shared, hidden).to(dtype) / hidden**0.5 if shared else None
    shared_w2 = torch.randn(hidden, shared).to(dtype) / shared**0.5 if shared else None
    ids = torch.rand(tokens, used or experts).argsort(1)[:, :top_k].int()
    return torch.randn(tokens, hidden).to(dtype), w13, w2, shared_w13, shared_w2, ids, torch.rand(tokens, top_k)


def run(
    emulator,
    x,
    w13,
    w2,
    shared_w13,
    shared_w2,
    ids,
    weights,
    *,
    scales=(None,) * 4,
    expert_map=None,
    scheduled=False,
    activation="silu",
    **how,
):
    """y, and how many bytes of weights were copied."""
    y = torch.full_like(x, torch.nan)
    schedule = emulator.schedule_of(len(w13 if expert_map is None else expert_map))
    tensors = x, w13, w2, shared_w13, shared_w2, ids, weights, schedule
    workspace = emulator.workspace_of(emulator.experts(*tensors, expert_map=expert_map))
    args = emulator.experts(*tensors, workspace, y, scales, expert_map, activation)
    emulator.run_experts(args, scheduled, emulated.form(**how))
    assert (workspace[-64:] == 255).all()
    return y, emulator.totals()[3]


def check(y, x, w13, w2, shared_w13, shared_w2, ids, weights, activation="silu"):
    """Within a few roundings to the dtype: h is rounded once, y once."""
    wide = [None if t is None else t.double() for t in (x, w13, w2, shared_w13, shared_w2)]
    expected = reference.moe_experts(*wide[:3], ids, weights.double(), activation=activation)
    if shared_w13 is not None:
        expected += reference.mlp(wide[0], wide[3], wide[4], activation=activation)
    step = torch.finfo(x.dtype).eps
    assert y.isfinite().all()
    assert (y.double() - expected).norm() <= step * expected.norm() + 1e-30
    assert ((y.double() - expected).abs() <= 4 * step * (expected.abs() + expected.abs().mean())).all()


CASES = {
    "one block": dict(tokens=32, hidden=320, inner=96, experts=12, top_k=4, shared=32),
    "two blocks": dict(tokens=64, hidden=128, inner=64, experts=9, top_k=2, shared=64),
    "odd": dict(tokens=19, hidden=64, inner=32, experts=7, top_k=3, shared=0),
    "one token": dict(tokens=1, hidden=192, inner=288, experts=5, top_k=5, shared=320),
    "large shared": dict(tokens=5, hidden=64, inner=32, experts=3, top_k=1, shared=544),
    "wide tiles": dict(tokens=33, hidden=384, inner=64, experts=9, top_k=2, shared=192),
    "wide tiles, none shared": dict(tokens=7, hidden=128, inner=320, experts=4, top_k=3, shared=0),
    "fp16": dict(tokens=17, hidden=128, inner=32, experts=6, top_k=2, shared=32, dtype=torch.float16),
    "few used": dict(tokens=33, hidden=64, inner=64, experts=40, top_k=2, shared=32, used=3),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(emulator, name):
    torch.manual_seed(len(name))
    tensors = layer(**CASES[name])
    _, w13, w2, shared_w13, shared_w2, ids, _ = tensors
    y, copied = run(emulator, *tensors, rows=128 if name.startswith("wide") else 64)
    check(y, *tensors)
    # Every byte of every used weight is copied once: tiles cover the weights and do not overlap.
    wanted = len(ids.unique()) * (w13[0].nbytes + w2[0].nbytes)
    if shared_w13 is not None:
        wanted += shared_w13.nbytes + shared_w2.nbytes
    assert copied == wanted


@pytest.mark.parametrize("name", ["two blocks", "odd", "wide tiles", "fp16"])
def test_gelu_tanh(emulator, name):
    torch.manual_seed(len(name))
    tensors = layer(**CASES[name])
    tensors[0].mul_(3)
    rows = 128 if name.startswith("wide") else 64
    y, _ = run(emulator, *tensors, rows=rows, activation="gelu_tanh")
    check(y, *tensors, activation="gelu_tanh")
    assert not torch.equal(y, run(emulator, *tensors, rows=rows)[0])


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize(["ctas", "stages", "rows"], [(1, 2, 64), (2, 8, 64), (7, 3, 64), (2, 2, 128)])
def test_any_launch_shape(emulator, ctas, stages, rows, splits):
    """More parts than chunks, fewer thread blocks than tiles and more: the same result."""
    torch.manual_seed(1)
    tensors = layer(tokens=9, hidden=128, inner=64, experts=6, top_k=2, shared=64)
    y, _ = run(emulator, *tensors, ctas=ctas, stages=stages, rows=rows, splits=splits)
    check(y, *tensors)


def test_deterministic(emulator):
    """The bits do not depend on the order in which threads, thread blocks and copies get on."""
    torch.manual_seed(2)
    tensors = layer(tokens=12, hidden=128, inner=64, experts=6, top_k=2, shared=32)
    first, _ = run(emulator, *tensors, ctas=5, splits=3)
    for seed in range(1, 6):
        assert torch.equal(run(emulator, *tensors, ctas=1 + seed, stages=2 + seed % 3, splits=3, seed=seed)[0], first)


def test_slots_without_an_expert(emulator):
    torch.manual_seed(3)
    x, w13, w2, shared_w13, shared_w2, ids, weights = layer(
        tokens=10, hidden=64, inner=32, experts=4, top_k=3, shared=32
    )
    ids[0], ids[1, 1:], ids[2, 0] = -1, -1, ids[2, 1]  # none, one, and the same expert twice
    tensors = x, w13, w2, shared_w13, shared_w2, ids, weights
    check(run(emulator, *tensors)[0], *tensors)
    ids[:] = -1
    check(run(emulator, *tensors)[0], *tensors)
    y, _ = run(emulator, x, w13, w2, None, None, ids, weights)
    assert (y == 0).all()


def test_an_overflow_stays_with_the_tokens_that_chose_the_expert(emulator):
    torch.manual_seed(4)
    x, w13, w2, *_, weights = layer(tokens=8, hidden=64, inner=32, experts=3, top_k=1, shared=0)
    w13[2] = 1e30  # the product of gate and up leaves fp32
    ids = torch.tensor([[0], [1], [2], [0], [1], [0], [1], [0]], dtype=torch.int32)
    y, _ = run(emulator, x, w13, w2, None, None, ids, weights)
    assert y[[0, 1, 3, 4, 5, 6, 7]].isfinite().all() and not y[2].isfinite().any()


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_in_any_order_change_no_bit(emulator, fp8):
    torch.manual_seed(5)
    sizes = dict(tokens=17, hidden=192, inner=96, experts=9, top_k=3, shared=32)
    (x, w13, w2, *rest), scales, _ = fp8_layer(**sizes) if fp8 else (layer(**sizes), [None] * 4, None)
    stacks = dict(w13=w13, w2=w2, w13_scale=scales[0], w2_scale=scales[1])
    y, copied = run(emulator, x, w13, w2, *rest, scales=scales)
    for seed in range(3):
        pools, expert_map = in_a_pool({name: stack for name, stack in stacks.items() if stack is not None}, seed)
        mapped = [pools.get("w13_scale"), pools.get("w2_scale"), *scales[2:]]
        again = run(emulator, x, pools["w13"], pools["w2"], *rest, scales=mapped, expert_map=expert_map)
        assert torch.equal(again[0], y) and again[1] == copied


@pytest.mark.parametrize("tokens", [16, 24])  # one block, and two
def test_a_layer_with_an_expert_map(emulator, monkeypatch, tokens):
    """Whole and in halves: the bits of the layer without a map; what is elsewhere adds nothing."""
    emulated.Backend(emulator, emulated.form(cluster=2, ctas=3)).install(monkeypatch)
    torch.manual_seed(6)
    x, w13, w2, *shared, _, _ = layer(tokens=tokens, hidden=64, inner=32, experts=12, top_k=3, shared=32)
    routing = BlockRouting(num_experts=12, top_k=3, block_size=16, n_group=3, topk_group=2, min_experts=5)
    gate, bias = torch.randn(12, 64), torch.randn(12) / 10
    y, result, _ = layers.block_moe(x, gate, bias, w13, w2, *shared, routing=routing)
    gelu, *_ = layers.block_moe(x, gate, bias, w13, w2, *shared, routing=routing, activation="gelu_tanh")
    check(gelu, x, w13, w2, *shared, result.topk_ids, result.topk_weights, "gelu_tanh")
    pools, expert_map = in_a_pool(dict(w13=w13, w2=w2))
    arguments = x, gate, bias, *pools.values(), *shared
    assert torch.equal(layers.block_moe(*arguments, routing=routing, expert_map=expert_map)[0], y)
    weights = ExpertWeights(*pools.values(), *shared, expert_map=torch.full_like(expert_map, NOT_LOADED))
    routed = layers.route(x, gate, bias, weights, routing=routing)
    weights.expert_map.copy_(expert_map)
    assert torch.equal(layers.experts(x, weights, routed), y)
    with pytest.raises(ValueError, match="waves must be None"):
        layers.experts(x, weights, routed, [(0, 12)])
    away = result.topk_ids[0, 0]
    expert_map[away] = -1
    part = layers.block_moe(*arguments, routing=routing, expert_map=expert_map)[0]
    rest = result.topk_ids.where(result.topk_ids != away, -1)
    wide = [t.double() for t in (x, w13, w2, *shared)]
    expected = reference.moe_experts(*wide[:3], rest, result.topk_weights.double()) + reference.mlp(wide[0], *wide[3:])
    torch.testing.assert_close(part.double(), expected, rtol=0.02, atol=0.02)


# Weights in fp8 -----------------------------------------------------------------------------------------------------------


def fp8_layer(shared_fp8=True, **sizes):
    """As `layer`, in fp8; the scales of w13, w2, shared_w13 and shared_w2; and the same layer dequantised, float32."""
    x, *weights, ids, topk_weights = layer(**sizes)
    stored, scales, wide = [], [], []
    for i, weight in enumerate(weights):
        if weight is None or (i > 1 and not shared_fp8):
            stored, scales, wide = [*stored, weight], [*scales, None], [*wide, weight]
            continue
        # Rows that differ in size: a scale that belongs to another block shows.
        values, scale = quantize(
            weight.float() * torch.rand(len(weight), *[1] * (weight.dim() - 1)), "fp8", halves=2 - i % 2
        )
        stored, scales = [*stored, values], [*scales, scale * (0.5 + torch.rand(scale.shape))]
        wide.append(reference.dequantize(values, scales[-1], halves=2 - i % 2))
    return (x, *stored, ids, topk_weights), scales, (x, *wide, ids, topk_weights)


def distances(y, x, w13, w2, shared_w13, shared_w2, ids, weights, activation="silu"):
    """From float64: of y, and of what rounds where the kernel has to, h times its weight and y."""
    w13, w2, shared_w13, shared_w2 = (t if t is None else t.double() for t in (w13, w2, shared_w13, shared_w2))
    truth, best = torch.zeros(2, *x.shape, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        chosen = [(w13[e], w2[e], weight) for e, weight in zip(ids[t], weights[t].double()) if e >= 0]
        for up, down, weight in chosen + ([(shared_w13, shared_w2, 1.0)] if shared_w13 is not None else []):
            gate, up = (up @ token).chunk(2)
            h = reference.activate(gate, activation) * up * weight
            truth[t] += down @ h
            best[t] += down @ h.to(x.dtype).double()
    return [float((value.double() - truth).norm() / truth.norm()) for value in (y, best.to(x.dtype))]


FP8_CASES = {
    "several chunks": dict(tokens=32, hidden=1088, inner=544, experts=5, top_k=2, shared=288),
    "ragged blocks": dict(tokens=19, hidden=320, inner=96, experts=12, top_k=4, shared=160),
    "sixty-four tokens": dict(tokens=64, hidden=128, inner=160, experts=6, top_k=2, shared=64),
    "none shared": dict(tokens=3, hidden=64, inner=32, experts=7, top_k=3, shared=0),
    "a plain shared expert": dict(tokens=17, hidden=576, inner=288, experts=6, top_k=2, shared=544, shared_fp8=False),
    "wide tiles": dict(tokens=30, hidden=640, inner=320, experts=4, top_k=2, shared=192),
    "wide, plain shared": dict(tokens=7, hidden=384, inner=64, experts=4, top_k=3, shared=320, shared_fp8=False),
    "fp16": dict(tokens=33, hidden=192, inner=160, experts=6, top_k=2, shared=32, dtype=torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("name", FP8_CASES)
def test_fp8_errs_no_more_than_exact_dequantisation(emulator, name):
    torch.manual_seed(len(name))
    tensors, scales, wide = fp8_layer(**FP8_CASES[name])
    tensors[-2][0] = -1
    y, copied = run(emulator, *tensors, scales=scales, rows=128 if name.startswith("wide") else 64, splits=3)
    mine, best = distances(y, *wide)
    assert mine <= 1.05 * best
    _, w13, w2, *shared, ids, _ = tensors
    used = len(ids.unique()) - 1
    assert copied == used * (w13[0].nbytes + w2[0].nbytes) + sum(t.nbytes for t in shared if t is not None)


@pytest.mark.parametrize("name", ["ragged blocks", "a plain shared expert", "wide tiles", "fp16"])
def test_gelu_tanh_in_fp8(emulator, name):
    torch.manual_seed(len(name))
    tensors, scales, wide = fp8_layer(**FP8_CASES[name])
    rows = 128 if name.startswith("wide") else 64
    y, _ = run(emulator, *tensors, scales=scales, rows=rows, splits=3, activation="gelu_tanh")
    mine, best = distances(y, *wide, "gelu_tanh")
    assert mine <= 1.05 * best


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(["ctas", "stages", "rows"], [(1, 2, 64), (7, 3, 64), (2, 2, 128)])
@pytest.mark.parametrize("shared_fp8", [True, False])
def test_fp8_in_any_launch_shape(emulator, ctas, stages, rows, splits, shared_fp8):
    torch.manual_seed(1)
    sizes = dict(tokens=9, hidden=256, inner=64, experts=6, top_k=2, shared=320)
    tensors, scales, wide = fp8_layer(shared_fp8, **sizes)
    how = dict(scales=scales, rows=rows, splits=splits)
    y, _ = run(emulator, *tensors, ctas=ctas, stages=stages, **how)
    mine, best = distances(y, *wide)
    assert mine <= 1.05 * best
    for seed in (1, 2):  # the same bits in any order
        assert torch.equal(run(emulator, *tensors, ctas=ctas + seed, stages=2 + seed, seed=seed, **how)[0], y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_of_fp8(emulator, dtype):
    """Each as the only number of its row of W2, and a NaN in W13, which reaches the tokens that chose its expert alone."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = values.isfinite()
    x, w13, w2 = torch.ones(4, 256, dtype=dtype), torch.zeros(2, 64, 256), torch.zeros(2, 256, 32)
    w13[:, :, 0] = 4
    w2[:, :, 5] = torch.where(finite, values, 0)
    w13[1, 40, 7] = torch.nan
    stored = w13.to(torch.float8_e4m3fn), w2.to(torch.float8_e4m3fn)
    scales = torch.ones(2, 2, 2), torch.ones(2, 2, 1), None, None
    ids, weights = torch.tensor([[0], [1], [0], [0]], dtype=torch.int32), torch.full((4, 1), 0.25)
    y, _ = run(emulator, x, *stored, None, None, ids, weights, scales=scales)
    h = (torch.nn.functional.silu(torch.tensor(4.0)) * 4 * 0.25).to(dtype).float()
    assert torch.equal(y[[0, 2, 3]], (h * w2[0, :, 5]).to(dtype).expand(3, 256))
    assert y[1].isnan().all()


MINI = dict(hidden=2048, intermediate=512, shared_intermediate=512, experts=256, top_k=8)  # LLaDA2.0-mini
FP8 = dict(w13_scale=1)


@pytest.mark.parametrize(
    ["tokens", "change", "form"],
    [
        (32, {}, (128, 2, 8)),
        (48, {}, (128, 2, 8)),
        (49, {}, (64, 3, 4)),  # sums of 64 tokens leave registers for 64 rows
        (1, {}, (64, 5, 4)),  # 9 experts: 72 tiles of 128 rows for 132 multiprocessors
        (2, {}, (128, 3, 8)),
        (32, dict(hidden=2112), (64, 4, 4)),  # no multiple of 128
        (32, dict(intermediate=544), (64, 4, 4)),
        (32, dict(hidden=64), (64, 4, 8)),
        (32, dict(hidden=8192), (128, 2, 2)),
        (32, FP8, (128, 2, 8)),
        (33, FP8, (64, 2, 4)),  # sums and those of a block leave registers for 64 rows
        (64, FP8, (64, 2, 4)),
        (1, FP8, (64, 4, 4)),
    ],
)
def test_the_form_of_a_launch(emulator, tokens, change, form):
    assert emulator.experts_form(132, 227 * 1024, tokens=tokens, **MINI | change)[:3] == form


@pytest.mark.parametrize("fp8", [{}, FP8])
def test_every_form_fits(emulator, fp8):
    for tokens in range(1, 65):
        _, stages, _, bytes_ = emulator.experts_form(132, 227 * 1024, tokens=tokens, **MINI | dict(top_k=32) | fp8)
        assert stages >= 2 and bytes_ <= 227 * 1024
    assert emulator.experts_form(132, 99 * 1024, tokens=64, **MINI)[1] < 2  # a GeForce: the launcher refuses


@pytest.mark.parametrize(
    ["change", "why"],
    [
        (dict(dtype=torch.float32), "float32"),
        (dict(tokens=65), "more than 64 tokens"),
        (dict(tokens=64, experts=200, top_k=190), "more choices"),
        (dict(experts=513, top_k=1), "more than 512 experts"),
        (dict(hidden=96), "a hidden size"),
        (dict(inner=48), "an intermediate size"),
        (dict(shared=16), "an intermediate size"),
    ],
)
def test_refuses_what_it_does_not_cover(emulator, change, why):
    tensors = layer(**{**dict(tokens=2, hidden=64, inner=32, experts=4, top_k=2, shared=32), **change})
    args = emulator.experts(*tensors)
    assert emulator.library.refuses_experts(ctypes.byref(args)).decode().startswith(why)
