"""Checkpoints that come from elsewhere or go there: other dtypes and devices."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=16)
SIZES.update(num_experts=16, num_experts_per_tok=2, rope_theta=1e4, rms_norm_eps=1e-6, n_group=4, topk_group=2)
SIZES.update(first_k_dense_replace=1, intermediate_size=48, num_shared_experts=1, mask_token_id=62, eos_token_id=63)


@pytest.fixture
def folder(tmp_path):
    LLaDA2ForDiffusion(LLaDA2Config(**SIZES), dtype=torch.float32).init_weights(0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(says: str, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        LLaDA2ForDiffusion.from_pretrained(*args, **kwargs)
    assert says in str(error.value) and "\n" not in str(error.value)


# Dtypes and devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_by_either_name(name, value, folder, tmp_path):
    model = LLaDA2ForDiffusion.from_pretrained(folder, **{name: value})
    assert model.model.word_embeddings.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved", dtype="float16")
    assert load_file(tmp_path / "saved" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "float16"


def test_auto_is_the_stored_dtype(folder):
    for options in (dict(dtype="auto"), dict(torch_dtype="auto"), {}):
        assert LLaDA2ForDiffusion.from_pretrained(folder, **options).model.norm.weight.dtype == torch.float32


def test_bad_dtypes_and_devices_are_refused(folder, tmp_path):
    for dtype in ("int8", torch.int8, "", "float", 16, True):
        refused("dtype must be None or a floating-point type of torch", folder, dtype=dtype)
        refused("dtype must be None or a floating-point type of torch", folder, torch_dtype=dtype)
    refused("dtype must be given alone", folder, dtype="float32", torch_dtype="float32")
    for device in ("foo", "meta", "cuda:99", "", 1.5, ["cpu"]):
        refused("device must be one that torch can use here, got", folder, device=device)
    with pytest.raises(ValueError, match="dtype must be None or"):
        LLaDA2ForDiffusion.from_pretrained(folder).save_pretrained(tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()
