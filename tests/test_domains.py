"""block_route over blocks that share a pool, and with coresets passed in: against the specification's plain loops."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from routings import BIASES, PALETTES, SELECTIONS

import dmoe_ops
from dmoe_ops import BlockRouting, block_moe, block_route, reference

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = BlockRouting(
    num_experts=24, top_k=4, block_size=4, n_group=4, topk_group=2, min_experts=5, capacity=7, union_k=2
)


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, monkeypatch) -> str:
    from dmoe_ops import _backends

    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if torch.cuda.is_available():
            pytest.skip("Triton: tests/gpu, where there is a GPU")
    elif request.param in _backends.missing():
        pytest.skip(f"backend cpp: {_backends.missing()['cpp']}")
    monkeypatch.setenv("DMOE_BACKEND", request.param)
    return request.param


def fill(rng, shape, palette="normal"):
    values = rng.normal(size=shape) if PALETTES.get(palette) is None else rng.choice(PALETTES[palette], size=shape)
    return torch.from_numpy(np.asarray(values, np.float32))


def bias_of(rng, kind, experts):
    if kind == "none":
        return None
    values = rng.normal(size=experts) * 0.3 if BIASES[kind] is None else rng.choice(BIASES[kind], size=experts)
    return torch.from_numpy(np.asarray(values, np.float32))


def rising(rng, end, most):
    """0 to `end` by steps of up to `most`, some of them 0."""
    offsets = [0]
    while offsets[-1] < end:
        offsets.append(min(end, offsets[-1] + int(rng.integers(0, most + 1))))
    return [*offsets, *[end] * int(rng.integers(0, 2))]


def check(logits, bias, routing, oracle, domains=None, given=None):
    """Every backend gives the oracle's routing, and that of the reference."""
    experts = routing.num_experts
    blocks = oracle.cut(logits.shape[:-1].numel(), logits.shape[-2], routing.block_size)
    shared = dict(
        domain_offsets=None if domains is None else torch.tensor(domains, dtype=torch.int32),
        coreset_ids=None if given is None else torch.tensor(given, dtype=torch.int32),
    )
    result = block_route(logits, bias, routing=routing, **shared)
    spans = None if domains is None else [range(a, b) for a, b in itertools.pairwise(domains)]
    vector = None if bias is None else bias.numpy()
    ids, weights, coresets = oracle.route(logits.reshape(-1, experts).numpy(), vector, routing, blocks, spans, given)
    width = routing.coreset_width if given is None else len(given[0])
    padded = [members + [-1] * (width - len(members)) for members in coresets]
    assert result.coreset_ids.tolist() == padded
    assert result.coreset_sizes.tolist() == [len(members) for members in coresets]
    assert result.topk_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(result.topk_weights.numpy(), weights, rtol=1e-6, atol=1e-9)
    want = reference.block_route(logits, bias, routing=routing, **shared)
    for got, expected in zip(result[:1] + result[2:], want[:1] + want[2:]):
        assert torch.equal(got, expected)
    torch.testing.assert_close(result.topk_weights, want.topk_weights, rtol=1e-6, atol=1e-9)
    return result


def random_routing(rng, selection):
    group_size, n_group = [(1, 1), (8, 1), (17, 1), (2, 2), (2, 6), (4, 4), (3, 5)][rng.integers(7)]
    experts = group_size * n_group
    upto = lambda most: int(rng.integers(1, most + 1))  # noqa: E731
    aggregate, select = selection
    return BlockRouting(
        num_experts=experts,
        top_k=min(upto(experts), 8),
        block_size=upto(7),
        n_group=n_group,
        topk_group=upto(n_group),
        score=["sigmoid", "softmax"][rng.integers(2)],
        aggregate=aggregate,
        select=select,
        top_p=[1e-6, 0.3, 0.6, 1.0][rng.integers(4)],
        min_experts=int(rng.integers(0, experts + 2)),
        max_experts=None if rng.integers(2) else upto(experts + 2),
        capacity=upto(experts + 2),
        union_k=upto(experts),
        pool_capacity=None if rng.integers(3) == 0 else upto(experts + 2),
        choose=["block", "pool"][rng.integers(2)],
    )


@pytest.mark.parametrize("selection", [*SELECTIONS, ("sum", "all"), ("max", "all"), ("union", "all")])
def test_any_pool_is_the_specifications(selection, oracle, backend):
    """Random settings, values, biases and domains, empty ones too."""
    rng = np.random.default_rng(list(map(ord, "".join(selection))))
    for _ in range(1 if backend == "triton" else 12):
        routing = random_routing(rng, selection)
        logits = fill(
            rng, [int(rng.integers(1, 4)), int(rng.integers(1, 15)), routing.num_experts], rng.choice(list(PALETTES))
        )
        bias = bias_of(rng, rng.choice(list(BIASES)), routing.num_experts)
        n_blocks = logits.shape[0] * -(-logits.shape[1] // routing.block_size)
        check(logits, bias, routing, oracle, None if rng.integers(6) == 0 else rising(rng, n_blocks, 4))


def test_any_coresets_may_be_passed_in(oracle, backend):
    """In any order, with repetitions and holes, of any width."""
    rng = np.random.default_rng(1)
    for _ in range(1 if backend == "triton" else 12):
        routing = random_routing(rng, SELECTIONS[rng.integers(len(SELECTIONS))])
        logits = fill(rng, [2, 9, routing.num_experts], rng.choice(list(PALETTES)))
        bias = bias_of(rng, rng.choice(list(BIASES)), routing.num_experts)
        n_blocks, width = 2 * -(-9 // routing.block_size), int(rng.integers(1, routing.num_experts + 40))
        check(logits, bias, routing, oracle, given=rng.integers(-1, routing.num_experts, [n_blocks, width]).tolist())


@pytest.mark.parametrize("aggregate, select", SELECTIONS)
def test_a_domain_of_one_block_changes_nothing(aggregate, select, backend):
    """Nor does any domain, unless tokens choose in a pool or the pool has a capacity."""
    routing = dataclasses.replace(SMALL, aggregate=aggregate, select=select)
    logits = fill(np.random.default_rng(2), [2, 7, 24])
    want = block_route(logits, routing=routing)
    pool = dataclasses.replace(routing, choose="pool")
    for settings, offsets in ((routing, [0, 4]), (routing, range(5)), (pool, range(5)), (pool, None)):
        offsets = None if offsets is None else torch.tensor([*offsets])  # int64
        got = block_route(logits, routing=settings, domain_offsets=offsets)
        assert torch.equal(got.topk_ids, want.topk_ids) and torch.equal(got.topk_weights, want.topk_weights)
        assert torch.equal(got.coreset_sizes, want.coreset_sizes)


def test_tokens_choose_in_the_union(backend):
    """Three blocks of one token each; the first two are one domain: both choose among {0, 1, 4, 5}."""
    logits = torch.full((3, 8), -5.0)
    logits[0, [0, 1, 4]] = torch.tensor([3.0, 2.0, 1.0])
    logits[1, [4, 5, 0]] = torch.tensor([3.0, 2.0, 2.5])
    logits[2, [6, 7]] = 1.0
    routing = BlockRouting(8, 3, 1, 1, 1, aggregate="union", select="nonzero", union_k=2, choose="pool")
    got = block_route(logits, routing=routing, domain_offsets=torch.tensor([0, 2, 2, 3]))
    assert [ids[:size].tolist() for ids, size in zip(got.coreset_ids, got.coreset_sizes)] == [[0, 1, 4]] * 2 + [[6, 7]]
    assert got.topk_ids.tolist() == [[0, 1, 4], [4, 0, 1], [6, 7, -1]]


def test_a_pool_is_voted_by_shares_and_ties_go_to_the_lower_id(backend):
    """Each block has one vote to give, however many tokens it has: 4, of four tokens, 2 and 6, of one each, are equal."""
    logits = torch.full((6, 8), -float("inf"))
    logits[[0, 1, 2, 3, 4, 5], [4, 4, 4, 4, 6, 2]] = float("inf")
    offsets = torch.tensor([0, 4, 5, 6], dtype=torch.int32)
    for capacity, pool in ((1, [2]), (2, [2, 4]), (3, [2, 4, 6]), (4, [0, 2, 4, 6])):
        routing = BlockRouting(8, 1, 4, 1, 1, pool_capacity=capacity, choose="pool")
        got = block_route(logits, routing=routing, block_offsets=offsets, domain_offsets=torch.tensor([0, 3]))
        assert got.coreset_ids.tolist() == [pool] * 3
    assert got.topk_ids.flatten().tolist() == [4, 4, 4, 4, 6, 2]


def test_coresets_are_selected_inside_the_pool_as_if_it_were_all(backend):
    """The pool is {1, 2}. The third block has half of its votes for 2 and none for 1: of the pool's votes, all."""
    logits = torch.full((3, 4), -2.0)
    logits[0, 1], logits[0, 2] = 5.0, 2.0
    logits[1, 2], logits[1, 1] = 5.0, 2.0
    logits[2, 3], logits[2, 2] = 0.5, 0.4
    routing = BlockRouting(4, 2, 1, 1, 1, min_experts=0, top_p=0.5, pool_capacity=2)
    got = block_route(logits, routing=routing, domain_offsets=torch.tensor([0, 3]))
    assert got.coreset_ids.tolist() == [[1, -1], [2, -1], [2, -1]]
    assert got.topk_ids.tolist() == [[1, -1], [2, -1], [2, -1]]


def test_a_batch_reaches_its_members_only_inside_a_domain(backend):
    routing = dataclasses.replace(SMALL, pool_capacity=6)
    logits = fill(np.random.default_rng(4), [4, 4, 24])
    offsets = torch.tensor([0, 2, 4])
    want = block_route(logits, routing=routing, domain_offsets=offsets)
    logits[3, :, 20:] += 9
    got = block_route(logits, routing=routing, domain_offsets=offsets)
    assert torch.equal(got.topk_ids[:8], want.topk_ids[:8]) and torch.equal(got.topk_weights[:8], want.topk_weights[:8])
    assert {20, 21, 22, 23} <= set(got.topk_ids[12:].flatten().tolist())
    assert not torch.equal(got.coreset_ids[2], want.coreset_ids[2])


def test_what_was_selected_may_be_passed_in(backend):
    logits = fill(np.random.default_rng(6), [3, 9, 24])
    for routing in (SMALL, dataclasses.replace(SMALL, select="all"), dataclasses.replace(SMALL, max_experts=6)):
        want = block_route(logits, routing=routing)
        got = block_route(logits, routing=routing, coreset_ids=want.coreset_ids)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        assert got.coreset_ids.data_ptr() != want.coreset_ids.data_ptr()


@pytest.mark.parametrize("name", ["oea", "xshare"])
def test_named_policies_at_the_models_size(name, oracle, backend):
    rng = np.random.default_rng(7)
    policy = BlockRouting.policy(name, block_size=8, **({"pool_capacity": 20} if name == "xshare" else {}))
    check(fill(rng, [3, 8, 256]) * 1.5 - 1, fill(rng, [256]) * 0.05, policy, oracle, [0, 2, 3])


def test_no_tokens(backend):
    pool = dataclasses.replace(SMALL, pool_capacity=5)
    for offsets in ([0], [0, 0, 0]):
        got = block_route(torch.empty(0, 24), routing=pool, domain_offsets=torch.tensor(offsets))
        assert got.coreset_ids.shape == (0, 5) and got.topk_ids.shape == (0, 4)
    given = torch.empty(0, 3, dtype=torch.int32)
    assert block_route(torch.empty(0, 24), routing=SMALL, coreset_ids=given).coreset_ids.shape == (0, 3)


LAYER = dict(num_experts=24, top_k=4, block_size=4, n_group=4, topk_group=2, min_experts=5)
SHARED = [
    (dict(choose="pool"), dict(domain_offsets=torch.tensor([0, 2, 3]))),
    (dict(pool_capacity=6), dict(domain_offsets=torch.tensor([0, 2, 3]))),
    (dict(), dict(coreset_ids=torch.tensor([[3, 5, 9, -1], [1, 2, 8, 9], [7, -1, -1, 4]], dtype=torch.int32))),
]


def layer_arguments():
    generator = torch.Generator().manual_seed(8)
    shapes = (12, 16), (24, 16), (24,), (24, 16, 16), (24, 16, 8), (16, 16), (16, 8)
    return [torch.randn(shape, generator=generator) / 4 for shape in shapes]


@pytest.mark.parametrize("settings, shared", SHARED)
def test_a_layer_routes_as_its_router_does(settings, shared, backend):
    routing = BlockRouting(**LAYER, **settings)
    x, gate, bias, *weights = layer_arguments()
    y, routed, logits = block_moe(x, gate, bias, *weights, routing=routing, **shared)
    alone = block_route(logits, bias, routing=routing, **shared)
    assert all(torch.equal(a, b) for a, b in zip(routed, alone))
    want, _, _ = reference.block_moe(x, gate, bias, *weights, routing=routing, **shared)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings, shared", SHARED)
def test_gradients_are_those_of_the_weights(settings, shared):
    routing = BlockRouting(**LAYER, **settings)
    x, gate, bias, *weights = layer_arguments()
    grads = []
    for function in (block_moe, reference.block_moe):
        leaves = [t.clone().requires_grad_() for t in (x, gate, *weights)]
        y, routed, _ = function(*leaves[:2], bias, *leaves[2:], routing=routing, **shared)
        (y.square().sum() + routed.topk_weights.sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings, shared", SHARED)
def test_ops_are_traced_with_what_blocks_share(settings, shared):
    routing = BlockRouting(**LAYER, **settings)
    x, gate, bias, *weights = layer_arguments()
    rest = *routing.pool_args(), shared.get("domain_offsets"), shared.get("coreset_ids")
    logits = (x @ gate.T).requires_grad_()
    arguments = logits, bias, None, 12, *routing.args(), *rest
    torch.library.opcheck(torch.ops.dmoe.block_route.default, arguments)
    scales = *[None] * 4, False, None, "silu"
    arguments = x, gate, bias, *weights, None, 12, *routing.args(), *scales, *rest
    torch.library.opcheck(torch.ops.dmoe.block_moe.default, arguments)
    torch._dynamo.reset()

    def function(logits, values):
        name = next(iter(shared))
        return block_route(logits * 2, bias, routing=routing, **{name: values})

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    values = next(iter(shared.values()))
    assert all(torch.equal(a, b) for a, b in zip(compiled(logits.detach(), values), function(logits.detach(), values)))


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("domain_offsets", ints(0, 2), "to n_blocks=3, got [0, 2]"),
        ("domain_offsets", ints(1, 3), "[1, 3]"),
        ("domain_offsets", ints(0, 2, 1, 3), "2 then 1 at domain 1"),
        ("domain_offsets", ints(), "[]"),
        ("domain_offsets", ints(0, 3, dtype=torch.float32), "float32"),
        ("domain_offsets", ints(0, 3)[None], "[1, 2]"),
        ("domain_offsets", ints(0, 3).to("meta"), "meta"),
        ("domain_offsets", [0, 3], "[0, 3]"),
        ("coreset_ids", torch.zeros(2, 4, dtype=torch.int32), "[3, width], got [2, 4]"),
        ("coreset_ids", torch.zeros(3, dtype=torch.int32), "[3]"),
        ("coreset_ids", torch.zeros(3, 0, dtype=torch.int32), "width of at least 1, got [3, 0]"),
        ("coreset_ids", torch.zeros(3, 4, dtype=torch.int64), "int64"),
        ("coreset_ids", torch.full((3, 4), 24, dtype=torch.int32), "below num_experts=24, got 24"),
        ("coreset_ids", torch.full((3, 4), -2, dtype=torch.int32), "got -2"),
        ("coreset_ids", torch.zeros(3, 4, dtype=torch.int32, device="meta"), "meta"),
        ("coreset_ids", [[0]] * 3, "[[0], [0], [0]]"),
    ],
)
def test_bad_input_is_refused_by_name(name, value, says):
    x, gate, bias, *weights = layer_arguments()
    shared = dict(routing=SMALL, **{name: value})
    calls = [lambda module=module: module.block_route(x @ gate.T, bias, **shared) for module in (dmoe_ops, reference)]
    calls += [
        lambda module=module: module.block_moe(x, gate, bias, *weights, **shared) for module in (dmoe_ops, reference)
    ]
    calls += [lambda: block_route((x @ gate.T).requires_grad_(), bias, **shared)]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(f"{name} must") and says in str(error.value) and "\n" not in str(error.value)


def test_domains_and_coresets_do_not_go_together():
    with pytest.raises(ValueError, match=r"^domain_offsets must be None with coreset_ids, got a tensor of shape \[2\]"):
        block_route(torch.zeros(4, 24), routing=SMALL, domain_offsets=ints(0, 1), coreset_ids=ints(1)[None])


PRIVATE_SHARED = [
    (dict(domain_offsets=ints(0, 2)), "domain_offsets"),
    (dict(domain_offsets=ints(3, 0, 3)), "domain_offsets"),
    (dict(domain_offsets=ints(0, 3, dtype=torch.int64)), "domain_offsets"),
    (dict(domain_offsets=ints()), "domain_offsets"),
    (dict(domain_offsets=ints(0, 3), choose_in_pool=True), "narrow"),
    (dict(given_coresets=torch.zeros(3, 4, dtype=torch.int32)), "given_coresets"),
]


@pytest.mark.parametrize("shared, says", PRIVATE_SHARED)
def test_the_op_of_the_cpu_looks_at_its_bounds_again(shared, says):
    from dmoe_ops import _backends, _library

    if "cpp" in _backends.missing():
        pytest.skip(f"backend cpp: {_backends.missing()['cpp']}")
    routing = dataclasses.replace(SMALL, max_experts=7)
    out = [torch.zeros(shape, dtype=torch.int32) for shape in ((12, 4), (12, 4), (3, 7), (3,))]
    out[1] = out[1].float()
    inputs = (torch.zeros(12, 24), None, None, 12, *_library.packed_routing(routing))
    with pytest.raises(RuntimeError, match=says):
        torch.ops.dmoe._block_route_out(*inputs, *out, **shared)
