"""`dmoe quantize`: what it writes, what it leaves alone, what it refuses, and what it holds in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from shards import shard
from sizes import SIZES as SMALL

from dmoe_ops import convert
from dmoe_ops.__main__ import main
from dmoe_ops.convert import quantize_folder
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

SIZES = SMALL | dict(
    hidden_size=48, head_dim=32, intermediate_size=40, moe_intermediate_size=20, num_experts=8, initializer_range=0.2
)
FORMS = ["fp8", "int8", "int4"]
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


def build(**changes) -> LLaDA2ForDiffusion:
    return LLaDA2ForDiffusion(LLaDA2Config(**{**SIZES, **changes}), dtype=torch.bfloat16).init_weights(0)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in three shards, with other files beside it."""
    folder = tmp_path / "model"
    build().save_pretrained(folder)
    shard(folder)
    (folder / "tokenizer.json").write_text('{"ä": 1}')
    (folder / "merges.model").write_bytes(bytes(range(256)))
    (folder / "pytorch_model.bin").write_bytes(b"weights of another kind")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "assets").mkdir()
    edit(folder, unknown_key="kept", torch_dtype="bfloat16")
    return folder


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("form", FORMS)
def test_it_writes_what_the_model_would_save(form, folder, tmp_path):
    out = tmp_path / "a" / "new" / form
    done = quantize_folder(folder, form, out)
    LLaDA2ForDiffusion.from_pretrained(folder).quantize(form).save_pretrained(tmp_path / "saved")
    assert_same_bits(tensors_of(out), tensors_of(tmp_path / "saved"))
    saved, written, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "saved", out, folder))
    assert written == {**before, "quantization_config": saved["quantization_config"]}
    assert written["unknown_key"] == "kept" and list(written)[:-1] == list(before)
    files = {"config.json", "model.safetensors", "tokenizer.json", "merges.model"}
    assert {file.name for file in out.iterdir()} == files | {file.name for file in folder.glob("*.py")}
    for name in ("tokenizer.json", "merges.model"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    sizes = [sum(value.nbytes for value in tensors_of(f).values()) for f in (folder, out)]
    assert done == (2 * 8 * 3, *sizes, 1)
    model = LLaDA2ForDiffusion.from_pretrained(out)
    assert [moe.form for moe in model.moe_layers] == [form, form]


@pytest.mark.parametrize("shard_bytes", [1, 4000, 30_000])
def test_shards(shard_bytes, folder, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    quantize_folder(folder, "int4", one)
    done = quantize_folder(folder, "int4", many, shard_bytes=shard_bytes)
    assert_same_bits(tensors_of(one), tensors_of(many))
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in many.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{done.files:05}.safetensors" for i in range(1, done.files + 1)]
    held = {file: load_file(many / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    assert index["metadata"] == {"total_size": done.size}
    # A file is full, or the next matrix (three tensors) or tensor would not have fitted.
    sizes = [sum(value.nbytes for value in tensors.values()) for tensors in held.values()]
    assert sum(sizes) == done.size and done.files > 5
    for file, size in zip(files, sizes):
        alone = {name.rpartition(".")[0] if "weight_" in name else name for name in held[file]}
        assert size <= shard_bytes or len(alone) == 1
    assert_same_bits(
        LLaDA2ForDiffusion.from_pretrained(many).state_dict(), LLaDA2ForDiffusion.from_pretrained(one).state_dict()
    )


def test_a_tied_head_and_a_stray_buffer_are_left_alone(tmp_path):
    """They have no place in the model, but may be in a checkpoint; the head stays out of what is quantised."""
    build(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    extra = {"lm_head.weight": torch.ones(64, 48), "model.rotary_emb.inv_freq": torch.arange(3)}
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), **extra}, path)
    quantize_folder(tmp_path / "model", "int8", tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    assert all(torch.equal(written[name], value) for name, value in extra.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]
    LLaDA2ForDiffusion.from_pretrained(tmp_path / "out")


def quantised(folder, out):
    quantize_folder(folder, "int8", folder.parent / "before")
    shutil.rmtree(folder)
    (folder.parent / "before").rename(folder)


def other_config(folder, out):
    edit(folder, quantization_config=dict(quant_method="gptq"))


def quantised_without_saying_so(folder, out):
    quantised(folder, out)
    edit(folder, quantization_config=None)


def not_empty(folder, out):
    out.mkdir()
    (out / "notes.txt").write_text("somebody's own")


def without_a_tensor(folder, out):
    path = folder / "model-1.safetensors"
    tensors, index = load_file(path), folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    gone = next(name for name in tensors if name == EXPERT or "experts" in name)
    save_file({name: value for name, value in tensors.items() if name != gone}, path)
    index.write_text(json.dumps(dict(weight_map={n: f for n, f in weight_map.items() if n != gone})))


def odd(folder, out):
    shutil.rmtree(folder)
    build(moe_intermediate_size=15).save_pretrained(folder)


def full(folder, out):
    usage = shutil.disk_usage(folder)
    convert.shutil.disk_usage = lambda path: usage._replace(free=1000)


REFUSED = [
    (quantised, "model must not be quantised already, got int8"),
    (other_config, "quantization_config must be null or of quant_method fp8 or compressed-tensors, got 'gptq'"),
    (quantised_without_saying_so, "is missing in"),
    (not_empty, "out must be a new or an empty folder, got something in it"),
    (lambda folder, out: out.write_text("x"), "out must be a new or an empty folder, got a file"),
    (without_a_tensor, "is missing in"),
    (lambda folder, out: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder, out: shutil.rmtree(folder), "config.json is missing"),
    (odd, "w2 must have an even number of columns for int4, got [8, 48, 15]"),
    (lambda folder, out: edit(folder, model_type="llama"), "model_type must be llada2_moe, got 'llama'"),
    (full, "GB, got 0.00 GB of free space"),
]


@pytest.mark.parametrize("fault, says", REFUSED, ids=[says for _, says in REFUSED])
def test_what_is_refused_before_anything_is_written(fault, says, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", shutil.disk_usage)  # which puts it back after `full`
    out = tmp_path / "out"
    fault(folder, out)
    before = sorted(tmp_path.rglob("*"))
    assert main(["quantize", str(folder), "--to", "int4", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.startswith("dmoe quantize: ") and said.err.count("\n") == 1 and not said.out
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_format_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="format must be one of fp8, int8, int4, got 'int3'"):
        quantize_folder(folder, "int3", tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["quantize", str(folder), "--to", "int3", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_in_the_middle_leaves_nothing(there, folder, tmp_path, monkeypatch):
    """A value that is not finite, a disk that fails, and Ctrl-C; an empty folder that was there stays."""
    out = tmp_path / "out"
    if there:
        out.mkdir()
    path = next(file for file in folder.glob("*.safetensors") if EXPERT in load_file(file))
    sound = path.read_bytes()
    tensors = load_file(path)
    tensors[EXPERT][3, 4] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"tensor {EXPERT} in .* must be finite in float32, got NaN or infinity"):
        quantize_folder(folder, "fp8", out, shard_bytes=4000)
    assert out.exists() == there and not list(tmp_path.glob("out/*"))
    path.write_bytes(sound)

    real, calls = convert.save_file, []

    def broken(error):
        def save(*args, **options):
            calls.append(1)
            if len(calls) % 3 == 0:
                raise error
            real(*args, **options)

        return save

    for error, raised, says in (
        (OSError(28, "No space left on device"), ValueError, "out can't be written: No space left on device"),
        (convert.SafetensorError("I/O error:\n disk"), ValueError, "out can't be written: I/O error: disk"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ):
        monkeypatch.setattr(convert, "save_file", broken(error))
        with pytest.raises(raised, match=says):
            quantize_folder(folder, "fp8", out, shard_bytes=4000)
        assert out.exists() == there and not list(tmp_path.glob("out/*"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(folder, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="out can't be written: Permission denied"):
            quantize_folder(folder, "fp8", tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_what_the_command_says(folder, tmp_path, capsys):
    assert main(["quantize", str(folder), "--to", "int4", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 48 matrices of experts in int4; 0.00 GB, 1 file, " in said.out
    assert said.err == ""  # no bar where there is no terminal
    assert main(["quantize", str(tmp_path / "out"), "--to", "int4", "--out", str(tmp_path / "again")]) == 2


MEASURE = """
import re, sys
from pathlib import Path
from dmoe_ops.convert import quantize_folder

def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

small, large, form, out = sys.argv[1:]
quantize_folder(small, form, out + "-small")  # whatever is imported and allocated once
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
done = quantize_folder(large, form, out, shard_bytes=4_000_000)
print(done.size_before, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_and_a_layer_are_all_that_is_held(folder, tmp_path):
    """88 MB in layers of 11 MB, written in files of 4 MB."""
    large = tmp_path / "large"
    sizes = dict(hidden_size=256, moe_intermediate_size=128, num_experts=56, num_hidden_layers=9)
    model = LLaDA2ForDiffusion(LLaDA2Config(**{**SIZES, **sizes}), dtype=torch.bfloat16)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(0.5)
    model.save_pretrained(large)
    del model
    command = [sys.executable, "-c", MEASURE, str(folder), str(large), "int4", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, held = map(int, done.stdout.split())
    print(f"{held / 1e6:.0f} MB held of {size / 1e6:.0f}")
    assert size > 88e6 and 4e6 < held < 44e6
