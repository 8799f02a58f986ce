"""Quantised experts, on every backend: the formats, the ops over them, their gradients, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmoe_ops import BlockRouting, block_moe, moe_experts, reference

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

FORMATS = ["fp8", "int8", "int4"]
ROUTING = BlockRouting(num_experts=5, top_k=2, block_size=8, min_experts=3, n_group=1, topk_group=1)


def scales(generator, *shape):
    return torch.rand(*shape, generator=generator) * 0.02 + 1e-3


def quantized(form, lead, rows, columns, halves=1, seed=0, scale_dtype=torch.float32):
    """Random bits of a format and random scales: nothing that the package's own quantisers made."""
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape):
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    groups = math.ceil(columns / 128)
    if form == "fp8":
        weight = bits(*lead, rows, columns)
        weight[weight & 127 == 127] = 3  # the two NaN
        weight = (weight & 0xBF).view(torch.float8_e4m3fn)  # up to 1.875
        return weight, scales(generator, *lead, halves * math.ceil(rows // halves / 128), groups)
    if form == "int8":
        return bits(*lead, rows, columns).view(torch.int8).clamp(-127), scales(generator, *lead, rows) / 100
    return bits(*lead, rows, columns // 2), (scales(generator, *lead, rows, groups) / 5).to(scale_dtype)


def widened(weight, scale, rows, columns, halves=1):
    """float32 [rows, columns], element by element from the description of the formats."""
    out = np.zeros((rows, columns), np.float32)
    half, scale = rows // halves, scale.float().numpy()
    raw = weight.float().numpy() if weight.dtype != torch.uint8 else weight.numpy().astype(np.int64)
    for r in range(rows):
        for c in range(columns):
            if weight.dtype == torch.int8:
                out[r, c] = raw[r, c] * scale[r]
            elif weight.dtype == torch.uint8:
                out[r, c] = np.float32((raw[r, c // 2] >> (4 * (c % 2))) % 16 - 8) * scale[r, c // 128]
            else:
                block = r // half * math.ceil(half / 128) + r % half // 128
                out[r, c] = raw[r, c] * scale[block, c // 128]
    return torch.from_numpy(out)


def layer(form, hidden=30, inter=22, experts=5, seed=0, scale_dtype=torch.float32):
    """w13, w2 and their scales by name."""
    w13, w13_scale = quantized(form, [experts], 2 * inter, hidden, 2, seed, scale_dtype)
    w2, w2_scale = quantized(form, [experts], hidden, inter, 1, seed + 1, scale_dtype)
    return dict(w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale)


def wide(weights, dtype=torch.float64):
    w13 = reference.dequantize(weights["w13"], weights["w13_scale"], halves=2)
    return w13.to(dtype), reference.dequantize(weights["w2"], weights["w2_scale"]).to(dtype)


def routed(tokens, hidden, experts=5, top_k=2, dtype=torch.float32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(x=x, topk_ids=ids, topk_weights=torch.rand(tokens, top_k, generator=generator).to(acc))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows, columns, halves", [(6, 10, 1), (6, 10, 2), (270, 130, 2), (256, 256, 2), (129, 300, 1)])
def test_dequantised_to_the_bit(form, rows, columns, halves):
    weight, scale = quantized(form, [], rows, columns, halves)
    got = reference.dequantize(weight, scale, halves=halves)
    assert got.dtype == torch.float32 and torch.equal(got, widened(weight, scale, rows, columns, halves))
    stacked = reference.dequantize(torch.stack([weight] * 3), torch.stack([scale] * 3), halves=halves)
    assert torch.equal(stacked, got.expand(3, -1, -1))


def test_every_byte_of_fp8_and_every_nibble():
    every = torch.arange(256, dtype=torch.uint8)
    fp8 = reference.dequantize(every.view(torch.float8_e4m3fn).view(2, 128), torch.full((1, 1), 0.37))
    torch.testing.assert_close(
        fp8, every.view(torch.float8_e4m3fn).float().view(2, 128) * 0.37, rtol=0, atol=0, equal_nan=True
    )
    int4 = reference.dequantize(every.view(2, 128), torch.full((2, 2), 0.37, dtype=torch.bfloat16))
    want = torch.stack([every.int() % 16 - 8, every.int() // 16 - 8], 1).view(2, 256)
    assert torch.equal(int4, want.float() * torch.tensor(0.37).bfloat16().float())


@settings(max_examples=25)
@given(
    form=st.sampled_from(FORMATS),
    tokens=st.sampled_from([0, 1, 3, 17, 40]),
    hidden=st.integers(1, 140).map(lambda n: 2 * n),
    inter=st.integers(1, 80).map(lambda n: 2 * n),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@example(form="int4", tokens=17, hidden=260, inter=130, dtype=torch.float32, scale_dtype=torch.bfloat16, seed=0)
def test_the_ops_answer_is_that_of_the_dequantised_weights(
    form, tokens, hidden, inter, dtype, scale_dtype, seed, oracle
):
    weights, inputs = (
        layer(form, hidden, inter, 3, seed, scale_dtype),
        routed(tokens, hidden, 3, dtype=dtype, seed=seed),
    )
    y = moe_experts(**inputs, **weights)
    assert y.dtype == dtype and y.shape == inputs["x"].shape
    truth = oracle.experts(inputs["x"], *wide(weights), inputs["topk_ids"], inputs["topk_weights"])
    size = truth.abs().max() if truth.numel() else 0
    # Rounded once from fp32 sums (bf16: h as well); in float64 by the order of the additions alone.
    relative = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps + 2e-6
    assert ((y.double() - truth).abs() <= relative * size + 6e-8 * (dtype == torch.float16)).all()


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_odd_sizes(form, oracle):
    weights, inputs = layer(form, 131, 129), routed(9, 131)
    truth = oracle.experts(inputs["x"], *wide(weights), inputs["topk_ids"], inputs["topk_weights"])
    torch.testing.assert_close(
        moe_experts(**inputs, **weights).double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max()
    )


def layer_arguments(form, shared, dtype=torch.float32, hidden=30):
    weights = layer(form, hidden, 22)
    generator = torch.Generator().manual_seed(5)
    arguments = dict(
        x=torch.randn(2, 13, hidden, generator=generator).to(dtype),
        gate_weight=torch.randn(5, hidden, generator=generator),
        expert_bias=torch.zeros(5),
        shared_w13=None,
        shared_w2=None,
        routing=ROUTING,
        **weights,
    )
    if shared == "quantized":
        more = layer(form, hidden, 14, 1, seed=9)
        arguments.update({f"shared_{name}": value[0].contiguous() for name, value in more.items()})
    elif shared:
        arguments["shared_w13"] = (torch.randn(28, hidden, generator=generator) * 0.1).to(dtype)
        arguments["shared_w2"] = (torch.randn(hidden, 14, generator=generator) * 0.1).to(dtype)
    return arguments


def unquantized(arguments, dtype=torch.float64):
    """The same layer with the weights dequantised."""
    plain = {name: value for name, value in arguments.items() if not name.endswith("_scale")}
    for prefix in ("", "shared_"):
        if f"{prefix}w13_scale" in arguments:
            pair = {name: arguments[prefix + name] for name in ("w13", "w2", "w13_scale", "w2_scale")}
            plain[f"{prefix}w13"], plain[f"{prefix}w2"] = wide(pair, dtype)
    return plain


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shared", [None, "plain", "quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_is_that_of_the_dequantised_weights(form, shared, dtype):
    arguments = layer_arguments(form, shared, dtype)
    y, result, _ = block_moe(**arguments)
    exact = {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in unquantized(arguments).items()
    }
    want, same, _ = reference.block_moe(**exact)
    assert torch.equal(result.topk_ids, same.topk_ids)
    assert (y.double() - want).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * want.abs().max()


# ---- rounded activations ----


def integer_mlp(x, w13, w13_scale, w2, w2_scale):
    """One token's expert with int8 activations, in whole numbers; float32 where the contract has it."""

    def product(v, weight, scale):
        row = np.abs(v).max() / np.float32(127) or np.float32(1)
        q = np.rint(v / row).astype(np.int64)
        assert abs(q).max() <= 127
        return (weight.numpy().astype(np.int64) @ q).astype(np.float32) * row * scale.numpy()

    gate, up = np.split(product(x, w13, w13_scale), 2)
    h = gate / (1 + np.exp(-gate)) * up
    return product(h.astype(np.float32), w2, w2_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations_are_integer_arithmetic(dtype):
    weights, inputs = layer("int8", 66, 34), routed(12, 66, dtype=dtype)
    inputs["x"][3] = 0
    y = moe_experts(**inputs, **weights, activations="int8")
    want = torch.zeros(12, 66, dtype=torch.float64)
    order = ("w13", "w13_scale", "w2", "w2_scale")
    for t, (ids, scale) in enumerate(zip(inputs["topk_ids"].tolist(), inputs["topk_weights"].tolist())):
        for e, weight in zip(ids, scale):
            if e >= 0:
                out = integer_mlp(inputs["x"][t].float().numpy(), *(weights[n][e] for n in order))
                want[t] += weight * torch.from_numpy(out)
    # A value of h beside a tie may round the other way: one step of one of 34.
    assert (y.double() - want).abs().max() <= (torch.finfo(dtype).eps + 2e-3) * want.abs().max()
    assert (y[3] == 0).all()
    plain = moe_experts(**inputs, **weights)
    assert 1e-4 < ((y - plain).norm() / plain.norm()).item() < 0.05


def test_int8_activations_in_the_layer_round_the_shared_expert_where_it_is_int8():
    for shared in (None, "plain", "quantized"):
        arguments = layer_arguments("int8", shared)
        got, want = (f(**arguments, activations="int8")[0] for f in (block_moe, reference.block_moe))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3 * want.abs().max().item())
        alone = block_moe(
            **{**arguments, "shared_w13": None, "shared_w2": None, "shared_w13_scale": None, "shared_w2_scale": None},
            activations="int8",
        )[0]
        if shared == "plain":
            expected = alone + reference.mlp(
                arguments["x"].view(-1, 30), arguments["shared_w13"], arguments["shared_w2"]
            ).view_as(alone)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_rows_are_rounded_by_their_largest():
    tiny = 190 * 2.0**-149  # a 127th of it is one and a half of the smallest number, which becomes one of them
    x = torch.tensor([[0.0, 0.0, 0.0], [tiny, -tiny, 0.0], [254.0, -3.0, 1.0], [float("inf"), 1.0, 0.0]])
    q, scale = reference.quantize_rows(x)
    assert torch.equal(scale[:3], torch.tensor([[1.0], [2.0**-149], [2.0]])) and (q * scale)[3].isnan().all()
    assert torch.equal(q[:3], torch.tensor([[0.0, 0.0, 0.0], [127.0, -127.0, 0.0], [127.0, -2.0, 0.0]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_token_stays_in_its_row_with_int8_activations(value):
    weights, inputs = layer("int8"), routed(8, 30)
    inputs["topk_ids"][5] = torch.tensor([1, 2])
    y = moe_experts(**inputs, **weights, activations="int8")
    inputs["x"][5, 4] = value
    changed = moe_experts(**inputs, **weights, activations="int8")
    others = torch.arange(8) != 5
    assert torch.equal(changed[others], y[others]) and changed[5].isnan().all()


# ---- the same bits ----

ISAS = ["plain", "avx2", "avx512", "avx512_bf16", "amx"]  # DMOE_CPU_ISA is read once, so each has its own process
ON_THREADS = """
import sys, torch
from test_quantized import FORMATS, layer, routed
from dmoe_ops import _library, moe_experts
assert _library._C.cpu_isa() == sys.argv[1]
for form, activations in (*((form, None) for form in FORMATS), ("int8", "int8")):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens, hidden, inter in ((1, 256, 128), (40, 256, 384), (70, 130, 66), (600, 64, 32)):
            weights, inputs = layer(form, hidden, inter, 5), routed(tokens, hidden, dtype=dtype)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(moe_experts(**inputs, **weights, activations=activations))
            for other in results[1:]:
                assert torch.equal(results[0], other), (form, activations, dtype, tokens)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_the_same_bits_for_every_number_of_threads(isa, backend):
    if backend == "reference":
        pytest.skip("the reference has no instruction sets, and torch's products may change with the number of threads")
    from dmoe_ops import _library

    if ISAS.index(isa) > ISAS.index(_library._C.cpu_isa()):
        pytest.skip(f"{isa} is not here, or DMOE_CPU_ISA lowers it")
    env = {**os.environ, "DMOE_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", ON_THREADS, isa], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- special values ----


@pytest.mark.parametrize("form", FORMATS)
def test_a_scale_of_nan_or_inf_stays_with_the_tokens_that_chose_the_expert(form):
    weights, inputs = layer(form), routed(20, 30)
    y = moe_experts(**inputs, **weights)
    for value in (float("nan"), float("inf")):
        weights["w13_scale"][2] = value
        changed = moe_experts(**inputs, **weights)
        chose = (inputs["topk_ids"] == 2).any(1)
        assert chose.any() and torch.equal(changed[~chose], y[~chose])
        assert not changed[chose].isfinite().all(1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_infinite_weight_beside_quantised_ones_stays_infinite(dtype):
    arguments = layer_arguments("int8", "plain", dtype)
    y = block_moe(**arguments)[0]
    arguments["shared_w2"][3] = float("inf")
    changed = block_moe(**arguments)[0]
    others = torch.arange(30) != 3
    assert torch.equal(changed[..., others], y[..., others]) and not changed[..., 3].isfinite().any()


# ---- gradients and tracing ----


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_are_those_of_the_dequantised_weights(form):
    weights, inputs = layer(form, 130, 70), routed(11, 130)
    grads = []
    for function, w in ((moe_experts, weights), (reference.moe_experts, weights), (moe_experts, None)):
        leaves = {n: v.clone().requires_grad_(v.is_floating_point()) for n, v in inputs.items()}
        either = w or dict(zip(("w13", "w2"), wide(weights, torch.float32)))
        function(**leaves, **either).square().sum().backward()
        grads.append([leaves["x"].grad, leaves["topk_weights"].grad])
    for mine, theirs, plain in zip(*grads):
        size = plain.abs().max().item()
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5 * size)
        torch.testing.assert_close(theirs, plain, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("form", FORMATS)
def test_gradcheck_through_quantised_experts(form):
    weights, inputs = layer(form, 6, 4), routed(4, 6, dtype=torch.float64)
    leaves = inputs["x"].requires_grad_(), inputs["topk_weights"].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: moe_experts(x, topk_ids=inputs["topk_ids"], topk_weights=w, **weights), leaves
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shared", ["plain", "quantized"])
def test_gradients_of_the_layer(form, shared):
    arguments = layer_arguments(form, shared)
    plain = unquantized(arguments, torch.float32)
    grads = []
    for either in (arguments, plain):
        leaves = {n: either[n].clone().requires_grad_() for n in ("x", "gate_weight")}
        block_moe(**{**either, **leaves})[0].square().sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("function", [moe_experts, reference.moe_experts])
@pytest.mark.parametrize("name, form", [("w13_scale", "int8"), ("w2_scale", "int4"), ("w13", "fp8"), ("w2", "fp8")])
def test_a_gradient_of_quantised_weights_is_refused(function, name, form):
    weights, inputs = layer(form), routed(4, 30)
    weights[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name} must not require a gradient: quantised"):
        function(**inputs, **weights).sum().backward()
    with torch.no_grad():
        function(**inputs, **weights)


@pytest.mark.parametrize("function", [moe_experts, reference.moe_experts])
@pytest.mark.parametrize("name", ["x", "topk_weights"])
def test_a_gradient_through_int8_activations_is_refused(function, name):
    weights, inputs = layer("int8"), routed(4, 30)
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name} must not require a gradient with activations"):
        function(**inputs, **weights, activations="int8")


@pytest.mark.parametrize("function", [block_moe, reference.block_moe])
def test_gradients_that_the_layer_does_not_have_are_refused(function):
    for name in ("w13", "w2_scale", "shared_w13_scale", "shared_w2"):
        arguments = layer_arguments("fp8", "quantized")
        arguments[name].requires_grad_()
        with pytest.raises(ValueError, match=f"^{name} must not require a gradient: quantised"):
            function(**arguments)[0].sum().backward()
        with torch.no_grad():
            function(**arguments)
    for name in ("x", "gate_weight"):
        arguments = layer_arguments("int8", "quantized")
        arguments[name].requires_grad_()
        with pytest.raises(ValueError, match=f"^{name} must not require a gradient with activations"):
            function(**arguments, activations="int8")


@pytest.mark.parametrize("function", [block_moe, reference.block_moe])
def test_the_layer_refuses_int8_activations_without_int8_weights(function):
    for value, form, says in (("int8", "fp8", "float8_e4m3fn"), ("fp8", "int8", "'fp8'"), (False, "int8", "False")):
        with pytest.raises(ValueError, match=f"^activations must be None .*got .*{says}"):
            function(**layer_arguments(form, "quantized"), activations=value)


@pytest.mark.parametrize("form", FORMATS)
def test_opcheck(form):
    weights, inputs = layer(form), routed(5, 30)
    order = inputs["x"].requires_grad_(), weights["w13"], weights["w2"], inputs["topk_ids"], inputs["topk_weights"]

    def checks(op, args):
        # torch's check of the schema compares its arguments before and after with a product, which fp8 has none of.
        names = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, args, test_utils=names if form == "fp8" else ("test_schema", *names))

    checks(torch.ops.dmoe.moe_experts.default, (*order, weights["w13_scale"], weights["w2_scale"]))
    a = layer_arguments(form, "quantized")
    names = ("gate_weight", "expert_bias", "w13", "w2", "shared_w13", "shared_w2")
    last = [a[n] for n in ("w13_scale", "w2_scale", "shared_w13_scale", "shared_w2_scale")]
    x = a["x"][0].contiguous().requires_grad_()
    checks(
        torch.ops.dmoe.block_moe.default, (x, *(a[n] for n in names), None, 13, *ROUTING.args(), *last, form == "never")
    )


@pytest.mark.parametrize("form", FORMATS)
def test_compiled_equals_eager(form):
    torch._dynamo.reset()
    arguments = layer_arguments(form, "quantized")

    def function(x):
        return block_moe(**{**arguments, "x": x * 2})[0] + 1

    x = arguments["x"]
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


# ---- bad input ----

T, H, I, E = 6, 8, 6, 4


def fault(form, name, value, says):
    return pytest.param(form, name, value, says, id=f"{form}-{name}-{says}")


FAULTS = [
    fault("fp8", "w13_scale", None, "None"),
    fault("fp8", "w2_scale", None, "None"),
    fault("fp8", "w13_scale", torch.ones(E, 1, 1), "[4, 1, 1]"),
    fault("fp8", "w13_scale", torch.ones(E, 2, 1).bfloat16(), "bfloat16"),
    fault("fp8", "w2_scale", torch.ones(E, 2, 1), "[4, 2, 1]"),
    fault("fp8", "w2", torch.ones(E, H, I), "float32"),
    fault("fp8", "w2", torch.ones(E, H, I, dtype=torch.int8), "int8"),
    fault("fp8", "w13", torch.zeros(E, 2 * I, H).to(torch.float8_e5m2), "float8_e5m2"),
    fault("fp8", "w13", torch.zeros(E, H, 2 * I).to(torch.float8_e4m3fn).transpose(1, 2), "(96, 1, 12)"),
    fault("fp8", "activations", "int8", "float8_e4m3fn"),
    fault("int8", "activations", "fp8", "'fp8'"),
    fault("int8", "activations", True, "True"),
    fault("int8", "w13_scale", torch.ones(E, 2 * I, 1), "[4, 12, 1]"),
    fault("int8", "w13_scale", torch.ones(E, 2 * I).to("meta"), "meta"),
    fault("int8", "w13_scale", torch.ones(2 * I, E).T, "(1, 4)"),
    fault("int8", "w2_scale", torch.ones(E, H).half(), "float16"),
    fault("int8", "w13_scale", 0.25, "0.25"),
    fault("int8", "w2_scale", 0.5, "0.5"),
    fault("int4", "w13", torch.zeros(E, 2 * I, H, dtype=torch.uint8), "[4, 12, 8]"),
    fault("int4", "w2", torch.zeros(E, H, I, dtype=torch.uint8), "[4, 8, 6]"),
    fault("int4", "w13", torch.zeros(E, 2 * I - 2, H // 2, dtype=torch.uint8), "I=5"),
    fault("int4", "w13_scale", torch.ones(E, 2 * I, 2), "[4, 12, 2]"),
    fault("int4", "w2_scale", torch.ones(E, H, 1).half(), "float16"),
    fault("plain", "w13_scale", torch.ones(E, 2 * I), "float32"),
    fault("plain", "w2_scale", torch.ones(E, H), "float32"),
    fault("plain", "activations", "int8", "float32"),
]


def good(form):
    weights = layer(form, H, I, E) if form != "plain" else dict(w13=torch.ones(E, 2 * I, H), w2=torch.ones(E, H, I))
    return {**routed(T, H, E), **weights}


@pytest.mark.parametrize("function", [moe_experts, reference.moe_experts])
@pytest.mark.parametrize("form, name, value, says", FAULTS)
def test_refused(function, form, name, value, says):
    with pytest.raises(ValueError) as error:
        function(**{**good(form), name: value})
    assert name in str(error.value).split("got")[0] and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("function", [moe_experts, reference.moe_experts])
@pytest.mark.parametrize("form", [*FORMATS, "plain"])
def test_what_the_faults_start_from_is_good(function, form):
    function(**good(form))


@pytest.mark.parametrize(
    "form, change, name",
    [
        ("int8", dict(shared_w13_scale=None), "shared_w13_scale"),
        ("int8", dict(shared_w2_scale=torch.ones(7)), "shared_w2_scale"),
        ("int8", dict(shared_w13=torch.ones(28, 30).half()), "shared_w13"),
        ("int8", dict(shared_w13=torch.ones(28, 30).to(torch.float8_e4m3fn)), "shared_w13"),
        ("int8", dict(shared_w2=torch.ones(30, 14)), "shared_w2"),
        ("int8", dict(shared_w13=None, shared_w2=None), "shared_w13_scale"),
        ("int8", dict(shared_w13=torch.ones(28, 30), shared_w2=torch.ones(30, 14)), "shared_w13_scale"),
    ],
)
def test_a_bad_shared_expert_is_refused(form, change, name):
    arguments = {**layer_arguments(form, "quantized"), **change}
    for function in (block_moe, reference.block_moe):
        with pytest.raises(ValueError, match=f"^{name} must"):
            function(**arguments)


def test_dequantize_refuses():
    for weight, scale, says in (
        (torch.ones(2, 2), torch.ones(2), "weight must be float8_e4m3fn or int8 or uint8, got float32"),
        (torch.ones(2, 2).char(), torch.ones(3), "scale must have shape [2], got [3]"),
        (torch.ones(2).char(), torch.ones(2), "weight must have shape"),
    ):
        with pytest.raises(ValueError) as error:
            reference.dequantize(weight, scale)
        assert str(error.value).startswith(says)
