"""A model whose routed experts stay in the files of its checkpoint."""

from __future__ import annotations

import itertools

import numpy

from ..expert_memory import ExpertMemory, Extents, MemorySettings
from ..pooled import POOLED, PooledMoE
from .checkpoint import DTYPES, Checkpoint
from .names import PROJECTIONS
from .quantized import PACKED

STORED = {name: dtype for dtype, name in DTYPES.items()}


def keep_in_files(model, stored: Checkpoint, settings: MemorySettings) -> ExpertMemory:
    """Puts a `PooledMoE` in the place of every MoE layer of a model, which may be on the meta device, and returns the memory
    that they share. Raises ValueError, in one line, for experts whose bytes in the files are not those in memory."""
    layers = [layer for layer in model.model.layers if hasattr(layer.mlp, "w13")]
    forms = {moe.form for moe in model.moe_layers}
    if len(forms) > 1:
        raise ValueError(f"expert_memory takes experts of one format in all layers, got {sorted(map(str, forms))}")
    parts = [getattr(model.moe_layers[0], name) for name in POOLED]
    one = tuple(part if part is None else part[0] for part in parts)
    files: dict[str, int] = {}
    names = {id(module): name for name, module in model.named_modules()}
    pieces = [_of_layer(names[id(layer.mlp)], layer.mlp, stored, files) for layer in layers]
    memory = ExpertMemory(Extents(list(files), numpy.array(pieces, dtype=numpy.int64)), one, settings)
    for i, layer in enumerate(layers):
        layer.mlp = PooledMoE(layer.mlp, memory, i)
    if settings.ahead == "gate":
        for layer, after in itertools.pairwise(layers):
            layer.mlp.following = after.mlp, layer.post_attention_layernorm, after.post_attention_layernorm
    return memory


def _of_layer(name: str, moe, stored: Checkpoint, files: dict[str, int]) -> list:
    """[experts, n, 5]: `Extents.pieces` of a layer. files: the number of each, and room for more."""
    held = [part for part in POOLED if getattr(moe, part) is not None]
    return [
        [
            piece
            for number, part in enumerate(held)
            for piece in _pieces(f"{name}.experts.{expert}", part, getattr(moe, part)[expert], number, stored, files)
        ]
        for expert in range(moe.routing.num_experts)
    ]


def _pieces(expert: str, part: str, matrix, number: int, stored: Checkpoint, files: dict[str, int]) -> list[list[int]]:
    stacked, wanted = part.removesuffix("_scale"), STORED.get(matrix.dtype)
    end = "weight"
    if stored.storage is not None and f"{expert}.gate_proj" in stored.matrices:
        end = stored.storage.weight if part == stacked else stored.storage.scale
    if end == PACKED and stored.storage.form == "int8":
        raise ValueError("expert_memory takes experts whose bytes in files are those in memory, got packed int8")
    found, at = [], 0
    for projection in PROJECTIONS[stacked]:
        tensor = f"{expert}.{projection}.{end}"
        if wanted and stored.dtypes[tensor] != wanted:
            raise ValueError(
                f"expert_memory takes experts as they are stored: tensor {tensor} is {stored.dtypes[tensor]}, and can't "
                f"become {str(matrix.dtype).removeprefix('torch.')}"
            )
        path, offset, size = stored.extent(tensor)
        found.append([files.setdefault(str(path), len(files)), number, offset, size, at])
        at += size
    if at != matrix.nbytes:
        raise ValueError(f"expert_memory takes experts without padding, got {at} bytes in {expert}.{part}")
    return found
