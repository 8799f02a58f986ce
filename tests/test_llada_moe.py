"""LLaDA-MoE: against the authors' model and decoder (tests/golden, written by tools/golden_llada_moe.py), and what is
refused as every token sees all others."""

from __future__ import annotations

import json

import pytest
import torch
from golden_file import Golden
from safetensors.torch import load_file

import dmoe_ops
from dmoe_ops.models import LLaDAMoEForDiffusion
from dmoe_ops.models.training import denoising_loss

GOLDEN = Golden("llada_moe")
TENSORS, DECODES, weights, write = GOLDEN.tensors, GOLDEN.decodes, GOLDEN.weights, GOLDEN.write
pytestmark = pytest.mark.usefixtures("one_thread")  # faster than two, at this size


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "other"])
def test_golden_logits(name, tmp_path, backend):
    model = dmoe_ops.load(write(tmp_path, name))
    assert type(model) is LLaDAMoEForDiffusion and model.routing == model.config.routing("token")
    assert not model.routing.norm_topk_prob and model.routing.score == "softmax"
    logits = model(TENSORS[f"{name}.input_ids"]).logits
    torch.testing.assert_close(logits, TENSORS[f"{name}.logits"], atol=1e-4, rtol=0)


def decode(model, *names: str, **options):
    """As the authors' generate was called: a share of each block per step, whatever the confidence."""
    settings = DECODES[names[0]]
    length, size = settings["gen_length"], settings["block_length"]
    prompts = torch.cat([TENSORS[f"prompt.{name}"] for name in names])
    steps = settings["steps"] * size // length
    ask = dict(gen_length=length, block_length=size, steps=steps, threshold=1.0, eos_id=None)
    return model.generate(prompts, **ask | options)


@pytest.mark.parametrize("name", DECODES)
def test_golden_tokens(name, tmp_path):
    decoded = decode(dmoe_ops.load(write(tmp_path)), name)
    assert decoded.tokens.tolist() == [TENSORS[f"tokens.{name}"].tolist()]
    assert decoded.stats.forwards == decoded.stats.denoising_forwards == DECODES[name]["steps"]


def test_a_batch_gives_the_golden_tokens_of_its_rows(tmp_path):
    names = "blocks_of_8", "a_second_prompt"
    tokens = decode(dmoe_ops.load(write(tmp_path)), *names).tokens
    assert tokens.tolist() == [TENSORS[f"tokens.{name}"].tolist() for name in names]


def test_an_end_that_is_looked_for(tmp_path):
    want = TENSORS["tokens.blocks_of_8"].tolist()
    tokens = decode(dmoe_ops.load(write(tmp_path)), "blocks_of_8", eos_id=want[10]).tokens
    assert tokens.tolist() == [want[: want.index(want[10]) + 1]]


def test_a_checkpoint_is_written_by_its_own_names(tmp_path):
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        model = dmoe_ops.load(write(tmp_path / name, name))
        model.save_pretrained(tmp_path / name / "saved")
        saved = load_file(tmp_path / name / "saved" / "model.safetensors")
        assert saved.keys() == weights(name).keys()
        assert all(torch.equal(saved[key], value) for key, value in weights(name).items())
        config = json.loads((tmp_path / name / "saved" / "config.json").read_text())
        assert config["expert_intermediate_size"] == 16 and config["dense_intermediate_size"] == 40
        assert "moe_intermediate_size" not in config and "auto_map" not in config
        assert dmoe_ops.load(tmp_path / name / "saved").config == model.config


def test_what_all_tokens_seeing_all_others_rules_out(tmp_path):
    model = dmoe_ops.load(write(tmp_path))
    with torch.no_grad(), pytest.raises(ValueError, match="kv_cache must be None"):
        model(TENSORS["model.input_ids"], kv_cache=model.new_cache(64, 2))
    with pytest.raises(ValueError, match=r"gen_length must be a multiple of block_length=8, .* got \[20\]"):
        decode(model, "blocks_of_8", gen_length=20)
    both = torch.tensor([12, 13])
    with pytest.raises(ValueError, match=r"prompt_lengths must be equal .* got \[12, 13\]"):
        decode(model, "blocks_of_8", "a_second_prompt", prompt_lengths=both)
    with pytest.raises(ValueError, match=r"gen_length must be a multiple .* one for all"):
        decode(model, "blocks_of_8", "a_second_prompt", gen_length=torch.tensor([8, 16]))
    with pytest.raises(ValueError, match="refresh_every must be None"):
        decode(model, "blocks_of_8", refresh_every=2)
    with pytest.raises(ValueError, match="use_graphs must not be True"):
        decode(model, "blocks_of_8", use_graphs=True)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(moe_router_enable_expert_bias=True), "moe_router_enable_expert_bias must be null or false"),
        (dict(moe_router_score_function="sigmoid"), "moe_router_score_function must be"),
        (dict(shared_expert_intermediate_size=32), "shared_expert_intermediate_size must be"),
        (dict(routed_scaling_factor=2.5), "routed_scaling_factor must be"),
        (dict(router_num_group=4), "router_num_group must be"),
        (dict(clip_qkv=8.0), "clip_qkv must be null"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor must be"),
        (dict(moe_layer_freq=[1, 1]), "moe_layer_freq must have a value for each layer"),
        (dict(moe_layer_freq=[1, 2, 1]), "moe_layer_freq must hold 0 and 1"),
        (dict(moe_layer_freq=[0, 0, 0]), "leave no MoE layer"),
        (dict(expert_intermediate_size=None), "moe_intermediate_size must be given"),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(changes, says, tmp_path):
    with pytest.raises(ValueError) as error:
        dmoe_ops.load(write(tmp_path, **changes))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_policies_and_training(tmp_path):
    model = dmoe_ops.load(write(tmp_path), "dmoe", top_p=0.4, min_experts=4)
    few = decode(model, "blocks_of_8").stats.unique_experts_denoising
    model.set_routing("token")
    assert few < decode(model, "blocks_of_8").stats.unique_experts_denoising
    clean = TENSORS["model.input_ids"][:, :16].clamp(max=61)
    masked = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    loss, routed = denoising_loss(model, clean, masked, block_length=8)
    logits = model(clean.masked_fill(masked, 62)).logits
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[masked], clean[masked]))
    loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters()) and len(routed) == 2
