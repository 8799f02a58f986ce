"""The authors' released code, run once on the CPU, against every backend."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from routings import GOLDEN
from safetensors import safe_open

from dmoe_ops import BlockRouting, block_moe, block_route, moe_experts, reference

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

FUNCTIONS = [block_route, reference.block_route]


def load(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def sets(ids):
    return [set(row) for row in ids.flatten(0, -2).tolist()]


def coresets(result):
    return [members[:size] for members, size in zip(result.coreset_ids.tolist(), result.coreset_sizes.tolist())]


def test_the_folder_holds_what_these_tests_know(golden_folder):
    known = {f"routing_{name}" for name in GOLDEN} | {"moe_block_f32", "moe_block_bf16"}
    known |= {"tiny_llada2", "tiny_llada2_greedy"}
    assert {file.stem for file in golden_folder.glob("*.safetensors")} == known


@pytest.mark.parametrize("route", FUNCTIONS)
@pytest.mark.parametrize("name", GOLDEN)
def test_routing(name, route, golden_folder):
    golden, config = load(golden_folder / f"routing_{name}.safetensors")
    result = route(golden["logits"], golden["expert_bias"], routing=BlockRouting(**config))
    members = [mask.nonzero().flatten().tolist() for mask in golden["coreset_mask"].flatten(0, 1)]
    assert coresets(result) == members

    released_ids, released_weights, in_coreset = (
        golden[key].flatten(0, 1) for key in ("topk_ids", "topk_weights", "slot_in_coreset")
    )
    tokens_per_block = len(released_ids) // len(members)  # every golden sequence is whole blocks
    scarce = 0
    for t in range(len(released_ids)):
        ours = dict(zip(result.topk_ids[t].tolist(), result.topk_weights[t].tolist()))
        assert set(ours) <= set(members[t // tokens_per_block])
        slots = in_coreset[t]
        assert set(released_ids[t][slots].tolist()) <= set(ours)
        if slots.all():
            theirs = dict(zip(released_ids[t].tolist(), released_weights[t].tolist()))
            assert theirs.keys() == ours.keys()
            assert all(abs(theirs[e] - ours[e]) <= 1e-6 for e in ours)
        else:  # the released code left the coreset; ours is the best of the rest of it
            scarce += 1
            assert len(ours) == config["top_k"]
            score = golden["logits"].flatten(0, 1)[t].sigmoid()
            biased = score + golden["expert_bias"]
            rest = set(members[t // tokens_per_block]) - set(released_ids[t][slots].tolist())
            best = sorted(rest, key=lambda e: -biased[e].item())[: int((~slots).sum())]
            assert set(ours) == {*released_ids[t][slots].tolist(), *best}
            total = sum(score[e].item() for e in ours)
            assert all(abs(score[e].item() / total * 2.5 - w) <= 1e-6 for e, w in ours.items())
    assert bool(scarce) == (name == "scarce_groups_e128")


def layer(name, golden_folder):
    golden, config = load(golden_folder / f"moe_block_{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}

    def pair(prefix):
        gate, up, down = (weights[f"{prefix}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        return torch.cat([gate, up]), down

    experts = [pair(f"experts.{e}") for e in range(config["num_experts"])]
    w13, w2 = (torch.stack(list(stack)) for stack in zip(*experts))
    routing = BlockRouting(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        top_p=config["core_threshold"],
        **{key: config[key] for key in ("n_group", "topk_group", "routed_scaling_factor", "block_size", "min_experts")},
    )
    arguments = (weights["gate.weight"], weights["gate.expert_bias"], w13, w2, *pair("shared_experts"))
    return golden, arguments, routing


def truth(golden, arguments, routing, oracle):
    """The block in float64 for the released code's experts."""
    _, _, w13, w2, shared_w13, shared_w2 = arguments
    x, ids = golden["x"].flatten(0, 1), golden["topk_ids"].flatten(0, 1)
    score = golden["router_logits"].flatten(0, 1).sigmoid().gather(1, ids)
    weights = score / score.sum(1, keepdim=True) * routing.routed_scaling_factor
    shared = torch.from_numpy(np.stack([oracle.mlp(row, shared_w13, shared_w2) for row in x]))
    return x, ids.int(), weights, oracle.experts(x, w13, w2, ids, weights) + shared


@pytest.mark.parametrize("block", [block_moe, reference.block_moe])
def test_block_f32(block, golden_folder):
    golden, arguments, routing = layer("f32", golden_folder)
    y, routed, router_logits = block(golden["x"], *arguments, routing=routing)
    torch.testing.assert_close(y, golden["y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(router_logits, golden["router_logits"].flatten(0, 1), rtol=0, atol=1e-5)
    assert sets(routed.topk_ids) == sets(golden["topk_ids"])


@pytest.mark.parametrize("block", [block_moe, reference.block_moe])
def test_block_bf16(block, golden_folder, oracle):
    """Within twice the released code's own bf16 error. Where fewer experts have votes than min_experts asks for, the
    released code fills the coreset by whatever torch.topk does with equal zeros, and we by the lowest ids: a token that
    one of these fillers reaches may differ."""
    golden, arguments, routing = layer("bf16", golden_folder)
    y, routed, router_logits = block(golden["x"], *arguments, routing=routing)
    torch.testing.assert_close(router_logits, golden["router_logits"].flatten(0, 1), rtol=0, atol=1e-5)

    logits, bias = golden["router_logits"].flatten(0, 1), arguments[1].numpy()
    scores = oracle.scores(logits.numpy(), "sigmoid")
    selection = scores + bias
    ours, theirs = sets(routed.topk_ids), sets(golden["topk_ids"])
    differing = set()
    for b, coreset in enumerate(coresets(routed)):
        rows = range(b * 32, b * 32 + 32)
        votes = oracle.votes(scores, selection, routing, rows)
        voted = set(np.flatnonzero(votes).tolist())
        fillers = [e for e in range(routing.num_experts) if e not in voted]
        missing = max(0, routing.min_experts - len(voted))
        assert not missing or set(coreset) == voted | set(fillers[:missing])

        def choices(members, rows=rows):
            return [set(oracle.choose(selection[t], sorted(members), routing)) for t in rows]

        assert [ours[t] for t in rows] == choices(coreset)
        # One choice of fillers explains every token of the block, and without fillers there is nothing to explain.
        paddings = itertools.combinations(fillers, missing) if missing else [()]
        base = voted if missing else set(coreset)
        assert any(choices(base | set(padding)) == [theirs[t] for t in rows] for padding in paddings)
        for t in rows:
            if ours[t] != theirs[t]:
                assert missing and (ours[t] | theirs[t]) & set(fillers)
                differing.add(t)
    assert len(differing) <= 1

    x, ids, weights, exact = truth(golden, arguments, routing, oracle)
    released_error = (golden["y"].flatten(0, 1).double() - exact).abs()
    same = [t for t in range(len(x)) if t not in differing]
    error = (y.flatten(0, 1).double() - exact).abs()[same]
    assert error.max() <= 2 * released_error[same].max() and error.mean() <= 2 * released_error[same].mean()

    # The arithmetic of all tokens, with the released code's own choice of experts.
    _, _, w13, w2, shared_w13, shared_w2 = arguments
    experts = moe_experts if block is block_moe else reference.moe_experts
    one = torch.ones(len(x), 1)
    total = experts(x, w13, w2, ids, weights).double()
    total += experts(x, shared_w13[None], shared_w2[None], torch.zeros(len(x), 1, dtype=torch.int32), one).double()
    error = (total - exact).abs()
    assert error.max() <= 2 * released_error.max() and error.mean() <= 2 * released_error.mean()


@pytest.mark.parametrize("route", FUNCTIONS)
@pytest.mark.parametrize("index", [1, 2])
def test_routing_inside_the_tiny_model(index, route, golden_folder):
    golden, config = load(golden_folder / "tiny_llada2.safetensors")
    routing = BlockRouting(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        top_p=config["core_threshold"],
        **{key: config[key] for key in ("n_group", "topk_group", "routed_scaling_factor", "block_size", "min_experts")},
    )
    bias = golden[f"weights.model.layers.{index}.mlp.gate.expert_bias"]
    result = route(golden[f"router_logits.{index}"], bias, routing=routing)
    assert sets(result.topk_ids) == sets(golden[f"topk_ids.{index}"])
