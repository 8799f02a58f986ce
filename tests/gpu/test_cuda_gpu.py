"""The CUDA backend on a real GPU: golden files, gate, fp8. Layers: test_layer_gpu.py; races: test_races_gpu.py."""

from __future__ import annotations

import json

import pytest
import torch
from mini_on_gpu import (
    H,
    activations,
    calibrated,
    distance,
    expert_sum,
    filled,
    kernels_of,
    same_routing,
    weights,
    why_no_cuda,
)
from safetensors import safe_open

from dmoe_ops import BlockRouting, _library, block_moe, block_route, moe_experts, reference, router
from dmoe_ops.quantize import quantize

__all__ = ["weights"]  # a fixture
pytestmark = [
    pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda())),
    pytest.mark.usefixtures("cuda_backend"),
]


@pytest.fixture
def cuda_backend(monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", "cuda")


@pytest.mark.parametrize(
    "name", ["mini_p60", "mini_p60_diffuse", "mini_p80", "nogroup_p70", "scarce_groups_e128", "small_p50"]
)
def test_golden_routing(golden_folder, name):
    name = f"routing_llada2_{name}" if name.startswith("mini") else f"routing_{name}"
    with safe_open(golden_folder / f"{name}.safetensors", "pt") as file:
        data = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        routing = BlockRouting(**json.loads(file.metadata()["config"]))
    got = block_route(data["logits"].cuda(), data["expert_bias"].cuda(), routing=routing)
    same_routing(got, reference.block_route(data["logits"], data["expert_bias"], routing=routing))
    for members, size, mask in zip(
        got.coreset_ids.tolist(), got.coreset_sizes.tolist(), data["coreset_mask"].flatten(0, 1)
    ):
        assert members[:size] == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("aggregate", ["topk_sum", "sum", "max", "union"])
@pytest.mark.parametrize("select", ["top_p", "top_n", "nonzero", "all"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ["experts", "fields"],
    [
        (512, dict(n_group=8, topk_group=4, top_k=32, block_size=128)),
        (96, dict(n_group=32, topk_group=7, top_k=5, block_size=7)),
        (33, dict(n_group=1, topk_group=1, top_k=2, block_size=16)),
    ],
)
def test_routing_settings(aggregate, select, score, experts, fields):
    routing = BlockRouting(
        num_experts=experts, aggregate=aggregate, select=select, score=score, union_k=3, capacity=20, **fields
    )
    offsets = torch.tensor([0, 1, 6, 13, 14, 20], dtype=torch.int32)
    logits = calibrated(20, experts=experts)
    got = block_route(logits.cuda(), routing=routing, block_offsets=offsets.cuda())
    same_routing(got, reference.block_route(logits, routing=routing, block_offsets=offsets))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(["hidden", "experts", "tokens"], [(2048, 256, 32), (72, 40, 70), (512, 500, 300)])
def test_gate(x_dtype, gate_dtype, hidden, experts, tokens):
    """fp32 arithmetic for every pair of dtypes, whole tiles or not, and the routing of these logits."""
    routing = BlockRouting(num_experts=experts, n_group=4, topk_group=2, block_size=48)
    x, gate = activations(tokens, hidden, dtype=x_dtype), filled(experts, hidden, dtype=gate_dtype)
    out = router.allocate_routing(tokens, tokens, None, routing, x)
    logits = torch.full((tokens, experts), torch.nan, device="cuda")
    torch.ops.dmoe._gate_route_out(x, gate, None, None, tokens, *_library.packed_routing(routing), logits, *out, None)
    exact, size = x.double() @ gate.double().T, x.double().abs() @ gate.double().abs().T
    assert ((logits - exact).abs() <= 2e-6 * size).all()
    same_routing(out, reference.block_route(logits.cpu(), routing=routing))


@pytest.mark.parametrize("tokens", [1, 19, 32, 45, 64])
@pytest.mark.parametrize("shared", ["fp8", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_in_fp8(weights, tokens, shared, dtype):
    """No further from float32 than 1.05 times plain weights of these values, which bf16 holds all but exactly: scales are
    powers of two here."""
    gate, bias, *plain = weights
    stored, scales = [], []
    for i, weight in enumerate(plain):
        if i > 1 and shared == "plain":
            stored, scales = [*stored, weight.to(dtype)], [*scales, None]
            continue
        values, scale = quantize(weight, "fp8", halves=2 - i % 2)
        stored, scales = [*stored, values], [*scales, scale.log2().round().exp2()]
    wide = [
        weight if scale is None else reference.dequantize(weight, scale, halves=2 - i % 2).to(dtype)
        for i, (weight, scale) in enumerate(zip(stored, scales))
    ]
    names = ("w13", "w2", "shared_w13", "shared_w2")
    given = dict(zip(names, stored)) | {f"{name}_scale": scale for name, scale in zip(names, scales)}
    x, routing = activations(tokens, dtype=dtype), BlockRouting()
    y, routed, _ = block_moe(x, gate, bias, **given, routing=routing)
    other, same, _ = block_moe(x, gate, bias, *wide, routing=routing)
    assert torch.equal(routed.topk_ids, same.topk_ids)
    want = expert_sum(x, (gate, bias, *(w.float() for w in wide)), routed.topk_ids, routed.topk_weights, torch.float32)
    assert distance(y, want) <= 1.05 * distance(other, want) + 1e-6


def test_every_code_of_fp8_on_the_tensor_cores():
    """Each as the only number of its row of W2; NaN in W13 reaches the tokens that chose its expert alone."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    w13, w2 = torch.zeros(2, 64, 256), torch.zeros(2, 256, 32)
    w13[:, :, 0], w2[:, :, 5], w13[1, 40, 7] = 4, values.nan_to_num(0), torch.nan
    stored = [w.to(torch.float8_e4m3fn).cuda() for w in (w13, w2)]
    scales = dict(w13_scale=torch.ones(2, 2, 2, device="cuda"), w2_scale=torch.ones(2, 2, 1, device="cuda"))
    ids = torch.tensor([[0], [1], [0], [0]], dtype=torch.int32, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        x, scale = torch.ones(4, 256, dtype=dtype, device="cuda"), torch.full((4, 1), 0.25, device="cuda")
        y = moe_experts(x, *stored, ids, scale, **scales).cpu()
        h = (torch.nn.functional.silu(torch.tensor(4.0)) * 4 * 0.25).to(dtype).float()
        torch.testing.assert_close(y[[0, 2, 3]].float(), (h * w2[0, :, 5]).expand(3, 256), rtol=0.01, atol=0)
        assert y[1].isnan().all()


def test_same_routing_as_triton(weights, monkeypatch):
    x, routing = activations(64), BlockRouting()
    y, routed, logits = block_moe(x, *weights, routing=routing)
    monkeypatch.setenv("DMOE_BACKEND", "triton")
    same_routing(routed, block_route(logits, weights[1], routing=routing))
    other, *_ = block_moe(x, *weights, routing=routing)
    assert distance(y, other) <= 0.02


def test_two_launches(weights):
    """The profiler sees the router and the experts, and nothing else."""
    x, routing = activations(32), BlockRouting()
    names = kernels_of(lambda: block_moe(x, *weights, routing=routing))
    assert len(names) == 2 and "route_entry" in names[0] and "experts_entry" in names[1], names


def test_a_view_that_starts_anywhere_is_refused(weights):
    x = activations(33).flatten()[1 : 1 + 32 * H].view(32, H)
    with pytest.raises(RuntimeError, match="x must start at a multiple of 16 bytes"):
        block_moe(x, *weights, routing=BlockRouting())
