"""Coresets that serve several denoising steps: `generate(refresh_every=…)`."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import test_step
import torch
from test_step import RULE, build, filled, prompt, same_state

from dmoe_ops.layer import BlockMoE
from dmoe_ops.models import graphs
from dmoe_ops.models.step import Batch, denoise

taped = test_step.taped  # a fixture
OFTEN = 10**6  # more than any block has steps


def decode(model, lengths=(40, 3, 17), rows=slice(None), **options):
    """A few blocks of a batch, some steps each."""
    lengths = torch.tensor(lengths)[rows]
    ids = torch.cat([prompt(40, seed) for seed in range(3)])[rows]
    return model.generate(ids, prompt_lengths=lengths, gen_length=24, steps=6, eos_id=None, threshold=0.99, **options)


def same(got, want) -> None:
    assert torch.equal(got.tokens, want.tokens) and got.stats == want.stats


def test_coresets_of_every_step_are_the_default():
    model = build()
    want = decode(model)
    same(decode(model, refresh_every=1), want)
    assert decode(model, refresh_every=OFTEN).stats.unique_experts != want.stats.unique_experts


@pytest.mark.parametrize("every", [3, OFTEN])
def test_a_block_keeps_its_coresets(every, monkeypatch):
    """What each layer selects in a block's first step, and every so many, the others get; rows that are done drop out."""
    model, calls, compute = build(), collections.defaultdict(list), BlockMoE.compute

    def recorded(moe, x, bias, offsets, domains, given):
        out = compute(moe, x, bias, offsets, domains, given)
        calls[moe].append((len(x), given, out[1].coreset_ids))
        return out

    monkeypatch.setattr(BlockMoE, "compute", recorded)
    blocks = [0]

    def count(block):
        blocks[-1] += 1
        if block.done:
            blocks.append(0)

    decode(model, [30, 29, 28], stream=count, every_step=True, refresh_every=every)
    assert max(blocks) > 4 and len(blocks) == 3
    for steps in calls.values():
        steps = steps[-sum(blocks) :]  # behind the prefill
        for number in blocks[:-1]:
            for step, (rows, given, used) in enumerate(steps[:number]):
                assert (given is None) == (step % every == 0)
                if given is None:
                    kept = used[1::2] if len(used) == 2 * rows else used  # one that rides selects for itself
                elif rows == len(kept):
                    assert torch.equal(given, kept) and torch.equal(used, kept)
                else:
                    assert {*map(tuple, used.tolist())} <= {*map(tuple, kept.tolist())}
            steps = steps[number:]


def test_sequences_of_a_batch_come_out_as_if_alone():
    model = build()
    got = decode(model, refresh_every=2).tokens
    for row in range(3):
        assert torch.equal(got[row], decode(model, rows=slice(row, row + 1), refresh_every=2).tokens[0])


def test_replayed_steps_decode_the_same(taped):
    model = build()
    want = decode(model, use_graphs=False, refresh_every=2)
    for _ in range(2):
        same(decode(model, use_graphs=True, refresh_every=2), want)
    assert len(taped) == 3  # one with a block to commit, one with coresets that were kept


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[40], [3, 37, 20]])
def test_the_step_of_fixed_shapes_is_the_step(lengths):
    model, rule, rows = build(), dataclasses.replace(RULE, refresh_every=2), torch.arange(len(lengths))
    model.use_block_length(16)
    cut, fixed = filled(model, lengths), filled(model, lengths)
    for batch in (cut, fixed):
        batch.coresets = Batch.empty(model, 16, len(lengths), 128, keeps_coresets=True).coresets
    for fresh in (True, False, True, False):
        flags = denoise(model, cut, rule, rows, len(lengths) * 16, False, False, fresh)
        assert torch.equal(flags, denoise(model, fixed, rule, rows, len(lengths) * 16, False, True, fresh))
        same_state(cut, fixed)
        assert torch.equal(cut.coresets, fixed.coresets)


@torch.no_grad()
@pytest.mark.parametrize("fresh", [True, False])
def test_the_step_compiles_whole(fresh):
    model, rows = build(), torch.arange(2)
    model.use_block_length(16)
    torch.compiler.reset()
    run = torch.compile(denoise, fullgraph=True, backend="eager", dynamic=False)
    want, got = filled(model, [40, 33]), filled(model, [40, 33])
    for batch in (want, got):
        batch.coresets = Batch.empty(model, 16, 2, 128, keeps_coresets=True).coresets
        denoise(model, batch, RULE, rows, 32, False, True, True)
    flags = denoise(model, want, RULE, rows, 32, False, True, fresh)
    assert torch.equal(run(model, got, RULE, rows, 32, False, True, fresh), flags)
    same_state(want, got)
    assert torch.equal(want.coresets, got.coresets) and bool((want.coresets >= 0).any())


@torch.no_grad()
def test_what_the_graphs_read_is_held(monkeypatch):
    model = build()
    model.use_block_length(16)
    monkeypatch.setattr(graphs, "capture", lambda run, pool: (None, run()))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    plain = graphs.StepGraphs(model, RULE, 2, 128, ())
    kept = graphs.StepGraphs(model, dataclasses.replace(RULE, refresh_every=4), 2, 128, ())
    assert [*plain.replays] == [(False, True), (True, True)] and plain.batch.coresets is None
    assert [*kept.replays] == [*plain.replays, (False, False)]
    assert kept.batch.coresets.shape == (len(model.moe_layers), 2, 1, model.config.num_experts)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_a_bad_value_is_refused(value):
    with pytest.raises(ValueError, match=f"^refresh_every must be None or an integer of at least 1, got {value!r}$"):
        build().generate(prompt(4), gen_length=4, refresh_every=value)
