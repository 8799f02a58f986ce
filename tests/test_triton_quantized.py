"""The Triton experts over quantised weights: under Triton's interpreter or on a GPU, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("triton")

import triton
import triton.language as tl
from dmoe_ops.triton_kernels import backend, weights
from test_quantized import FORMATS, layer, layer_arguments, routed, wide

from dmoe_ops import block_moe, moe_experts, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned")


def on_device(arguments):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def jit(function):
    """triton.jit, for the interpreter where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if DEVICE == "cpu" else "0")
        return triton.jit(function)


@jit
def numbers_kernel(
    w_ptr, out_ptr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out [16, COLUMNS] float32: the numbers of w, in the way that a product of DTYPE loads them."""
    row = tl.arange(0, 16)
    rows = w_ptr + row[:, None] * weights.stored_columns(COLUMNS, FORMAT)
    for first in range(0, COLUMNS, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        value = weights.load_numbers(rows, row < 16, first, COLUMNS, BLOCK_K, True, FORMAT, DTYPE)
        at = out_ptr + row[:, None] * COLUMNS + column[None, :]
        tl.store(at, value.to(tl.float32), mask=(column < COLUMNS)[None, :])


@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float16, tl.float32], ids=str)
@pytest.mark.parametrize("name", ["fp8", "fp8_bits", "int8", "int4"])
def test_every_byte_is_its_number_exactly(name, dtype):
    """NaN too; 16 columns more than the row's, and a step of the loop that is half empty."""
    stored = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 3)
    kind = name.removesuffix("_bits")
    weight = stored.view({"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[kind])
    columns = 96 if kind == "int4" else 48
    scale = torch.ones({"fp8": (1, 1), "int8": (16,), "int4": (16, 1)}[kind])
    if name == "fp8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no conversion of fp8")
    out = torch.empty(16, columns, device=DEVICE)
    data = (weight if kind == "int8" else stored).to(DEVICE)
    numbers_kernel[(1,)](data, out, columns, name, dtype, 64)
    want = reference.dequantize(weight, scale)
    if name == "fp8" and DEVICE == "cpu":  # the conversion of Triton's interpreter knows no NaN
        out = torch.where(want.isnan(), want, out)
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True)


def rounded_truth(x, w13, w2, ids, topk_weights, round_rows):
    """moe_experts in float64, but what kernels keep is rounded to the dtype of x: each hidden value times its weight, and in
    the gathered form each slot's row of the output."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for e, weight in zip(ids[t].tolist(), topk_weights[t].double()):
            if e >= 0:
                gate, up = (w13[e] @ x[t].double()).chunk(2)
                h = torch.nn.functional.silu(gate) * up * weight
                row = w2[e] @ h.to(x.dtype).double()
                y[t] += row.to(x.dtype).double() if round_rows else row
    return y


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "hidden, inter, dtype",
    [(130, 70, torch.float32), (130, 70, torch.bfloat16), (270, 140, torch.bfloat16), (32, 16, torch.float16)],
)
def test_the_error_is_that_of_exact_dequantisation(form, kind, hidden, inter, dtype, oracle):
    """At most 1.05 times: nothing more is rounded. Ragged blocks and groups, ids of -1, poisoned outputs."""
    quant = layer(
        kind, hidden, inter, scale_dtype=torch.bfloat16 if hidden == 130 and kind == "int4" else torch.float32
    )
    inputs = routed(11, hidden, dtype=dtype)
    inputs["topk_ids"][3] = -1
    truth = oracle.experts(inputs["x"], *wide(quant), inputs["topk_ids"], inputs["topk_weights"])
    exact = rounded_truth(inputs["x"], *wide(quant), inputs["topk_ids"], inputs["topk_weights"], form == "gathered").to(
        dtype
    )
    y = moe_experts(**on_device(inputs), **on_device(quant)).cpu()
    assert y.dtype == dtype and (y[3] == 0).all()
    mine, best = ((value.double() - truth).norm() / truth.norm() for value in (y, exact))
    assert mine <= 1.05 * best + 1e-6


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_odd_sizes(form, kind):
    quant, inputs = layer(kind, 131, 129), routed(9, 131)
    y = moe_experts(**on_device(inputs), **on_device(quant)).cpu()
    torch.testing.assert_close(y, reference.moe_experts(**inputs, **quant), rtol=1e-4, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("kind", FORMATS)
def test_many_tokens_per_expert(form, kind):
    """Several tiles of tokens of one expert, and steps that are parts of a group (depth 32 of float32)."""
    quant, inputs = layer(kind, 288, 144, 3), routed(70, 288, 3)
    y = moe_experts(**on_device(inputs), **on_device(quant)).cpu()
    torch.testing.assert_close(y, reference.moe_experts(**inputs, **quant), rtol=1e-4, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shared", [None, "plain", "quantized", "as wide"])
def test_layer(form, kind, shared):
    """A shared expert in its own format, in that of the experts, and where it passes for one of them."""
    arguments = layer_arguments(kind, shared and shared.replace("as wide", "quantized"))
    if shared == "as wide":
        more = layer(kind, 30, 22, 1, seed=9)
        arguments.update({f"shared_{name}": value[0].contiguous() for name, value in more.items()})
    y, result, _ = block_moe(**on_device(arguments))
    want, same, _ = reference.block_moe(**arguments)
    assert torch.equal(result.topk_ids.cpu(), same.topk_ids)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("kind", FORMATS)
def test_scales_of_nan_of_an_unused_expert_stay_out(form, kind):
    quant, inputs = layer(kind, 140, 30), routed(20, 140)
    inputs["topk_ids"][inputs["topk_ids"] == 2] = 1
    y = moe_experts(**on_device(inputs), **on_device(quant))
    for name in ("w13_scale", "w2_scale"):
        quant[name][2] = float("nan")
    assert torch.equal(moe_experts(**on_device(inputs), **on_device(quant)), y) and y.isfinite().all()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_scale_of_nan_stays_with_its_tokens(kind, monkeypatch):
    """In the gathered form. In the dense one it reaches the block, like any weight that is not finite."""
    monkeypatch.setattr(backend, "DENSE_TOKENS", 0)
    quant, inputs = layer(kind), routed(20, 30)
    y = moe_experts(**on_device(inputs), **on_device(quant))
    quant["w2_scale"][2] = float("nan")
    changed = moe_experts(**on_device(inputs), **on_device(quant))
    chose = (inputs["topk_ids"] == 2).any(1).to(DEVICE)
    assert torch.equal(changed[~chose], y[~chose]) and changed[chose].isnan().any(1).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_no_experts_at_all(form, kind):
    quant, inputs = layer(kind), routed(8, 30)
    inputs["topk_ids"][:] = -1
    assert (moe_experts(**on_device(inputs), **on_device(quant)) == 0).all()


def test_int8_activations_are_left_to_the_reference():
    quant, inputs = layer("int8"), routed(8, 30)
    y = moe_experts(**on_device(inputs), **on_device(quant), activations="int8")
    want = reference.moe_experts(**inputs, **quant, activations="int8")
    torch.testing.assert_close(y.cpu(), want, rtol=1e-5, atol=1e-5)


# ---- gradients ----


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "hidden, inter, dtype", [(140, 70, torch.float32), (30, 22, torch.float32), (270, 140, torch.bfloat16)]
)
def test_gradients_are_those_of_the_dequantised_weights(kind, hidden, inter, dtype):
    """Of x and of the routing weights; ids of -1, an expert named twice, and one whose scales are NaN but that is unused."""
    quant, inputs = layer(kind, hidden, inter), routed(9, hidden, dtype=dtype)
    inputs["topk_ids"][inputs["topk_ids"] == 2] = -1
    inputs["topk_ids"][1] = 3
    quant["w13_scale"][2] = quant["w2_scale"][2] = float("nan")
    plain = dict(zip(("w13", "w2"), wide(quant, torch.float32)))
    grads = []
    for function, move, either in ((moe_experts, on_device, quant), (reference.moe_experts, dict, plain)):
        d_y = torch.randn(9, hidden, generator=torch.Generator().manual_seed(4)).to(dtype)
        leaves = move(inputs if function is moe_experts else {**inputs, "x": inputs["x"].float()})
        for name in ("x", "topk_weights"):
            leaves[name] = leaves[name].clone().requires_grad_()
        y = function(**leaves, **move(either))
        y.backward(d_y.to(y))
        grads.append([leaves[name].grad.cpu().double() for name in ("x", "topk_weights")])
    for mine, want in zip(*grads):
        assert (mine - want).norm() <= (8e-3 if dtype == torch.bfloat16 else 1e-6) * want.norm()


def test_a_gradient_launches_no_kernel_of_the_reference(monkeypatch):
    monkeypatch.setattr(reference, "moe_experts_backward", None)
    quant, inputs = layer("int4"), routed(4, 30)
    inputs["x"].requires_grad_()
    moe_experts(**on_device(inputs), **on_device(quant)).sum().backward()
