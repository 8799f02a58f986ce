"""`dmoe quantize`: a checkpoint folder with its experts in fp8, int8 or int4, stored as `dmoe_ops.models.quantized` says."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from . import _files
from .formats import FORMATS
from .models import checkpoint, families, hub, quantized
from .models.model import open_checkpoint
from .models.quantized import WRITTEN, Matrix
from .quantize import check_form, quantize

SHARD_BYTES = 2_000_000_000
# Of a model on the hub: what from_pretrained reads, and what is carried over.
FILES = (*hub.EVERYTHING, "*.py", "*.txt", "*.model")
NOT_CARRIED = ("config.json", ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint that is not quantised: a folder or a hub id")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format of the routed experts")
    parser.add_argument("--out", required=True, metavar="FOLDER", type=Path, help="a new or an empty folder")


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    try:
        done = quantize_folder(args.folder, args.to, args.out, progress=True)
    except ValueError as error:
        print(f"dmoe quantize: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {done.matrices} matrices of experts in {args.to}; {done.size / 1e9:.2f} GB, {done.files} "
        f"file{'s' * (done.files > 1)}, {done.size / done.size_before:.0%} of {done.size_before / 1e9:.2f} GB; "
        f"{time.perf_counter() - begin:.0f} s"
    )
    return 0


class Written(NamedTuple):
    """Quantised matrices, bytes of all tensors before and after, and the number of files they are in."""

    matrices: int
    size_before: int
    size: int
    files: int


def quantize_folder(folder, form: str, out, *, shard_bytes: int = SHARD_BYTES, progress: bool = False) -> Written:
    """Writes a checkpoint like `folder`, with its routed experts in a format ("fp8", "int8", "int4"), to the folder `out`.

    Everything else is left alone: the other tensors bit for bit, the keys of config.json, which gets a quantization_config,
    and the files beside them (tokenizer, code; not weights of other kinds). Tensors are written in files of at most
    `shard_bytes`, or of one tensor; such a file and a layer of the source are what is held in memory. config.json comes
    last. progress: shows a bar on a terminal.

    Raises ValueError, one line, before anything is written: for a format that is unknown or can't hold these experts, an
    `out` that is not empty, a checkpoint that is quantised already or that `dmoe_ops.load` would
    refuse, and a full disk. A value that is not finite, and a disk that fails, show later: what was written is removed.
    """
    check_form(form)
    out = Path(out)
    _check_empty(out)
    folder = hub.folder_of(folder, files=FILES)
    config = families.config_of(folder)
    if config.storage:
        raise ValueError(f"{_files.short(folder)} must not be quantised already, got {config.storage.form}")
    stored, model = open_checkpoint(config, folder)
    model.quantize(form)
    tensors = {name: value for name, value in model.checkpoint_tensors().items()}
    matrices = {name: value for name, value in tensors.items() if isinstance(value, Matrix)}

    sizes = {name: _size(WRITTEN[form].pack(name, value)) for name, value in matrices.items()}
    sizes = {name: sizes.get(name) or stored.nbytes(name) for name in stored.file_of}
    shards = list(_cut(sizes, shard_bytes))
    others = [file for file in sorted(folder.iterdir()) if _files.is_file(file) and not file.name.endswith(NOT_CARRIED)]
    _check_space(out, sum(sizes.values()) + sum(file.stat().st_size for file in others))
    done = Written(len(matrices), sum(map(stored.nbytes, sizes)), sum(sizes.values()), len(shards))

    with (
        _filling(out),
        tqdm(total=done.size_before, unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        weight_map = {}
        for i, names in enumerate(shards, 1):
            file = checkpoint.SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            bar.set_description(file)
            found = {}
            for name, tensor in stored.stream(names):
                found |= _quantized(name, tensor, form, stored) if name in matrices else {name: tensor.clone()}
                bar.update(tensor.nbytes)
            save_file(found, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(found, file)
        if len(shards) > 1:
            index = dict(metadata=dict(total_size=done.size), weight_map=dict(sorted(weight_map.items())))
            _write_json(out / checkpoint.INDEX, index)
        for other in others:
            shutil.copyfile(other, out / other.name)
        values = checkpoint.read_json(folder / "config.json")
        _write_json(out / "config.json", {**values, "quantization_config": quantized.config_of(form, tensors)})
    return done


def _quantized(name: str, weight, form: str, stored: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    if not checkpoint.is_finite(weight.float()):
        raise ValueError(f"tensor {name} in {stored.file_of[name]} must be finite in float32, got NaN or infinity")
    return WRITTEN[form].pack(name, Matrix(*quantize(weight, form)))


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _cut(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """The names in their order, in groups of at most `most` bytes; larger ones stand alone."""
    group, held = [], 0
    for name, size in sizes.items():
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_empty(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "something in it" if out.is_dir() else "a file"
            raise ValueError(f"{_files.short(out)} must be a new or an empty folder, got {what}")
    except OSError as error:
        raise ValueError(f"{_files.short(out)} can't be written: {error.strerror}") from None


def _check_space(out: Path, size: int) -> None:
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < size:
        raise ValueError(f"{_files.short(out)} takes {size / 1e9:.2f} GB, got {free / 1e9:.2f} GB of free space")


@contextlib.contextmanager
def _filling(folder: Path) -> Iterator[None]:
    """Makes the folder, which is new or empty, and leaves it so where what is done in it fails."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for file in folder.iterdir() if folder.is_dir() else ():
            file.unlink()
        if new and folder.is_dir():
            folder.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            why = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise ValueError(f"{_files.short(folder)} can't be written: {_files.short(why)}") from None
        raise
