"""SDAR: against transformers' Qwen3-MoE and the authors' decoder (tests/golden, written by tools/golden_sdar.py), its
checkpoints, and what it shares with the other families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_file import Golden
from safetensors.torch import load_file, save_file

import dmoe_ops
from dmoe_ops.convert import quantize_folder
from dmoe_ops.models import SDARConfig, SDARForDiffusion
from dmoe_ops.models.training import denoising_loss

GOLDEN = Golden("sdar")
TENSORS, DECODES, weights, write = GOLDEN.tensors, GOLDEN.decodes, GOLDEN.weights, GOLDEN.write
pytestmark = pytest.mark.usefixtures("one_thread")  # faster than two, at this size


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The golden file -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "other"])
def test_golden_logits(name, tmp_path, backend):
    model = dmoe_ops.load(write(tmp_path, name))
    assert type(model) is SDARForDiffusion and model.routing.select == "all"
    assert model.routing.norm_topk_prob == (name == "model")
    ids, want = TENSORS[f"{name}.input_ids"], TENSORS[f"{name}.logits"]
    torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=0)
    cache = model.new_cache(ids.shape[1], len(ids))
    for begin in range(0, ids.shape[1], 4):
        part = slice(begin, begin + 4)
        torch.testing.assert_close(model(ids[:, part], kv_cache=cache).logits, want[:, part], atol=1e-4, rtol=0)
        cache.commit(4)


def decode(model, *names: str, **options):
    """As the authors' generate was called, for one or several prompts."""
    settings = [DECODES[name] for name in names]
    ask = settings[0]
    prompts = [TENSORS[f"prompt.{name}"][0] for name in names]
    static = ask.get("remasking_strategy") == "low_confidence_static"
    drawn = {} if ask["temperature"] == 1 else {key: ask[key] for key in ("temperature", "top_k", "top_p")}
    return model.generate(
        torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        gen_length=torch.tensor([one["gen_length"] for one in settings]),
        block_length=ask["block_length"],
        steps=ask["denoising_steps"],
        threshold=1.0 if static else ask["confidence_threshold"],
        eos_id=ask.get("stopping_criteria_idx", [None])[0],
        **drawn,
        **options,
    )


@pytest.mark.parametrize("name", DECODES)
def test_golden_tokens(name, folder):
    generator = torch.Generator().manual_seed(0)
    decoded = decode(dmoe_ops.load(folder), name, generator=generator)
    want = TENSORS[f"tokens.{name}"].tolist()
    ends = DECODES[name].get("stopping_criteria_idx")
    want = want[: want.index(ends[0]) + 1] if ends else want
    assert decoded.tokens.tolist() == [want]
    assert not ends or len(want) < DECODES[name]["gen_length"]


def test_a_batch_gives_the_golden_tokens_of_its_rows(folder):
    names = ["at_a_block_end", "inside_a_block", "ends_inside_a_block", "from_one_token"]
    tokens = decode(dmoe_ops.load(folder), *names).tokens
    for row, name in zip(tokens.tolist(), names):
        want = TENSORS[f"tokens.{name}"].tolist()
        assert row[: len(want)] == want


# Checkpoints -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_by_its_own_names(folder, tmp_path):
    for name in ("model", "other"):
        model = dmoe_ops.load(write(folder, name))
        out = tmp_path / f"saved {name}"
        model.save_pretrained(out)
        saved = load_file(out / "model.safetensors")
        assert saved.keys() == weights(name).keys()
        assert all(torch.equal(saved[key], value) for key, value in weights(name).items())
        assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
        again = dmoe_ops.load(out)
        assert again.config == model.config and again.routing == model.routing
        other = SDARForDiffusion(model.config, dtype=torch.float32)
        other.load_state_dict(model.state_dict())
        ids = TENSORS["model.input_ids"]
        assert torch.equal(other(ids).logits, model(ids).logits) and torch.equal(again(ids).logits, model(ids).logits)


def test_shards_equal_the_single_file(folder):
    before = dmoe_ops.load(folder).state_dict()
    tensors = weights("model")
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    (folder / "model.safetensors").unlink()
    after = dmoe_ops.load(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_quantised_experts_and_experts_in_files(form, folder, tmp_path):
    quantised = dmoe_ops.load(folder).quantize(form)
    quantised.save_pretrained(tmp_path / "quantised")
    again = dmoe_ops.load(tmp_path / "quantised", dtype=torch.float32)
    assert again.moe_layers[0].form == form
    torch.testing.assert_close(again(TENSORS["model.input_ids"]).logits, quantised(TENSORS["model.input_ids"]).logits)
    tokens = decode(dmoe_ops.load(folder), "inside_a_block").tokens
    assert torch.equal(decode(dmoe_ops.load(folder, expert_memory="50%"), "inside_a_block").tokens, tokens)


def test_the_command_that_quantises_a_folder(folder, tmp_path):
    written = quantize_folder(folder, "int8", tmp_path / "int8")
    assert written.matrices == 2 * 16 * 3  # of two layers with experts
    want = dmoe_ops.load(folder).quantize("int8").state_dict()
    found = dmoe_ops.load(tmp_path / "int8").state_dict()
    assert all(torch.equal(found[name], value) for name, value in want.items())


@pytest.mark.parametrize(
    "missing", ["model.layers.0.self_attn.k_proj.weight", "model.layers.2.self_attn.q_norm.weight"]
)
def test_a_missing_tensor_is_named_as_the_checkpoint_does(missing, folder):
    save_file(
        {name: value for name, value in weights("model").items() if name != missing}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=f"tensor {missing} is missing"):
        dmoe_ops.load(folder)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor must be null or 1"),
        (dict(routed_scaling_factor=2.5), "routed_scaling_factor must be"),
        (dict(shared_expert_intermediate_size=64), "shared_expert_intermediate_size must be"),
        (dict(n_group=8), "n_group must be"),
        (dict(scoring_func="sigmoid"), 'scoring_func must be null or "softmax"'),
        (dict(use_qk_norm=False), "use_qk_norm must be"),
        (dict(layer_types=["linear_attention"]), "layer_types must all be full_attention"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_scaling must be null"),
        (dict(use_sliding_window=True), "use_sliding_window must be false"),
        (dict(hidden_act="gelu"), "hidden_act must be silu"),
        (dict(quantization_config=dict(quant_method="gptq")), "of quant_method fp8 or compressed-tensors, got 'gptq'"),
        (dict(mlp_only_layers=[0, 1, 2]), "mlp_only_layers=(0, 1, 2) and num_hidden_layers=3 leave no MoE layer"),
        (dict(mlp_only_layers=["1"]), "mlp_only_layers must be a list of integers"),
        (dict(decoder_sparse_step=4), "leave no MoE layer"),
        (dict(num_experts=None), "num_experts must be given"),
        (dict(intermediate_size=None), "intermediate_size must be given for dense layers"),
        (dict(head_dim=13), "head_dim must be even"),
        (dict(model_type="qwen2_moe"), "model_type must be sdar_moe"),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(changes, says, folder):
    edit(folder, **changes)
    with pytest.raises(ValueError) as error:
        dmoe_ops.load(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_which_layers_have_experts(folder):
    config = SDARConfig.from_pretrained(folder)
    for changes in (
        dict(),
        dict(mlp_only_layers=[]),
        dict(decoder_sparse_step=2, mlp_only_layers=[2, 7]),
        dict(num_hidden_layers=9),
        dict(num_hidden_layers=9, decoder_sparse_step=2, mlp_only_layers=[3, 4, 90, 3]),
    ):
        values = json.loads((folder / "config.json").read_text()) | changes
        config = SDARConfig.from_dict(values)
        step = values.get("decoder_sparse_step", 1)
        want = [(i + 1) % step == 0 and i not in values["mlp_only_layers"] for i in range(config.num_hidden_layers)]
        assert list(map(config.has_experts, range(config.num_hidden_layers))) == want and config.moe_layers == sum(want)
        assert len(SDARForDiffusion(config, device="meta").moe_layers) == sum(want)


def test_what_ends_a_text(folder):
    """A list in generation_config.json begins with the end of a turn."""
    assert dmoe_ops.load(folder).config.eos_token_id == 63
    for ends, want in (([5, 63], 5), (7, 7), (None, 63), ([], 63)):
        (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=ends)))
        assert dmoe_ops.load(folder).config.eos_token_id == want
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=["x"])))
    with pytest.raises(ValueError, match="eos_token_id must be an integer"):
        dmoe_ops.load(folder)


# Routing by block, and training ----------------------------------------------------------------------------------------


def test_policies(folder):
    model = dmoe_ops.load(folder)
    assert model.routing == model.config.routing("token") and model.routing.block_size == 4
    plain = decode(model, "at_a_block_end").stats.unique_experts_denoising
    model.set_routing("dmoe", top_p=0.5, min_experts=4)
    assert model.routing.score == "softmax" and model.routing.norm_topk_prob and model.routing.n_group == 1
    few = decode(model, "at_a_block_end").stats.unique_experts_denoising
    assert 4 <= few < plain <= 16
    model.set_routing("token")
    assert decode(model, "at_a_block_end").tokens.tolist() == [TENSORS["tokens.at_a_block_end"].tolist()]
    edit(folder, core_threshold=0.4, min_experts=6)
    assert dmoe_ops.load(folder).routing == model.config.routing("dmoe", top_p=0.4, min_experts=6)


def test_training_moves_every_weight(folder):
    model = dmoe_ops.load(folder, "dmoe", min_experts=4).train()
    before = {name: value.clone() for name, value in model.checkpoint_tensors().items()}
    clean = TENSORS["model.input_ids"].clamp(max=61)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, _ = denoising_loss(model, clean, torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    loss.backward()
    optimizer.step()
    moved = {name for name, value in model.checkpoint_tensors().items() if not torch.equal(value, before[name])}
    still = before.keys() - moved
    assert all(".experts." in name for name in still) and len(still) < len(before) / 2
