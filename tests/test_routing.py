"""BlockRouting: its fields, their defaults, the named policies, and every value it refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dmoe_ops
from dmoe_ops import BlockRouting, _library
from dmoe_ops.routing import AGGREGATES, PACKED_FLOATS, PACKED_INTS, SCORES, SELECTS

ROOT = Path(__file__).resolve().parents[1]

FIELDS = tuple(
    """num_experts top_k block_size n_group topk_group score aggregate select top_p min_experts max_experts capacity
    union_k norm_topk_prob routed_scaling_factor pool_capacity choose""".split()  # noqa: SIM905
)


def test_the_fields_are_these():
    assert [field.name for field in dataclasses.fields(BlockRouting)] == list(FIELDS)


def test_a_routing_is_frozen_and_hashable():
    routing = BlockRouting()
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(routing, name, getattr(routing, name))
    assert hash(routing) == hash(BlockRouting()) and routing == BlockRouting()
    assert dataclasses.replace(routing, top_p=0.5) != routing


def test_the_defaults_are_dmoe_on_llada2_mini():
    assert dataclasses.asdict(BlockRouting()) == dict(
        num_experts=256,
        top_k=8,
        block_size=32,
        n_group=8,
        topk_group=4,
        score="sigmoid",
        aggregate="topk_sum",
        select="top_p",
        top_p=0.6,
        min_experts=16,
        max_experts=None,
        capacity=None,
        union_k=None,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        pool_capacity=None,
        choose="block",
    )


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("backend_name", ["reference", "auto"])
def test_numbers_of_numpy_are_numbers(integer, backend_name, monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", backend_name)
    wanted = dict(num_experts=16, top_k=4, block_size=8, n_group=2, topk_group=2, min_experts=5, max_experts=7)
    given = {name: integer(value) for name, value in wanted.items()}
    routing = BlockRouting(**given, top_p=np.float32(0.5), routed_scaling_factor=np.float16(2))
    assert routing == BlockRouting(**wanted, top_p=0.5, routed_scaling_factor=2.0)
    assert all(
        type(value) in (int, float, str, bool) for value in dataclasses.asdict(routing).values() if value is not None
    )
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    for ours, same in zip(
        dmoe_ops.block_route(logits, routing=routing),
        dmoe_ops.reference.block_route(logits, routing=BlockRouting(**wanted, top_p=0.5, routed_scaling_factor=2.0)),
    ):
        assert torch.equal(ours, same)
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1, got"):
        BlockRouting(top_k=integer(0))
    with pytest.raises(ValueError, match="top_k must be an integer"):
        BlockRouting(top_k=np.float64(4))
    with pytest.raises(ValueError, match="top_k must be an integer"):
        BlockRouting(top_k=np.True_)


@pytest.mark.parametrize(
    "name, fields",
    {
        "token": dict(select="all"),
        "top4": dict(select="all", top_k=4),
        "des_seq": dict(aggregate="union", select="nonzero", union_k=3),
        "des_vote": dict(aggregate="topk_sum", select="top_n", capacity=38),
        "capacity": dict(aggregate="max", select="top_n", capacity=48, n_group=1),
        "dmoe": dict(aggregate="topk_sum", select="top_p", top_p=0.6, min_experts=16),
        "oea": dict(aggregate="union", select="nonzero", union_k=1, choose="pool"),
        "xshare": dict(aggregate="sum", select="all", choose="pool", pool_capacity=48),
    }.items(),
)
def test_named_policies(name, fields):
    routing = BlockRouting.policy(name)
    assert {key: getattr(routing, key) for key in fields} == fields
    free = set(FIELDS) - {*fields, "topk_group", "aggregate"}
    assert {key: getattr(routing, key) for key in free} == {key: getattr(BlockRouting(), key) for key in free}


def test_an_override_wins_over_a_policy():
    for name in ("token", "top4", "des_seq", "des_vote", "capacity", "dmoe", "oea", "xshare"):
        routing = BlockRouting.policy(name, num_experts=64, top_k=6, n_group=1, topk_group=1, score="softmax")
        assert (routing.num_experts, routing.top_k, routing.n_group, routing.score) == (64, 6, 1, "softmax")
    assert BlockRouting.policy("des_seq", union_k=1).union_k == 1
    assert BlockRouting.policy("des_vote", num_experts=64, capacity=7).capacity == 7
    assert BlockRouting.policy("des_vote", num_experts=64).capacity == 10  # 0.15 E
    assert BlockRouting.policy("des_vote", num_experts=1, top_k=1, n_group=1, topk_group=1).capacity == 1
    assert BlockRouting.policy("capacity", capacity=24).capacity == 24
    assert BlockRouting.policy("xshare", num_experts=64).pool_capacity == 12  # 3/16 E
    assert BlockRouting.policy("xshare", pool_capacity=None).pool_capacity is None


def test_a_models_geometry_gives_way_to_what_makes_the_policy():
    geometry = dict(num_experts=64, top_k=6, n_group=4, topk_group=2)
    found = {name: BlockRouting.for_model(name, geometry) for name in ("dmoe", "top4", "capacity")}
    assert [(r.num_experts, r.top_k, r.n_group, r.topk_group) for r in found.values()] == [
        (64, 6, 4, 2),
        (64, 4, 4, 2),
        (64, 6, 1, 1),
    ]
    assert BlockRouting.of_model("top4", geometry, top_k=2, n_group=8).top_k == 2


@pytest.mark.parametrize(
    "field, value, settings",
    [
        *[(name, value, {}) for name in FIELDS[:5] for value in (0, -1, 1.5, "8", None, True)],
        *[
            (name, value, {})
            for name in ("max_experts", "capacity", "union_k", "pool_capacity")
            for value in (0, -3, 2.0, "4", False)
        ],
        *[("min_experts", value, {}) for value in (-1, 1.5, None, True)],
        *[(name, value, {}) for name in FIELDS[:5] for value in (2**31, 10**400)],
        *[(name, 2**31, {}) for name in ("min_experts", "max_experts", "capacity", "union_k", "pool_capacity")],
        *[(name, 10**400, {}) for name in ("top_p", "routed_scaling_factor")],
        ("top_k", 257, {}),
        ("top_k", 9, dict(num_experts=8)),
        ("n_group", 7, {}),
        ("n_group", 512, {}),
        ("topk_group", 9, {}),
        *[(name, value, {}) for name in ("score", "aggregate", "select", "choose") for value in ("relu", "", None, 1)],
        *[
            ("top_p", value, {})
            for value in (0, 0.0, -0.1, 1.0000001, 60, float("nan"), float("inf"), "0.6", None, True)
        ],
        *[("routed_scaling_factor", value, {}) for value in (float("nan"), float("inf"), "2.5", None)],
        *[("norm_topk_prob", value, {}) for value in (None, "yes", 2)],
        ("capacity", None, dict(select="top_n")),
        ("union_k", None, dict(aggregate="union", select="nonzero")),
        ("union_k", 257, dict(aggregate="union", select="nonzero")),
        ("union_k", None, dict(aggregate="union", select="top_p")),
        ("union_k", None, dict(aggregate="union", select="all", pool_capacity=8)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, settings):
    with pytest.raises(ValueError) as error:
        BlockRouting(**{**settings, field: value})
    message = str(error.value)
    assert message.startswith(f"{field} must") and repr(value) in message and "\n" not in message


def test_an_integer_must_fit_32_bits_and_a_number_a_float():
    assert BlockRouting(min_experts=2**31 - 1).min_experts == 2**31 - 1
    with pytest.raises(ValueError, match=r"^min_experts must be an integer below 2\*\*31, got 2147483648$"):
        BlockRouting(min_experts=2**31)
    assert BlockRouting(routed_scaling_factor=2**1023 - 1).routed_scaling_factor == 2**1023 - 1
    for sign in (1, -1):
        with pytest.raises(ValueError, match=r"^routed_scaling_factor must be a finite number, got -?89"):
            BlockRouting(routed_scaling_factor=sign * 2**1023)


@pytest.mark.parametrize("policy", ["dMoE", "", None, "top_p"])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(ValueError, match=r"policy .*dmoe") as error:
        BlockRouting.policy(policy)
    assert repr(policy) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_or_bad_override_is_refused():
    with pytest.raises(ValueError, match=r"threshold.*0\.6"):
        BlockRouting.policy("dmoe", threshold=0.6)
    with pytest.raises(ValueError, match=r"top_p .*1\.5"):
        BlockRouting.policy("dmoe", top_p=1.5)
    with pytest.raises(ValueError, match=r"num_experts .*0"):
        BlockRouting.policy("des_vote", num_experts=0)
    with pytest.raises(ValueError, match=r"num_experts must .*'8'"):
        BlockRouting.policy("des_vote", num_experts="8")


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_experts=1, top_k=1, n_group=1, topk_group=1),
        dict(num_experts=8, top_k=8, n_group=8, topk_group=8),
        dict(top_p=1),
        dict(top_p=1e-9),
        dict(min_experts=0),
        dict(min_experts=500),
        dict(max_experts=4),
        dict(max_experts=500),
        dict(select="top_n", capacity=500),
        dict(select="all", aggregate="union"),
        dict(routed_scaling_factor=1),
        dict(block_size=1),
    ],
)
def test_the_limits_of_each_range_are_allowed(settings):
    routing = BlockRouting(**settings)
    assert all(getattr(routing, key) == value for key, value in settings.items())


@pytest.mark.parametrize(
    "settings, width",
    [
        (dict(), 256),
        (dict(max_experts=20), 20),
        (dict(max_experts=500), 256),
        (dict(select="all", max_experts=20), 256),
        (dict(select="top_n", capacity=48, max_experts=20), 48),
        (dict(select="top_n", capacity=500), 256),
        (dict(aggregate="union", select="nonzero", union_k=3), 96),
        (dict(aggregate="union", select="nonzero", union_k=9), 256),
        (dict(aggregate="topk_sum", select="nonzero", block_size=4), 32),
        (dict(aggregate="max", select="nonzero", block_size=4), 256),
        (dict(aggregate="sum", select="nonzero", block_size=1), 256),
        (dict(choose="pool", max_experts=20), 256),
        (dict(choose="pool", pool_capacity=48), 48),
        (dict(pool_capacity=48), 48),
        (dict(pool_capacity=500), 256),
        (dict(pool_capacity=48, max_experts=20), 20),
        (dict(pool_capacity=48, select="all"), 48),
        (dict(pool_capacity=48, select="top_n", capacity=60), 48),
    ],
)
def test_coreset_width_is_the_largest_possible_coreset(settings, width):
    assert BlockRouting(**settings).coreset_width == width


def test_the_settings_reach_cpp_in_one_order():
    """The order is `PACKED_INTS` and `PACKED_FLOATS`; csrc/routing.h names what it reads at each position."""
    source = (ROOT / "csrc/routing.h").read_text()
    fields = re.findall(r"\.(\w+) = .*?\b(ints|floats)\[(\d+)\]", source)
    for kind, names in (("ints", PACKED_INTS), ("floats", PACKED_FLOATS)):
        assert [(name, int(at)) for name, of, at in fields if of == kind] == [(name, i) for i, name in enumerate(names)]
    enums = dict(re.findall(r"enum class (\w+) : int32_t \{ (.*?) \}", source))
    for name, values in (("Score", SCORES), ("Aggregate", AGGREGATES), ("Select", SELECTS)):
        assert tuple(value.rstrip("_") for value in enums[name].split(", ")) == values  # union is a word of C++


def test_the_settings_as_cpp_reads_them():
    numbers = dict(
        num_experts=60, top_k=3, block_size=17, n_group=6, topk_group=5, min_experts=7, capacity=11, union_k=13
    )
    choices = dict(score="softmax", aggregate="union", select="nonzero", norm_topk_prob=False)
    routing = BlockRouting(**numbers, **choices, top_p=0.25, routed_scaling_factor=1.5)
    ints, floats = _library.packed_routing(routing)
    assert ints == [3, 17, 6, 5, 1, 3, 2, 7, 60, 11, 13, 0] and floats == [0.25, 1.5]
    pooled = dataclasses.replace(routing, pool_capacity=9, choose="pool")
    assert _library.packed_routing(pooled) == _library.packed_routing(
        routing
    )  # another argument, of the CPU's op alone
    assert [_library.unpack_routing(each.args(), each.pool_args()) for each in (routing, pooled)] == [routing, pooled]
    assert _library.unpack_routing(routing.args()) == routing
    fields = [part.split()[1] for part in _library.ROUTING.split(", ")]
    fields += [part.split()[1].split("=")[0] for part in _library.SHARING.split(", ")[:2]]
    assert fields == list(vars(routing))
