"""The CUDA router's own code, run thread by thread on the CPU (tests/cpp/emulate.h), against the reference."""

from __future__ import annotations

import itertools
import json

import emulated
import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routings import PALETTES, SELECTIONS
from safetensors import safe_open

from dmoe_ops import BlockRouting, reference

BIASES = {
    "normal": None,
    "negative": [-0.9, -0.8, -2.0],
    "cancel": [-0.5, 0.5],
    "banned": [float("-inf"), 0.0, 0.1],
    "infinite": [float("-inf"), float("inf"), 0.0],
}


def route(emulator, logits, bias, routing, offsets=None, *, x=None, gate=None, **how):
    """(RoutingResult, used experts) of the emulated kernels. `logits` [bsz, seq, E] is written where x is given."""
    rows, seq_len = logits.view(-1, logits.shape[-1]), logits.shape[1]
    n_blocks = len(offsets) - 1 if offsets is not None else logits.shape[0] * -(-seq_len // routing.block_size)
    out, schedule = emulated.outputs(len(rows), n_blocks, routing), emulator.schedule_of(rows.shape[1])
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    args = emulator.router(rows, bias, offsets, out, schedule, seq_len, x, gate)
    emulator.run_route(args, routing, emulated.form(**how))
    assert not schedule[: emulator.library.count_at()].any()  # the counters of the expert kernel start from zero
    return out, emulator.used(schedule)


def check(result, used, expected):
    for name in ("topk_ids", "coreset_ids", "coreset_sizes"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    torch.testing.assert_close(result.topk_weights, expected.topk_weights, rtol=1e-6, atol=1e-9)
    ids = expected.topk_ids.unique()
    assert torch.equal(used, ids[ids >= 0])


@st.composite
def cases(draw):
    group_size, n_group = draw(
        st.sampled_from(
            [(1, 1), (8, 1), (17, 1), (2, 2), (1, 6), (2, 6), (4, 4), (16, 4), (8, 8), (3, 5), (33, 1), (2, 40)]
        )
    )
    experts = group_size * n_group
    aggregate, select = draw(st.sampled_from(SELECTIONS))
    upto = st.integers(1, experts)
    routing = BlockRouting(
        num_experts=experts,
        top_k=draw(st.integers(1, min(32, experts))),
        block_size=draw(st.integers(4, 40)),
        n_group=n_group,
        topk_group=draw(st.integers(1, n_group)),
        score=draw(st.sampled_from(["sigmoid", "softmax"])),
        aggregate=aggregate,
        select=select,
        top_p=draw(st.sampled_from([1e-6, 0.3, 0.5, 0.6, 0.95, 1.0])),
        min_experts=draw(st.integers(0, experts + 2)),
        max_experts=draw(st.none() | st.integers(1, experts + 2)),
        capacity=draw(st.integers(1, experts + 2)),
        union_k=draw(upto),
        norm_topk_prob=draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def fill(shape, palette):
        values = rng.normal(size=shape) if palette is None else rng.choice(palette, size=shape)
        return torch.from_numpy(values.astype(np.float32))

    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 40)), experts)
    logits = fill(shape, PALETTES[draw(st.sampled_from(list(PALETTES)))])
    kind = draw(st.sampled_from(["none", *BIASES]))
    bias = None if kind == "none" else fill((experts,), BIASES[kind])
    offsets = None
    if draw(st.booleans()):
        offsets, tokens = [0], shape[0] * shape[1]
        while offsets[-1] < tokens:
            offsets.append(min(tokens, offsets[-1] + int(rng.integers(1, routing.block_size + 1))))
    n_blocks = len(offsets) - 1 if offsets else shape[0] * -(-shape[1] // routing.block_size)
    cluster = draw(st.sampled_from([c for c in (1, 2, 4, 8) if c == 1 or c * n_blocks <= 16]))
    return logits, bias, routing, offsets, cluster, draw(st.integers(0, 2**31))


@given(cases())
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_ready_made_logits(emulator, case):
    logits, bias, routing, offsets, cluster, seed = case
    block_offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    expected = reference.block_route(logits, bias, routing=routing, block_offsets=block_offsets)
    check(*route(emulator, logits, bias, routing, offsets, cluster=cluster, seed=seed), expected)


@pytest.mark.parametrize(
    ["experts", "settings"],
    [
        (256, dict()),
        (256, dict(select="all")),
        (256, dict(aggregate="max", select="top_n", capacity=48, n_group=1, topk_group=1)),
        (512, dict(n_group=8, topk_group=4, top_k=32, min_experts=0)),
        (500, dict(n_group=125, topk_group=9, score="softmax", aggregate="sum")),
        (64, dict(n_group=1, topk_group=1, score="softmax", norm_topk_prob=False)),
    ],
)
@pytest.mark.parametrize("cluster", [4, 8])
def test_real_geometries(emulator, experts, settings, cluster):
    torch.manual_seed(experts + cluster)
    routing = BlockRouting(num_experts=experts, **settings)
    logits = -1 + 1.2 * torch.randn(1, 1, experts) + torch.randn(1, 32, experts)
    bias = 0.02 * torch.randn(experts)
    check(
        *route(emulator, logits, bias, routing, cluster=cluster), reference.block_route(logits, bias, routing=routing)
    )


@pytest.mark.parametrize("name", ["llada2_mini_p60", "scarce_groups_e128", "nogroup_p70"])
def test_golden(emulator, golden_folder, name):
    """The coresets of the authors' code, and in them the experts of the reference. The first two sequences' first blocks."""
    with safe_open(golden_folder / f"routing_{name}.safetensors", "pt") as file:
        routing = BlockRouting(**json.loads(file.metadata()["config"]))
        logits, bias, mask = (file.get_tensor(key) for key in ("logits", "expert_bias", "coreset_mask"))
    logits = logits[:2, : 2 * routing.block_size].contiguous()
    mask = mask[:2, : -(-logits.shape[1] // routing.block_size)].flatten(0, 1)
    result, used = route(emulator, logits, bias, routing, cluster=4)
    check(result, used, reference.block_route(logits, bias, routing=routing))
    for members, size, want in zip(result.coreset_ids.tolist(), result.coreset_sizes.tolist(), mask):
        assert members[:size] == want.nonzero().flatten().tolist()


@pytest.mark.parametrize("aggregate", ["topk_sum", "sum", "max", "union"])
def test_several_tokens_of_a_warp(emulator, aggregate):
    torch.manual_seed(2)
    routing = BlockRouting(num_experts=32, top_k=2, block_size=24, aggregate=aggregate, min_experts=0, union_k=2)
    logits = torch.randn(1, 24, 32)  # of 8 warps
    check(*route(emulator, logits, None, routing, cluster=1), reference.block_route(logits, routing=routing))


def test_max_experts_wins_over_min_experts(emulator):
    torch.manual_seed(6)
    routing = BlockRouting(num_experts=32, top_k=2, block_size=4, min_experts=9, max_experts=5)
    logits = torch.randn(1, 4, 32)
    result, _ = route(emulator, logits, None, routing, cluster=1)
    assert result.coreset_sizes.tolist() == [5]


def test_a_share_that_meets_top_p_takes_one_more(emulator):
    routing = BlockRouting(4, 2, 8, 1, 1, aggregate="sum", top_p=0.5, min_experts=0)
    result, _ = route(emulator, torch.zeros(1, 1, 4), None, routing, cluster=1)
    assert result.coreset_sizes.tolist() == [3]


def test_largest_block(emulator):
    torch.manual_seed(1)
    routing = BlockRouting(num_experts=128, block_size=128)
    logits = torch.randn(1, 200, 128)
    check(*route(emulator, logits, None, routing, cluster=8), reference.block_route(logits, routing=routing))


@pytest.mark.parametrize("x_dtype", emulated.DTYPES)
@pytest.mark.parametrize("gate_dtype", emulated.DTYPES)
@pytest.mark.parametrize("two_launches", [False, True])
def test_gate(emulator, x_dtype, gate_dtype, two_launches):
    """The logits are those of fp32 arithmetic, and the routing is that of the logits."""
    torch.manual_seed(0)
    experts, hidden, seq = 72, 136, 37  # partial tiles of experts, tokens and k
    routing = BlockRouting(num_experts=experts, block_size=34, top_k=4, min_experts=6)
    x = torch.randn(1, seq, hidden, dtype=torch.float64).to(x_dtype)
    gate = (torch.randn(experts, hidden, dtype=torch.float64) / 8).to(gate_dtype)
    logits = torch.full((1, seq, experts), torch.nan)
    cluster = 1 if two_launches else 4
    result = route(emulator, logits, None, routing, x=x, gate=gate, cluster=cluster, two_launches=two_launches)
    exact = x.double() @ gate.double().T
    size = x.double().abs() @ gate.double().abs().T
    assert ((logits - exact).abs() <= 2e-7 * 8 * size).all()  # 8 roundings of the running sum are plenty on average
    check(*result, reference.block_route(logits, routing=routing))


def test_both_forms_of_the_gate_agree_to_the_bit(emulator):
    torch.manual_seed(3)
    routing = BlockRouting(num_experts=64, block_size=16, top_k=4)
    x, gate = torch.randn(1, 20, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    logits = [torch.full((1, 20, 64), torch.nan) for _ in range(3)]
    route(emulator, logits[0], None, routing, x=x, gate=gate, cluster=1, two_launches=True)
    route(emulator, logits[1], None, routing, x=x, gate=gate, cluster=2, seed=1)
    route(emulator, logits[2], None, routing, x=x, gate=gate, cluster=8, seed=2)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001])
def test_a_nan_in_x_stays_in_its_block(emulator, bits):
    """Also one whose only bits are those that bf16 cuts off."""
    torch.manual_seed(4)
    routing = BlockRouting(num_experts=32, block_size=4, top_k=2, n_group=1, topk_group=1)
    x, gate = torch.randn(1, 8, 64), torch.randn(32, 64)
    x.view(torch.int32)[0, 1, 3] = bits
    logits = torch.empty(1, 8, 32)
    result, _ = route(emulator, logits, None, routing, x=x, gate=gate, cluster=2)
    assert logits[0, 1].isnan().all() and logits[0, [0, *range(2, 8)]].isfinite().all()
    assert (result.topk_ids[1] == -1).all() and (result.topk_weights[1] == 0).all()


@pytest.mark.parametrize("size", [2, 20])  # of a group: both fit in a lane each, or not
def test_the_lower_of_two_groups_without_a_pair_is_kept(emulator, size):
    """Whatever its only candidate is, inf too: both groups rank last, and ties go to the lower group."""
    routing = BlockRouting(num_experts=2 * size, top_k=2, block_size=4, n_group=2, topk_group=1, select="all")
    logits, bias = torch.zeros(1, 1, 2 * size), torch.full((2 * size,), -torch.inf)
    bias[0], bias[size] = torch.inf, 0
    result, _ = route(emulator, logits, bias, routing, cluster=1)
    assert result.topk_ids.tolist() == [[0, size]]


def test_schedule_of_bare_ids(emulator):
    torch.manual_seed(5)
    ids = torch.randint(-1, 70, (300,), dtype=torch.int32)
    ids[7:9] = torch.tensor([1 << 20, 70])  # as a careless caller could send them
    out = emulator.schedule_of(70)
    emulator.run_schedule(ids, 70, out)
    expected = ids[(ids >= 0) & (ids < 70)].unique()
    assert torch.equal(emulator.used(out), expected) and not out[: emulator.library.count_at()].any()


def test_host_rules(emulator):
    """Cluster sizes, and shared memory within the 227 KB of Hopper (and the 163 KB of Ampere, without clusters)."""
    assert [emulator.library.cluster_size(n, 132) for n in (1, 4, 16, 17, 32, 1000)] == [8, 8, 8, 4, 4, 4]
    for experts, block_size in itertools.product((1, 33, 256, 512), (1, 32, 128)):
        assert emulator.library.router_shared_bytes(experts, block_size, 1, 0) <= 163 * 1024
        for cluster in (4, 8):
            assert emulator.library.router_shared_bytes(experts, block_size, cluster, 1) <= 227 * 1024


@pytest.mark.parametrize("fields", [dict(num_experts=520), dict(top_k=33), dict(block_size=129)])
def test_refuses_what_it_does_not_cover(emulator, fields):
    routing = BlockRouting(**fields)
    with pytest.raises(AssertionError, match=r"more than|above"):
        route(emulator, torch.zeros(1, 4, routing.num_experts), None, routing)
