"""Checkpoint folders: JSON, and safetensors (one file or a sharded index) read into tensors that already exist."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import _files
from .quantized import SHAPE, Matrix, Storage, dequantize

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# By which transformers finds the classes of a folder that `write` wrote; the files are copies of those in AUTO_CLASSES.
AUTO_CLASSES = Path(__file__).resolve().parent / "auto_classes"
AUTO_MAP = {
    "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
    "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
}


def dtype_of(value) -> torch.dtype | None:
    """A dtype of torch, or the name of one ("bfloat16", "torch.bfloat16"); None and "auto" are None: as stored."""
    if value is None or value == "auto":
        return None
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    found = by_name.get(str(value).removeprefix("torch.")) if isinstance(value, (str, torch.dtype)) else None
    if found is None:
        names = ", ".join(by_name)
        raise ValueError(f"dtype must be None or a floating-point type of torch ({names}) or its name, got {value!r}")
    return found


def read_json(path: Path) -> dict:
    """Raises ValueError, naming the file, when it is missing or holds no JSON object."""
    if not _files.is_file(path):
        raise ValueError(f"{path.name} is missing in {_files.short(path.parent)}")
    value = _files.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


class Checkpoint:
    """The tensors of a folder: the file, shape and dtype of each, read from the headers alone. Of sharded files the index
    says which tensor lies where. storage: how quantised matrices are stored, where the config has them; matrices: the
    modules (names without .weight) that hold one.

    Raises ValueError, naming the file, when one is missing, truncated or corrupt, or when index and files disagree.
    """

    def __init__(self, folder: Path, storage: Storage | None = None):
        self.folder, self.storage = folder, storage
        self._headers: dict[Path, tuple[dict, int]] = {}
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, str] = {}
        shard_of = self._index()
        for shard in sorted(set(shard_of.values())) if shard_of else [SINGLE]:
            path = folder / shard
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                    if shard_of and name not in shard_of:
                        raise ValueError(f"tensor {_files.short(name)} in {path} is not in {INDEX}")
                    if shard_of and shard_of[name] != shard:
                        continue  # a copy that the index does not mean
                    header = file.get_slice(name)
                    self.file_of[name] = path
                    self.shapes[name], self.dtypes[name] = header.get_shape(), header.get_dtype()
        for name, shard in shard_of.items():
            if name not in self.file_of:
                raise ValueError(f"tensor {_files.short(name)} is not in {_files.short(shard)}, where {INDEX} has it")
        parts = [(*name.rpartition("."), dtype) for name, dtype in self.dtypes.items()]
        self.matrices = {module for module, _, end, dtype in parts if storage and storage.holds(end, dtype)}

    def _index(self) -> dict[str, str]:
        """The shard of every tensor; nothing where the folder holds a single file."""
        index = self.folder / INDEX
        if not _files.is_file(index):
            if not _files.is_file(self.folder / SINGLE):
                raise ValueError(f"{SINGLE} or {INDEX} is missing in {self.folder}")
            return {}
        shard_of = read_json(index).get("weight_map")
        if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(v, str) for v in shard_of.values()):
            raise ValueError(f"{index} must hold a weight_map from tensor names to file names")
        for shard in set(shard_of.values()):
            # Plain names alone: a path could lead out of the folder.
            if shard in ("", ".", "..") or any(c in shard for c in "/\\:"):
                raise ValueError(f"{INDEX} must name files of its own folder, got {_files.short(shard)}")
            if not _files.is_file(self.folder / shard):
                raise ValueError(f"{_files.short(shard)}, named by {INDEX}, is missing in {self.folder}")
        return shard_of

    def check(self, targets: dict[str, torch.Tensor | Matrix], ignore=()) -> None:
        """Raises ValueError, naming the tensor, unless the folder holds exactly the `targets`, in their shapes: a Matrix
        quantised, another matrix quantised or not. Names that end with one of `ignore` may be there besides."""
        wanted = {part: is_ for name, target in targets.items() for part, is_ in self._parts(name, target).items()}
        missing = [name for name in wanted if name not in self.file_of]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"tensor {missing[0]} is missing in {self.folder}{more}")
        for name, (shape, dtypes) in wanted.items():
            if self.shapes[name] != shape:
                raise ValueError(f"tensor {name} must have shape {shape}, got {self.shapes[name]}")
            if self.dtypes[name] not in dtypes:
                raise ValueError(f"tensor {name} must be one of {', '.join(dtypes)}, got {self.dtypes[name]}")
        for name in self.file_of:
            if name not in wanted and not name.endswith(tuple(ignore)):
                raise ValueError(f"tensor {_files.short(name)} in {self.file_of[name]} has no place in this model")

    def _parts(self, name: str, target) -> dict[str, tuple[list[int], tuple[str, ...]]]:
        """The tensors that a target is read from, with the shape and the possible dtypes of each."""
        module = name.removesuffix(".weight")
        if isinstance(target, Matrix) or (module in self.matrices and target.dim() == 2):
            return {f"{module}.{end}": is_ for end, is_ in self.storage.tensors(target.shape).items()}
        return {name: (list(target.shape), tuple(DTYPES))}

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * DTYPES.get(self.dtypes[name], torch.float64).itemsize

    def extent(self, name: str) -> tuple[Path, int, int]:
        """Where a tensor lies: (file, offset, bytes)."""
        path = self.file_of[name]
        header, begin = self._headers.get(path) or self._headers.setdefault(path, _header(path))
        first, end = header[name]["data_offsets"]
        return path, begin + first, end - first

    def stream(self, names) -> Iterator[tuple[str, torch.Tensor]]:
        """The names with their tensors as they are stored, layer by layer; a tensor is good until the next is asked for."""
        for group, get in self._layers(names):
            for name in group:
                yield name, get(name)

    def read(self, targets: dict[str, torch.Tensor | Matrix]) -> None:
        """Fills the targets, cast to their dtypes; quantised matrices bit for bit, or dequantised where the target is a
        tensor. Raises ValueError, naming the tensor, for a value that is not finite or becomes infinite in the cast."""
        for names, get in self._layers(targets):
            for name in names:
                self._fill(name, targets[name], get)

    def _layers(self, names) -> Iterator[tuple[list[str], Callable]]:
        """The names by layer, each with a function that reads a tensor. A file is mapped anew for each layer, so that the
        pages of one are all that is held."""
        layers = defaultdict(list)
        for name in names:
            layers[".".join(name.split(".")[:3])].append(name)
        for group in layers.values():
            with contextlib.ExitStack() as stack:
                opened = functools.cache(lambda path, stack=stack: stack.enter_context(_open(path)))
                yield group, lambda name, opened=opened: opened(self.file_of[name]).get_tensor(name)

    def _fill(self, name: str, target: torch.Tensor | Matrix, get: Callable) -> None:
        parts = {part: get(part) for part in self._parts(name, target)}
        if isinstance(target, Matrix) or len(parts) > 1:
            stored = self._unpack(name, target.shape, parts)
        else:
            stored = parts[name]
        if isinstance(target, Matrix):
            target.weight.copy_(stored.weight)
            target.scale.copy_(stored.scale)
            return
        stored = dequantize(stored, target.shape[1]) if isinstance(stored, Matrix) else stored
        target.copy_(stored)
        if not is_finite(target):
            why = f" as {target.dtype}".replace("torch.", "") if is_finite(stored) else ""
            path = self.file_of[next(iter(parts))]
            raise ValueError(f"tensor {name} in {path} must be finite, got NaN or infinity{why}")

    def _unpack(self, name: str, shape, parts: dict[str, torch.Tensor]) -> Matrix:
        for part, tensor in parts.items():
            if part.endswith(SHAPE) and tensor.tolist() != list(shape):
                raise ValueError(f"tensor {part} must be {list(shape)}, got {tensor.tolist()}")
            if not is_finite(tensor):
                raise ValueError(f"tensor {part} in {self.file_of[part]} must be finite, got NaN or infinity")
        return self.storage.unpack(name, parts, shape[1])


def is_finite(tensor) -> bool:
    """One pass over the tensor, and no copy: NaN is the least and the largest of what holds one."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # has no infinity, and no least of its own in torch
        return bool((tensor.view(torch.uint8) & 0x7F != 0x7F).all())
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is truncated or corrupt: {_files.short(said)}") from None


def _header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file that has been opened before, and where its data begin."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Writes config.json, model.safetensors and the files of AUTO_CLASSES that the config's auto_map names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for reference in config.get("auto_map", {}).values():
        name = reference.split(".")[0] + ".py"
        shutil.copyfile(AUTO_CLASSES / name, folder / name)
