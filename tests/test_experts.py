"""moe_experts, on every backend: against float64 truth, with torch's own error in the same dtype as the measure."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_ops import moe_experts, reference

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "w13", "w2", "topk_ids", "topk_weights")


def inputs(tokens, hidden, inter, experts, top_k, dtype=torch.float32, seed=0, empty=0.2):
    """Random ids, a few of them -1, duplicates among them; the scales keep y near 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    ids[torch.rand(tokens, top_k, generator=generator) < empty] = -1
    return (
        normal(tokens, hidden).to(dtype),
        (normal(experts, 2 * inter, hidden) / hidden**0.5).to(dtype),
        (normal(experts, hidden, inter) / inter**0.5).to(dtype),
        ids,
        (normal(tokens, top_k).abs() + 0.1).to(torch.float64 if dtype == torch.float64 else torch.float32),
    )


def torch_loop(x, w13, w2, ids, weights, activation="silu"):
    """What torch itself gives in the dtype of x, expert by expert."""
    act = F.silu if activation == "silu" else functools.partial(F.gelu, approximate="tanh")
    y = torch.zeros_like(x)
    for e in range(len(w13)):
        rows, slots = (ids == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows], w13[e]).chunk(2, -1)
        out = F.linear(act(gate) * up, w2[e]) * weights[rows, slots, None].to(x.dtype)
        y.index_add_(0, rows, out)
    return y


def check(arguments, oracle, **how):
    """Error at most twice torch's own, besides the rounding of fp32 sums."""
    x = arguments[0]
    y = moe_experts(*arguments, **how)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous() and y.isfinite().all()
    truth = oracle.experts(*arguments, **how)
    if truth.numel():
        scale = truth.abs().max().item() + 1e-6
        error, torchs = ((v.double() - truth).abs().max().item() for v in (y, torch_loop(*arguments, **how)))
        assert error <= 2 * torchs + 5e-7 * scale, (error, torchs, scale)
        theirs = reference.moe_experts(*arguments, **how).double()
        assert (y.double() - theirs).abs().max() <= (torch.finfo(x.dtype).eps + 1e-6) * scale
    return y


@settings(max_examples=50)
@given(
    tokens=st.sampled_from([0, 1, 2, 3, 5, 16, 17, 33, 40]),
    hidden=st.integers(1, 70),
    inter=st.integers(1, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_shape_within_twice_torchs_error(tokens, hidden, inter, experts, top_k, dtype, seed, empty, oracle):
    check(inputs(tokens, hidden, inter, experts, top_k, dtype, seed, empty), oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 128, 64, 16, 3), (70, 97, 33, 5, 2), (3, 512, 96, 12, 4)])
def test_larger_layers(shape, dtype, oracle):
    check(inputs(*shape, dtype), oracle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_to_one_expert(dtype, oracle):
    x, w13, w2, ids, weights = inputs(45, 40, 24, 7, 1, dtype)
    check((x, w13, w2, torch.full_like(ids, 6), weights), oracle)


def test_an_expert_that_a_token_names_twice_counts_twice():
    x, w13, w2, _, _ = inputs(1, 9, 5, 3, 2)
    twice = moe_experts(x, w13, w2, torch.tensor([[2, 2]], dtype=torch.int32), torch.tensor([[0.25, 0.5]]))
    once = moe_experts(x, w13, w2, torch.tensor([[2]], dtype=torch.int32), torch.tensor([[0.75]]))
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_slot_adds_nothing_whatever_its_weight(dtype):
    x, w13, w2, ids, weights = inputs(6, 20, 12, 4, 3, dtype, empty=0.5)
    y = moe_experts(x, w13, w2, ids, weights)
    junk = torch.tensor([float("nan"), float("inf"), -1e30]).expand_as(weights)
    assert torch.equal(moe_experts(x, w13, w2, ids, torch.where(ids < 0, junk, weights)), y)
    nothing = moe_experts(x, w13, w2, torch.full_like(ids, -1), weights * float("nan"))
    assert torch.equal(nothing, torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (5, 0)])
def test_no_token_and_no_slot(shape):
    x, w13, w2, _, _ = inputs(shape[0], 10, 6, 2, 1)
    y = moe_experts(x, w13, w2, torch.zeros(shape, dtype=torch.int32), torch.ones(shape))
    assert torch.equal(y, torch.zeros(shape[0], 10))
    arguments = [t.requires_grad_() for t in (x, w13, w2, torch.ones(shape))]
    moe_experts(*arguments[:3], torch.zeros(shape, dtype=torch.int32), arguments[3]).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e4])
def test_a_bad_token_stays_in_its_row(dtype, value):
    """Its neighbours share its experts, and an expert that it did not choose may overflow on it."""
    x, w13, w2, ids, weights = inputs(20, 33, 18, 3, 2, dtype, empty=0.1)
    ids[7] = torch.tensor([1, -1])
    y = moe_experts(x, w13, w2, ids, weights)
    bad = x.clone()
    bad[7] = value
    changed = moe_experts(bad, w13, w2, ids, weights)
    others = torch.arange(20) != 7
    assert torch.equal(changed[others], y[others])
    if not value < 1e5:
        assert not changed[7].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_expert_stays_with_the_tokens_that_chose_it(dtype):
    x, w13, w2, ids, weights = inputs(20, 33, 18, 4, 2, dtype)
    y = moe_experts(x, w13, w2, ids, weights)
    w13[2], w2[2] = float("nan"), float("inf")
    changed = moe_experts(x, w13, w2, ids, weights)
    chose = (ids == 2).any(1)
    assert chose.any() and torch.equal(changed[~chose], y[~chose])
    assert changed[chose].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_every_run_and_for_every_number_of_threads(dtype, threads, backend):
    # The reference is as good as torch's matrix product, whose bits may change with the number of threads.
    counts = (1, 2, 2, 1) if backend != "reference" else (2, 2)
    for shape in ((32, 128, 64, 12, 4), (5, 96, 40, 3, 3), (1, 300, 33, 8, 8)):
        arguments = inputs(*shape, dtype)
        results = []
        for n in counts:
            threads(n)
            results.append(moe_experts(*arguments))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_strided_inputs_and_untouched_arguments():
    x, w13, w2, ids, weights = inputs(9, 24, 10, 4, 3)
    before = [t.clone() for t in (x, w13, w2, ids, weights)]
    y = moe_experts(x, w13, w2, ids, weights)
    assert all(torch.equal(t, b) for t, b in zip((x, w13, w2, ids, weights), before))
    loose = [t.t().contiguous().t() for t in (x, ids, weights)]
    assert torch.equal(moe_experts(loose[0], w13, w2, loose[1], loose[2]), y)
    wide = torch.cat([x, x], 1)[:, :24]
    assert torch.equal(moe_experts(wide, w13, w2, ids, weights), y)


def test_silu_is_accurate_wherever_it_is_finite():
    """One gate at a time: x = (gate, 1), up = 1, so that y = silu(gate). Relative to the value, small ones included."""
    gate = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-1, 1, 501), torch.tensor([1e-20, -1e-6, 1e30])])
    x = torch.stack([gate, torch.ones_like(gate)], 1)
    ids, weights = torch.zeros(len(x), 1, dtype=torch.int32), torch.ones(len(x), 1)
    y = moe_experts(x, torch.eye(2)[None], torch.ones(1, 2, 1), ids, weights)
    torch.testing.assert_close(y[:, 0].double(), F.silu(gate.double()), rtol=1e-6, atol=1e-37)
    edge = torch.tensor([[float("inf"), 1.0], [-1e30, 1.0], [-3e38, 1.0]])  # exp overflows, the limit is 0
    expert = (torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.ones(1, 2, 1))
    y = moe_experts(edge[1:], *expert, ids[:2], weights[:2])
    assert (y.abs() <= 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_y_is_rounded_half_to_even(dtype):
    """As torch rounds, to infinity beyond the largest number, and a NaN stays one. A token a number: gate 32, up 1/32 and
    w2 1 make y the token's weight."""
    bits = torch.randperm(0x7FFF, generator=torch.Generator().manual_seed(0))[:2000].short()
    bits = torch.cat([bits, torch.tensor([0, 0x3FF, 0x400, 0x7BFE, 0x7BFF, 0x7C00, 0x7F7E, 0x7F7F]).short()])
    number, above = bits.view(dtype).float(), (bits + 1).view(dtype).float()
    middle = (number.double() + above.double()).div(2).float()
    largest = torch.tensor([torch.finfo(dtype).max * (1 + 2.0**-k) for k in (8, 9, 11, 12, 13)])
    values = torch.cat([number, middle, middle.nextafter(number), middle.nextafter(above), largest, -largest, -middle])
    values = values[(values == 0) | (values.abs() >= torch.finfo(torch.float32).tiny)]
    values = torch.cat([values, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    x = torch.tensor([32, 1 / 32], dtype=dtype).repeat(len(values), 1)
    ids = torch.zeros(len(values), 1, dtype=torch.int32)
    y = moe_experts(x, torch.eye(2, dtype=dtype)[None], torch.ones(1, 2, 1, dtype=dtype), ids, values[:, None])
    for column in y.T:
        torch.testing.assert_close(column, values.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- gradients, tracing ----


def leaves(arguments):
    return [t.clone().requires_grad_(t.is_floating_point()) for t in arguments]


def test_gradcheck():
    x, w13, w2, ids, weights = leaves(inputs(4, 5, 3, 3, 3, torch.float64))
    ids[0], ids[1], ids[2] = -1, torch.tensor([2, 2, 0]), torch.tensor([1, -1, 1])
    assert torch.autograd.gradcheck(lambda *v: moe_experts(*v[:3], ids, v[3]), (x, w13, w2, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_reference(dtype):
    ours, theirs = leaves(inputs(17, 21, 13, 5, 3, dtype)), leaves(inputs(17, 21, 13, 5, 3, dtype))
    d_y = torch.randn(17, 21, generator=torch.Generator().manual_seed(1)).to(dtype)
    moe_experts(*ours).backward(d_y)
    reference.moe_experts(*theirs).backward(d_y)
    tolerance = 1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    for name, mine, expected in zip(NAMES, ours, theirs):
        if name != "topk_ids":
            assert mine.grad.dtype == mine.dtype and mine.grad.shape == mine.shape
            error = (mine.grad.double() - expected.grad.double()).abs().max() / expected.grad.double().abs().max()
            assert error <= tolerance, (name, error)


@pytest.mark.parametrize("name", ["x", "w13", "w2", "topk_weights"])
def test_each_gradient_by_itself(name):
    arguments = dict(zip(NAMES, inputs(6, 8, 4, 3, 2)))
    arguments[name].requires_grad_()
    grads = []
    for function in (moe_experts, reference.moe_experts):
        grads += torch.autograd.grad(function(**arguments).square().sum(), arguments[name])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_gradients_of_many_narrow_experts(oracle):
    """More experts than rows of w13, and only some of them used."""
    x, w13, w2, ids, weights = inputs(6, 8, 2, 11, 2)
    arguments = dict(zip(NAMES, (x, w13.requires_grad_(), w2, ids, weights)))
    grads = [torch.autograd.grad(f(**arguments).square().sum(), w13)[0] for f in (moe_experts, reference.moe_experts)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_ids_of_no_expert_have_no_gradient():
    """As those of -1: what a forward leaves out, a gradient does too."""
    x, w13, w2, ids, weights = inputs(6, 8, 4, 3, 2, empty=0.4)
    gradient = torch.ops.dmoe._moe_experts_backward
    for outside in (torch.arange(3, 15, dtype=torch.int32), torch.arange(-13, -1, dtype=torch.int32)):
        strange = torch.where(ids < 0, outside.view(6, 2), ids)
        for plain, other in zip(
            gradient(x, x, w13, w2, ids, weights, True), gradient(x, x, w13, w2, strange, weights, True)
        ):
            assert torch.equal(plain, other)


def test_gradients_of_weights_that_nobody_wants_are_empty():
    x, w13, w2, ids, weights = inputs(5, 8, 4, 3, 2)
    d_x, d_w13, d_w2, d_weights = torch.ops.dmoe._moe_experts_backward(x, x, w13, w2, ids, weights, False)
    assert (d_x.shape, d_w13.shape, d_w2.shape, d_weights.shape) == (x.shape, (0,), (0,), weights.shape)


def test_opcheck():
    torch.library.opcheck(torch.ops.dmoe.moe_experts.default, leaves(inputs(5, 8, 4, 3, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_the_fake_kernel_allocates_what_the_real_one_returns(tokens, dtype):
    arguments = inputs(tokens, 8, 4, 3, 2, dtype)
    real = torch.ops.dmoe.moe_experts(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.dmoe.moe_experts(*map(mode.from_tensor, arguments))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_compiled_with_dynamic_shapes_equals_eager():
    torch._dynamo.reset()

    def function(x, *rest):
        return moe_experts(x * 2, *rest) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # one graph serves every length
        for tokens in (7, 9, 33):
            grads = []
            for f in (compiled, function):
                arguments = leaves(inputs(tokens, 12, 6, 4, 2, seed=tokens))
                y = f(*arguments)
                y.sum().backward()
                grads.append([y.detach()] + [a.grad for a in arguments if a.grad is not None])
            assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_truth_is_the_formula(oracle):
    """The oracle itself, on one token by hand: y = w * W_down (silu(gate) * up)."""
    x, w13, w2 = torch.tensor([[1.0]]), torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[5.0]]])
    y = oracle.experts(x, w13, w2, torch.tensor([[0]]), torch.tensor([[0.5]]))
    assert math.isclose(y.item(), 0.5 * 5 * (2 / (1 + math.exp(-2)) * 3))
