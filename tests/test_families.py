"""`dmoe_ops.load`: which family a folder is of, and the geometries of the released models, read from their config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sizes import SIZES

import dmoe_ops
from dmoe_ops.models import (
    DiffusionModel,
    LLaDA2Config,
    LLaDA2ForDiffusion,
    LLaDAMoEForDiffusion,
    SDARForDiffusion,
    families,
)
from dmoe_ops.routing import BlockRouting

RELEASED = json.loads((Path(__file__).parent / "released_configs.json").read_text())


class Known(NamedTuple):
    """billions: of parameters, as its authors say. parameters: all of them. own: the policy of its weights. block: tokens
    that are decoded at a time. coreset: megabytes in bfloat16 of 16 experts in one layer."""

    family: type[DiffusionModel]
    billions: float
    parameters: int
    own: BlockRouting
    block: int
    coreset: float


def llada2(policy: str = "dmoe", **settings) -> BlockRouting:
    return BlockRouting.policy(policy, **settings)


def softmax(num_experts: int, block_size: int, norm_topk_prob: bool) -> BlockRouting:
    geometry = dict(num_experts=num_experts, n_group=1, topk_group=1, score="softmax", routed_scaling_factor=1.0)
    return BlockRouting.policy("token", **geometry, block_size=block_size, norm_topk_prob=norm_topk_prob)


KNOWN = {
    "LLaDA2.0-mini": Known(LLaDA2ForDiffusion, 16, 16_255_643_392, llada2(), 32, 100.7),
    "LLaDA2.0-flash": Known(LLaDA2ForDiffusion, 103, 102_889_705_216, llada2(), 32, 402.7),
    "LLaDA2.1-mini": Known(LLaDA2ForDiffusion, 16, 16_255_643_392, llada2(), 32, 100.7),
    "LLaDA2.1-flash": Known(LLaDA2ForDiffusion, 103, 102_889_705_216, llada2(), 32, 402.7),
    "LLaDA2.2-mini": Known(LLaDA2ForDiffusion, 16, 16_255_643_392, llada2("capacity"), 32, 100.7),
    "LLaDA2.2-flash": Known(LLaDA2ForDiffusion, 103, 102_889_705_216, llada2("capacity"), 32, 402.7),
    "dMoE-16B": Known(LLaDA2ForDiffusion, 16, 16_255_643_392, llada2(), 32, 100.7),
    "LLaDA-MoE-7B-A1B": Known(LLaDAMoEForDiffusion, 7.36, 7_356_880_896, softmax(64, 32, False), 32, 201.3),
    "SDAR-30B-A3B-Chat": Known(SDARForDiffusion, 30.5, 30_532_122_624, softmax(128, 4, True), 4, 151.0),
}


def names(config) -> set[str]:
    """What the checkpoints of a family call some of their tensors."""
    last, expert = f"model.layers.{config.num_hidden_layers - 1}", config.num_experts - 1
    found = {f"{last}.{norm}layernorm.weight" for norm in ("input_", "post_attention_")} | {"model.norm.weight"}
    found |= {f"{last}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")}
    found |= {f"{last}.mlp.gate.weight", "lm_head.weight"}
    if isinstance(config, LLaDA2Config):
        found |= {"model.word_embeddings.weight", "model.layers.0.mlp.up_proj.weight", f"{last}.mlp.gate.expert_bias"}
        found |= {f"{last}.mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
        parts = ("query_key_value", "dense", "query_layernorm", "key_layernorm")
        return found | {f"{last}.attention.{part}.weight" for part in parts}
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    return found | {"model.embed_tokens.weight"} | {f"{last}.self_attn.{part}.weight" for part in parts}


def test_every_released_config_is_known():
    assert list(RELEASED) == list(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_the_geometry_of_a_released_model(name, tmp_path):
    known = KNOWN[name]
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name]["config"]))
    assert families.family_of(tmp_path) is known.family
    config = families.config_of(tmp_path)
    assert type(config) is known.family.config_type
    assert (
        config.parameters == known.parameters and abs(known.parameters / 1e9 - known.billions) < 0.04 * known.billions
    )
    assert config.routing() == known.own and config.routing("token").select == "all"
    assert config.block_length == known.block and config.mask_token_id is not None and config.eos_token_id is not None
    model = known.family(config, device="meta")
    tensors = model.checkpoint_tensors()  # every one that the checkpoint must have
    assert sum(tensor.numel() for tensor in tensors.values()) == known.parameters and tensors.keys() >= names(config)
    assert round(16 * model.to(torch.bfloat16).bytes_per_expert / 1e6, 1) == known.coreset


@pytest.fixture
def folder(tmp_path):
    model = LLaDA2ForDiffusion(LLaDA2Config(**SIZES), dtype=torch.float32).init_weights(0)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("named", [["LLaDA2MoeModelLM"], None])
def test_load_takes_what_from_pretrained_does(folder, named):
    edit(folder, architectures=named)
    model = dmoe_ops.load(folder)
    assert type(model) is LLaDA2ForDiffusion and model.routing == model.config.routing("dmoe")
    model = dmoe_ops.load(str(folder), "token", block_size=16, expert_memory="50%")
    assert model.routing.select == "all" and model.routing.block_size == 16
    assert model.expert_memory is not None and dmoe_ops.load(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        dict(architectures=["LlamaForCausalLM"]),
        dict(architectures=["LlamaForCausalLM"], model_type="llama"),
        dict(architectures=None, model_type="llama"),
        dict(architectures=None, model_type=None),
        dict(architectures="LLaDA2", model_type=3),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_known_ones(changes, folder):
    edit(folder, **changes)
    for read in (dmoe_ops.load, families.config_of):
        with pytest.raises(ValueError) as error:
            read(folder)
        said = str(error.value)
        assert "\n" not in said and f"{folder / 'config.json'}: architectures must be one of" in said
        assert all(family.config_type.architectures[0] in said for family in families.FAMILIES)


@pytest.mark.parametrize(
    "key, value",
    [
        ("norm_softmax", True),
        ("using_split_qkv_in_self_attention", True),
        ("logits_scaling", 8.0),
        ("final_logit_softcapping", 30.0),
        ("moe_router_enable_expert_bias", False),
        ("layer_types", ["sliding_attention"]),
        ("moe_shared_expert_intermediate_size", 48),
        ("scoring_func", "softmax"),
    ],
)
def test_a_key_that_changes_the_arithmetic_is_refused_by_name(key, value, folder):
    edit(folder, **{key: value})
    with pytest.raises(ValueError, match=key):
        dmoe_ops.load(folder)


def test_keys_that_change_nothing_are_read_over(folder):
    edit(folder, logits_scaling=1, scoring_func="sigmoid", layer_types=3 * ["full_attention"], unheard_of=7)
    edit(folder, moe_shared_expert_intermediate_size=SIZES["moe_intermediate_size"])
    assert dmoe_ops.load(folder).config == LLaDA2Config(**SIZES)
