"""The Triton router against the reference: under Triton's interpreter, and compiled where there is a GPU."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from routings import GOLDEN
from safetensors import safe_open

from dmoe_ops import BlockRouting, block_moe, block_route, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned")

inf, nan = float("inf"), float("nan")
PALETTES = {
    "normal": None,
    "ties": [-1.0, 0.0, -0.0, 0.5, 2.0],
    "equal": [0.25],
    "extreme": [-90.0, 90.0, -200.0, 200.0, 0.0, inf, -inf],
    "nan": [nan, 0.0, 1.0, -1.0, 0.3, inf, -inf],
    "holes": [nan, nan, nan, 0.5],
}
SMALL = dict(num_experts=32, top_k=4, block_size=8, n_group=4, topk_group=2, min_experts=5, capacity=7, union_k=2)


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if DEVICE == "cpu" else "0")


def values(shape, palette=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if palette is None:
        return torch.randn(shape, generator=generator)
    return torch.tensor(palette)[torch.randint(len(palette), shape, generator=generator)]


def check(logits, bias, routing, offsets=None):
    """block_route equals the reference: ids and coresets to the bit, weights to their rounding."""
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    want = reference.block_route(logits, bias, routing=routing, block_offsets=offsets)
    logits, bias, offsets = (t if t is None else t.to(DEVICE) for t in (logits, bias, offsets))
    got = block_route(logits, bias, routing=routing, block_offsets=offsets)
    same(got, want)
    return got


def same(got, want):
    for name in ("coreset_sizes", "coreset_ids", "topk_ids"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    torch.testing.assert_close(got.topk_weights.cpu(), want.topk_weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "aggregate, select",
    [*itertools.product(("topk_sum", "sum", "max", "union"), ("top_p", "top_n", "nonzero")), ("topk_sum", "all")],
)
def test_every_aggregate_and_selection(aggregate, select, score):
    routing = BlockRouting(**SMALL, score=score, aggregate=aggregate, select=select)
    logits = torch.cat([values((1, 11, 32)), values((1, 11, 32), PALETTES["ties"])])
    check(logits, values((32,), seed=9) * 0.3, routing)


@pytest.mark.parametrize("palette", PALETTES)
@pytest.mark.parametrize("bias", [None, [-0.9, -0.8, -2.0], [-0.5, 0.5], [-inf, 0.0, 0.1, nan], [-inf, inf, 0.0]])
def test_hard_values(palette, bias):
    bias = bias if bias is None else values((32,), bias)
    check(values((16, 32), PALETTES[palette]), bias, BlockRouting(**SMALL))
    softmax = BlockRouting(**{**SMALL, "score": "softmax", "n_group": 1, "topk_group": 1})
    check(values((16, 32), PALETTES[palette]), bias, softmax)


@pytest.mark.parametrize("name", ["dmoe", "token", "top4", "des_seq", "des_vote", "capacity"])
def test_named_policies_at_the_models_size(name):
    logits = values((1, 41, 256)) + values((1, 1, 256), seed=1) - 1
    check(logits, values((256,), seed=2) * 0.05, BlockRouting.policy(name))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, golden_folder):
    """The authors' released code: its coresets, and its experts where none lies outside of the coreset."""
    with safe_open(golden_folder / f"routing_{name}.safetensors", "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        routing = BlockRouting(**json.loads(file.metadata()["config"]))
    got = check(golden["logits"], golden["expert_bias"], routing)
    coresets = [ids[:size].tolist() for ids, size in zip(got.coreset_ids.cpu(), got.coreset_sizes.cpu())]
    assert coresets == [mask.nonzero().flatten().tolist() for mask in golden["coreset_mask"].flatten(0, 1)]
    kept = golden["slot_in_coreset"].flatten(0, 1).all(1)
    ids, order = got.topk_ids.cpu()[kept].sort(1)
    their_ids, their_order = golden["topk_ids"].flatten(0, 1)[kept].sort(1)
    assert torch.equal(ids, their_ids.int())
    their_weights = golden["topk_weights"].flatten(0, 1)[kept].gather(1, their_order)
    torch.testing.assert_close(got.topk_weights.cpu()[kept].gather(1, order), their_weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "experts, groups, kept, top_k",
    [(1, 1, 1, 1), (5, 1, 1, 5), (24, 3, 2, 4), (30, 5, 2, 7), (6, 6, 2, 3), (33, 1, 1, 32), (32, 16, 3, 32)],
)
def test_any_number_of_experts(experts, groups, kept, top_k):
    routing = BlockRouting(experts, top_k, 8, groups, kept, min_experts=top_k + 1, top_p=0.4)
    check(values((11, experts)), None, routing)


def test_512_experts():
    check(values((9, 512)), values((512,), seed=1) * 0.1, BlockRouting(512, 8, 8, 8, 4))


@pytest.mark.parametrize("block_size, tokens, aggregate", [(1, 5, "sum"), (33, 50, "max"), (128, 130, "topk_sum")])
def test_block_sizes(block_size, tokens, aggregate):
    """Blocks of more than 32 tokens are taken in several tiles."""
    routing = BlockRouting(**{**SMALL, "block_size": block_size, "aggregate": aggregate})
    check(values((tokens, 32)), None, routing)


def test_blocks_end_where_they_should():
    routing = BlockRouting(**SMALL)
    for seq_len in (1, 7, 8, 9):
        check(values((3, seq_len, 32)), None, routing)
    check(values((20, 32)), None, routing, offsets=[0, 1, 9, 12, 20])


def test_one_token_and_none():
    check(values((1, 32)), None, BlockRouting(**SMALL))
    got = block_route(torch.empty(0, 32, device=DEVICE), routing=BlockRouting(**SMALL))
    assert got.topk_ids.shape == (0, 4) and got.coreset_ids.shape == (0, 32)


def test_scarce_groups_and_scarce_coresets():
    """Members outside the kept groups fill the free slots, then -1."""
    filled = free = 0
    for size in (1, 3, 6):
        routing = BlockRouting(**{**SMALL, "top_k": 5, "select": "top_n", "capacity": size, "topk_group": 1})
        got = check(values((24, 32)), None, routing)
        filled += int((got.topk_ids >= 0).sum())
        free += int((got.topk_ids < 0).sum())
    assert filled and free


def test_a_share_that_meets_top_p_takes_one_more():
    routing = BlockRouting(4, 2, 8, 1, 1, aggregate="sum", top_p=0.5, min_experts=0)
    assert check(torch.zeros(1, 4), None, routing).coreset_sizes.tolist() == [3]


def test_max_experts_wins_over_min_experts():
    routing = BlockRouting(**SMALL, max_experts=3)
    assert check(values((8, 32)), None, routing).coreset_sizes.tolist() == [3]


def test_equal_votes_beside_one_that_is_zero():
    routing = BlockRouting(4, 2, 8, 1, 1, aggregate="max", select="top_n", capacity=2)
    got = check(torch.tensor([[2.0, 1.0, 1.0, -inf]]), None, routing)
    assert got.coreset_ids.tolist() == [[0, 1]]


def test_a_nan_takes_no_share_of_minus_infinities():
    check(torch.tensor([[-inf, -inf, nan]]), None, BlockRouting(3, 2, 8, 1, 1, score="softmax", norm_topk_prob=False))


def test_a_nan_token_touches_no_other():
    routing = BlockRouting(**SMALL, select="all")
    logits = values((16, 32))
    want = check(logits, None, routing)
    logits[3] = nan
    got = check(logits, None, routing)
    others = torch.arange(16) != 3
    assert torch.equal(got.topk_weights[others], want.topk_weights[others])
    assert (got.topk_ids[3] == -1).all() and (got.topk_weights[3] == 0).all()


def test_same_bits_every_time():
    logits = values((40, 32)).to(DEVICE)
    first = block_route(logits, routing=BlockRouting(**SMALL))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(block_route(logits, routing=BlockRouting(**SMALL)), first))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_gate(x_dtype, gate_dtype):
    """Products are exact, so the logits are those of the reference up to the order of additions."""
    x, gate = values((19, 48)).to(x_dtype), (values((24, 48), seed=1) / 7).to(gate_dtype)
    w13, w2 = values((24, 32, 48), seed=2).to(x_dtype) / 7, values((24, 48, 16), seed=3).to(x_dtype) / 4
    routing = BlockRouting(24, 4, 8, 4, 2, min_experts=6)
    args = [t.to(DEVICE) for t in (x, gate, w13, w2)]
    _, routed, logits = block_moe(args[0], args[1], None, args[2], args[3], None, None, routing=routing)
    torch.testing.assert_close(logits.cpu(), x.float() @ gate.float().T, rtol=1e-5, atol=1e-5)
    same(routed, reference.block_route(logits.cpu(), None, routing=routing))
