"""block_moe and BlockMoE, on every backend: the composition of gate, routing, experts and shared expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_ops import BlockMoE, BlockRouting, block_moe, block_route, moe_experts, patch, reference

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTING = BlockRouting(num_experts=12, top_k=3, block_size=4, n_group=3, topk_group=2, min_experts=5)
WEIGHTS = ("gate_weight", "expert_bias", "w13", "w2", "shared_w13", "shared_w2")


def weights(hidden=24, inter=10, shared=14, dtype=torch.float32, bias=True, gate_dtype=None, seed=0, experts=12):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        (normal(experts, hidden) * 2).to(gate_dtype or dtype),
        torch.linspace(-0.05, 0.05, experts, dtype=acc) if bias else None,
        normal(experts, 2 * inter, hidden),
        normal(experts, hidden, inter),
        normal(2 * shared, hidden) if shared else None,
        normal(hidden, shared) if shared else None,
    )


def tokens(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(x, arguments, oracle, offsets=None, routing=ROUTING):
    gate_weight, bias, w13, w2, shared_w13, shared_w2 = arguments
    y, routed, router_logits = block_moe(x, *arguments, routing=routing, block_offsets=offsets)
    flat = x.reshape(-1, x.shape[-1])
    assert y.shape == x.shape and y.dtype == x.dtype
    assert router_logits.shape == (len(flat), routing.num_experts) and router_logits.dtype == torch.float32
    if not len(flat):
        return
    # The gate in fp32: products of half-width values are exact, and their sum is as good as fp32 allows.
    exact_logits = flat.double() @ gate_weight.double().T
    torch.testing.assert_close(router_logits.double(), exact_logits, rtol=1e-6, atol=4e-6)
    # Routing and experts are those of the two other ops, on these logits.
    alone = block_route(router_logits.view(*x.shape[:-1], -1), bias, routing=routing, block_offsets=offsets)
    for ours, expected in zip(routed, alone):
        assert torch.equal(ours, expected)
    chosen = routed.topk_ids, routed.topk_weights
    parts = [moe_experts(flat, w13, w2, *chosen).double()]
    truth, terms = (oracle.experts(flat, w13, w2, *chosen, absolute) for absolute in (False, True))
    if shared_w13 is not None:
        parts.append(reference.mlp(flat.float(), shared_w13.float(), shared_w2.float()).double())
        for total, absolute in ((truth, False), (terms, True)):
            total += torch.from_numpy(np.stack([oracle.mlp(row, shared_w13, shared_w2, absolute) for row in flat]))
    y, eps, single = y.reshape(flat.shape).double(), torch.finfo(x.dtype).eps, 1e-6 * truth.abs().max()
    # y is rounded once. A body that multiplies bf16 numbers, as torch's own products do, has rounded h before.
    hidden = eps / 2 * terms if x.dtype == torch.bfloat16 else 0
    assert ((y - truth).abs() <= eps / 2 * truth.abs() + hidden + single + 1e-7).all()
    assert ((y - sum(parts)).abs() <= eps * (parts[0].abs() + y.abs()) + hidden + 2 * single + 1e-7).all()


@settings(max_examples=25)
@given(
    shape=st.sampled_from([(0,), (1,), (9,), (2, 7), (3, 1), (1, 33), (2, 0)]),
    dtype=st.sampled_from(DTYPES),
    gate_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    hidden=st.sampled_from([1, 7, 24, 33]),
    shared=st.sampled_from([0, 1, 14]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_layer_is_the_composition(shape, dtype, gate_dtype, hidden, shared, bias, seed, oracle):
    arguments = weights(hidden, 10, shared, dtype, bias, gate_dtype, seed)
    check(tokens(*shape, hidden, dtype=dtype, seed=seed), arguments, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dmoe", "token", "des_seq", "des_vote", "capacity"])
def test_named_policies(name, dtype, oracle):
    routing = BlockRouting.policy(name, num_experts=32, top_k=4, block_size=16, n_group=1, topk_group=1)
    check(tokens(2, 19, 48, dtype=dtype), weights(48, 16, 16, dtype, experts=32), oracle, routing=routing)


def test_packed_blocks(oracle):
    check(tokens(13, 24), weights(), oracle, torch.tensor([0, 4, 5, 9, 12, 13], dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_token_stays_in_its_row(dtype):
    """It routes nowhere, votes nowhere, and the others of its block get what they get without it."""
    x = tokens(11, 24, dtype=dtype)
    x[5] = float("nan")
    arguments = weights(dtype=dtype)
    y, routed, router_logits = block_moe(x, *arguments, routing=ROUTING)
    rest = [t for t in range(11) if t != 5]
    offsets = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
    alone, routed_alone, logits_alone = block_moe(x[rest], *arguments, routing=ROUTING, block_offsets=offsets)
    assert y[5].isnan().all() and router_logits[5].isnan().all() and (routed.topk_ids[5] == -1).all()
    torch.testing.assert_close(router_logits[rest], logits_alone)
    assert torch.equal(routed.topk_ids[rest], routed_alone.topk_ids)
    torch.testing.assert_close(y[rest], alone)
    without_shared = block_moe(x, *arguments[:4], None, None, routing=ROUTING)[0]
    assert torch.equal(without_shared[5], torch.zeros(24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_every_run_and_for_every_number_of_threads(dtype, threads, backend):
    # The reference is as good as torch's matrix product, whose bits may change with the number of threads.
    counts = (1, 2, 2, 1) if backend != "reference" else (2, 2)
    x, arguments, results = tokens(2, 21, 96, dtype=dtype), weights(96, 40, 40, dtype), []
    for n in counts:
        threads(n)
        y, routed, router_logits = block_moe(x, *arguments, routing=ROUTING)
        results.append((y, *routed, router_logits))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- gradients, tracing ----


def leaves(arguments):
    return [t if t is None else t.clone().requires_grad_() for t in arguments]


@pytest.mark.parametrize("shared", [0, 3])
def test_gradcheck(shared):
    routing = BlockRouting(num_experts=5, top_k=2, block_size=3, n_group=1, topk_group=1, min_experts=3)
    x, gate_weight, bias, *rest = leaves(
        [tokens(4, 4, dtype=torch.float64), *weights(4, 3, shared, torch.float64, experts=5)]
    )

    def function(x, gate_weight, *rest):
        y, routed, router_logits = block_moe(x, gate_weight, bias.detach(), *rest, routing=routing)
        return y, routed.topk_weights, router_logits

    if shared:
        assert torch.autograd.gradcheck(function, (x, gate_weight, *rest))
    else:
        assert torch.autograd.gradcheck(lambda *v: function(*v, None, None), (x, gate_weight, *rest[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [0, 14])
def test_gradients_are_those_of_the_reference(shared, dtype):
    """Through every output: y, the weights of the chosen experts, the router logits."""
    tolerance = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    names, grads = ("x", *WEIGHTS), []
    for function in (block_moe, reference.block_moe):
        x, gate_weight, bias, *rest = leaves([tokens(2, 7, 24, dtype=dtype), *weights(dtype=dtype, shared=shared)])
        y, routed, router_logits = function(x, gate_weight, bias.detach(), *rest, routing=ROUTING)
        d_y = tokens(2, 7, 24, dtype=dtype, seed=5)
        loss = (y * d_y).double().sum() + routed.topk_weights.square().sum() + router_logits.sin().sum()
        loss.backward()
        grads.append([None if t is None else t.grad for t in (x, gate_weight, bias, *rest)])
    for name, mine, expected in zip(names, *grads):
        assert (mine is None) == (expected is None), name
        if mine is not None:
            assert mine.dtype == expected.dtype and mine.shape == expected.shape
            error = (mine.double() - expected.double()).abs().max() / expected.double().abs().max()
            assert error <= tolerance, (name, error)


@pytest.mark.parametrize("name", ["x", *(name for name in WEIGHTS if name != "expert_bias")])
def test_each_gradient_by_itself(name):
    """More tokens than columns, and gradients of one argument alone."""
    grads = []
    for function in (block_moe, reference.block_moe):
        arguments = dict(zip(("x", *WEIGHTS), (tokens(29, 24), *weights())))
        arguments[name].requires_grad_()
        y, routed, _ = function(**arguments, routing=ROUTING)
        assert not any(part.requires_grad for part in (routed.topk_ids, routed.coreset_ids, routed.coreset_sizes))
        grads += torch.autograd.grad(y.square().sum(), arguments[name])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    """Inside the region, backward too: a region's dtype would reach the torch ops within an op."""

    def run():
        x, gate_weight, bias, *rest = leaves([tokens(2, 7, 24), *weights()])
        y, routed, router_logits = block_moe(x, gate_weight, bias.detach(), *rest, routing=ROUTING)
        alone = moe_experts(x[0], rest[0], rest[1], routed.topk_ids[:7], routed.topk_weights[:7])
        (y.square().sum() + alone.square().sum() + router_logits.sin().sum()).backward()
        return [y, alone, router_logits, *(t.grad for t in (x, gate_weight, *rest))]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        for ours, plain in zip(run(), expected):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("op", ["block_moe", "moe_experts"])
def test_a_second_derivative_is_refused(op):
    x, gate_weight, bias, *rest = leaves([tokens(7, 24), *weights()])
    y, routed, _ = block_moe(x, gate_weight, bias.detach(), *rest, routing=ROUTING)
    if op == "moe_experts":
        y = moe_experts(x, *rest[:2], routed.topk_ids, routed.topk_weights.detach())
    with pytest.raises(RuntimeError, match="differentiable once, got create_graph=True"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("op", ["block_route", "moe_experts", "block_moe"])
def test_derivatives_of_torch_func_are_refused(op):
    """A forward-mode derivative would be zero in silence. vmap and plain gradients pass."""
    gate_weight, bias, w13, w2, shared_w13, shared_w2 = weights()
    ids, scale = torch.zeros(7, 2, dtype=torch.int32), torch.ones(7, 2)
    function = dict(
        block_route=lambda x: block_route(x @ gate_weight.T, bias, routing=ROUTING).topk_weights,
        moe_experts=lambda x: moe_experts(x, w13, w2, ids, scale),
        block_moe=lambda x: block_moe(x, gate_weight, bias, w13, w2, shared_w13, shared_w2, routing=ROUTING)[0],
    )[op]
    x, ones = tokens(7, 24), torch.ones(7, 24)
    for forward_mode in (
        lambda: torch.func.jvp(function, (x,), (ones,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.func.vmap(lambda v: torch.func.jvp(function, (v,), (ones,)))(x[None]),
        lambda: dual(function, x, ones),
    ):
        with pytest.raises(NotImplementedError, match=f"^{op} has no forward-mode derivative"):
            forward_mode()
    for backward_mode in (
        torch.func.grad(lambda x: function(x).sum()),
        torch.func.jacrev(function),
        lambda x: torch.func.vmap(torch.func.grad(lambda v: function(v).sum()))(x[None]),
    ):
        with pytest.raises(NotImplementedError, match=f"^{op} is not differentiable by torch.func"):
            backward_mode(x)
    assert torch.equal(torch.func.vmap(function)(x[None])[0], function(x))
    assert torch.autograd.grad(function(x.requires_grad_()).sum(), x)[0].isfinite().all()


def dual(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, tangent))


def op_arguments(count=9, offsets=None, shared=14, **kwargs):
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    return (tokens(count, 24), *weights(shared=shared, **kwargs), offsets, count, *ROUTING.args())


def test_opcheck():
    arguments = [
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.dim() > 1 else a
        for a in op_arguments(offsets=[0, 4, 5, 9])
    ]
    torch.library.opcheck(torch.ops.dmoe.block_moe.default, arguments)


@pytest.mark.parametrize("count, offsets", [(0, None), (0, [0]), (1, None), (9, None), (9, [0, 4, 5, 9])])
def test_the_fake_kernel_allocates_what_the_real_one_returns(count, offsets):
    arguments = op_arguments(count, offsets)
    real = torch.ops.dmoe.block_moe(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = torch.ops.dmoe.block_moe(*fakes)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def module(dtype=torch.float32, **kwargs):
    layer = BlockMoE(24, 10, ROUTING, shared_intermediate_size=14, dtype=dtype, **kwargs)
    for name, value in zip(WEIGHTS, weights(dtype=dtype)):
        if getattr(layer, name) is not None:
            getattr(layer, name).data.copy_(value)
    return layer


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_with_dynamic_shapes_equals_eager(compiler, backend):
    if compiler == "inductor" and backend != "reference":
        pytest.skip("inductor wraps the same op whatever the backend: once is enough")
    torch._dynamo.reset()
    layer = module()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():  # one graph serves every length
        for seq in (7, 33):
            y, (router_logits, topk_ids) = compiled(tokens(2, seq, 24))
            expected, (logits, ids) = layer(tokens(2, seq, 24))
            assert torch.equal(topk_ids, ids) and torch.equal(router_logits, logits) and torch.equal(y, expected)


# ---- the module ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_returns_what_llada2s_own_block_returns(dtype):
    layer, x = module(dtype), tokens(2, 9, 24, dtype=dtype)
    y, (router_logits, topk_ids) = layer(x)
    assert y.shape == (2, 9, 24) and y.dtype == dtype
    assert router_logits.shape == (2, 9, 12) and router_logits.dtype == torch.float32
    assert topk_ids.shape == (2, 9, 3) and topk_ids.dtype == torch.int64
    expected, routed, logits = block_moe(x, *weights(dtype=dtype), routing=ROUTING)
    assert torch.equal(y, expected) and torch.equal(router_logits, logits.view(2, 9, 12))
    assert torch.equal(topk_ids, routed.topk_ids.view(2, 9, 3).long())
    offsets = torch.tensor([0, 2, 6, 9], dtype=torch.int32)
    y, (router_logits, topk_ids) = layer(x[0], offsets)
    assert (y.shape, router_logits.shape, topk_ids.shape) == ((9, 24), (9, 12), (9, 3))
    assert torch.equal(y, block_moe(x[0], *weights(dtype=dtype), routing=ROUTING, block_offsets=offsets)[0])


def test_a_new_module_is_where_and_what_it_is_asked_to_be():
    layer = BlockMoE(24, 10, ROUTING, shared_intermediate_size=14, dtype=torch.bfloat16, device="meta")
    assert {name: value.dtype for name, value in layer.state_dict().items()} == {
        **dict.fromkeys(WEIGHTS, torch.bfloat16),
        "expert_bias": torch.float32,
    }
    assert all(value.is_meta for value in layer.state_dict().values())
    torch.set_default_dtype(torch.float64)
    try:
        bias = BlockMoE(24, 10, ROUTING).expert_bias
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bias, torch.zeros(12, dtype=torch.float32)) and bias.dtype == torch.float32
    assert "top_k=3" in repr(layer)
    layer.expert_map = torch.arange(12, dtype=torch.int32)  # of where experts are now, not of the model
    assert set(layer.state_dict()) == set(WEIGHTS)


def test_a_module_in_float64():
    layer, x = module(torch.float64), tokens(2, 9, 24, dtype=torch.float64)
    y, (router_logits, _) = layer(x)
    assert y.dtype == router_logits.dtype == torch.float64
    gate_weight, bias, *rest = weights(dtype=torch.float64)
    bias = bias.float().double()  # held in float32
    assert torch.equal(y, block_moe(x, gate_weight, bias, *rest, routing=ROUTING)[0])


def test_a_module_without_bias_and_shared_expert(oracle):
    layer = BlockMoE(24, 10, ROUTING, expert_bias=False)
    assert layer.expert_bias is None and layer.shared_w13 is None and layer.shared_w2 is None
    plain = weights(bias=False, shared=0)
    for name, value in zip(WEIGHTS, plain):
        if value is not None:
            getattr(layer, name).data.copy_(value)
    x = tokens(2, 9, 24)
    assert torch.equal(layer(x)[0], block_moe(x, *plain, routing=ROUTING)[0])


def eager(block, x, ids, router_logits):
    """What the reference block computes, given the experts of each token: loops over its own sub-modules."""

    def mlp(m, v):
        return m.down_proj(F.silu(m.gate_proj(v)) * m.up_proj(v))

    y = torch.zeros_like(x) if block.shared_experts is None else mlp(block.shared_experts, x)
    for t, chosen in enumerate(ids):
        score = router_logits[t, chosen].sigmoid()
        for e, w in zip(chosen.tolist(), (score / score.sum() * 2.5).tolist()):
            y[t] += w * mlp(block.experts[e], x[t])
    return y


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_from_hf_takes_over_a_block(shared, make_block):
    torch.manual_seed(shared)
    block = make_block(shared=shared)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    layer = BlockMoE.from_hf(block, BlockRouting(num_experts=8, top_k=2, n_group=2, topk_group=1, min_experts=4))
    x = torch.randn(2, 10, 16)
    with torch.no_grad():
        y, (router_logits, topk_ids) = layer(x)
        expected = eager(block, x.view(20, 16), topk_ids.view(20, 2), router_logits.view(20, 8))
    torch.testing.assert_close(y.view(20, 16), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    # Held once: the block's own parameters are views of the layer's.
    stacked = layer.w13.untyped_storage().data_ptr()
    assert all(e.up_proj.weight.untyped_storage().data_ptr() == stacked for e in block.experts)


def test_a_block_of_one_expert_is_taken_over(make_block):
    block = make_block(experts=1, top_k=1, n_group=1)
    block.gate.weight.requires_grad_(False)
    layer = BlockMoE.from_reference(block, BlockRouting(num_experts=1, top_k=1, n_group=1, topk_group=1))
    assert torch.equal(layer.w2[0], block.experts[0].down_proj.weight)


@pytest.mark.parametrize("training", [True, False])
def test_undo_carries_the_mode_over(training, make_block):
    model = torch.nn.Sequential(make_block(), make_block()).train(not training)
    handle = patch(model, "dmoe", min_experts=4)
    assert all(layer.training != training for layer in model)
    model.train(training)
    handle.undo()
    assert all(module.training == training for module in model.modules())


def test_patch_and_undo_restore_every_module_and_bit(make_block):
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16), make_block(), make_block(dtype=torch.bfloat16)])
    modules, before = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    handle = patch(model, "dmoe", min_experts=4)
    assert isinstance(model.layers[1], BlockMoE) and isinstance(model.layers[2], BlockMoE)
    assert (handle.routing.num_experts, handle.routing.top_k, handle.routing.min_experts) == (8, 2, 4)
    y, (router_logits, topk_ids) = model.layers[2](torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert (y.dtype, router_logits.dtype, topk_ids.dtype) == (torch.bfloat16, torch.float32, torch.int64)
    handle.undo()
    handle.undo()  # nothing left to do
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before)
