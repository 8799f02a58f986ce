"""block_route, on every backend, against the reference and against the specification's plain loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from routings import BIASES, PALETTES, SELECTIONS

from dmoe_ops import BlockRouting, RoutingResult, block_route, reference

pytestmark = pytest.mark.usefixtures("backend", "poisoned")


@dataclasses.dataclass
class Case:
    """One call of block_route; `blocks` are its rows as the specification cuts them."""

    logits: torch.Tensor
    bias: torch.Tensor | None
    routing: BlockRouting
    offsets: list[int] | None

    def __call__(self, function=block_route, logits=None):
        offsets = None if self.offsets is None else torch.tensor(self.offsets, dtype=torch.int32)
        logits = self.logits if logits is None else logits
        return function(logits, self.bias, routing=self.routing, block_offsets=offsets)

    @property
    def rows(self):
        return self.logits.reshape(-1, self.routing.num_experts)

    def blocks(self, oracle):
        return oracle.cut(len(self.rows), self.logits.shape[-2], self.routing.block_size, self.offsets)


def fill(rng, shape, palette):
    values = rng.normal(size=shape) if palette is None else rng.choice(palette, size=shape)
    return torch.from_numpy(values.astype(np.float32))


@st.composite
def routings(draw, selections=SELECTIONS, scarce=False):
    group_size, n_group = draw(
        st.sampled_from([(1, 1), (8, 1), (17, 1), (2, 2), (1, 6), (2, 6), (4, 4), (8, 8), (3, 5)])
    )
    num_experts = group_size * n_group
    aggregate, select = draw(st.sampled_from(selections))
    upto = st.integers(1, num_experts)
    top_k = draw(st.one_of(upto, st.just(num_experts), st.integers(1, min(8, num_experts))))
    return BlockRouting(
        num_experts=num_experts,
        top_k=top_k,
        block_size=draw(st.integers(1, 9)),
        n_group=n_group,
        topk_group=draw(st.integers(1, n_group)),
        score=draw(st.sampled_from(["sigmoid", "softmax"])),
        aggregate=aggregate,
        select=select,
        top_p=draw(st.sampled_from([1e-6, 0.3, 0.5, 0.6, 0.95, 1.0])),
        min_experts=draw(st.integers(0, top_k if scarce else num_experts + 2)),
        max_experts=draw(st.none() | st.integers(1, num_experts + 2)),
        capacity=draw(st.integers(1, num_experts + 2)),
        union_k=draw(upto),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )


@st.composite
def cases(draw, palettes=tuple(PALETTES), biases=tuple(BIASES), **kwargs):
    routing = draw(routings(**kwargs))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    flat = draw(st.booleans())
    shape = [seq] if flat else [batch, seq]
    logits = fill(rng, [*shape, routing.num_experts], PALETTES[draw(st.sampled_from(palettes))])
    if logits.shape[-2] > 1 and draw(st.booleans()):
        logits[..., 1, :] = logits[..., 0, :]  # two tokens alike
    kind = draw(st.sampled_from(biases))
    bias = None if kind == "none" else fill(rng, [routing.num_experts], BIASES[kind])
    offsets = None
    if draw(st.booleans()):
        offsets, tokens = [0], logits.shape[:-1].numel()
        while offsets[-1] < tokens:
            offsets.append(min(tokens, offsets[-1] + int(rng.integers(1, routing.block_size + 1))))
    return Case(logits, bias, routing, offsets)


def check_form(result, case, n_blocks):
    """What holds for any routing: types, shapes, ascending coresets, filled slots first, no id twice or outside."""
    routing, tokens = case.routing, len(case.rows)
    width = routing.coreset_width
    assert [t.dtype for t in result] == [torch.int32, torch.float32, torch.int32, torch.int32]
    shapes = [(tokens, routing.top_k), (tokens, routing.top_k), (n_blocks, width), (n_blocks,)]
    assert [tuple(t.shape) for t in result] == shapes
    assert all(t.is_contiguous() for t in result)
    for members, size in zip(result.coreset_ids.tolist(), result.coreset_sizes.tolist()):
        assert members[:size] == sorted(set(members[:size])) and set(members[size:]) <= {-1}
        assert all(0 <= e < routing.num_experts for e in members[:size])
    assert result.topk_weights.isfinite().all()
    empty = result.topk_ids == -1
    assert (result.topk_weights[empty] == 0).all()
    assert not (empty[:, :-1] & ~empty[:, 1:]).any()  # filled in order


def same(a, b):
    """The same routing, to the bit but for the rounding of the weights."""
    for name in ("topk_ids", "coreset_ids", "coreset_sizes"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.topk_weights, b.topk_weights, rtol=1e-6, atol=1e-9)


def equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def check_against_oracle(case, oracle):
    blocks = case.blocks(oracle)
    result = case()
    check_form(result, case, len(blocks))
    same(result, case(reference.block_route))
    bias = None if case.bias is None else case.bias.numpy()
    ids, weights, coresets = oracle.route(case.rows.numpy(), bias, case.routing, blocks)
    sizes = result.coreset_sizes.tolist()
    assert [members[:size] for members, size in zip(result.coreset_ids.tolist(), sizes)] == coresets
    assert result.topk_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(result.topk_weights.numpy(), weights, rtol=1e-6, atol=1e-9)
    for members, rows in zip(coresets, blocks):
        assert set(result.topk_ids[rows.start : rows.stop].flatten().tolist()) <= {*members, -1}
    return result


@settings(max_examples=120)
@given(case=cases())
def test_any_routing_is_the_specifications(case, oracle):
    check_against_oracle(case, oracle)


@settings(max_examples=40)
@given(case=cases(palettes=("normal", "ties"), biases=("none", "banned"), scarce=True))
def test_scarce_coresets_fill_their_slots_in_order_and_never_leak(case, oracle):
    check_against_oracle(case, oracle)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("aggregate, select", SELECTIONS)
@pytest.mark.parametrize("palette", PALETTES)
def test_every_aggregate_and_selection(aggregate, select, score, palette, oracle):
    routing = BlockRouting(
        num_experts=24,
        top_k=4,
        block_size=8,
        n_group=4,
        topk_group=2,
        score=score,
        aggregate=aggregate,
        select=select,
        min_experts=5,
        capacity=7,
        union_k=2,
    )
    rng = np.random.default_rng(3)
    for bias in BIASES:
        vector = None if bias == "none" else fill(rng, [24], BIASES[bias])
        check_against_oracle(Case(fill(rng, [2, 19, 24], PALETTES[palette]), vector, routing, None), oracle)


@pytest.mark.parametrize("name", ["dmoe", "token", "top4", "des_seq", "des_vote", "capacity"])
def test_named_policies_at_the_models_size(name, oracle):
    rng = np.random.default_rng(5)
    logits = fill(rng, [1, 41, 256], None) * 1.5 - 1
    case = Case(logits, fill(rng, [256], None) * 0.05, BlockRouting.policy(name), None)
    check_against_oracle(case, oracle)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 5, 6), (1, 6), (1, 1, 6), (3, 1, 6)])
def test_no_token_and_one_token(shape, oracle):
    routing = BlockRouting(num_experts=6, top_k=3, block_size=4, n_group=3, topk_group=2, min_experts=2)
    check_against_oracle(Case(fill(np.random.default_rng(0), shape, None), None, routing, None), oracle)
    if shape == (0, 6):
        check_against_oracle(Case(torch.zeros(shape), None, routing, [0]), oracle)


def test_blocks_are_cut_inside_each_sequence():
    """Sequences of 5 in blocks of 4 end in a partial block, which votes by its own token alone."""
    routing = BlockRouting(
        num_experts=8, top_k=1, block_size=4, n_group=1, topk_group=1, select="top_n", capacity=1, aggregate="topk_sum"
    )
    favourites = [3, 3, 3, 1, 7, 2, 2, 0, 2, 5]
    logits = torch.nn.functional.one_hot(torch.tensor(favourites), 8).float().view(2, 5, 8)
    result = block_route(logits, routing=routing)
    assert result.coreset_ids.tolist() == [[3], [7], [2], [5]]
    assert result.topk_ids.flatten().tolist() == [3, 3, 3, 3, 7, 2, 2, 2, 2, 5]
    result = block_route(logits.view(10, 8), routing=routing)
    assert result.topk_ids.flatten().tolist() == [3] * 4 + [2] * 4 + [2, 2]


def test_first_expert_that_crosses_top_p_is_kept():
    """Shares of exactly 1/2, 1/4, 1/8 and 1/8: at 0.5 the first does not cross, so the second is kept as well."""
    routing = BlockRouting(num_experts=4, top_k=1, block_size=8, n_group=1, topk_group=1, min_experts=0)
    logits = torch.full((8, 4), -float("inf"))
    for t, e in enumerate([2, 2, 2, 2, 0, 0, 3, 1]):
        logits[t, e] = float("inf")  # scores of exactly 0 and 1
    for top_p, coreset in ((0.49, [2]), (0.5, [0, 2]), (0.75, [0, 1, 2]), (0.875, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        result = block_route(logits, routing=dataclasses.replace(routing, top_p=top_p))
        assert result.coreset_ids[0, : result.coreset_sizes[0]].tolist() == coreset


@pytest.mark.parametrize("route", [block_route, reference.block_route])
def test_a_group_of_one_candidate_ranks_last_even_where_that_one_is_infinite(route):
    """inf and -inf in a group make no sum: its first is its only candidate, so the other group is kept."""
    routing = BlockRouting(num_experts=4, top_k=3, block_size=4, n_group=2, topk_group=1, select="all")
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, float("inf"), -float("inf")])
    assert route(logits, bias, routing=routing).topk_ids.tolist() == [[0, 1, 2]]
    bias = torch.tensor([float("inf"), -float("inf"), 0.0, -float("inf")])  # of two such groups the lower one
    assert route(logits, bias, routing=routing).topk_ids.tolist() == [[0, 2, -1]]


@pytest.mark.parametrize("route", [block_route, reference.block_route])
@pytest.mark.parametrize("aggregate", ["topk_sum", "sum", "max", "union"])
@pytest.mark.parametrize(
    "settings", [dict(select="top_n", capacity=3), dict(select="top_p", top_p=0.01, min_experts=3)]
)
def test_ties_in_a_coreset_go_to_the_lower_ids(route, aggregate, settings):
    """Experts 2, 4, 5, 6 and 7 have the same votes of every token, the others fewer: the coreset takes the lowest three."""
    logits = torch.tensor([-2.0, -2.0, 1.0, -2.0, 1.0, 1.0, 1.0, 1.0]).expand(6, 8)
    routing = BlockRouting(
        num_experts=8, top_k=5, block_size=6, n_group=1, topk_group=1, aggregate=aggregate, union_k=5, **settings
    )
    result = route(logits, routing=routing)
    assert result.coreset_sizes.tolist() == [3] and result.coreset_ids[0, :3].tolist() == [2, 4, 5]
    assert result.topk_ids.tolist() == [[2, 4, 5, -1, -1]] * 6


def test_top_p_is_compared_as_the_nearest_float32():
    """3 of 5 votes are the float32 nearest to 0.6, which is above the double 0.6: they do not cross the threshold."""
    routing = BlockRouting(num_experts=4, top_k=1, block_size=5, n_group=1, topk_group=1, min_experts=0)
    logits = torch.full((5, 4), -float("inf"))
    logits[range(5), [1, 1, 1, 3, 3]] = float("inf")
    result = block_route(logits, routing=routing)
    assert result.coreset_ids[0].tolist() == [1, 3, -1, -1]


def test_votes_are_summed_in_double_precision():
    """1 and 16 times 5e-8 are more than 1 and 2e-7, though no single 5e-8 changes a 1 in float32."""
    routing = BlockRouting(num_experts=3, top_k=1, block_size=19, n_group=1, topk_group=1, select="top_n", capacity=1)
    logits = torch.full((19, 3), -float("inf"))
    logits[[0, 17], [1, 0]] = float("inf")
    logits[1:17, 1], logits[18, 0] = math.log(5e-8), math.log(2e-7)
    assert block_route(logits, routing=routing).coreset_ids.tolist() == [[1]]


@pytest.mark.parametrize("aggregate, select", SELECTIONS)
def test_an_expert_with_a_nan_bias_is_never_chosen(aggregate, select):
    """It neither votes nor routes, and nothing else changes: as with a bias of -inf."""
    rng = np.random.default_rng(7)
    settings = dict(
        num_experts=12, top_k=3, block_size=4, n_group=3, topk_group=2, min_experts=4, capacity=5, union_k=2
    )
    routing = BlockRouting(aggregate=aggregate, select=select, **settings)
    logits, bias = fill(rng, [9, 12], None), fill(rng, [12], None)
    bias[[2, 7]] = float("nan")
    result = block_route(logits, bias, routing=routing)
    assert not set(result.topk_ids.flatten().tolist()) & {2, 7}
    equal(result, block_route(logits, bias.nan_to_num(-float("inf")), routing=routing))


@pytest.mark.parametrize("votes_of", [-1.0, -0.5, 0.0])
def test_top_p_by_the_formula_for_votes_that_sum_below_or_to_zero(votes_of, oracle):
    """With r <= 0 the shares are positive or huge, the cumulative sum need not rise, and n = (number of c <= p) + 1."""
    routing = BlockRouting(
        num_experts=6, top_k=6, block_size=4, n_group=1, topk_group=1, aggregate="max", min_experts=0
    )
    bias = torch.tensor([0.3, 0.2, 0.1, -0.1, -0.2, -0.3]) + votes_of - 0.5
    for top_p in (0.1, 0.6, 1.0):
        settings = dataclasses.replace(routing, top_p=top_p)
        check_against_oracle(Case(torch.zeros(4, 6), bias, settings, None), oracle)


def test_votes_that_cancel_out():
    """Their sum is 0, so the shares are votes / 1e-20: the first two are above any p, and what follows sums to 0."""
    routing = BlockRouting(
        num_experts=3, top_k=3, block_size=1, n_group=1, topk_group=1, aggregate="max", min_experts=0
    )
    result = block_route(torch.zeros(1, 3), torch.tensor([0.0, -0.5, -1.0]), routing=routing)
    assert result.coreset_ids.tolist() == [[0, 1, -1]]


def test_scores_as_small_as_1e_20():
    """A share of a sum is score / (sum + 1e-20): that of a score of about 1e-20 alone is a half, and its vote loses."""
    routing = BlockRouting(num_experts=4, top_k=2, block_size=8, n_group=1, topk_group=1, select="all")
    logits = torch.tensor([[-46.0, -46.5, -47.0, -48.0]], dtype=torch.float64).requires_grad_()
    score = logits[:, :2].sigmoid()
    want = 2.5 * score / (score.sum(1, keepdim=True) + 1e-20)
    got = block_route(logits, routing=routing).topk_weights
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    single = block_route(logits.detach().float(), routing=routing).topk_weights
    torch.testing.assert_close(single, want.detach().float(), rtol=1e-6, atol=0)
    of = [torch.autograd.grad(weights, logits, torch.tensor([[1.0, 3.0]]).double()) for weights in (got, want)]
    torch.testing.assert_close(*of, rtol=1e-12, atol=0)

    routing = dataclasses.replace(routing, aggregate="sum", select="top_n", capacity=1)
    logits = torch.full((2, 4), -float("inf"))
    logits[0, 0], logits[1, 1], logits[1, 2] = -46, 0.5, 0
    assert block_route(logits, routing=routing).coreset_ids.tolist() == [[1]]


def test_max_experts_wins_over_min_experts():
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    routing = BlockRouting(num_experts=16, top_k=4, n_group=1, topk_group=1, min_experts=9, max_experts=3)
    result = block_route(logits, routing=routing)
    assert result.coreset_sizes.tolist() == [3] and result.coreset_ids.shape == (1, 3)
    assert (result.topk_ids[:, 3] == -1).all() and (result.topk_ids[:, :3] >= 0).all()


def test_a_scarce_group_is_filled_from_the_coreset():
    """Coreset {0, 1, 4, 6}, groups of 4, one kept: group 0 for its sum, then the best of group 1; then -1."""
    routing = BlockRouting(
        num_experts=8, top_k=5, block_size=1, n_group=2, topk_group=1, select="top_n", capacity=4, score="sigmoid"
    )
    logits = torch.tensor([[2.0, 1.0, -9, -9, 0.5, -9, 1.5, -9]])
    result = block_route(logits, routing=routing)
    assert result.coreset_ids.tolist() == [[0, 1, 4, 6]]
    assert result.topk_ids.tolist() == [[0, 1, 6, 4, -1]]
    w = logits[0, [0, 1, 6, 4]].sigmoid()
    torch.testing.assert_close(result.topk_weights[0, :4], 2.5 * w / w.sum())
    assert result.topk_weights[0, 4] == 0


def test_groups_of_one_expert_are_kept_by_their_order(oracle):
    """No group of one has two candidates, so ties keep the lowest groups; the best others follow."""
    routing = BlockRouting(num_experts=6, top_k=4, block_size=1, n_group=6, topk_group=2, select="all")
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.0, 3.0, 2.0]])
    assert check_against_oracle(Case(logits, None, routing, None), oracle).topk_ids.tolist() == [[1, 0, 2, 3]]


def test_of_many_groups_alike_the_lowest_are_kept():
    """Beyond 16 equal numbers torch's sort keeps their order only where it is asked to."""
    routing = BlockRouting(num_experts=80, top_k=6, block_size=4, n_group=40, topk_group=3, select="all")
    for route in (block_route, reference.block_route):
        assert route(torch.zeros(2, 80), routing=routing).topk_ids.tolist() == 2 * [[0, 1, 2, 3, 4, 5]]


def test_token_policy_is_the_plain_grouped_top_k_of_torch():
    logits = torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(256, generator=torch.Generator().manual_seed(2)) * 0.1
    result = block_route(logits, bias, routing=BlockRouting.policy("token"))
    score = logits.sigmoid()
    grouped = (score + bias).view(50, 8, 32)
    kept = grouped.topk(2, 2).values.sum(2).topk(4, 1).indices
    mask = torch.ones(50, 8).scatter(1, kept, 0).bool()
    ids = grouped.masked_fill(mask[:, :, None], -1e9).view(50, 256).topk(8, 1).indices
    assert torch.equal(result.topk_ids.long().sort(1).values, ids.sort(1).values)
    weights = score.gather(1, result.topk_ids.long())
    torch.testing.assert_close(result.topk_weights, weights / weights.sum(1, keepdim=True) * 2.5)
    assert (result.coreset_sizes == 256).all() and (result.coreset_ids == torch.arange(256)).all()


def test_every_token_to_the_same_experts():
    logits = torch.full((40, 64), -5.0)
    logits[:, [9, 63]] = 5.0
    routing = BlockRouting(num_experts=64, top_k=2, n_group=8, topk_group=2, min_experts=0)
    result = block_route(logits, routing=routing)
    assert (result.topk_ids == torch.tensor([9, 63])).all() and (result.topk_weights == 1.25).all()
    assert result.coreset_sizes.tolist() == [2, 2]


@settings(max_examples=30)
@given(case=cases(palettes=("normal", "nan", "holes")), junk=st.sampled_from([float("nan"), float("inf"), 90.0, -3.0]))
def test_a_block_never_reaches_another(case, junk, oracle):
    blocks = case.blocks(oracle)
    result = case()
    for rows in blocks[:2]:
        logits = case.rows.clone()
        logits[rows.start : rows.stop] = junk
        changed = case(logits=logits.view_as(case.logits))
        for i, other in enumerate(blocks):
            if other != rows:
                assert torch.equal(changed.coreset_ids[i], result.coreset_ids[i])
                assert torch.equal(
                    changed.topk_ids[other.start : other.stop], result.topk_ids[other.start : other.stop]
                )
                span = slice(other.start, other.stop)
                assert torch.equal(changed.topk_weights[span], result.topk_weights[span])


@settings(max_examples=30)
@given(case=cases(), seed=st.integers(0, 99))
def test_the_order_of_blocks_and_of_tokens_in_them_does_not_matter(case, seed, oracle):
    blocks = case.blocks(oracle)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(blocks))
    rows = [int(t) for b in order for t in rng.permutation(list(blocks[b]))]
    offsets = np.cumsum([0] + [len(blocks[b]) for b in order]).tolist()
    moved = Case(case.rows[rows].clone(), case.bias, case.routing, offsets)()
    result = case()
    assert torch.equal(moved.topk_ids, result.topk_ids[rows])
    assert torch.equal(moved.topk_weights, result.topk_weights[rows])
    assert torch.equal(moved.coreset_ids, result.coreset_ids[list(order)])
    assert torch.equal(moved.coreset_sizes, result.coreset_sizes[list(order)])


@settings(max_examples=30)
@given(case=cases(palettes=("normal", "ties")), row=st.integers(0, 19))
def test_a_nan_token_neither_votes_nor_routes(case, row, oracle):
    """The rest of its block routes as if the token were not there."""
    tokens = len(case.rows)
    if not tokens:
        return
    row %= tokens
    logits = case.rows.clone()
    logits[row] = float("nan")
    result = case(logits=logits.view_as(case.logits))
    assert (result.topk_ids[row] == -1).all() and (result.topk_weights[row] == 0).all()
    kept = [[t for t in rows if t != row] for rows in case.blocks(oracle)]
    offsets = np.cumsum([0] + [len(rows) for rows in kept if rows]).tolist()
    rest = [t for t in range(tokens) if t != row]
    without = Case(case.rows[rest].clone(), case.bias, case.routing, offsets)()
    assert torch.equal(result.topk_ids[rest], without.topk_ids)
    assert torch.equal(result.topk_weights[rest], without.topk_weights)
    filled = [i for i, rows in enumerate(kept) if rows]
    assert torch.equal(result.coreset_ids[filled], without.coreset_ids)


def test_the_same_bits_on_every_run_and_for_every_number_of_threads(threads):
    logits = torch.randn(2, 70, 256, generator=torch.Generator().manual_seed(4))
    for name in ("dmoe", "des_vote", "capacity", "des_seq", "token"):
        results = []
        for n in (1, 2, 2, 1):
            threads(n)
            results.append(block_route(logits, routing=BlockRouting.policy(name)))
        for other in results[1:]:
            equal(results[0], other)


def test_strides_and_layouts_do_not_matter():
    generator = torch.Generator().manual_seed(6)
    wide = torch.randn(2, 10, 48, generator=generator)
    bias = torch.randn(48, generator=generator)
    routing = BlockRouting(num_experts=24, top_k=3, block_size=4, n_group=4, topk_group=2, min_experts=6)
    offsets = torch.tensor([0, 9, 1, 9, 5, 9, 8, 9, 12, 9, 16, 9, 20], dtype=torch.int32)[::2]
    for logits in (wide[..., ::2], wide[..., :24], wide[:, :, 24:].transpose(0, 1)):
        plain = Case(logits.contiguous(), bias[::2].contiguous(), routing, None)
        equal(block_route(logits, bias[::2], routing=routing), plain())
    flat = wide[0, :, :24].repeat(2, 1)
    packed = block_route(flat, bias[:24], routing=routing, block_offsets=offsets)
    equal(packed, block_route(flat, bias[:24], routing=routing, block_offsets=offsets.contiguous()))


@pytest.mark.parametrize("route", [block_route, reference.block_route])
@pytest.mark.parametrize("aggregate, select", SELECTIONS)
def test_whatever_torch_makes_tensors_on_by_default_the_inputs_say(aggregate, select, route):
    settings = dict(num_experts=6, top_k=3, block_size=4, topk_group=2, min_experts=2, capacity=4, union_k=2)
    logits, bias = fill(np.random.default_rng(3), [2, 9, 6], None), torch.linspace(-0.1, 0.1, 6)
    for n_group in (2, 6):
        routing = BlockRouting(aggregate=aggregate, select=select, n_group=n_group, **settings)
        for offsets in (None, torch.tensor([0, 3, 7, 11, 15, 18], dtype=torch.int32)):
            wanted = route(logits, bias, routing=routing, block_offsets=offsets)
            with torch.device("meta"):
                equal(route(logits, bias, routing=routing, block_offsets=offsets), wanted)


@pytest.mark.parametrize("select", ["all", "nonzero", "top_n"])
def test_the_bounds_of_top_p_are_of_top_p_alone(select):
    logits = fill(np.random.default_rng(5), [2, 9, 8], None)
    settings = dict(num_experts=8, top_k=2, block_size=4, n_group=1, topk_group=1, select=select, capacity=4)
    bounded = BlockRouting(**settings, min_experts=2, max_experts=2)
    equal(block_route(logits, routing=bounded), block_route(logits, routing=BlockRouting(**settings, min_experts=8)))


def test_the_inputs_are_left_as_they_were():
    logits, bias = torch.randn(9, 8), torch.randn(8)
    logits[2, 3] = float("nan")
    before = logits.clone(), bias.clone()
    block_route(logits, bias, routing=BlockRouting(num_experts=8, top_k=2, n_group=2, topk_group=1))
    assert torch.equal(bias, before[1]) and torch.equal(logits.nan_to_num(7), before[0].nan_to_num(7))


# ---- gradients, tracing ----


def spread_logits(tokens, experts, dtype=torch.float64):
    """Logits so far apart that a small step changes no selection."""
    generator = torch.Generator().manual_seed(tokens)
    ranks = torch.rand(tokens, experts, generator=generator).argsort(1)
    return (
        ranks.to(dtype) * 0.37 - 0.18 * experts + 0.01 * torch.rand(tokens, experts, generator=generator, dtype=dtype)
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("scarce", [True, False])
def test_gradients(score, norm, scarce, backend):
    routing = BlockRouting(
        num_experts=8,
        top_k=4,
        block_size=3,
        n_group=2,
        topk_group=1,
        score=score,
        select="top_n",
        capacity=3 if scarce else 6,
        norm_topk_prob=norm,
    )
    bias = torch.linspace(-0.01, 0.01, 8)
    logits = spread_logits(5, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda l: block_route(l, bias.double(), routing=routing).topk_weights, logits)

    single = logits.detach().float().requires_grad_()
    ours = block_route(single, bias, routing=routing)
    theirs = reference.block_route(single, bias, routing=routing)
    grad = torch.randn(ours.topk_weights.shape, generator=torch.Generator().manual_seed(0))
    (mine,), (expected,) = (torch.autograd.grad(r.topk_weights, single, grad) for r in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    assert not any(t.requires_grad for t in (ours.topk_ids, ours.coreset_ids, ours.coreset_sizes))


def test_gradients_stay_finite_beside_nan_and_infinite_logits():
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    logits[0] = float("nan")
    logits[1, 3], logits[2, 5], logits[3, 6] = float("nan"), float("inf"), -float("inf")
    logits[4] = -90.0
    routing = BlockRouting(num_experts=8, top_k=3, block_size=6, n_group=1, topk_group=1)
    for score in ("sigmoid", "softmax"):
        leaf = logits.clone().requires_grad_()
        block_route(leaf, routing=dataclasses.replace(routing, score=score)).topk_weights.square().sum().backward()
        assert leaf.grad.isfinite().all() and (leaf.grad[0] == 0).all()


def op_arguments(routing, with_bias, offsets, tokens=11, requires_grad=False):
    logits = spread_logits(tokens, routing.num_experts, torch.float32).requires_grad_(requires_grad)
    bias = torch.zeros(routing.num_experts) if with_bias else None
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    return logits, bias, offsets, tokens, *routing.args()


SMALL = BlockRouting(num_experts=8, top_k=2, block_size=4, n_group=2, topk_group=1, min_experts=3)


def test_opcheck():
    arguments = op_arguments(SMALL, True, [0, 3, 7, 11], requires_grad=True)
    torch.library.opcheck(torch.ops.dmoe.block_route.default, arguments)


@pytest.mark.parametrize("name", ["dmoe", "token", "des_seq", "des_vote", "capacity"])
@pytest.mark.parametrize("tokens, offsets", [(0, None), (0, [0]), (1, None), (11, None), (11, [0, 3, 7, 11])])
def test_the_fake_kernel_allocates_what_the_real_one_returns(name, tokens, offsets):
    routing = BlockRouting.policy(name, num_experts=16, top_k=2, block_size=4, n_group=1, topk_group=1)
    arguments = op_arguments(routing, True, offsets, tokens)
    real = torch.ops.dmoe.block_route(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = torch.ops.dmoe.block_route(*fakes)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_with_dynamic_shapes_equals_eager(packed):
    torch._dynamo.reset()

    def function(logits, bias, offsets):
        result = block_route(logits * 2, bias, routing=SMALL, block_offsets=offsets)
        return RoutingResult(*(t + 1 for t in result))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # one graph serves every length
        for seq in (7, 9, 33):
            logits = torch.randn(2, seq, 8, generator=torch.Generator().manual_seed(seq))
            offsets = torch.tensor([*range(0, 2 * seq, 3), 2 * seq], dtype=torch.int32) if packed else None
            equal(compiled(logits, torch.zeros(8), offsets), function(logits, torch.zeros(8), offsets))
