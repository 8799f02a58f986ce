"""Folders that `dmoe quantize` wrote, read by others: the weights they make of them are ours to the bit.

In an environment with this package: pip install compressed-tensors transformers accelerate, and then
python -m pytest tests/test_quantized_elsewhere.py (0.20.0, 5.24.0 and 1.15.0 were run together; no GPU is needed).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_quantized_checkpoints import CONFIG, FORMS, build, load
from torch import nn

from dmoe_ops import reference
from dmoe_ops.convert import quantize_folder
from dmoe_ops.models.quantized import Matrix


def needs(*modules: str):
    absent = [module.replace("_", "-") for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)} (PyPI)")


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


@pytest.fixture
def written(form, tmp_path) -> Path:
    """Its shards are many, and its sizes multiples of 128: neither reads ragged blocks or groups."""
    whole = dataclasses.replace(CONFIG, hidden_size=256, moe_intermediate_size=128)
    build(whole, torch.bfloat16).save_pretrained(tmp_path / "whole")
    quantize_folder(tmp_path / "whole", form, tmp_path / form, shard_bytes=400_000)
    assert len(list((tmp_path / form).glob("*.safetensors"))) > 2
    return tmp_path / form


def ours(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that we read from it, dequantised to float32."""
    tensors = load(folder).checkpoint_tensors()
    return {
        name: reference.dequantize(*tensor) if isinstance(tensor, Matrix) else tensor
        for name, tensor in tensors.items()
    }


def add_modules(root: nn.Module, shapes: dict[str, torch.Size]) -> nn.Module:
    """Gives it modules by the names of a checkpoint's tensors, without values."""
    for name, shape in shapes.items():
        *path, leaf, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if len(shape) == 2:
            embedding = leaf == "word_embeddings"
            matrix = nn.Embedding(*shape, device="meta") if embedding else nn.Linear(*shape[::-1], False, device="meta")
            module.add_module(leaf, matrix)
            continue
        if not hasattr(module, leaf):
            module.add_module(leaf, nn.Module())
        getattr(module, leaf).register_parameter(last, nn.Parameter(torch.empty(shape, device="meta")))
    return root


@needs("compressed_tensors")
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_compressed_tensors_reads_what_is_written(written):
    """Its config, which modules that takes for quantised, and the values that its decompression gives."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = json.loads((written / "config.json").read_text())["quantization_config"]
    wanted = ours(written)
    stub = add_modules(nn.Module(), {name: value.shape for name, value in wanted.items()})
    apply_quantization_config(stub, QuantizationConfig.model_validate(config))
    tensors = {name: value for file in written.glob("*.safetensors") for name, value in load_file(file).items()}
    decompress = BaseCompressor.get_value_from_registry(config["format"]).decompress
    linear = [name for name, module in stub.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 48
    for name in linear:
        scheme = getattr(stub.get_submodule(name), "quantization_scheme", None)
        assert (scheme is not None) == (".mlp.experts." in name), name
        if scheme is not None:
            parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            # In float32: theirs multiplies in the dtype of the scale.
            parts["weight_scale"] = parts["weight_scale"].float()
            assert torch.equal(decompress(parts, scheme)["weight"].float(), wanted[f"{name}.weight"]), name


@needs("compressed_tensors", "transformers", "accelerate")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_reads_what_is_written(form, dtype, written, tmp_path, monkeypatch):
    """AutoConfig, the quantiser that it chooses, and what it loads into modules of these names: everything, and dequantised,
    as there is no GPU."""
    import transformers

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    wanted = ours(written)

    class Model(transformers.PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            add_modules(self, {name: value.shape for name, value in wanted.items()})
            self.post_init()

        def _init_weights(self, module):
            raise AssertionError(f"{module} has a weight that was not read")

    config = transformers.AutoConfig.from_pretrained(written, trust_remote_code=True)
    asked = {} if form == "fp8" else dict(quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    options = dict(config=config, dtype=dtype, device_map="cpu", output_loading_info=True)
    model, info = Model.from_pretrained(written, **options, **asked)
    assert not any(info.values()), info
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    scaled_in = torch.bfloat16 if form == "int4" else torch.float32  # theirs multiplies in the dtype of the scale
    for name, value in found.items():
        rounded = wanted[name].to(scaled_in) if ".mlp.experts." in name else wanted[name]
        assert value.dtype == dtype and torch.equal(value, rounded.to(dtype)), name
