"""The LLaDA2 model: against the released code's golden file, its loader, and block-diffusion decoding."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shards import shard
from sizes import EOS, MASK, SIZES

from dmoe_ops import BlockRouting, decoder, reference
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion, checkpoint
from dmoe_ops.models.attention import KVCache
from dmoe_ops.models.decoding import _decoded, _stats
from dmoe_ops.models.sampling import sample
from dmoe_ops.models.step import Counter, Rule
from dmoe_ops.reference import choose_tokens, ended

CONFIG = LLaDA2Config(**SIZES)


def build(config: LLaDA2Config = CONFIG, policy="dmoe", **overrides) -> LLaDA2ForDiffusion:
    model = LLaDA2ForDiffusion(config, dtype=torch.float32).init_weights(0).eval()
    model.set_routing(policy, **{**(dict(min_experts=4) if policy == "dmoe" else {}), **overrides})
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, MASK, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path):
    """A saved checkpoint."""
    build().save_pretrained(tmp_path)
    return tmp_path


# The golden file -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_of():
    """Tensors of the golden file and the folder that its weights are saved to as a checkpoint."""
    return {}


@pytest.fixture
def golden(golden_folder, golden_of, tmp_path_factory):
    if not golden_of:
        with safe_open(golden_folder / "tiny_llada2.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
            config = file.metadata()["config"]
        weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        folder = tmp_path_factory.mktemp("golden")
        (folder / "config.json").write_text(config)
        save_file(weights, folder / "model.safetensors")
        golden_of.update(tensors=tensors, weights=weights, folder=folder)
    return types.SimpleNamespace(**golden_of)


@torch.no_grad()
def test_golden_logits_and_routing(golden, backend):
    logits, routed = LLaDA2ForDiffusion.from_pretrained(golden.folder)(golden.tensors["input_ids"])
    torch.testing.assert_close(logits, golden.tensors["logits"], atol=1e-4, rtol=0)
    assert len(routed) == 2
    for layer, (router_logits, topk_ids) in enumerate(routed, 1):
        torch.testing.assert_close(router_logits, golden.tensors[f"router_logits.{layer}"], atol=1e-4, rtol=0)
        assert torch.equal(topk_ids.sort(-1).values, golden.tensors[f"topk_ids.{layer}"].sort(-1).values)


def test_golden_generated_tokens(golden, backend):
    # At temperature 0 the released code does not take the most probable token: it draws from the softmax. The golden
    # tokens were drawn in the run that drew the golden weights: seed 21, then a number for every weight of the model's
    # construction (gates once, other matrices twice), of the golden weights, biases and input_ids.
    model = LLaDA2ForDiffusion.from_pretrained(golden.folder)
    matrices = {name: w.numel() for name, w in golden.weights.items() if w.dim() == 2}
    gates = sum(size for name, size in matrices.items() if name.endswith("gate.weight"))
    biases = sum(w.numel() for name, w in golden.weights.items() if name.endswith("expert_bias"))
    generator = torch.Generator().manual_seed(21)
    torch.rand(3 * sum(matrices.values()) - gates + biases + golden.tensors["input_ids"].numel(), generator=generator)
    decoded = model.generate(
        golden.tensors["prompt"],
        gen_length=87,
        threshold=0.6,
        temperature=1.0,
        mask_id=511,
        eos_id=510,
        generator=generator,
    )
    assert torch.equal(decoded.tokens, golden.tensors["generated"])


def test_golden_greedy_tokens(golden, golden_folder, backend):
    """The released generate() with its sampler taking the most probable token: our temperature 0."""
    with safe_open(golden_folder / "tiny_llada2_greedy.safetensors", "pt") as file:
        expected = file.get_tensor("generated")
    model = LLaDA2ForDiffusion.from_pretrained(golden.folder)
    decoded = model.generate(golden.tensors["prompt"], gen_length=87, threshold=0.6, mask_id=511, eos_id=510)
    assert torch.equal(decoded.tokens, expected)


@torch.no_grad()
def test_bfloat16_is_close_where_it_routes_alike(golden):
    model = LLaDA2ForDiffusion.from_pretrained(golden.folder, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(moe.expert_bias.dtype == torch.float32 for moe in model.moe_layers)
    logits, routed = model(golden.tensors["input_ids"])
    assert logits.dtype == torch.float32
    # Rounding moves some tokens to other experts; the rest has to stay close.
    pairs = [(ids, golden.tensors[f"topk_ids.{layer}"]) for layer, (_, ids) in enumerate(routed, 1)]
    same = torch.stack([(a.sort(-1).values == b.sort(-1).values).all(-1) for a, b in pairs]).all(0)
    error = (logits - golden.tensors["logits"]).norm(dim=-1) / golden.tensors["logits"].norm(dim=-1)
    assert same.float().mean() > 0.5
    assert error[same].median() < 0.05


# The loader ------------------------------------------------------------------------------------------------------------


def test_save_and_load_are_a_round_trip(folder):
    model, loaded = build(), LLaDA2ForDiffusion.from_pretrained(folder, min_experts=4)
    assert loaded.config == model.config and loaded.routing == model.routing
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    names = load_file(folder / "model.safetensors")
    assert "model.layers.1.mlp.experts.15.down_proj.weight" in names
    assert "model.layers.2.mlp.gate.expert_bias" in names
    assert not any("w13" in name or "w2" in name for name in names)


def test_saved_in_another_dtype(tmp_path):
    model = build()
    model.moe_layers[0].expert_bias.fill_(1 / 3)
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, saved in load_file(tmp_path / "model.safetensors").items():
        ours = model.checkpoint_tensors()[name]
        assert torch.equal(saved, ours if name.endswith("expert_bias") else ours.bfloat16())
    with pytest.raises(ValueError, match="dtype must be None or a floating-point type of torch"):
        model.save_pretrained(tmp_path, dtype=torch.int8)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # which transformers asks for


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_in_its_own_dtype(dtype, tmp_path):
    folder = tmp_path / "a" / "new one"
    build().save_pretrained(folder, dtype=dtype)
    assert LLaDA2ForDiffusion.from_pretrained(folder).moe_layers[0].w13.dtype == dtype
    text = (folder / "config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"


def test_shards_equal_the_single_file(folder):
    before = LLaDA2ForDiffusion.from_pretrained(folder).state_dict()
    shard(folder)
    after = LLaDA2ForDiffusion.from_pretrained(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_file_is_opened_anew_for_each_layer(folder, monkeypatch):
    """So that the pages of one layer are all that is mapped: one layer in each opening, each layer in one."""
    openings, opened = [], checkpoint._open

    def spied(path):
        file = opened(path).__enter__()
        openings.append([])
        get_tensor = file.get_tensor
        spy = types.SimpleNamespace(keys=file.keys, get_slice=file.get_slice)
        spy.get_tensor = lambda name: openings[-1].append(".".join(name.split(".")[:3])) or get_tensor(name)
        return contextlib.nullcontext(spy)

    monkeypatch.setattr(checkpoint, "_open", spied)
    names = LLaDA2ForDiffusion.from_pretrained(folder).checkpoint_tensors()
    read = [set(layers) for layers in openings if layers]
    assert all(len(layers) == 1 for layers in read)
    assert sorted(min(layers) for layers in read) == sorted({".".join(name.split(".")[:3]) for name in names})


def test_the_index_says_which_of_two_tensors_of_a_name_is_meant(folder):
    before = LLaDA2ForDiffusion.from_pretrained(folder).state_dict()
    shard(folder)
    for file in sorted(folder.glob("model-*.safetensors")):  # every shard holds a wrong copy of another's tensor
        tensors = load_file(file)
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        foreign = {name: torch.full((64, 32), 7.0) for name in ("lm_head.weight",) if weight_map[name] != file.name}
        save_file({**tensors, **foreign}, file)
    after = LLaDA2ForDiffusion.from_pretrained(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def edit_config(**changes):
    def fault(folder):
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))

    return fault


def edit_tensors(change):
    def fault(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return fault


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_shard(folder):
    shard(folder)
    (folder / "model-1.safetensors").unlink()


def index_of(shard: str):
    def fault(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={EXPERT: shard})))

    return fault


def edit_index(change):
    """Shards the checkpoint and lets `change` edit the index's weight_map."""

    def fault(folder):
        shard(folder)
        path = folder / "model.safetensors.index.json"
        weight_map = json.loads(path.read_text())["weight_map"]
        path.write_text(json.dumps(dict(weight_map=change(weight_map) or weight_map)))

    return fault


def outside(path):
    """Names a file outside of the folder that holds the tensor, so that only the path is wrong."""

    def fault(folder):
        other = folder.parent / (folder.name + "-outside")
        other.mkdir()
        save_file(load_file(folder / "model.safetensors"), other / "model-0.safetensors")
        edit_index(lambda m: dict.fromkeys(m, path.format(other=other)))(folder)

    return fault


def not_finite(name, value, dtype=torch.float32):
    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[3] = value

    return edit_tensors(change)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FAULTS = [
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json must hold a JSON object"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json is not valid JSON"),
    (lambda f: (f / "config.json").write_text('{"a":' * 10**5), "config.json is not valid JSON: it is nested too"),
    (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json is not valid JSON: it is nested too"),
    (index_of("x" * 5000), "xxx, named by model.safetensors.index.json, is missing"),
    (index_of("x\0y"), "named by model.safetensors.index.json, is missing"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors or model.safetensors.index.json is missing"),
    (truncate, "model.safetensors is truncated or corrupt"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is truncated or corrupt"),
    (without_a_shard, "model-1.safetensors, named by model.safetensors.index.json, is missing"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "must hold a weight_map"),
    (edit_index(lambda m: {n: f"model-{(int(f[6]) + 1) % 3}.safetensors" for n, f in m.items()}), "where model.saf"),
    (edit_index(lambda m: m.update(stray="model-0.safetensors")), "tensor stray is not in model-0.safetensors"),
    (edit_index(lambda m: {n: f for n, f in m.items() if n != EXPERT}), f"tensor {EXPERT} in"),
    (edit_index(lambda m: dict.fromkeys(m, 3)), "must hold a weight_map"),
    (edit_index(lambda m: m.update({EXPERT: 3})), "must hold a weight_map from tensor names to file names"),
    *[
        (edit_index(lambda m, name=name: m.update({EXPERT: name})), f"must name files of its own folder, got {name}")
        for name in ("", ".", "..", "a\\b", "c:d")
    ],
    (edit_index(lambda m: m.update({EXPERT: "X"})), "X, named by model.safetensors.index.json, is missing"),
    (edit_index(lambda m: m.update({EXPERT: "a\nb"})), "'a\\nb', named by model.safetensors.index.json, is missing"),
    (outside("{other}/model-0.safetensors"), "must name files of its own folder, got /"),
    (outside("../{other.name}/model-0.safetensors"), "must name files of its own folder, got .."),
    (not_finite(EXPERT, float("nan")), f"tensor {EXPERT} in"),
    (not_finite("model.layers.2.mlp.gate.weight", float("inf")), "tensor model.layers.2.mlp.gate.weight in"),
    (not_finite("model.layers.1.mlp.gate.expert_bias", -float("inf")), "tensor model.layers.1.mlp.gate.expert_bias in"),
    (not_finite("model.norm.weight", float("nan")), "must be finite, got NaN or infinity"),
    (not_finite("lm_head.weight", 1e300, torch.float64), "must be finite, got NaN or infinity as float32"),
    (edit_tensors(lambda t: t.update({"a\nb": t[EXPERT].clone()})), "tensor 'a\\nb' in"),
    (edit_tensors(lambda t: t.pop(EXPERT)), f"tensor {EXPERT} is missing"),
    (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()})), f"tensor {EXPERT} must have shape [16, 32]"),
    (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].int()})), f"tensor {EXPERT} must be one of"),
    (edit_tensors(lambda t: t.update(stray=t[EXPERT].clone())), "tensor stray in"),
    (edit_config(hidden_size="absent"), "hidden_size must be given"),
    (edit_config(hidden_size="32"), "hidden_size must be an integer"),
    (edit_config(rms_norm_eps=0), "rms_norm_eps must be a positive number"),
    (edit_config(tie_word_embeddings=1), "tie_word_embeddings must be true or false"),
    (edit_config(model_type="llama"), "model_type must be llada2_moe"),
    (edit_config(first_k_dense_replace=3), "leave no MoE layer"),
    (edit_config(num_experts=0), "leave no MoE layer"),
    (edit_config(hidden_size=2**63), "hidden_size must be an integer below 2**31, got 9223372036854775808"),
    (edit_config(hidden_size=2**30, vocab_size=2**31 - 1, moe_intermediate_size=2**30), "weights that no memory holds"),
    (edit_config(num_hidden_layers=2**30), "num_hidden_layers must fit 130 stored tensors, got 1073741824"),
    (edit_config(num_experts=2**30), "num_experts must fit 130 stored tensors, got 1073741824"),
    (edit_config(routed_scaling_factor=10**400), "routed_scaling_factor must be a positive number"),
    (edit_config(intermediate_size="absent"), "intermediate_size must be given"),
    (edit_config(hidden_act="gelu"), "hidden_act must be silu"),
    (edit_config(use_sliding_window=True), "use_sliding_window must be false"),
    (edit_config(rope_scaling=dict(type="yarn", factor=4)), "rope_scaling must be null"),
    (edit_config(rope_scaling="yarn"), "rope_scaling must be an object"),
    (edit_config(num_key_value_heads=3), "num_key_value_heads must divide"),
    (edit_config(rotary_dim=8), "rotary_dim must be partial_rotary_factor"),
    (edit_config(partial_rotary_factor=0.4, rotary_dim="absent"), "rotary_dim must be even"),
    (edit_config(n_group=3), "n_group must divide"),
    (edit_config(num_experts_per_tok=17), "top_k must be at most"),
    (edit_config(score_function="tanh"), "score_function must be one of"),
    (edit_config(eos_token_id=64), "eos_token_id must be below"),
    (edit_config(core_threshold=1.5), "core_threshold must be in (0, 1], got 1.5"),
    (edit_config(core_threshold=0), "core_threshold must be a positive number, got 0"),
    (edit_config(expert_capacity=-1), "expert_capacity must be an integer"),
    (edit_config(expert_capacity="8"), "expert_capacity must be an integer"),
    (edit_config(expert_capacity=8, block_size=0), "block_size must be an integer"),
    (edit_config(expert_capacity=8, core_threshold=0.6), "policy must be given where a config has core_threshold=0.6"),
    (
        edit_config(quantization_config=dict(quant_method="gguf")),
        "of quant_method fp8 or compressed-tensors, got 'gguf'",
    ),
    (edit_config(quantization_config=dict(bits=4)), "quantization_config must be null"),
    (edit_config(quantization_config="int4"), "quantization_config must be an object"),
    (edit_config(compression_config=dict(format="pack")), "compression_config must be null"),
    (
        edit_config(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)),
        "rope_parameters must be null or of rope_type",
    ),
]


@pytest.mark.parametrize("fault, says", FAULTS, ids=[says for _, says in FAULTS])
def test_a_broken_folder_is_refused_in_one_line(fault, says, folder):
    fault(folder)
    with pytest.raises(ValueError) as error:
        LLaDA2ForDiffusion.from_pretrained(folder)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_folder_name_that_no_file_system_takes():
    with pytest.raises(ValueError, match=r"^config.json is missing in x+\.\.\.x+$"):
        LLaDA2ForDiffusion.from_pretrained("x" * 5000)


@pytest.mark.parametrize(
    "fault, ends",
    [
        (edit_tensors(lambda t: t.pop(EXPERT)), "is missing in {folder}"),
        (edit_tensors(lambda t: (t.pop(EXPERT), t.pop("lm_head.weight"))), "is missing in {folder} (and 1 more)"),
        (not_finite(EXPERT, float("nan")), "must be finite, got NaN or infinity"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"1"),
            "corrupt: Error while deserializing header: header too small",
        ),
    ],
    ids=["one is missing", "two are missing", "NaN", "one byte"],
)
def test_how_an_error_ends(fault, ends, folder):
    fault(folder)
    with pytest.raises(ValueError) as error:
        LLaDA2ForDiffusion.from_pretrained(folder)
    assert str(error.value).endswith(ends.format(folder=folder))


def test_a_bad_argument_is_refused_before_anything_is_read(folder):
    with pytest.raises(ValueError, match="policy must be one of"):
        LLaDA2ForDiffusion.from_pretrained(folder, policy="best")
    with pytest.raises(ValueError, match="top_p must be in"):
        LLaDA2ForDiffusion.from_pretrained(folder, top_p=0)
    with pytest.raises(ValueError, match="dtype must be None or"):
        LLaDA2ForDiffusion.from_pretrained(folder, dtype=torch.int8)


def test_a_checkpoint_brings_its_own_routing(folder):
    def loaded(*args, **changes):
        edit_config(**{"core_threshold": "absent", "expert_capacity": "absent", "block_size": "absent", **changes})(
            folder
        )
        return LLaDA2ForDiffusion.from_pretrained(folder, **dict(args))

    plain = loaded()
    assert plain.routing == CONFIG.routing("dmoe") and plain.routing.top_p == 0.6 and plain.config.block_length == 32

    trained = loaded(core_threshold=0.4, block_size=16)
    assert trained.routing == CONFIG.routing("dmoe", top_p=0.4, block_size=16)
    assert trained.config.block_length == 16 and trained.block_size_follows
    tokens = trained.generate(prompt(20), gen_length=30, eos_id=None).tokens
    assert trained.routing.block_size == 16
    assert torch.equal(tokens, trained.generate(prompt(20), gen_length=30, eos_id=None, block_length=16).tokens)
    trained.generate(prompt(20), gen_length=8, block_length=8)
    assert trained.routing.block_size == 8  # follows the decode
    assert loaded(("top_p", 0.7), core_threshold=0.4).routing.top_p == 0.7
    assert loaded(("policy", "token"), core_threshold=0.4).routing == CONFIG.routing("token")
    assert loaded(core_threshold=0.4, min_experts=5).routing.min_experts == 5

    capacity = loaded(expert_capacity=6, block_size=16, n_group=3, topk_group=5)
    wanted = CONFIG.routing("capacity", capacity=6, block_size=16)
    assert capacity.routing == wanted and wanted.n_group == wanted.topk_group == 1
    capacity.generate(prompt(20), gen_length=30, block_length=64)
    assert capacity.routing == wanted  # a multiple of the routing's block
    assert loaded(expert_capacity=6).routing == CONFIG.routing("capacity", capacity=6, block_size=32)
    other = loaded(("policy", "capacity"), ("capacity", 4), expert_capacity=6, n_group=4, topk_group=2)
    assert other.routing.capacity == 4
    assert loaded(("policy", "token"), expert_capacity=6).routing == CONFIG.routing("token", n_group=1, topk_group=1)


def test_a_config_of_transformers_5(folder):
    """It keeps the base of the rotary embedding in rope_parameters."""
    before = LLaDA2Config.from_pretrained(folder)
    rope = dict(rope_theta=10000.0, rope_type="default", partial_rotary_factor=0.5)
    edit_config(rope_theta="absent", partial_rotary_factor="absent", rope_parameters=rope)(folder)
    assert LLaDA2Config.from_pretrained(folder) == before


def test_the_released_config_json():
    """The values of LLaDA2.0-mini, unknown keys and all; the ids of mask and eos are its generate()'s."""
    values = dict(SIZES, vocab_size=157184, hidden_size=2048, num_attention_heads=16, head_dim=128, rotary_dim=64)
    values.update(num_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, router_dtype="fp32")
    del values["mask_token_id"], values["eos_token_id"]
    config = LLaDA2Config.from_dict(values)
    assert (config.mask_token_id, config.eos_token_id) == (156895, 156892)
    assert config.routing("dmoe") == BlockRouting.policy("dmoe")
    assert config.routing("capacity", capacity=32).n_group == 1


@torch.no_grad()
def test_options_of_the_head_and_of_attention(tmp_path):
    ids = prompt(40)
    for option in ("tie_word_embeddings", "norm_head", "use_bias", "use_qkv_bias"):
        model = build(dataclasses.replace(CONFIG, **{option: True}))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        model.save_pretrained(tmp_path)
        loaded = LLaDA2ForDiffusion.from_pretrained(tmp_path, min_experts=4)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (option != "tie_word_embeddings")
    assert build(dataclasses.replace(CONFIG, use_qk_norm=False))(ids).logits.isfinite().all()


@torch.no_grad()
def test_norm_head_gives_the_columns_of_the_head_length_1():
    """The weights that one hidden value is multiplied with, over the vocabulary."""
    model = build(dataclasses.replace(CONFIG, norm_head=True))
    columns = model.logits(torch.eye(32))  # [H, V]
    torch.testing.assert_close(columns.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(columns, torch.nn.functional.normalize(model.lm_head.weight, dim=0).T)


def test_weights_are_the_same_for_a_seed_and_differ_for_another():
    first, second, other = (
        LLaDA2ForDiffusion(CONFIG, dtype=torch.float32).init_weights(seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


# The model -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("policy", ["token", "dmoe"])
def test_the_cache_gives_what_a_full_pass_gives(policy):
    model, ids = build(policy=policy), prompt(96)
    full = model(ids).logits
    cache = model.new_cache(96)
    prefill = model(ids[:, :32], kv_cache=cache).logits
    cache.commit(32)
    noise = model(prompt(32, seed=9), kv_cache=cache).logits  # not committed: leaves no trace
    second = model(ids[:, 32:64], kv_cache=cache).logits
    cache.commit(32)
    third = model(ids[:, 64:], kv_cache=cache).logits
    torch.testing.assert_close(torch.cat([prefill, second, third], 1), full, atol=1e-4, rtol=0)
    assert not torch.allclose(noise, second)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (0, 5)])
def test_no_tokens_give_empty_results(shape):
    logits, routed = build()(torch.zeros(shape, dtype=torch.int64))
    assert logits.shape == (*shape, 64)
    assert [(a.shape, b.shape) for a, b in routed] == 2 * [((*shape, 16), (*shape, 2))]


@torch.no_grad()
def test_attention_is_block_causal():
    model, ids = build(), prompt(80)
    before = model(ids).logits
    changed = ids.clone()
    changed[0, 40] = (ids[0, 40] + 1) % MASK
    differs = ((model(changed).logits - before).abs().amax(-1)[0] > 1e-5).tolist()
    assert not any(differs[:32])  # the past does not see it
    assert all(differs[32:])  # its own block and the partial one behind it do


@torch.no_grad()
def test_attention_takes_its_result_in_either_layout(monkeypatch):
    """GPUs leave it as [n, T, heads, D] in memory."""
    model, ids, plain = build(), prompt(80), reference.F.scaled_dot_product_attention
    want = model(ids).logits

    def as_on_a_gpu(*args, **options):
        return plain(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(reference.F, "scaled_dot_product_attention", as_on_a_gpu)
    assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_a_batch_is_its_rows():
    model = build()
    rows = [prompt(40, seed) for seed in range(3)]
    both = model(torch.cat(rows)).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(both[i : i + 1], model(row).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_routing_is_switched_at_run_time():
    model, ids = build(policy="token"), prompt(64)

    def unique():
        return [len(topk_ids[0, :32].unique()) for _, topk_ids in model(ids).routed]

    everyone = unique()
    model.set_routing("dmoe", min_experts=2, max_experts=3)
    assert all(few <= 3 < many for few, many in zip(unique(), everyone))
    model.set_routing(model.config.routing("token"))
    assert unique() == everyone
    for routing, says in ((5, "routing must be"), (BlockRouting(), "num_experts=16"), ("best", "policy must be")):
        with pytest.raises(ValueError, match=says):
            model.set_routing(routing)
    assert unique() == everyone


@torch.no_grad()
def test_routing_blocks_follow_the_decode_unless_they_are_given():
    model, ids = build(), prompt(64)
    model(ids, block_length=16)
    assert model.routing.block_size == model.moe_layers[0].routing.block_size == 16
    model.set_routing("dmoe", block_size=8)
    model(ids, block_length=16)
    assert model.routing.block_size == 8
    with pytest.raises(ValueError, match="block_length must be a multiple"):
        model(ids, block_length=12)


# Decoding --------------------------------------------------------------------------------------------------------------


def decode_without_cache(model, input_ids, gen_length, block_length, steps, threshold):
    """Greedy block diffusion, every forward over the whole text so far; also the topk_ids of each denoising forward's
    block, of each MoE layer."""
    x = torch.full((1, -(-(input_ids.shape[1] + gen_length) // block_length) * block_length), MASK)
    x[:, : input_ids.shape[1]] = input_ids
    seen = []
    for begin in range(input_ids.shape[1] // block_length * block_length, x.shape[1], block_length):
        end = begin + block_length
        for step in range(steps):
            masked = x[0, begin:end] == MASK
            if not masked.any():
                break
            logits, routed = model(x[:, :end], block_length=block_length)
            seen.append([ids[0, begin:end] for _, ids in routed])
            token, probability = decoder.greedy(logits[0, begin:])  # with its rounding: masks alone are all but equal
            share = block_length // steps + (step < block_length % steps)
            order = sorted((i for i in range(block_length) if masked[i]), key=lambda i: -probability[i])
            sure = [i for i in order if probability[i] > threshold]
            for i in sure if len(sure) >= share else order[:share]:
                x[0, begin + i] = token[i]
    return x[:, input_ids.shape[1] :][:, :gen_length], seen


@torch.no_grad()
@pytest.mark.parametrize(
    "length, gen_length, block_length, steps, threshold",
    [(41, 50, 32, 32, 0.6), (5, 20, 8, 3, 0.9), (32, 32, 32, 7, 1.0), (0, 16, 16, 16, 0.3), (16, 5, 16, 40, 0.5)],
)
def test_decoding_equals_a_recount_without_cache(length, gen_length, block_length, steps, threshold):
    model, ids = build(), prompt(length)
    decoded = model.generate(
        ids,
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        threshold=threshold,
        eos_id=None,
    )
    steps = min(steps, gen_length)
    tokens, seen = decode_without_cache(model, ids, gen_length, block_length, steps, threshold)
    assert torch.equal(decoded.tokens, tokens)
    stats = decoded.stats
    first, last = length // block_length, -(-(length + gen_length) // block_length) - 1
    assert stats.tokens == tokens.shape[1]
    assert stats.denoising_forwards == len(seen)
    assert stats.prefill_forwards == (first > 0)
    assert stats.commit_forwards == last - first
    assert stats.forwards == stats.denoising_forwards + stats.prefill_forwards + stats.commit_forwards
    assert stats.tokens_per_forward == pytest.approx(stats.tokens / stats.forwards)
    counts = torch.tensor([[len(ids.unique()) for ids in layers] for layers in seen]).double()
    assert stats.unique_experts_denoising_by_layer == pytest.approx(counts.mean(0).tolist())
    assert stats.unique_experts_denoising == pytest.approx(counts.mean().item())
    assert stats.unique_experts == pytest.approx(sum(stats.unique_experts_by_layer) / 2)
    assert stats.expert_bytes_per_step == pytest.approx(counts.mean(0).sum().item() * 3 * 32 * 16 * 4)
    # The blocks that were prefilled and committed count once more, with their final tokens.
    text = torch.cat([ids, tokens], 1)[:, : last * block_length]
    if last:
        _, routed = model(text, block_length=block_length)
        blocks = [[len(b.unique()) for b in ids[0].split(block_length)] for _, ids in routed]
        total = counts.sum(0) + torch.tensor(blocks).sum(1)
        assert stats.unique_experts_by_layer == pytest.approx((total / (len(seen) + last)).tolist())


def test_eos_ends_the_text():
    model, ids = build(), prompt(20)
    every = model.generate(ids, gen_length=60, eos_id=None).tokens[0].tolist()
    eos = next(token for token in every if token not in (MASK, every[0]))
    first = every.index(eos)
    early = model.generate(ids, gen_length=60, eos_id=eos)
    late = model.generate(ids, gen_length=60, eos_id=eos, eos_early_stop=False)
    assert early.tokens[0].tolist() == late.tokens[0].tolist() == every[: first + 1]
    assert early.stats.denoising_forwards <= late.stats.denoising_forwards
    assert early.stats.tokens == first + 1


@torch.no_grad()
@pytest.mark.parametrize("policy", ["token", "dmoe"])
@pytest.mark.parametrize("block_length, threshold, eos", [(16, 0.5, True), (32, 0.9, True), (16, 0.2, False)])
def test_a_batch_of_prompts_decodes_as_each_alone(block_length, threshold, eos, policy):
    """Prompts that end in different blocks, texts that end at different steps: none sees another."""
    lengths = [40, 3, 17, 32, 1, 16, 70]
    model, rows = build(policy=policy), [prompt(length, seed) for seed, length in enumerate(lengths)]
    options = dict(gen_length=45, block_length=block_length, threshold=threshold, steps=12, eos_id=None)
    if eos:  # a token that comes early in some texts, late or never in others
        texts = [model.generate(row, **options).tokens[0].tolist() for row in rows]
        ends = {t: [text.index(t) if t in text else None for text in texts] for t in range(MASK)}
        options["eos_id"] = max(ends, key=lambda t: len(set(ends[t])))
        assert len(set(ends[options["eos_id"]])) > 2
    batch = torch.full((len(rows), 70), -100)  # padding need not be a token
    for row, ids in zip(batch, rows):
        row[: ids.shape[1]] = ids[0]
    together = model.generate(batch, prompt_lengths=torch.tensor(lengths), **options)
    alone = [model.generate(row, **options) for row in rows]
    longest = max(one.tokens.shape[1] for one in alone)
    assert together.tokens.shape == (len(rows), longest)
    for row, one in zip(together.tokens, alone):
        assert row[: one.tokens.shape[1]].tolist() == one.tokens[0].tolist()
        assert set(row[one.tokens.shape[1] :].tolist()) <= {options["eos_id"]}
    assert together.stats.tokens == sum(one.stats.tokens for one in alone)
    steps = [one.stats.denoising_forwards for one in alone]
    assert together.stats.denoising_forwards == sum(steps)
    mean = sum(one.stats.unique_experts_denoising * n for one, n in zip(alone, steps)) / sum(steps)
    assert together.stats.unique_experts_denoising == pytest.approx(mean)
    assert together.stats.commit_forwards == sum(one.stats.commit_forwards for one in alone)
    # The shortest prompts have no full block: those of the others are run one by one.
    assert together.stats.prefill_forwards == sum(length // block_length for length in lengths)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_k", [None, 3])
def test_one_value_that_is_not_finite_is_noticed(value, top_k, backend):
    rule, logits = Rule(4, MASK, None, True, 0.9, top_k=top_k), torch.zeros(4, 8)
    assert rule.sample(logits)[1].isfinite().all()
    logits[2, 3] = value
    assert rule.sample(logits)[1].isfinite().tolist() == [True, True, False, True]


def test_a_text_stops_as_soon_as_its_end_is_certain():
    """In the block of the first eos; with eos_early_stop in the step that leaves no mask before it."""
    model, ids = build(), prompt(20)
    options = dict(gen_length=100, threshold=1.0)  # one token a step
    every = model.generate(ids, eos_id=None, **options)
    text = every.tokens[0].tolist()
    first = {token: text.index(token) for token in text if token != MASK}
    eos = min(first, key=lambda token: abs(first[token] - 20))
    late = model.generate(ids, eos_id=eos, eos_early_stop=False, **options)
    early = model.generate(ids, eos_id=eos, **options)
    assert early.tokens.tolist() == late.tokens.tolist() == [text[: first[eos] + 1]]
    block = (20 + first[eos]) // 32
    assert late.stats.commit_forwards == block < every.stats.commit_forwards
    assert late.stats.denoising_forwards == 12 + 32 * block
    assert 12 + 32 * (block - 1) < early.stats.denoising_forwards < late.stats.denoising_forwards


def test_the_end_of_a_text():
    """An eos among the new tokens, and no mask among those before it."""
    e, m = EOS, MASK
    rows = torch.tensor([[e, 1, e, m], [e, m, e, 3], [1, 2, 3, 4], [e, 1, m, 2], [m, e, 1, m], [1, m, e, e]])
    new = torch.tensor([[False, True, True, True]] * 6)
    new[4, 0] = False
    assert ended(rows, new, e, m).tolist() == [True, False, False, False, True, False]


def test_slots_without_an_expert_are_not_counted():
    counter = Counter(num_experts=4, block_length=2)
    ids = torch.tensor([[[[3, -1], [-1, -1], [0, 3], [1, -1]]]])  # [1, 1, tokens, k]: blocks of {3} and {0, 1, 3}
    counter.add("denoising", ids, torch.tensor([True]))
    counter.add("denoising", torch.cat([ids, ids], 1), torch.tensor([False, True]))
    counter.add("denoising", ids, torch.tensor([True]), forwards=False)
    assert counter.mean("denoising") == (2.0,)
    stats = _stats(counter, tokens=4, bytes_per_expert=10)
    assert (stats.forwards, stats.unique_experts, stats.expert_bytes_per_step) == (2, 2.0, 20.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.tokens = 5


def test_answers_are_filled_up_with_eos():
    x = torch.tensor([[9, 5, 0, 7, 7], [9, 9, 1, 2, 3]])
    counter = Counter(num_experts=4, block_length=2)
    counter.forwards += 1
    tokens, stats = _decoded(x, [1, 2], [4, 5], 0, counter, 10)
    assert tokens.tolist() == [[5, 0, 0], [1, 2, 3]] and stats.tokens == 5


def test_a_cache_is_as_large_as_the_blocks_and_of_the_models_dtype(monkeypatch):
    model, made = build(), []
    monkeypatch.setattr(
        model, "new_cache", lambda *args: made.append(args) or LLaDA2ForDiffusion.new_cache(model, *args)
    )
    model.generate(torch.cat([prompt(40), prompt(40)]), gen_length=9, prompt_lengths=torch.tensor([5, 30]))
    assert made == [(64, 2)]
    for dtype in (torch.float32, torch.bfloat16):
        cache = LLaDA2ForDiffusion(CONFIG, dtype=dtype, device="meta").new_cache(8)
        assert all(part.dtype == dtype and part.device.type == "meta" for part in (cache.keys, cache.values))
    assert KVCache(1, 1, 1, 4, 2, dtype=torch.float16).values.dtype == torch.float16


def test_columns_behind_the_longest_prompt_are_padding():
    model, ids = build(), prompt(9)
    wide = model.generate(ids, gen_length=8, prompt_lengths=torch.tensor([5]))
    assert torch.equal(wide.tokens, model.generate(ids[:, :5], gen_length=8).tokens)


@torch.no_grad()
def test_a_single_moe_layer():
    model = build(dataclasses.replace(CONFIG, num_hidden_layers=2))
    stats = model.generate(prompt(5), gen_length=8).stats
    assert stats.unique_experts_by_layer == (stats.unique_experts,)


def test_no_forward_runs_for_no_sequence(monkeypatch):
    """A step without a mask, and a block behind the end of the texts: nobody is left to run."""
    model, ids = build(), prompt(20)
    token = model.generate(ids, gen_length=60, eos_id=None).tokens[0, 5]
    rows, forward = [], model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda ids, **how: rows.append(ids.numel() // 32) or forward(ids, **how)
    )
    for eos_id in (None, int(token)):
        rows.clear()
        stats = model.generate(ids.expand(2, -1), gen_length=60, threshold=0.5, eos_id=eos_id).stats
        assert all(rows) and sum(rows) == stats.forwards


@pytest.mark.parametrize("lengths", [None, [20, 3], [70, 40]])
def test_decoding_makes_its_tensors_on_the_models_device(lengths):
    """Whatever torch makes them on by default."""
    model, ids = build(), torch.cat([prompt(70), prompt(70, 1)])
    options = dict(gen_length=20, prompt_lengths=None if lengths is None else torch.tensor(lengths))
    wanted = model.generate(ids, **options)
    with torch.device("meta"):
        got = model.generate(ids, **options)
    assert torch.equal(got.tokens, wanted.tokens) and got.stats == wanted.stats


def test_the_defaults_are_those_of_the_released_generate():
    defaults = {name: p.default for name, p in inspect.signature(LLaDA2ForDiffusion.generate).parameters.items()}
    assert CONFIG.block_length == 32 and (defaults["steps"], defaults["threshold"]) == (32, 0.95)
    assert defaults["temperature"] == 0 and defaults["eos_early_stop"] is True and defaults["progress"] is False
    assert all(defaults[name] is None for name in ("top_k", "top_p", "mask_id", "prompt_lengths", "generator"))


def test_drawing_repeats_with_the_generator():
    model, ids = build(), prompt(8)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        options = dict(gen_length=40, temperature=0.8, top_k=20, top_p=0.9, eos_id=None)
        return model.generate(ids, generator=generator, **options).tokens

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_sampling_filters():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    generator = torch.Generator().manual_seed(0)
    token, confidence = sample(logits[:1])
    assert token.item() == 0 and confidence.item() == pytest.approx(0.5)
    assert sample(logits[:1], top_k=2)[1].item() == pytest.approx(0.625)
    assert set(sample(logits, 1.0, generator=generator)[0].tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, 1.0, top_k=3, generator=generator)[0].tolist()) == {0, 1, 2}
    assert set(sample(logits, 1.0, top_p=0.6, generator=generator)[0].tolist()) == {0, 1}
    # top_p keeps the first token that crosses it: of 1/4 each, 2 do not cross 0.5.
    for top_p, kept in ((0.49, 2), (0.5, 3), (0.51, 3), (0.75, 4)):
        assert sample(torch.zeros(1, 4), top_p=top_p)[1].item() == pytest.approx(1 / kept)
    for temperature in (0.5, 2.0):
        token, confidence = sample(logits, temperature, generator=generator)
        expected = (logits / temperature).softmax(1).gather(1, token[:, None])[:, 0]
        torch.testing.assert_close(confidence, expected)
    assert (sample(logits, 1.0, top_k=1, generator=generator)[0] == 0).all()  # nothing else is left to draw
    # All of them at 1, whatever the rounding of the sum.
    many = torch.randn(8, 3000, generator=generator)
    assert torch.equal(sample(many, top_p=1.0)[1], sample(many)[1])


def test_of_equal_probabilities_the_lower_tokens_and_positions_come_first():
    """Beyond 16 equal numbers torch's sort keeps their order only where it is asked to."""
    confidence = choose_tokens(torch.full((2, 40), 0.5), torch.ones(2, 40, dtype=torch.bool), 0.9, 10)
    assert confidence.nonzero()[:, 1].tolist() == 2 * list(range(10))
    generator = torch.Generator().manual_seed(0)
    tokens, probability = sample(torch.zeros(1000, 64), temperature=1.0, top_p=0.25, generator=generator)
    assert set(tokens.tolist()) == set(range(17)) and torch.allclose(probability, torch.tensor(1 / 17))


def test_choosing_what_to_unmask():
    confidence = torch.tensor([0.9, 0.2, 0.7, 0.7, 0.99])
    active = torch.tensor([True, True, True, True, False])

    def chosen(threshold, share):
        return choose_tokens(confidence, active, threshold, share).nonzero().flatten().tolist()

    assert chosen(0.6, 1) == [0, 2, 3]
    assert chosen(0.95, 1) == [0]
    assert chosen(0.8, 2) == [0, 2]  # ties to the earlier position
    assert chosen(0.95, 9) == [0, 1, 2, 3]
    assert chosen(confidence[2].item(), 1) == [0]  # at the threshold is not above it


BAD_ARGUMENTS = [
    (dict(gen_length=0), "gen_length must be an integer of at least 1, got 0"),
    (dict(gen_length=300), "gen_length must leave prompt and answer within max_position_embeddings=256"),
    (dict(block_length=1.5), "block_length must be an integer"),
    (dict(steps=0), "steps must be an integer"),
    (dict(threshold=1.1), "threshold must be in [0, 1], got 1.1"),
    (dict(threshold=float("nan")), "threshold must be in [0, 1], got nan"),
    (dict(temperature=-1), "temperature must be a number of at least 0, got -1"),
    (dict(top_k=0), "top_k must be None or an integer of at least 1, got 0"),
    (dict(top_p=0.0), "top_p must be None or in (0, 1], got 0.0"),
    (dict(top_p=1.5), "top_p must be None or in (0, 1], got 1.5"),
    (dict(mask_id=64), "mask_id must be a token id below vocab_size=64, got 64"),
    (dict(eos_id=-1), "eos_id must be a token id below vocab_size=64, got -1"),
    (dict(eos_id=MASK), "eos_id must differ from mask_id"),
    (dict(input_ids=prompt(4)[0]), "input_ids must be an int64 tensor [bsz, T], got [4]"),
    (dict(input_ids=prompt(4).int()), "input_ids must be an int64 tensor [bsz, T], got [1, 4] torch.int32"),
    (dict(input_ids=[[1, 2]]), "input_ids must be an int64 tensor"),
    (dict(input_ids=prompt(4)[:0]), "input_ids must hold a prompt, [bsz, T], got [0, 4]"),
    (dict(prompt_lengths=[4]), "prompt_lengths must be an int64 tensor [bsz=1], got [4]"),
    (dict(prompt_lengths=torch.tensor([4.0])), "prompt_lengths must be an int64 tensor [bsz=1]"),
    (dict(prompt_lengths=torch.tensor([True])), "prompt_lengths must be an int64 tensor [bsz=1]"),
    (dict(prompt_lengths=torch.tensor([4, 4])), "prompt_lengths must be an int64 tensor [bsz=1]"),
    (dict(prompt_lengths=torch.tensor([5])), "prompt_lengths must be in [0, T=4], got [5]"),
    (dict(prompt_lengths=torch.tensor([-1])), "prompt_lengths must be in [0, T=4], got [-1]"),
    (dict(temperature=float("inf")), "temperature must be a number of at least 0, got inf"),
    (dict(prompt_lengths=torch.tensor([-1, 4]), input_ids=torch.ones(2, 4).long()), "must be in [0, T=4], got [-1, 4]"),
    (dict(prompt_lengths=torch.tensor([2, 5]), input_ids=torch.ones(2, 4).long()), "must be in [0, T=4], got [2, 5]"),
    (dict(prompt_lengths=torch.tensor([2, 249]), input_ids=torch.ones(2, 249).long()), "256 tokens, got 249 + 8"),
    (dict(input_ids=torch.tensor([[64]])), "input_ids must be in [0, vocab_size=64), got 64 to 64"),
    (dict(input_ids=torch.tensor([[-1, 3]])), "input_ids must be in [0, vocab_size=64), got -1 to 3"),
    (dict(input_ids=torch.tensor([[1, 64]])), "input_ids must be in [0, vocab_size=64), got 1 to 64"),
    (dict(input_ids=torch.tensor([[1, MASK]])), f"input_ids must not hold mask_id={MASK}"),
]


@pytest.mark.parametrize("change, says", BAD_ARGUMENTS, ids=[says for _, says in BAD_ARGUMENTS])
def test_generate_refuses_bad_arguments(change, says):
    with pytest.raises(ValueError) as error:
        build().generate(**{**dict(input_ids=prompt(4), gen_length=8), **change})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers(tmp_path):
    sizes = {name: np.int64(v) if isinstance(v, int) else np.float64(v) for name, v in SIZES.items()}
    config = LLaDA2Config(**sizes)
    assert config == CONFIG
    model = build(config)
    model.save_pretrained(tmp_path)
    assert LLaDA2Config.from_pretrained(tmp_path) == CONFIG
    integers = dict(gen_length=9, block_length=4, steps=3, top_k=5, eos_id=EOS, mask_id=MASK)
    numbers = dict(threshold=0.75, temperature=0.5, top_p=0.875)
    given = {n: np.int64(v) for n, v in integers.items()} | {n: np.float32(v) for n, v in numbers.items()}
    ours, same = (
        model.generate(prompt(6), **options, generator=torch.Generator().manual_seed(0))
        for options in (given, integers | numbers)
    )
    assert torch.equal(ours.tokens, same.tokens) and ours.stats == same.stats
    json.dumps(dataclasses.asdict(ours.stats))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "name, value",
    [
        ("model.layers.1.mlp.w13", float("nan")),
        ("model.layers.2.mlp.gate_weight", float("nan")),
        ("lm_head.weight", 1e38),
    ],
)
def test_generate_notices_broken_weights(name, value, temperature):
    """That came into the model after it was read: NaN, and what overflows on the way."""
    model = build()
    model.state_dict()[name].view(-1)[::7] = value
    with pytest.raises(ValueError) as error:
        model.generate(prompt(40), gen_length=40, temperature=temperature)
    said = f"weight {name} is not" if value != value else "all weights are, so float32 is too narrow for this model"
    assert str(error.value) == f"logits of the block at position 32 must be finite: {said}"


def test_generate_takes_the_limits_of_its_arguments():
    model = build(dataclasses.replace(CONFIG, max_position_embeddings=12))
    limits = dict(gen_length=1, block_length=1, steps=1, threshold=0, temperature=0, top_k=1, top_p=1)
    ids = prompt(4).clamp(min=1)
    for more in (dict(mask_id=0, eos_id=5), dict(eos_id=0), dict(eos_id=MASK - 1, threshold=1)):
        assert model.generate(ids, **{**limits, **more}).tokens.shape == (1, 1)
    for length in (0, 4):
        assert model.generate(ids, prompt_lengths=torch.tensor([length]), **limits).tokens.shape == (1, 1)
    assert model.generate(ids, gen_length=8, block_length=4, eos_id=None).tokens.shape == (1, 8)  # just fits


@pytest.mark.parametrize("ids", [prompt(4).int(), prompt(4)[0], [[1]]])
def test_a_forward_refuses_what_are_no_ids(ids):
    with pytest.raises(ValueError, match="input_ids must be an int64 tensor"):
        build()(ids)


def test_generate_asks_for_the_mask_where_the_config_has_none():
    model = build(dataclasses.replace(CONFIG, mask_token_id=None, eos_token_id=None))
    with pytest.raises(ValueError, match="mask_id must be given"):
        model.generate(prompt(4), gen_length=4)
    assert model.generate(prompt(4), gen_length=4, mask_id=MASK).tokens.shape == (1, 4)


def test_the_cache_refuses_what_does_not_fit():
    model = build()
    with pytest.raises(ValueError, match="kv_cache has room for 32 tokens"):
        model(prompt(40), kv_cache=model.new_cache(32))
    with pytest.raises(ValueError, match="batch size of kv_cache"):
        model(prompt(8), kv_cache=model.new_cache(32, batch=2))
    cache = model.new_cache(64)
    cache.commit(10)
    with pytest.raises(ValueError, match="kv_cache must end with a block"):
        model(prompt(8), kv_cache=cache)
    with pytest.raises(ValueError, match="kv_cache must be used under torch"):
        model(prompt(8), kv_cache=model.new_cache(64))


def test_progress_is_shown_when_asked_for(capsys):
    model = build()
    model.generate(prompt(4), gen_length=8)
    assert capsys.readouterr().err == ""
    model.generate(prompt(4), gen_length=8, progress=True)
    shown = capsys.readouterr().err
    assert "8/8" in shown and "token/s" in shown
