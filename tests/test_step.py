"""The denoising step: what it asks of the host, that it can be captured, and that a replay decodes what a decode does."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import types

import pytest
import torch
from sizes import EOS, MASK, SIZES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion, decoding, graphs
from dmoe_ops.models.step import Batch, Counter, Rule, denoise

CONFIG = LLaDA2Config(**{**SIZES, "max_position_embeddings": 512})
DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal")
RULE = Rule(16, MASK, EOS, True, 0.9)


def build(config=CONFIG) -> LLaDA2ForDiffusion:
    model = LLaDA2ForDiffusion(config, dtype=torch.float32).init_weights(0).eval()
    model.set_routing("dmoe", min_experts=4)
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, MASK, (1, length), generator=torch.Generator().manual_seed(seed))


def decodes():
    """Prompts and options of generate: batches, early ends, prompts that end inside a block, and of several."""
    for lengths, gen_length, eos_id in (
        ([40], 60, EOS),
        ([5], 100, None),
        ([40, 3, 17], 45, 7),
        ([9, 64, 1, 33], 40, 11),
    ):
        ids = torch.cat([prompt(max(lengths), seed) for seed in range(len(lengths))])
        yield ids, dict(prompt_lengths=torch.tensor(lengths), gen_length=gen_length, eos_id=eos_id, threshold=0.5)


class Count(TorchDispatchMode):
    """Ops by name; `views` apart, as they launch nothing."""

    def __init__(self):
        super().__init__()
        self.ops, self.views = collections.Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().split("::")[1].split(".")[0]
        if op.is_view or name in ("_unsafe_view", "detach", "alias"):
            self.views += 1
        else:
            places = args[1] if name in ("index", "index_put_", "_unsafe_index") else ()
            bools = [place for place in places if place is not None and place.dtype == torch.bool]
            self.ops["boolean indexing" if bools else name] += 1
        return op(*args, **(kwargs or {}))

    def reads(self) -> int:
        return sum(self.ops[name] for name in (*DATA_DEPENDENT, "boolean indexing"))


# Counted ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_id", [None, EOS])
def test_no_step_reads_a_value_back(eos_id, monkeypatch):
    """A decode of 256 tokens: none inside a step, at most one per block outside."""
    model, ids, inside = build(), prompt(40), []

    def counted(*args, **options):
        with Count() as count:
            out = denoise(*args, **options)
        inside.append(count)
        return out

    monkeypatch.setattr(decoding, "denoise", counted)
    with Count() as outside:
        decoded = model.generate(ids, gen_length=256, eos_id=eos_id, threshold=0.5)
    assert decoded.tokens.shape[1] == 256 or eos_id
    assert len(inside) == decoded.stats.denoising_forwards > 20
    assert [count.reads() for count in inside] == [0] * len(inside)
    blocks = -(-(40 + 256) // 32) - 1
    assert outside.reads() - decode_free_reads(outside) <= blocks, outside.ops


def decode_free_reads(count) -> int:
    """Those of the arguments' checks, in front of the first block."""
    model = build()
    with Count() as checks, contextlib.suppress(ValueError):
        model.generate(prompt(40), gen_length=256, use_graphs=True)  # refused behind the checks
    return checks.reads()


@pytest.mark.parametrize("fixed", [False, True])
def test_ops_of_a_forward(fixed):
    """20 layers: what launches something; `fixed`: as in a graph, which replays every one of them."""
    model = build(dataclasses.replace(CONFIG, num_hidden_layers=20))
    with torch.no_grad():
        cache = model.new_cache(64)
        cache.length = torch.tensor([32]) if fixed else 32
        with Count() as forward:
            model.hidden_states(prompt(32), kv_cache=cache, block_length=32)
        batch = Batch.empty(model, 32, 1, 64)
        with Count() as whole:
            denoise(model, batch, dataclasses.replace(RULE, block_length=32), torch.tensor([0]), 32, False, fixed)
    print(f"\nforward {sum(forward.ops.values())} ops, step {sum(whole.ops.values())}: {whole.ops}")
    assert sum(forward.ops.values()) <= 170
    assert sum(whole.ops.values()) <= 180
    assert forward.ops["add_rms_norm"] == 41 and forward.ops["qk_norm_rope"] == 20 and whole.ops["greedy"] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_head_is_applied_to_masks_alone(temperature, monkeypatch):
    """Unless tokens are drawn: what is drawn for a position depends on all before it."""
    model, ids, wanted, rows = build(), torch.cat([prompt(40, seed) for seed in range(3)]), [], []
    head = model.head

    def counted(model, batch, rule, which, *args):
        block = batch.x[which][:, int(batch.begin) : int(batch.begin) + 32]
        masks = int(((block == MASK) & batch.active[which, None]).sum())
        wanted.append(len(which) * 32 if temperature else masks)
        return denoise(model, batch, rule, which, *args)

    monkeypatch.setattr(decoding, "denoise", counted)
    monkeypatch.setattr(model, "head", lambda hidden: rows.append(len(hidden)) or head(hidden))
    options = dict(prompt_lengths=torch.tensor([40, 3, 17]), gen_length=50, threshold=0.5, temperature=temperature)
    model.generate(ids, eos_id=None, **options)
    assert rows == wanted and len(set(wanted)) > 2


@pytest.mark.parametrize("length, before", [(40, []), (70, [64])])
def test_a_finished_block_is_committed_by_the_next_ones_first_step(length, before, monkeypatch):
    """And so is a prompt of one full block: neither takes a run of the layers of its own."""
    model, tokens, forward = build(), [], build().hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, **how: tokens.append(ids.shape[1]) or forward(ids, **how))
    stats = model.generate(prompt(length), gen_length=80, eos_id=None, threshold=0.5).stats
    rides = stats.commit_forwards + (not before)
    assert tokens[: len(before)] == before and tokens.count(64) == rides + len(before)
    assert len(tokens) == stats.denoising_forwards + len(before) and stats.prefill_forwards == 1


@pytest.mark.parametrize("budget, runs", [(64, [32, 32, 16]), (1, [16] * 5), (10**6, [80])])
def test_a_long_prompt_is_prefilled_a_few_blocks_at_a_time(budget, runs, monkeypatch):
    """So that memory is bounded: no more than a budget of tokens of all sequences, whole blocks, at least one."""
    model, ids, tokens = build(), torch.cat([prompt(90), prompt(90, 1)]), []
    options = dict(gen_length=10, block_length=16, eos_id=None)
    want = model.generate(ids, **options)
    forward = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, **how: tokens.append(ids.shape[1]) or forward(ids, **how))
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", budget)
    got = model.generate(ids, **options)
    assert torch.equal(got.tokens, want.tokens) and got.stats == want.stats and got.stats.prefill_forwards == 2
    assert tokens[: len(runs) + 1] == [*runs, 16]


def test_a_mask_that_the_model_predicts_is_a_token():
    """It is left at the block's last step, and is part of the answer."""
    model = build()
    torch.nn.init.zeros_(model.lm_head.weight)  # token 0 is the first of the most probable ones
    decoded = model.generate(prompt(8).clamp(min=1), gen_length=30, steps=4, mask_id=0, eos_id=None)
    assert decoded.tokens.tolist() == [[0] * 30] and decoded.stats.denoising_forwards == 8


def test_counts_are_integers_of_64_bits():
    counter = Counter(4, 2, layers=3, device="meta")
    assert [part.dtype for part in (counter.forwards, counter.blocks, counter.unique)] == [torch.int64] * 3
    assert [part.device.type for part in (counter.forwards, counter.blocks, counter.unique)] == ["meta"] * 3


def test_what_a_batch_holds():
    """Empty, nothing is new or active, and a row without a sequence has one step. Filled, whatever it held is gone."""
    batch = Batch.empty(build(), 16, 3, 16)
    for name in ("x", "new", "length", "active", "begin", "step"):
        assert not getattr(batch, name).any(), name
        assert getattr(batch, name).dtype == (torch.bool if name in ("new", "active") else torch.int64), name
    assert batch.x.shape == batch.new.shape == (3, 16) and batch.begin.shape == batch.step.shape == (1,)
    assert batch.length.shape == batch.active.shape == (3,) and batch.steps.tolist() == [1, 1, 1]

    batch.x.fill_(1), batch.new.fill_(True), batch.active.fill_(True)
    batch.cache.commit(16)
    batch.counter.forwards += 1
    prompts, lengths = torch.tensor([[5, 6, 7], [8, 9, 9]]), torch.tensor([3, 1])
    batch.fill(prompts, lengths, torch.tensor([2, 4]), torch.tensor([6, 7]), MASK)
    assert batch.x[:, :4].tolist() == [[5, 6, 7, MASK], [8, MASK, MASK, MASK], [MASK] * 4]
    assert (batch.x[:, 4:] == MASK).all() and not batch.active.any()
    assert [row.nonzero()[:, 0].tolist() for row in batch.new] == [[3, 4], [1, 2, 3, 4], []]
    assert batch.length.tolist() == [3, 1, 0] and batch.steps.tolist() == [6, 7, 1]
    assert batch.cache.length == 0 and not batch.counter.forwards.any()


# Captured --------------------------------------------------------------------------------------------------------------


def filled(model, lengths, capacity=128, rule=RULE, gen_length=30) -> Batch:
    """A batch in front of the block where the shortest prompt ends, with everything before it committed."""
    batch = Batch.empty(model, rule.block_length, len(lengths), capacity)
    ids = torch.cat([prompt(max(lengths), seed) for seed in range(len(lengths))])
    lengths = torch.tensor(lengths)
    batch.fill(ids, lengths, torch.full_like(lengths, gen_length), torch.full_like(lengths, 16), rule.mask_id)
    begin = int(lengths.min()) // rule.block_length * rule.block_length
    if begin:
        model.hidden_states(batch.x[:, :begin], kv_cache=batch.cache, block_length=rule.block_length)
        batch.cache.commit(begin)
    batch.begin.fill_(begin)
    batch.active[:] = batch.length < begin + rule.block_length
    return batch


def same_state(one: Batch, other: Batch) -> None:
    for name in ("x", "active", "step"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.counter.unique, other.counter.unique)
    assert torch.equal(one.counter.forwards, other.counter.forwards)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[40], [3, 37, 20]])
def test_the_step_of_fixed_shapes_is_the_step(lengths):
    """Over the whole cache, its length on the device."""
    model, rows = build(), torch.arange(len(lengths))
    cut, fixed = filled(model, lengths), filled(model, lengths)
    for _ in range(3):
        flags = denoise(model, cut, RULE, rows, len(lengths) * 16, False)
        assert torch.equal(flags, denoise(model, fixed, RULE, rows, len(lengths) * 16, False, fixed=True))
        same_state(cut, fixed)


@torch.no_grad()
@pytest.mark.parametrize("rides", [False, True])
def test_the_step_compiles_whole_and_once_for_all_lengths(rides):
    model, rows = build(), torch.arange(2)
    model.use_block_length(16)
    torch.compiler.reset()
    graphs_made = []

    def backend(graph, inputs):
        graphs_made.append(graph)
        return graph.forward

    run = torch.compile(denoise, fullgraph=True, backend=backend, dynamic=False)
    for lengths in ([40, 33], [70, 66], [20, 17]):
        want, got = filled(model, lengths), filled(model, lengths)
        flags = denoise(model, want, RULE, rows, 32, rides, fixed=True)
        assert torch.equal(run(model, got, RULE, rows, 32, rides, fixed=True), flags)
        same_state(want, got)
        assert len(graphs_made) == 1


@torch.no_grad()
def test_the_step_compiles_through_aot_autograd():
    """Which writes without mutation what the step writes in place."""
    model, rows = build(), torch.arange(1)
    model.use_block_length(16)
    torch.compiler.reset()
    run = torch.compile(denoise, fullgraph=True, backend="aot_eager", dynamic=False)
    want, got = filled(model, [40]), filled(model, [40])
    for _ in range(2):
        flags = denoise(model, want, RULE, rows, 16, False, fixed=True)
        assert torch.equal(run(model, got, RULE, rows, 16, False, fixed=True), flags)
        same_state(want, got)


@torch.no_grad()
def test_the_step_runs_on_fake_tensors():
    """No value is looked at: there is none."""
    model = build()
    model.use_block_length(16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = Batch.empty(model, 16, 2, 128)
        flags = denoise(model, batch, RULE, torch.arange(2), 32, True, fixed=True)
    assert flags.shape == (2, 3)


class Tape(TorchDispatchMode):
    """What stands for a CUDA graph: ops recorded with their tensors, which a replay runs again in place."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for op, args, kwargs, out in self.calls:
            if op.is_view:
                continue
            new = op(*args, **kwargs)
            if not op._schema.is_mutable or len(op._schema.returns) > 0:
                outs, news = ([t] if isinstance(t, torch.Tensor) else list(t or []) for t in (out, new))
                for old, value in zip(outs, news):
                    if old.data_ptr() != value.data_ptr():
                        old.copy_(value)


@pytest.fixture
def taped(monkeypatch):
    """Graphs on the CPU; returns what was captured."""
    captured = []

    def capture(run, pool):
        run()
        tape = Tape()
        with tape:
            out = run()
        captured.append(tape)
        return tape, out

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "ungraphable_reason", lambda model, rule: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return captured


def test_replayed_steps_decode_the_same(taped):
    """Batches, other prefixes, early ends, prompts of several blocks; the graphs of a bucket serve them all."""
    model = build()
    for ids, options in decodes():
        want = model.generate(ids, use_graphs=False, **options)
        for _ in range(2):
            got = model.generate(ids, use_graphs=True, **options)
            assert torch.equal(got.tokens, want.tokens)
            assert got.stats == want.stats
    assert len(taped) == 2 * 4  # a bucket of 1 under two rules, one of 4 under two; with and without a block to commit


def storages(value, seen=None) -> set[int]:
    """Where the tensors lie that an object holds, through its attributes."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()}
    if id(value) in seen:
        return set()
    seen[id(value)] = value
    parts = (
        list(value)
        if isinstance(value, (list, tuple))
        else list(getattr(value, "__dict__", value if isinstance(value, dict) else {}).values())
    )
    return set().union(*(storages(part, seen) for part in parts)) if parts else set()


@torch.no_grad()
def test_what_a_graph_reads_is_held(monkeypatch):
    """A CUDA graph holds no tensor, so whatever a step does not make itself must be the model's or the graphs' own."""
    model, read, tapes = build(), set(), []

    def capture(run, pool):
        with Tape() as tape:
            out = run()
        made = set()
        for _, args, kwargs, results in tape.calls:
            read.update(storages([args, kwargs]) - made)
            made |= storages([results])
        tapes.append(tape)  # so that no storage takes the place of another
        return None, out

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    made = graphs.StepGraphs(model, RULE, 2, 128, ())
    assert len(read) > 20 and read <= storages(made) | storages(list(model.state_dict().values()))


def test_a_cancelled_decode_leaves_nothing_to_the_next(taped):
    """Neither to a smaller one of the same bucket."""
    model, ids = build(), torch.cat([prompt(20, seed) for seed in range(4)])
    model.generate(ids, gen_length=40, eos_id=None, stream=lambda block: True, every_step=True)
    for rows in (3, 4):
        want, shapes = model.generate(ids[:rows], gen_length=40, eos_id=None, use_graphs=False), []
        got = model.generate(
            ids[:rows],
            gen_length=40,
            eos_id=None,
            stream=lambda block, shapes=shapes: shapes.append(tuple(block.tokens.shape)),
        )
        assert torch.equal(got.tokens, want.tokens) and got.stats == want.stats
        assert shapes == [(rows, 32)] * 2


def test_decodes_that_take_turns_have_graphs_of_their_own(taped):
    model, options = build(), dict(gen_length=60, eos_id=None, threshold=0.5)
    prompts = [prompt(20, seed) for seed in (1, 2)]
    want = [model.generate(ids, use_graphs=False, **options).tokens for ids in prompts]
    streams = [model.stream(ids, every_step=True, **options) for ids in prompts]
    found = [None, None]
    while None in found:
        for i, stream in enumerate(streams):
            try:
                next(stream)
            except StopIteration as end:
                found[i] = found[i] or end.value
    for got, tokens in zip(found, want):
        assert torch.equal(got.tokens, tokens)
    made = len(taped)
    assert (
        torch.equal(model.generate(prompts[0], **options).tokens, want[0]) and len(taped) == made
    )  # one of them serves


def test_graphs_are_made_again_where_the_model_changes(taped):
    model, ids = build(), prompt(20)
    for change in (lambda: None, lambda: model.set_routing("token"), lambda: model.float().set_routing("dmoe")):
        change()
        want = model.generate(ids, gen_length=20, use_graphs=False)
        assert torch.equal(model.generate(ids, gen_length=20).tokens, want.tokens)
    made = len(taped)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    want = model.generate(ids, gen_length=20, use_graphs=False)
    assert torch.equal(model.generate(ids, gen_length=20).tokens, want.tokens)
    assert len(taped) == made + 2
    assert len(model._step_graphs) <= graphs.KEPT


def test_the_first_graphs_of_a_block_length_serve_the_next_decode(taped):
    model = build()
    for _ in range(2):
        model.generate(prompt(20), gen_length=20, block_length=16)
        assert len(taped) == 2


def test_a_capture_is_warmed_up_in_a_stream_of_its_own(monkeypatch):
    """What `capture` asks of torch.cuda, in order."""
    said = []
    stream = types.SimpleNamespace(wait_stream=lambda other: said.append("wait"))
    graph = types.SimpleNamespace(replay=lambda: said.append("replay"))

    @contextlib.contextmanager
    def within(name):
        said.append(f"{name} begins")
        yield
        said.append(f"{name} ends")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda given, pool: within(f"graph in {pool}"))
    made, out = graphs.capture(lambda: said.append("run") or 7, "pool")
    assert made is graph and out == 7
    runs = ["stream begins", "run", "run", "stream ends"]
    assert said == ["wait", *runs, "wait", "graph in pool begins", "run", "graph in pool ends"]


def test_why_there_are_no_graphs(monkeypatch):
    model = build()
    with pytest.raises(ValueError, match="use_graphs must not be True here: the model is on cpu"):
        model.generate(prompt(4), gen_length=4, use_graphs=True)
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), config=types.SimpleNamespace(sees_all=True))
    assert "the whole text" in graphs.ungraphable_reason(on_gpu, RULE)
    on_gpu.config = CONFIG
    assert "random numbers" in graphs.ungraphable_reason(on_gpu, dataclasses.replace(RULE, temperature=1.0))
    monkeypatch.setattr(graphs._backends, "name_for", lambda device: "reference")
    assert "reference backend" in graphs.ungraphable_reason(on_gpu, RULE)
    on_gpu.mesh = None
    assert "several ranks" in graphs.ungraphable_reason(on_gpu, RULE)


def test_a_capture_that_fails_is_told_and_the_decode_goes_on(monkeypatch):
    model, ids = build(), prompt(20)

    def fails(run, pool):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "capture", fails)
    monkeypatch.setattr(graphs, "ungraphable_reason", lambda model, rule: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    want = model.generate(ids, gen_length=20, use_graphs=False)
    with pytest.warns(UserWarning, match="the capture failed: operation not permitted when stream is capturing"):
        assert torch.equal(model.generate(ids, gen_length=20).tokens, want.tokens)
    with pytest.raises(ValueError, match="the capture failed"):
        model.generate(ids, gen_length=20, use_graphs=True)


# Streams ---------------------------------------------------------------------------------------------------------------


def test_a_stream_hands_out_what_generate_returns():
    model, ids = build(), torch.cat([prompt(40), prompt(40, 1)])
    options = dict(gen_length=50, prompt_lengths=torch.tensor([40, 20]), eos_id=None, threshold=0.5)
    want, blocks, steps = model.generate(ids, **options), [], []
    got = model.generate(ids, stream=blocks.append, **options)
    assert torch.equal(got.tokens, want.tokens) and got.stats == want.stats
    assert [block.begin for block in blocks] == [0, 32, 64] and all(block.done for block in blocks)
    texts = torch.cat([block.tokens for block in blocks], 1)
    for row, length in enumerate((40, 20)):
        assert torch.equal(texts[row, length : length + 50], want.tokens[row])
    model.generate(ids, stream=steps.append, every_step=True, **options)
    assert [block.begin for block in steps if block.done] == [0, 32, 64] and len(steps) > len(blocks)
    masks = [(block.tokens == MASK).sum().item() for block in steps]
    assert all(a > b for a, b, block in zip(masks, masks[1:], steps) if not block.done)

    stream = model.stream(ids, **options)
    iterated = []
    while True:
        try:
            iterated.append(next(stream))
        except StopIteration as end:
            assert torch.equal(end.value.tokens, want.tokens) and end.value.stats == want.stats
            break
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(iterated, blocks, strict=True))


def test_a_stream_keeps_gradients_off_while_it_computes_alone(monkeypatch):
    model, modes = build(), []
    forward = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda *a, **k: modes.append(torch.is_grad_enabled()) or forward(*a, **k)
    )
    for _ in model.stream(prompt(40), gen_length=50):
        assert torch.is_grad_enabled()
    assert len(modes) > 2 and not any(modes)


def test_a_decode_is_cancelled_between_steps():
    model, ids = build(), prompt(40)
    want = model.generate(ids, gen_length=90, eos_id=None, threshold=0.5).tokens[0].tolist()
    seen = []

    def two_blocks(block):
        seen.append(block)
        return len(seen) == 2

    got = model.generate(ids, gen_length=90, eos_id=None, threshold=0.5, stream=two_blocks)
    assert got.tokens[0].tolist() == want[: 96 - 40] and got.stats.tokens == 56
    first = model.generate(ids, gen_length=90, eos_id=None, stream=lambda block: True, every_step=True)
    assert first.tokens.shape[1] < 24 and first.stats.denoising_forwards == 1
    stream = model.stream(ids, gen_length=90)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="gen_length must be"):
        model.stream(ids, gen_length=0)
    with pytest.raises(TypeError, match="gen_len"):
        model.stream(ids, gen_len=3)


@pytest.mark.parametrize("replay", [False, True])
def test_every_row_has_a_length_of_its_own(replay, request):
    if replay:
        request.getfixturevalue("taped")
    model, lengths, gens = build(), [40, 3, 17], [5, 70, 33]
    ids = torch.cat([prompt(40, seed) for seed in range(3)])
    options = dict(eos_id=None, threshold=0.5, steps=12)
    got = model.generate(ids, prompt_lengths=torch.tensor(lengths), gen_length=torch.tensor(gens), **options)
    for row, (length, gen) in enumerate(zip(lengths, gens)):
        alone = model.generate(ids[row : row + 1, :length], gen_length=gen, use_graphs=False, **options)
        assert torch.equal(got.tokens[row, :gen], alone.tokens[0]) and not got.tokens[row, gen:].any()
    assert got.stats.tokens == sum(gens)


def test_lengths_may_be_tensors_of_32_bits_and_each_has_to_fit():
    model, ids = build(dataclasses.replace(CONFIG, max_position_embeddings=32)), torch.cat([prompt(20), prompt(20, 1)])
    lengths = torch.tensor([20, 4], dtype=torch.int32)
    for gens in ([1, 1], [12, 28]):
        gens = torch.tensor(gens, dtype=torch.int32)
        tokens = model.generate(ids, prompt_lengths=lengths, gen_length=gens, eos_id=None, threshold=0.1).tokens
        assert tokens.shape == (2, int(gens.max()))
    for gens, says in (([12, 29], "4 + 29"), ([13, 2], "20 + 13")):
        with pytest.raises(ValueError, match=rf"max_position_embeddings=32 tokens, got {re.escape(says)}"):
            model.generate(ids, prompt_lengths=lengths, gen_length=torch.tensor(gens))


@pytest.mark.parametrize("gen_length", [torch.tensor([3]), torch.tensor([3.0, 3.0]), torch.tensor([0, 3])])
def test_lengths_that_are_none(gen_length):
    with pytest.raises(ValueError, match=r"gen_length must be an int64 tensor \[bsz=2\] of at least 1 each"):
        build().generate(torch.cat([prompt(4), prompt(4)]), gen_length=gen_length)
