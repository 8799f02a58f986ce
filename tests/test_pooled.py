"""Models whose experts stay in files: the bits of the resident model, and what such a model refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from sizes import MASK, SIZES

from dmoe_ops import BlockMoE, BlockRouting, _backends, reference
from dmoe_ops.demo import shipped_checkpoint
from dmoe_ops.expert_memory import MemorySettings
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion, TextCodec
from dmoe_ops.pooled import PooledMoE

if "cpp" in _backends.missing():
    pytest.skip(f"the pool is C++: {_backends.missing()['cpp']}", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (1, "10%", "30%", "60%", "100%")  # 1: one expert


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(dtype, form) -> (a resident model, the folder that it is read from)."""
    made = {}

    def get(dtype: str = "float32", form: str | None = None, shards: bool = False, hidden: int = 32):
        key = dtype, form, shards, hidden
        if key not in made:
            sizes = {**SIZES, "hidden_size": hidden, "moe_intermediate_size": hidden // 2}
            model = LLaDA2ForDiffusion(LLaDA2Config(**sizes), dtype=getattr(torch, dtype)).init_weights(1)
            if form:
                model.quantize(form)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            if shards:
                split(folder)
            made[key] = LLaDA2ForDiffusion.from_pretrained(folder), folder
        return made[key]

    return get


def split(folder) -> None:
    """model.safetensors in two files with an index; an expert's tensors lie in both."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    (folder / "model.safetensors").unlink()


def pooled(folder, budget, **options) -> LLaDA2ForDiffusion:
    budget = 1 if budget == 1 else budget
    if budget == 1:
        budget = LLaDA2ForDiffusion.from_pretrained(folder, expert_memory="100%").bytes_per_expert
    return LLaDA2ForDiffusion.from_pretrained(folder, expert_memory=budget, **options)


def prompts(sequences: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, MASK, (sequences, tokens), generator=torch.Generator().manual_seed(tokens))


def check_equal(model, other, sequences: int, tokens: int, policy: str, refresh_every=None, **options) -> None:
    for each in (model, other):
        each.set_routing(policy, **options)
    ids = prompts(sequences, tokens)
    with torch.no_grad():
        want, got = model(ids), other(ids)
    assert torch.equal(got.logits, want.logits)
    for mine, theirs in zip(got.routed, want.routed):
        assert all(map(torch.equal, mine, theirs))
    settings = dict(gen_length=20, threshold=0.6, steps=4, refresh_every=refresh_every)
    want, got = model.generate(ids, **settings), other.generate(ids, **settings)
    assert torch.equal(got.tokens, want.tokens)
    memory = got.stats.expert_memory
    assert memory.hits + memory.misses > 0 and memory.bytes_read == memory.misses * other.bytes_per_expert
    assert dataclasses.replace(got.stats, expert_memory=None) == want.stats


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ["policy", "sequences", "tokens", "options"],
    [
        ("dmoe", 1, 70, dict(min_experts=4)),
        ("dmoe", 2, 33, dict(min_experts=4, refresh_every=3)),
        ("token", 2, 33, {}),
        ("des_seq", 1, 1, {}),
        ("capacity", 3, 96, dict(capacity=3)),
    ],
)
def test_the_bits_of_the_resident_model(saved, budget, policy, sequences, tokens, options):
    model, folder = saved()
    check_equal(model, pooled(folder, budget), sequences, tokens, policy, **options)


@pytest.mark.parametrize("budget", [1, "30%"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(saved, dtype, budget):
    model, folder = saved(dtype)
    check_equal(model, pooled(folder, budget), 1, 40, "dmoe", min_experts=4)


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_quantised_experts(saved, form):
    model, folder = saved("bfloat16", form, hidden=128)
    check_equal(model, pooled(folder, "30%"), 1, 40, "dmoe", min_experts=4)


def test_packed_int8_is_refused(saved):
    with pytest.raises(ValueError, match="whose bytes in files are those in memory, got packed int8"):
        pooled(saved("bfloat16", "int8")[1], "30%")


def test_a_decode_tells_what_it_read_itself(saved, capsys):
    other = pooled(saved()[1], "30%")
    for _ in range(2):
        before = other.expert_memory.stats()
        stats = other.generate(prompts(1, 10), gen_length=20, progress=True).stats.expert_memory
        assert stats == other.expert_memory.stats().since(before) and stats.misses > 0
        assert "GB of experts in memory" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_no_matter_of_the_files(saved):
    other = pooled(saved()[1], "30%")
    torch.nn.init.constant_(other.lm_head.weight, 1e38)
    says = "all weights but those of experts, which lie in files, are, so float32 is too narrow for this model"
    with pytest.raises(ValueError, match=f"must be finite: {says}"):
        other.generate(prompts(1, 10), gen_length=20)


@pytest.mark.parametrize("ahead", ["previous", "gate"])
def test_sharded_files_and_reads_ahead(saved, ahead):
    model, folder = saved(shards=True)
    settings = MemorySettings("70%", ahead=ahead, readers=3)
    other = LLaDA2ForDiffusion.from_pretrained(folder, expert_memory=settings)
    for policy in ("dmoe", "token"):
        for each in (model, other):
            each.set_routing(policy)
        got, want = (each.generate(prompts(1, 40), gen_length=40) for each in (other, model))
        assert torch.equal(got.tokens, want.tokens)


@torch.no_grad()
def test_the_gate_of_the_next_layer_knows_what_it_needs(tmp_path):
    """Where layers add nothing to the residual, all that is read ahead is used, and only the first layer misses."""
    model = LLaDA2ForDiffusion(LLaDA2Config(**SIZES | dict(num_hidden_layers=4))).init_weights(1)
    for each in model.model.layers:
        each.attention.dense.weight.zero_()
        each.post_attention_layernorm.weight.uniform_(0.5, 2)
    for moe in model.moe_layers:
        moe.w2.zero_()
        moe.shared_w2.zero_()
    model.save_pretrained(tmp_path)
    other = LLaDA2ForDiffusion.from_pretrained(tmp_path, expert_memory=MemorySettings("100%", ahead="gate"))
    want, got = (each(prompts(1, 6)) for each in (model, other))
    first, *rest = (len(ids.unique()) for _, ids in got.routed)
    stats = other.expert_memory.stats()
    assert torch.equal(got.logits, want.logits)
    assert len(rest) == 2 and (stats.misses, stats.ahead, stats.ahead_used) == (first, sum(rest), sum(rest))


def test_refusals(saved):
    _, folder = saved()
    model, ids = pooled(folder, "50%"), prompts(1, 8)
    with torch.no_grad():
        want = model(ids).logits
    for call, why in (
        (model.state_dict, "a state dict or a saved model would lack them"),
        (lambda: model.save_pretrained(folder / "copy"), "a state dict or a saved model would lack them"),
        (lambda: model.model.layers[1].mlp.load_state_dict({}), "a state dict has no place for them"),
        (model.train, "training needs all experts in memory"),
        (model.half, "load the model anew to cast or move it"),
        (lambda: model.to("meta"), "load the model anew to cast or move it"),
        (lambda: model.quantize("fp8"), r"quantize the checkpoint in place of the model \(dmoe convert\)"),
        (lambda: model.generate(ids, gen_length=4, use_graphs=True), "use_graphs must not be True here"),
    ):
        with pytest.raises(ValueError, match=why):
            call()
    with torch.no_grad():
        assert torch.equal(model.to("cpu", torch.float32)(ids).logits, want)
    with pytest.raises(ValueError, match=r"a gradient needs all experts in memory: .*\(expert_memory\)"):
        model.requires_grad_(True)(ids)
    for options, why in (
        (dict(expert_memory="none"), "expert_memory must be a number of bytes"),
        (dict(expert_memory=1), "expert_memory must hold an expert of 6144 bytes, got 1"),
        (dict(expert_memory="50%", dtype="bfloat16"), "takes experts as they are stored: tensor .* is F32"),
        (dict(expert_memory="50%", device="meta"), "device must be one that torch can use|needs a model on the CPU"),
    ):
        with pytest.raises(ValueError, match=why):
            LLaDA2ForDiffusion.from_pretrained(folder, **options)


def test_a_read_that_fails_ends_the_decode_and_not_the_model(saved, tmp_path):
    model, folder = saved()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = pooled(tmp_path, "30%")
    file, size = tmp_path / "model.safetensors", os.path.getsize(folder / "model.safetensors")
    stamp = os.stat(file)
    os.truncate(file, size // 4)
    with pytest.raises(OSError, match=r"at byte \d+ \(expert \d+ of MoE layer \d\): '.*model.safetensors'"):
        other.generate(prompts(1, 40), gen_length=8)
    assert other.expert_memory.pool.counts()["pinned"] == 0
    with open(file, "r+b") as written:  # the same file, whole again
        written.write((folder / "model.safetensors").read_bytes())
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    check_equal(model, other, 1, 40, "token")


def test_a_layer_with_offsets():
    """Blocks of different lengths, and no tokens at all, as a `BlockMoE` takes them."""
    routing = BlockRouting(num_experts=8, top_k=2, block_size=4, n_group=1, topk_group=1, min_experts=2)
    layer = BlockMoE(16, 8, routing, shared_intermediate_size=8)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.requires_grad_(False)
    memory = Held(layer)
    other = PooledMoE(layer, memory, 0)
    x, offsets = torch.randn(7, 16), torch.tensor([0, 3, 7], dtype=torch.int32)
    for got, want in zip(other(x, offsets)[1], layer(x, offsets)[1]):
        assert torch.equal(got, want)
    assert torch.equal(other(x, offsets)[0], layer(x, offsets)[0])
    assert other(x[:0])[0].shape == (0, 16)


class Held:
    """Stands in for a memory: all experts are there, in another order, among slots that hold NaN."""

    def __init__(self, layer):
        self.settings = MemorySettings(1)
        self.slots = torch.randperm(20)[:8]
        self.weights = tuple(
            torch.full((20, *weight.shape[1:]), torch.nan).index_copy(0, self.slots, weight)
            for weight in (layer.w13.data, layer.w2.data)
        ) + (None, None)

    def visit(self, layer, topk_ids, expected=None):
        import contextlib

        return contextlib.nullcontext((self.slots.int(), None))


# A bias towards what is in memory -------------------------------------------------------------------------------------


def test_resident_bias_orders_and_cuts_at_the_true_mass():
    """Against the definition, written out."""
    torch.manual_seed(0)
    routing = BlockRouting(num_experts=12, top_k=3, block_size=8, n_group=1, topk_group=1, min_experts=3, top_p=0.7)
    logits, resident = torch.randn(16, 12), torch.rand(12) < 0.5
    plain = reference.block_route(logits, routing=routing)
    for bias in (0.0, 0.5, 1.0, 100.0):
        result, kept = reference.block_route_resident(logits, resident=resident, resident_bias=bias, routing=routing)
        for block in range(2):
            score = logits[8 * block : 8 * block + 8].sigmoid()
            votes = torch.zeros_like(score).scatter(1, score.topk(3).indices, score.topk(3).values).sum(0)
            order = (votes * (1 + bias * resident)).argsort(descending=True, stable=True)
            share = (votes[order] / votes.sum()).cumsum(0)
            size = max(3, int((share <= 0.7).sum()) + 1)
            assert result.coreset_ids[block, :size].tolist() == sorted(order[:size].tolist())
            assert result.coreset_sizes[block] == size
            without = plain.coreset_ids[block, : plain.coreset_sizes[block]].long()
            torch.testing.assert_close(kept[block], share[size - 1] / (votes[without].sum() / votes.sum()))
        if bias == 0:
            assert all(map(torch.equal, result, plain)) and (kept == 1).all()
    with pytest.raises(ValueError, match="resident_bias must be a number of at least 0, got -1"):
        reference.block_route_resident(logits, resident=resident, resident_bias=-1, routing=routing)
    with pytest.raises(ValueError, match=r"resident must have shape \[12\], got \[3\]"):
        reference.block_route_resident(logits, resident=resident[:3], resident_bias=1, routing=routing)


def test_the_mass_that_a_bias_keeps():
    """Of a block whose scores are small, and of one without any, which has nothing to lose."""
    policy = dict(aggregate="max", select="top_n", capacity=1)
    routing = BlockRouting(num_experts=4, top_k=1, block_size=1, n_group=1, topk_group=1, **policy)
    logits = torch.tensor([[0.02, 0.01, 0.005, 0.001], [torch.nan] * 4]).logit()
    resident = torch.tensor([False, False, False, True])
    kept = reference.block_route_resident(logits, resident=resident, resident_bias=100, routing=routing)[1]
    torch.testing.assert_close(kept, torch.tensor([0.05, 1.0]))


def test_the_miniature_at_a_fifth_of_its_experts():
    """The same answers to a batch of prompts; with a resident_bias fewer misses, at nearly all of the mass."""
    pytest.importorskip("tokenizers")
    folder = shipped_checkpoint()
    codec = TextCodec(folder)
    ids = [codec.encode(text) for text in ("work 8767+2064:", "sort 39,58,15,21,62:", "close {}[[]<{}>({[:")]
    model, answers, misses = LLaDA2ForDiffusion.from_pretrained(folder, policy="dmoe"), [], []
    for prompt in ids:
        answers.append(model.generate(torch.tensor([prompt]), gen_length=32).tokens)
    for bias in (0, 1):
        settings = MemorySettings("20%", resident_bias=bias)
        other = LLaDA2ForDiffusion.from_pretrained(folder, policy="dmoe", expert_memory=settings)
        for prompt, answer in zip(ids, answers):
            got = other.generate(torch.tensor([prompt]), gen_length=32)
            assert torch.equal(got.tokens, answer)
        stats = other.expert_memory.stats()
        misses.append(stats.misses)
        assert 0.3 < stats.hit_rate < 1 and (stats.kept_mass is None) == (bias == 0)
    assert misses[1] < misses[0] and stats.kept_mass > 0.98


def test_the_bench_and_the_tool_that_makes_its_checkpoints(tmp_path, monkeypatch, capsys):
    """A random checkpoint, its budgets against the resident model, and the picture."""
    import runpy
    import sys

    from dmoe_ops.bench.__main__ import main

    folder, found = str(tmp_path / "model"), tmp_path / "memory.json"
    arguments = ["--tiny", "--layers", "3", "--experts", "32", "--vocab", "512", "--form", "int4", "--scale", "2"]
    monkeypatch.setattr(sys, "argv", ["random_checkpoint.py", folder, *arguments])
    monkeypatch.syspath_prepend(str(ROOT))
    runpy.run_path(str(ROOT / "tools" / "random_checkpoint.py"), run_name="__main__")
    assert "experts of a block" in capsys.readouterr().out
    options = ["--budgets", "0.6W,100%", "--resident", "--rounds", "2", "--gen-length", "32", "--steps", "2"]
    assert main(["memory", folder, *options, "--resident-bias", "1", "--json", str(found)]) == 0
    rows = json.loads(found.read_text())["rows"]
    assert [row["key"] for row in rows] == ["dmoe, resident", "dmoe, 0.6W", "dmoe, 100%"]
    # With a bias, a decode may choose what the ones before it did not: a few experts are read even where all have room.
    assert 0 < rows[1]["hit_rate"] < 0.9 < rows[2]["hit_rate"] <= 1
    assert 0 <= rows[2]["read_per_forward"] < rows[1]["read_per_forward"]
    assert rows[0]["ratios"] == {} and rows[1]["ratios"]["resident"]["median"] > 0 and rows[1]["kept_mass"] > 0.9
    if importlib.util.find_spec("matplotlib"):
        assert main(["report", str(found), "--html", str(tmp_path / "page.html")]) == 0
        assert (tmp_path / "page-memory-memory.png").exists()
    with pytest.raises(SystemExit):
        main(["memory", folder, "--budgets", "much"])
    assert "--budgets must be a number of bytes" in capsys.readouterr().err
