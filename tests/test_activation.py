"""activation="gelu_tanh", and topk_ids in int64, on every backend of the CPU and every body of the C++ kernels. Triton, CUDA
and AMX beside their own tests: test_triton_experts.py, test_experts_host.py, test_amx.py."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types

import pytest
import test_experts
import test_layer
import test_quantized
import torch
from pools import in_a_pool

from dmoe_ops import BlockMoE, block_moe, hf_block, moe_experts, reference
from dmoe_ops import layer as layers
from dmoe_ops.formats import ExpertWeights

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT32 = torch.iinfo(torch.int32)
GELU = dict(activation="gelu_tanh")


def exact_gelu(gate):
    """In float64, and without the cancellation of 1 + tanh."""
    gate = gate.double()
    return gate * torch.sigmoid((8 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))


def test_the_oracle_is_torchs_function(oracle):
    gate = torch.linspace(-6, 6, 101, dtype=torch.float64)
    want = torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(exact_gelu(gate), want, rtol=0, atol=1e-15)
    got = [oracle.mlp(torch.tensor([g, 1.0]), torch.eye(2), torch.ones(1, 1), **GELU).item() for g in gate.tolist()]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-6, atol=1e-7)  # g in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 128, 64, 16, 3), (70, 97, 33, 5, 2), (3, 512, 96, 12, 4), (1, 7, 3, 2, 1)])
def test_within_twice_torchs_error(shape, dtype, oracle):
    arguments = test_experts.inputs(*shape, dtype)
    y = test_experts.check(arguments, oracle, **GELU)
    assert not torch.equal(y, moe_experts(*arguments))


def test_accurate_wherever_it_is_finite(backend):
    """One gate at a time, up = 1. The reference has torch's own tanh, which cancels where the result is small."""
    gate = torch.cat([torch.linspace(-9, 20, 4001), torch.linspace(-1, 1, 501), torch.tensor([1e-20, -1e-6, 1e30])])
    x = torch.stack([gate, torch.ones_like(gate)], 1)
    ids, weights = torch.zeros(len(x), 1, dtype=torch.int32), torch.ones(len(x), 1)
    expert = torch.eye(2)[None], torch.ones(1, 2, 1)
    y = moe_experts(x, *expert, ids, weights, **GELU)[:, 0].double()
    tolerance = dict(rtol=2e-5, atol=1e-37) if backend == "cpp" else dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, exact_gelu(gate), **tolerance)
    edge = torch.tensor([[-1e30, 1.0], [-3e38, 1.0], [3e38, 1.0], [float("nan"), 1.0]])
    y = moe_experts(edge, *expert, ids[:4], weights[:4], **GELU)[:, 0]
    assert (y[:2].abs() <= 1e-7).all() and y[2] == edge[2, 0] and y[3].isnan()


# ---- every body of the C++ kernels ----

FORMS = (None, *test_quantized.FORMATS)
EVERY_BODY = """
import sys, oracle, test_activation
from dmoe_ops import _library
assert _library._C.cpu_isa() == sys.argv[1]
test_activation.check_forms(oracle)
"""


def check_forms(oracle):
    """Against float64; few tokens and many, ragged sizes, every format, int8 activations."""
    for form in FORMS:
        for dtype in DTYPES:
            for tokens, hidden, inter in ((1, 66, 34), (40, 256, 96), (130, 30, 22)):
                inputs = test_quantized.routed(tokens, hidden, dtype=dtype)
                if form is None:
                    arguments = test_experts.inputs(tokens, hidden, inter, 5, 2, dtype)
                    test_experts.check(arguments, oracle, **GELU)
                    continue
                weights = test_quantized.layer(form, hidden, inter)
                chosen = inputs["topk_ids"], inputs["topk_weights"]
                truth = oracle.experts(inputs["x"], *test_quantized.wide(weights), *chosen, **GELU)
                y, size = moe_experts(**inputs, **weights, **GELU), truth.abs().max()
                tolerance = torch.finfo(dtype).eps + 2e-6
                assert ((y.double() - truth).abs() <= tolerance * size + 6e-8).all(), (form, dtype, tokens)
                if form == "int8":
                    rounded = moe_experts(**inputs, **weights, activations="int8", **GELU)
                    want = reference.moe_experts(**inputs, **weights, activations="int8", **GELU)
                    assert (rounded.double() - want.double()).abs().max() <= (tolerance + 4e-3) * size, (dtype, tokens)


@pytest.mark.parametrize("isa", test_quantized.ISAS)
def test_every_body(isa, backend):
    """DMOE_CPU_ISA is read once, so each has its own process."""
    if backend == "reference":
        pytest.skip("the reference has no instruction sets")
    from dmoe_ops import _library

    if test_quantized.ISAS.index(isa) > test_quantized.ISAS.index(_library._C.cpu_isa()):
        pytest.skip(f"{isa} is not here, or DMOE_CPU_ISA lowers it")
    env = {**os.environ, "DMOE_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", EVERY_BODY, isa], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- the layer ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [0, 14])
def test_the_layer_takes_it_for_every_expert(shared, dtype):
    """The shared one too; in halves and in waves the same bits."""
    x, weights = test_layer.tokens(2, 13, 24, dtype=dtype), test_layer.weights(shared=shared, dtype=dtype)
    y, routed, _ = block_moe(x, *weights, routing=test_layer.ROUTING, **GELU)
    exact = [x.double(), *(weight if weight is None else weight.double() for weight in weights)]
    want, same, _ = reference.block_moe(*exact, routing=test_layer.ROUTING, **GELU)
    assert torch.equal(routed.topk_ids, same.topk_ids)
    assert (y.double() - want).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * want.abs().max()
    given = ExpertWeights(*weights[2:], **GELU)
    half = layers.route(x, *weights[:2], given, routing=test_layer.ROUTING)
    assert torch.equal(layers.experts(x, given, half), y)
    assert torch.equal(layers.experts(x, given, half, [(0, 5), (5, 12)]), y)


def test_the_module():
    layer = test_layer.module(**GELU)
    x = test_layer.tokens(2, 9, 24)
    arguments = dict(routing=test_layer.ROUTING)
    want = block_moe(x, *test_layer.weights(), **arguments, **GELU)[0]
    assert torch.equal(layer(x)[0], want) and "gelu_tanh" in repr(layer)
    silu = test_layer.module()
    assert torch.equal(silu(x)[0], block_moe(x, *test_layer.weights(), **arguments)[0]) and "silu" not in repr(silu)
    exported = torch.export.export(layer, (x,), strict=True).module()
    assert torch.equal(exported(x)[0], want)


def test_a_block_of_transformers_says_which(make_block):
    """From its config, as `hf_block.activation_of` reads it."""
    block, routing = make_block(), dataclasses.replace(test_layer.ROUTING, num_experts=8, top_k=2, n_group=2)
    assert hf_block.activation_of(block) == BlockMoE.from_hf(block, routing).activation == "silu"
    block.config = types.SimpleNamespace(hidden_act="gelu_pytorch_tanh")
    assert BlockMoE.from_hf(block, routing).activation == "gelu_tanh"


# ---- gradients, tracing ----


def test_gradcheck():
    x, w13, w2, ids, weights = test_experts.leaves(test_experts.inputs(4, 5, 3, 3, 3, torch.float64))
    ids[0], ids[1], ids[2] = -1, torch.tensor([2, 2, 0]), torch.tensor([1, -1, 1])
    for given in (ids, ids.long()):
        how = dict(topk_ids=given, **GELU)
        call = lambda *v, how=how: moe_experts(*v[:3], topk_weights=v[3], **how)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, w13, w2, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_within_twice_torchs_error(dtype):
    """Of autograd through torch's own loop in the same dtype, against that in float64."""
    arguments = test_experts.inputs(17, 21, 13, 5, 3, dtype)
    d_y = test_layer.tokens(17, 21, dtype=dtype)

    def gradients(function, *given):
        leaves = test_experts.leaves(given)
        function(*leaves, **GELU).backward(d_y.to(leaves[0].dtype))
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    exact = [part.double() if part.is_floating_point() else part for part in arguments]
    truth = gradients(test_experts.torch_loop, *exact)
    for mine, torchs, want in zip(
        gradients(moe_experts, *arguments), gradients(test_experts.torch_loop, *arguments), truth
    ):
        error, allowed = (mine - want).abs().max(), (torchs - want).abs().max()
        assert error <= 2 * allowed + 1e-6 * want.abs().max(), (error, allowed)


@pytest.mark.parametrize("shared", [0, 14])
def test_gradients_of_the_layer(shared):
    grads = []
    for function in (block_moe, reference.block_moe):
        x, gate, bias, *rest = test_layer.leaves([test_layer.tokens(2, 7, 24), *test_layer.weights(shared=shared)])
        y, *_ = function(x, gate, bias.detach(), *rest, routing=test_layer.ROUTING, **GELU)
        y.square().sum().backward()
        grads.append([t.grad for t in (x, gate, *rest) if t is not None])
    for mine, want in zip(*grads):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("form", test_quantized.FORMATS)
def test_gradients_through_quantised_weights(form):
    weights, inputs = test_quantized.layer(form, 130, 70), test_quantized.routed(11, 130)
    grads = []
    for either in (weights, dict(zip(("w13", "w2"), test_quantized.wide(weights, torch.float32)))):
        leaves = {n: v.clone().requires_grad_(v.is_floating_point()) for n, v in inputs.items()}
        moe_experts(**leaves, **either, **GELU).square().sum().backward()
        grads.append([leaves["x"].grad, leaves["topk_weights"].grad])
    for mine, plain in zip(*grads):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_opcheck():
    x, w13, w2, ids, weights = test_experts.leaves(test_experts.inputs(5, 8, 4, 3, 2))
    rest = None, None, False, None, "gelu_tanh"
    torch.library.opcheck(torch.ops.dmoe.moe_experts.default, (x, w13, w2, ids.long(), weights, *rest))
    arguments = (*test_layer.op_arguments(), *[None] * 4, False, None, "gelu_tanh")
    torch.library.opcheck(torch.ops.dmoe.block_moe.default, arguments)


def test_compiled_equals_eager():
    torch._dynamo.reset()

    def function(x, w13, w2, ids, weights, activation):
        return moe_experts(x * 2, w13, w2, ids, weights, activation=activation) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for activation in ("silu", "gelu_tanh"):
        grads = []
        for f in (compiled, function):
            x, w13, w2, ids, weights = test_experts.leaves(test_experts.inputs(9, 12, 6, 4, 2))
            y = f(x, w13, w2, ids.long(), weights, activation)
            y.sum().backward()
            grads.append([y.detach(), x.grad, w13.grad, w2.grad, weights.grad])
        assert all(map(torch.equal, *grads))


def test_calls_that_differ_in_nothing_else():
    """What is kept of a call that has passed (`_checks.once`) is not taken for the other's."""
    x, w13, w2, ids, weights = test_experts.inputs(9, 24, 10, 4, 3)
    y = [moe_experts(x, w13, w2, ids, weights, activation=name) for name in ("silu", "gelu_tanh", "silu", "gelu_tanh")]
    assert torch.equal(y[0], y[2]) and torch.equal(y[1], y[3]) and not torch.equal(y[0], y[1])
    for name, want in zip(("silu", "gelu_tanh"), y):
        assert torch.equal(torch.ops.dmoe.moe_experts(x, w13, w2, ids, weights, activation=name), want)


@pytest.mark.parametrize("op", ["moe_experts", "block_moe"])
def test_the_ops_themselves_refuse_another_name(op):
    """Past the functions, under a fake tensor mode too."""
    arguments = test_experts.inputs(5, 8, 4, 3, 2) if op == "moe_experts" else test_layer.op_arguments()
    call, says = getattr(torch.ops.dmoe, op), r"^activation must be one of silu, gelu_tanh, got 'relu'$"
    with pytest.raises(ValueError, match=says):
        call(*arguments, activation="relu")
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(ValueError, match=says):
            call(*fakes, activation="relu")


@pytest.mark.parametrize("op", ["moe_experts", "block_moe"])
@pytest.mark.parametrize("tokens", [5, 0])
def test_the_contract_refuses_another_name(op, tokens):
    says = r"^activation must be one of silu, gelu_tanh, got 'relu'$"
    with pytest.raises(ValueError, match=says):
        if op == "moe_experts":
            reference.moe_experts(*test_experts.inputs(tokens, 8, 4, 3, 2), activation="relu")
        else:
            x, gate, bias, *weights = test_layer.op_arguments()[:7]
            reference.block_moe(x[..., :tokens, :], gate, bias, *weights, routing=test_layer.ROUTING, activation="relu")


# ---- ids in int64 ----

# In int32, the last bits of some would be an expert's id.
STRANGE = [-(2**40), -(2**32) + 1, -(2**31) - 1, -2, 4, 2**31, 2**32, 2**32 + 1, 2**40 + 3, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("graded", [False, True])
def test_ids_in_int64_are_those_in_int32(mapped, graded):
    """To the bit, gradients too, past the dispatcher or through it; what is no expert's id adds nothing."""
    x, w13, w2, ids, weights = test_experts.inputs(16, 24, 10, 4, 3, empty=0.3)
    stacks, how = dict(w13=w13, w2=w2), {}
    if mapped:
        stacks, how["expert_map"] = in_a_pool(stacks)
        how["expert_map"][2] = -1
    strange = torch.tensor(STRANGE).repeat(5)[: ids.numel()].view(ids.shape)
    wide = torch.where(ids < 0, strange, ids.long())
    results = []
    for given in (ids, ids.long(), wide):
        leaves = [t.clone().requires_grad_(graded) for t in (x, *stacks.values(), weights)]
        y = moe_experts(*leaves[:3], given, leaves[3], **how)
        if graded:
            y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves if graded)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    want = reference.moe_experts(x, *stacks.values(), wide, weights, **how)
    torch.testing.assert_close(results[0][0], want, rtol=1e-4, atol=1e-5)


def test_strided_and_missing_ids_in_int64():
    x, w13, w2, ids, weights = test_experts.inputs(9, 24, 10, 4, 3)
    y = moe_experts(x, w13, w2, ids, weights)
    assert torch.equal(moe_experts(x, w13, w2, ids.long().t().contiguous().t(), weights), y)
    nothing = moe_experts(x, w13, w2, torch.full((9, 3), INT32.max + 1), weights)
    assert torch.equal(nothing, torch.zeros_like(x))
    assert moe_experts(x[:0], w13, w2, ids[:0].long(), weights[:0]).shape == (0, 24)
    assert torch.equal(moe_experts(x, w13, w2, ids[:, :0].long(), weights[:, :0]), torch.zeros_like(x))


def test_the_backend_sees_int32(monkeypatch):
    """Converted once, before a kernel that takes nothing else."""
    from dmoe_ops import _backends

    x, w13, w2, ids, weights = test_experts.inputs(9, 24, 10, 4, 3)
    chosen, seen = _backends.backend(x), []
    for name in ("moe_experts", "moe_experts_backward"):
        run = getattr(chosen, name)
        at = 2 if name == "moe_experts" else 3
        counted = lambda *args, run=run, at=at: seen.append(args[at].dtype) or run(*args)  # noqa: E731
        monkeypatch.setattr(chosen, name, staticmethod(counted))
    moe_experts(x.requires_grad_(), w13, w2, ids.long(), weights).sum().backward()
    assert seen == [torch.int32, torch.int32]
