"""Checkpoint folders: JSON, and safetensors (one file or a sharded index) read into tensors that already exist."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import _files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_json(path: Path) -> dict:
    """Raises ValueError, naming the file, when it is missing or holds no JSON object."""
    if not _files.is_file(path):
        raise ValueError(f"{path.name} is missing in {_files.short(path.parent)}")
    value = _files.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


class Checkpoint:
    """The tensors of a folder: the file, shape and dtype of each, read from the headers alone.

    Raises ValueError, naming the file, when one is missing, truncated or corrupt.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self._files():
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                    header = file.get_slice(name)
                    self.file_of[name] = path
                    self.shapes[name], self.dtypes[name] = header.get_shape(), header.get_dtype()

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if not _files.is_file(index):
            if not _files.is_file(self.folder / SINGLE):
                raise ValueError(f"{SINGLE} or {INDEX} is missing in {self.folder}")
            return [self.folder / SINGLE]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{index} must hold a weight_map from tensor names to file names")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not _files.is_file(self.folder / shard):
                raise ValueError(f"{_files.short(shard)}, named by {INDEX}, is missing in {self.folder}")
        return [self.folder / shard for shard in shards]

    def check(self, targets: dict[str, torch.Tensor], ignore=()) -> None:
        """Raises ValueError, naming the tensor, unless the folder holds exactly the `targets`, in their shapes.
        Names that end with one of `ignore` may be there besides."""
        missing = [name for name in targets if name not in self.file_of]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"tensor {missing[0]} is missing in {self.folder}{more}")
        for name, target in targets.items():
            if self.shapes[name] != list(target.shape):
                raise ValueError(f"tensor {name} must have shape {list(target.shape)}, got {self.shapes[name]}")
            if self.dtypes[name] not in DTYPES:
                raise ValueError(f"tensor {name} must be one of {', '.join(DTYPES)}, got {self.dtypes[name]}")
        for name in self.file_of:
            if name not in targets and not name.endswith(tuple(ignore)):
                raise ValueError(f"tensor {name} in {self.file_of[name]} has no place in this model")

    def read(self, targets: dict[str, torch.Tensor]) -> None:
        """Fills the targets, cast to their dtypes. A file is mapped anew for each layer, so that the pages of one layer
        are all that is held besides the targets."""
        groups = defaultdict(list)
        for name in targets:
            groups[self.file_of[name], ".".join(name.split(".")[:3])].append(name)
        for (path, _), names in groups.items():
            with _open(path) as file:
                for name in names:
                    targets[name].copy_(file.get_tensor(name))


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from None


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
