"""Checkpoints that come from elsewhere or go there: the Hugging Face hub, transformers, other dtypes and devices."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion, checkpoint, hub

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=16)
SIZES.update(num_experts=16, num_experts_per_tok=2, rope_theta=1e4, rms_norm_eps=1e-6, n_group=4, topk_group=2)
SIZES.update(first_k_dense_replace=1, intermediate_size=48, num_shared_experts=1, mask_token_id=62, eos_token_id=63)
# What the released modeling and SGLang's models/llada2.py read of a config beside the geometry.
READ_BY_OTHERS = {
    *("norm_topk_prob", "moe_router_enable_expert_bias", "router_dtype", "attention_dropout", "embedding_dropout"),
    *("output_dropout", "pad_token_id", "output_router_logits", "use_cache", "sliding_window", "max_window_layers"),
    *("rope_scaling", "num_shared_experts", "intermediate_size", "auto_map", "architectures"),
}


@pytest.fixture
def folder(tmp_path):
    LLaDA2ForDiffusion(LLaDA2Config(**SIZES), dtype=torch.float32).init_weights(0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(says: str, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        LLaDA2ForDiffusion.from_pretrained(*args, **kwargs)
    assert says in str(error.value) and "\n" not in str(error.value)


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(folder, monkeypatch, tmp_path):
    """huggingface_hub with one model, owner/model; calls: what was asked of it."""
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        if name != "owner/model":
            raise RuntimeError(f"404 for {name}\nor no network")
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return calls


def test_a_hub_id_is_fetched(fake_hub, folder, tmp_path):
    assert LLaDA2Config.from_pretrained("owner/model") == LLaDA2Config(**SIZES)
    assert fake_hub == [("owner/model", None, ["config.json"])]
    assert [file.name for file in (tmp_path / "snapshot").iterdir()] == ["config.json"]
    fake_hub.clear()
    refused("policy must be one of", "owner/model", policy="best")
    assert [patterns for _, _, patterns in fake_hub] == [["config.json"]]  # no weights for a call that is wrong
    model = LLaDA2ForDiffusion.from_pretrained("owner/model", revision="v1")
    assert fake_hub[-1] == ("owner/model", "v1", list(hub.EVERYTHING))
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.checkpoint_tensors().items())


def test_what_the_hub_does_not_give_is_one_line(fake_hub):
    says = "owner/other is no folder here, and the Hugging Face hub did not give it: 404 for owner/other or no network"
    refused(says, "owner/other")


def test_a_folder_comes_before_the_hub(fake_hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    LLaDA2ForDiffusion.from_pretrained(f"{folder.parent.name}/model")
    for name in ("nowhere", "a/b/c", "../b", "./b", "a/..", "~/b", str(folder.parent / "none"), "a/b c", "a\\b"):
        refused("config.json is missing in", name)
    assert not fake_hub


def test_without_huggingface_hub_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("owner/model is no folder here, and fetching it from the Hugging Face hub takes", "owner/model")
    refused("pip install 'dmoe-ops[hub]'", "owner/model")


def test_offline_is_one_line(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("owner/model is no folder here, and the Hugging Face hub did not give it: ", "owner/model")


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
        names = "(float64, float32, bfloat16, float16)"
        refused(f"dtype must be None or a floating-point type of torch {names} or its name", folder, dtype=dtype)
        refused("dtype must be None or a floating-point type of torch", folder, torch_dtype=dtype)
    refused("dtype must be given alone", folder, dtype="float32", torch_dtype="float32")
    for device in ("foo", "meta", "cuda:99", "", 1.5, ["cpu"]):
        refused("device must be one that torch can use here, got", folder, device=device)
    with pytest.raises(ValueError, match="dtype must be None or"):
        LLaDA2ForDiffusion.from_pretrained(folder).save_pretrained(tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()


# Folders for others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_saved_folder_has_what_others_read(top_k, tmp_path):
    config = LLaDA2Config(**{**SIZES, "num_experts_per_tok": top_k})
    LLaDA2ForDiffusion(config).init_weights(0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved) >= READ_BY_OTHERS
    assert saved["norm_topk_prob"] is (top_k > 1) and saved["router_dtype"] == "fp32"
    assert saved["moe_router_enable_expert_bias"] is True and saved["pad_token_id"] == 63
    assert saved["architectures"] == ["LLaDA2MoeModelLM"]
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}  # the names that transformers looks for
    for reference in saved["auto_map"].values():
        file, name = reference.split(".")
        tree = ast.parse((tmp_path / f"{file}.py").read_text())
        assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert LLaDA2Config.from_pretrained(tmp_path) == config


def test_auto_classes_read_a_saved_folder(folder, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for name in READ_BY_OTHERS:
        getattr(config, name)
    assert config.num_experts == 16 and config.rope_theta == 1e4 and config.model_type == "llada2_moe"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = LLaDA2ForDiffusion.from_pretrained(folder, policy="token")(ids).logits
        options = dict(trust_remote_code=True, dtype=torch.float32, policy="token", device_map="cpu")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        assert isinstance(model, LLaDA2ForDiffusion)
        assert torch.equal(model(ids).logits, wanted)


def test_the_files_for_others_are_there():
    files = {file.name for file in checkpoint.AUTO_CLASSES.glob("*.py")}
    assert files == {"configuration_llada2_moe.py", "modeling_llada2_moe.py"}


def test_where_tensors_lie_and_how_large_they_are(tmp_path):
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float16]
    tensors = {f"model.layers.{i % 2}.{i}": torch.arange(3.0 * i, dtype=dtypes[i % 4]).view(3, i) for i in range(1, 9)}
    save_file(tensors, tmp_path / checkpoint.SINGLE)
    stored = checkpoint.Checkpoint(tmp_path)
    streamed = {name: tensor.clone() for name, tensor in stored.stream(tensors)}
    assert streamed.keys() == tensors.keys()
    assert [name.split(".")[2] for name in streamed] == ["1"] * 4 + ["0"] * 4  # layer by layer
    for name, tensor in tensors.items():
        path, begin, size = stored.extent(name)
        assert path.read_bytes()[begin : begin + size] == tensor.view(torch.uint8).numpy().tobytes()
        assert torch.equal(streamed[name], tensor) and stored.nbytes(name) == size == tensor.nbytes
