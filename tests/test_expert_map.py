"""expert_map, on every backend: the rows that hold the experts change no bit; parts of the experts give partial sums, and
the parts add up to the whole."""

from __future__ import annotations

import pytest
import torch
from pools import in_a_pool

from dmoe_ops import BlockMoE, BlockRouting, block_moe, formats, moe_experts, quantize, reference
from dmoe_ops import layer as layers
from dmoe_ops.experts import map_of_rank
from dmoe_ops.routing import POLICIES

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 37, 24, 10, 12, 4
PARTS = {
    "one": [range(EXPERTS)],
    "halves": [range(6), range(6, 12)],
    "shuffled": [[9, 2, 3, 11, 0], [1, 10, 8, 7, 6, 5, 4]],
    "with an empty part": [[], range(EXPERTS)],
    "each alone": [[e] for e in range(EXPERTS)],
}
POLICY_SETTINGS = dict(num_experts=EXPERTS, top_k=TOP_K, block_size=8, n_group=3, topk_group=2, min_experts=5)


def map_of(part, experts=EXPERTS):
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[list(part)] = torch.arange(len(part), dtype=torch.int32)
    return expert_map


def layer(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    return dict(
        x=normal(TOKENS, HIDDEN) * 4,
        gate_weight=normal(EXPERTS, HIDDEN) * 2,
        expert_bias=torch.linspace(-0.05, 0.05, EXPERTS, dtype=torch.float64).to(acc(dtype)),
        w13=normal(EXPERTS, 2 * INTER, HIDDEN),
        w2=normal(EXPERTS, HIDDEN, INTER),
        shared_w13=normal(2 * INTER, HIDDEN),
        shared_w2=normal(HIDDEN, INTER),
    )


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def slots(dtype=torch.float32, seed=3):
    """Ids with empty slots, and with an expert that a token names twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, EXPERTS, (TOKENS, TOP_K), generator=generator, dtype=torch.int32)
    ids[5], ids[6] = torch.tensor([7, 7, -1, 7]), -1
    return dict(topk_ids=ids, topk_weights=torch.rand(TOKENS, TOP_K, generator=generator).to(acc(dtype)))


def experts_of(weights, part):
    part = list(part)
    return {name: value[part].contiguous() for name, value in weights.items()}


def routed_weights(values):
    return {name: values[name] for name in ("w13", "w2")}


def quantised(values, form, names=("w13", "w2")):
    weights = {}
    for name in names:
        halves = 2 if name.endswith("w13") else 1
        weights[name], weights[f"{name}_scale"] = quantize.quantize(values[name], form, halves=halves)
    return weights


FORMS = [(None, None), ("fp8", None), ("int8", None), ("int4", None), ("int8", "int8")]


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_ranks_hold_equal_ranges(ranks):
    local = EXPERTS // ranks
    for rank in range(ranks):
        expert_map, part = map_of_rank(EXPERTS, local, rank, "cpu"), range(rank * local, (rank + 1) * local)
        assert expert_map.dtype == torch.int32 and torch.equal(expert_map, map_of(part))
        assert map_of_rank(EXPERTS, local, rank, "meta").is_meta
    assert map_of_rank(EXPERTS, EXPERTS, 0, "cpu") is None


@pytest.mark.parametrize("form, activations", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [1, 20])
def test_rows_in_any_order_change_no_bit(dtype, form, activations, repeats):
    """37 tokens, and 740, which take other paths and more than one chunk."""
    values, chosen = layer(dtype), {name: value.repeat(repeats, 1) for name, value in slots(dtype).items()}
    x = values["x"].repeat(repeats, 1)
    weights = quantised(values, form) if form else routed_weights(values)
    y = moe_experts(x, **weights, **chosen, activations=activations)
    for seed in range(3):
        pools, expert_map = in_a_pool(weights, seed)
        again = moe_experts(x, **pools, **chosen, activations=activations, expert_map=expert_map)
        assert torch.equal(again, y)


@pytest.mark.parametrize("form", [None, "fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", ["token", "dmoe"])
def test_rows_in_any_order_change_no_bit_of_a_layer(policy, dtype, form):
    routing, values = BlockRouting.policy(policy, **POLICY_SETTINGS), layer(dtype)
    if form:
        values |= quantised(values, form, ["w13", "w2", "shared_w13", "shared_w2"])
    routed = {name: values[name] for name in values if name.startswith(("w13", "w2"))}
    y, result, logits = block_moe(**values, routing=routing)
    pools, expert_map = in_a_pool(routed, 7)
    again, mapped, mapped_logits = block_moe(**values | pools, routing=routing, expert_map=expert_map)
    assert torch.equal(again, y) and torch.equal(mapped_logits, logits)
    assert all(torch.equal(a, b) for a, b in zip(mapped, result))


def test_an_expert_that_is_not_loaded():
    """It is an error where a token chose it, and only there."""
    values, chosen = layer(), slots()
    weights, expert_map = in_a_pool(routed_weights(values))
    rest = dict(chosen, topk_ids=chosen["topk_ids"].where(chosen["topk_ids"] != 7, -1))
    y = moe_experts(values["x"], **weights, **rest, expert_map=expert_map)
    expert_map[7] = formats.NOT_LOADED
    with pytest.raises(ValueError, match=r"expert_map must have a row.*got -2 for expert 7"):
        moe_experts(values["x"], **weights, **chosen, expert_map=expert_map)
    assert torch.equal(moe_experts(values["x"], **weights, **rest, expert_map=expert_map), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_moe_experts_add_up(parts, dtype):
    values, chosen = layer(dtype), slots(dtype)
    x, weights = values["x"], routed_weights(values)
    whole, total = moe_experts(x, **weights, **chosen), torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for part in PARTS[parts]:
        mine, ids = experts_of(weights, part), chosen["topk_ids"]
        y = moe_experts(x, **mine, **chosen, expert_map=map_of(part))
        local = torch.tensor([[sorted(part).index(e) if e in part else -1 for e in row] for row in ids.tolist()])
        in_order = experts_of(weights, sorted(part))
        by_hand = moe_experts(x, **in_order, topk_ids=local.int(), topk_weights=chosen["topk_weights"])
        assert torch.equal(y, by_hand)
        theirs = reference.moe_experts(x, **mine, **chosen, expert_map=map_of(part))
        torch.testing.assert_close(y, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        total += y.double()
    # Each part is rounded to the dtype of x once.
    torch.testing.assert_close(
        total, whole.double(), rtol=0, atol=4 * torch.finfo(dtype).eps * whole.abs().max().item()
    )


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_parts_of_quantised_experts_add_up(form, activations):
    if activations and form != "int8":
        pytest.skip("rounded activations are for int8 weights")
    values, chosen = layer(), slots()
    weights = quantised(values, form)
    whole = moe_experts(values["x"], **weights, **chosen, activations=activations)
    total = torch.zeros_like(whole)
    for part in PARTS["shuffled"]:
        mine = experts_of(weights, part)
        total += moe_experts(values["x"], **mine, **chosen, activations=activations, expert_map=map_of(part))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_parts_of_a_layer_add_up(policy, dtype):
    """Routing is over all experts on every part: the same bits. The shared expert is on one of them."""
    settings = POLICY_SETTINGS | (dict(capacity=6, n_group=1, topk_group=1) if policy == "capacity" else {})
    if policy == "top4":
        settings.pop("top_k")
    routing, values = BlockRouting.policy(policy, **settings), layer(dtype)
    y, routed, logits = block_moe(**values, routing=routing)
    total, tolerance = (
        torch.zeros(TOKENS, HIDDEN, dtype=torch.float64),
        4 * torch.finfo(dtype).eps * y.abs().max().item(),
    )
    for rank, part in enumerate(PARTS["shuffled"]):
        mine = (
            values | experts_of(routed_weights(values), part) | (dict(shared_w13=None, shared_w2=None) if rank else {})
        )
        part_y, part_routed, part_logits = block_moe(**mine, routing=routing, expert_map=map_of(part))
        assert torch.equal(part_logits, logits)
        assert all(torch.equal(a, b) for a, b in zip(part_routed, routed))
        theirs = reference.block_moe(**mine, routing=routing, expert_map=map_of(part))[0]
        torch.testing.assert_close(part_y, theirs, rtol=0, atol=tolerance)
        total += part_y.double()
    torch.testing.assert_close(total, y.double(), rtol=0, atol=tolerance)


def test_a_module_that_holds_a_part():
    routing, part = BlockRouting(**POLICY_SETTINGS), PARTS["shuffled"][0]
    values = layer() | experts_of(routed_weights(layer()), part)
    module = BlockMoE(HIDDEN, INTER, routing, shared_intermediate_size=INTER)
    for name, weight in values.items():
        if name != "x":
            setattr(module, name, weight if name == "expert_bias" else torch.nn.Parameter(weight))
    module.expert_map = map_of(part)
    y = block_moe(**values, routing=routing, expert_map=map_of(part))[0]
    assert torch.equal(module(values["x"])[0], y)


def test_ids_that_the_map_does_not_know_add_nothing():
    values, chosen, part = layer(), slots(), [EXPERTS - 1, 1]
    mine = experts_of(routed_weights(values), part)
    y = moe_experts(values["x"], **mine, **chosen, expert_map=map_of(part))
    weights = torch.where(chosen["topk_ids"] < 0, float("nan"), chosen["topk_weights"])
    for unknown in (EXPERTS, EXPERTS + 3):
        strange = torch.where(chosen["topk_ids"] < 0, unknown, chosen["topk_ids"])
        again = moe_experts(values["x"], **mine, topk_ids=strange, topk_weights=weights, expert_map=map_of(part))
        assert torch.equal(again, y)


def test_the_rows_of_ids():
    """-1 for what is no expert, elsewhere, or not loaded."""
    expert_map = torch.tensor([1, -1, formats.NOT_LOADED, 0], dtype=torch.int32)
    weights = formats.ExpertWeights(torch.zeros(2, 4, 3), torch.zeros(2, 3, 2), expert_map=expert_map)
    rows = weights.local(torch.tensor([[-2, -1, 0, 1], [2, 3, 4, 9]], dtype=torch.int32))
    assert rows.dtype == torch.int32 and rows.tolist() == [[-1, -1, 1, -1], [-1, 0, -1, -1]]


def leaves(values):
    return {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in values.items()}


def test_gradients_of_parts_add_up():
    """Of x and the gate as sums over the parts, of the experts' weights row by row; the shared expert is nowhere."""
    routing = BlockRouting(**POLICY_SETTINGS)
    values = {name: value for name, value in layer().items() if not name.startswith("shared")}
    values["expert_bias"].requires_grad_(False)
    d_y = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))

    def gradients(values, **kwargs):
        mine = leaves(values) | dict(expert_bias=values["expert_bias"], shared_w13=None, shared_w2=None)
        block_moe(**mine, routing=routing, **kwargs)[0].backward(d_y)
        return {name: mine[name].grad for name in ("x", "gate_weight", "w13", "w2")}

    whole, summed = gradients(values), dict(x=0, gate_weight=0)
    for part in PARTS["shuffled"]:
        mine = gradients(values | experts_of(routed_weights(values), part), expert_map=map_of(part))
        for name in summed:
            summed[name] = summed[name] + mine[name]
        for name in ("w13", "w2"):
            torch.testing.assert_close(mine[name], whole[name][list(part)], rtol=1e-5, atol=1e-6)
    for name, value in summed.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [[4, 0, 9], []])
def test_gradients_are_those_of_the_reference(part):
    grads = []
    for function in (moe_experts, reference.moe_experts):
        values = layer()
        arguments = leaves(dict(x=values["x"], **experts_of(routed_weights(values), part), **slots()))
        y = function(**arguments, expert_map=map_of(part))
        (y.square().sum() + 0 * arguments["x"].sum()).backward()  # of a part without experts, y is a constant
        grads.append(
            [torch.zeros_like(a) if a.grad is None else a.grad for n, a in arguments.items() if n != "topk_ids"]
        )
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def op_arguments(op, part):
    values, offsets = layer(), torch.tensor([0, 8, 13, 21, 29, 37], dtype=torch.int32)
    values |= experts_of(routed_weights(values), part)
    if op == "moe_experts":
        arguments = [(values | slots())[name] for name in ("x", "w13", "w2", "topk_ids", "topk_weights")]
        return [*arguments, None, None, False, map_of(part)]
    routing = BlockRouting(**POLICY_SETTINGS).args()
    return [*values.values(), offsets, TOKENS, *routing, *[None] * 4, False, map_of(part)]


@pytest.mark.parametrize("op", ["moe_experts", "block_moe"])
def test_opcheck_and_the_fake_kernel(op):
    arguments, function = op_arguments(op, [3, 8, 1]), getattr(torch.ops.dmoe, op)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = function(*fakes)
    real = function(*arguments)
    for mine, theirs in zip(*([out] if op == "moe_experts" else out for out in (fake, real))):
        assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    trained = [
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.dim() > 1 and a.is_floating_point() else a
        for a in arguments
    ]
    torch.library.opcheck(function.default, trained)


def in_halves(weights, routing=None, **more):
    """A layer as `layer.route` and `layer.experts`."""
    names = ("w13", "w2", "shared_w13", "shared_w2", "w13_scale", "w2_scale", "shared_w13_scale", "shared_w2_scale")
    stacked = formats.ExpertWeights(**{name: weights.get(name) for name in names}, **more)
    arguments = [weights[name] for name in ("x", "gate_weight", "expert_bias")]
    return stacked, layers.route(*arguments, stacked, routing=routing)


def cuts(generator, most=4):
    """Ranges that adjoin from 0 to EXPERTS."""
    inner = torch.randperm(EXPERTS - 1, generator=generator)[: torch.randint(most, (1,), generator=generator)] + 1
    ends = [*sorted(inner.tolist()), EXPERTS]
    return list(zip([0, *ends], ends))


def waves_of(pools, expert_map, used, generator):
    """Waves over a pool that holds what one of them needs, in other rows each time; the rest is poison."""
    whole = {name: value.clone() for name, value in pools.items()}
    home = expert_map.clone()
    for begin, end in cuts(generator):
        expert_map.fill_(formats.NOT_LOADED)
        rows = torch.randperm(len(pools["w13"]), generator=generator)
        for value in pools.values():
            value.view(torch.uint8).fill_(0xFF)
        for expert, row in zip([e for e in used if begin <= e < end], rows.tolist()):
            expert_map[expert] = row
            for name, value in pools.items():
                value[row] = whole[name][home[expert]]
        yield begin, end


@pytest.mark.parametrize("form, activations", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [TOKENS, 20 * TOKENS])
@pytest.mark.parametrize("shared", [None, "plain", "alike"])
def test_waves_change_no_bit(dtype, form, activations, tokens, shared):
    routing, values = BlockRouting.policy("token", **POLICY_SETTINGS), layer(dtype)
    values["x"] = values["x"].repeat(tokens // TOKENS, 1)
    if form:
        values |= quantised(values, form, ["w13", "w2"] + (["shared_w13", "shared_w2"] if shared == "alike" else []))
    if shared is None:
        values |= dict(shared_w13=None, shared_w2=None)
    y = block_moe(**values, routing=routing, activations=activations)[0]
    routed = {name: values[name] for name in values if name.startswith(("w13", "w2"))}
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        pools, expert_map = in_a_pool(routed, seed)
        more = dict(quantize_activations=activations is not None, expert_map=expert_map)
        weights, chosen = in_halves(values | pools, routing, **more)
        assert torch.equal(layers.experts(values["x"], weights, chosen), y)
        used = sorted(set(chosen.result.topk_ids.flatten().tolist()))
        assert torch.equal(
            layers.experts(values["x"], weights, chosen, waves_of(pools, expert_map, used, generator)), y
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_halves_of_a_layer(policy):
    settings = POLICY_SETTINGS | (dict(capacity=6, n_group=1, topk_group=1) if policy == "capacity" else {})
    if policy == "top4":
        settings.pop("top_k")
    routing, values = BlockRouting.policy(policy, **settings), layer(torch.bfloat16)
    y, result, logits = block_moe(**values, routing=routing)
    weights, chosen = in_halves(values, routing)
    assert all(torch.equal(a, b) for a, b in zip(chosen.result, result)) and torch.equal(chosen.router_logits, logits)
    assert torch.equal(layers.experts(values["x"], weights, chosen), y)
    in_threes = layers.experts(values["x"], weights, chosen, ((e, e + 3) for e in range(0, EXPERTS, 3)))
    assert torch.equal(in_threes, y)
    three = values["x"][:36].view(3, 12, HIDDEN)
    weights, chosen = in_halves(values | dict(x=three), routing)
    assert torch.equal(layers.experts(three, weights, chosen), block_moe(**values | dict(x=three), routing=routing)[0])
    nothing = values["x"][:0]
    weights, chosen = in_halves(values | dict(x=nothing), routing)
    assert layers.experts(nothing, weights, chosen, []).shape == (0, HIDDEN)


def test_halves_have_no_gradients():
    values = leaves(layer())
    weights, chosen = in_halves(values, BlockRouting(**POLICY_SETTINGS))
    y = layers.experts(values["x"], weights, chosen)
    assert not any(made.requires_grad for made in (y, chosen.router_logits, *chosen.result))


@pytest.mark.parametrize(
    "waves", [[], [(0, 5)], [(1, EXPERTS)], [(0, 5), (6, EXPERTS)], [(0, EXPERTS + 1)], [(0, 0), (0, EXPERTS)]]
)
def test_waves_must_adjoin(waves):
    values = layer()
    weights, chosen = in_halves(values, BlockRouting(**POLICY_SETTINGS))
    with pytest.raises(ValueError, match=f"waves must adjoin from 0 to {EXPERTS}, got"):
        layers.experts(values["x"], weights, chosen, waves)
