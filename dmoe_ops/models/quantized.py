"""Quantised matrices in checkpoints: what config.json says of them, and the tensors that hold one.

| quant_method, format | of the matrix NAME [rows, columns] | format here |
|---|---|---|
| fp8, weight_block_size [128, 128] (DeepSeek-V3) | weight F8_E4M3, weight_scale_inv, one per block | fp8 |
| compressed-tensors, float-quantized, blocks of [128, 128] | weight F8_E4M3, weight_scale | fp8 |
| compressed-tensors, int-quantized, 8 bits per channel | weight I8, weight_scale [rows, 1] | int8 |
| compressed-tensors, pack-quantized, 8 bits per channel | weight_packed, weight_scale [rows, 1], weight_shape | int8 |
| compressed-tensors, pack-quantized, 4 bits in groups of 128 | weight_packed, weight_scale, weight_shape | int4 |

weight_packed is I32 [rows, ceil(columns * bits / 32)]: bytes of q + 128, or of two q + 8, the even column in the low nibble,
filled up with zeros (compressed_tensors/compressors/pack_quantized). compressed-tensors calls float- and int-quantized
naive-quantized where activations are left alone. Whatever activations are to be rounded to, here they stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import reference
from ..formats import FORMATS, GROUP, scale_shape, stored_columns

PACKED, SHAPE = "weight_packed", "weight_shape"
SCALES = ("F32", "BF16", "F16")
PLAIN = {"fp8": "F8_E4M3", "int8": "I8"}  # the dtypes of a weight that isn't packed, by the names of safetensors
BITS = {"int8": 8, "int4": 4}


class Matrix(NamedTuple):
    """A quantised matrix in a format of `dmoe_ops.formats`."""

    weight: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> list[int]:
        rows, stored = self.weight.shape
        return [rows, 2 * stored if self.weight.dtype == torch.uint8 else stored]


class Storage(NamedTuple):
    """How a checkpoint stores its quantised matrices: the format, and what the names of weight and scale end with."""

    form: str
    weight: str = "weight"
    scale: str = "weight_scale"

    @property
    def dtype(self) -> torch.dtype:
        return FORMATS[self.form]

    def holds(self, end: str, dtype: str) -> bool:
        """Whether a tensor is part of a quantised matrix, by the end of its name and its dtype."""
        return end in (PACKED, SHAPE, self.scale) or (end == self.weight and dtype == PLAIN.get(self.form))

    def tensors(self, shape) -> dict[str, tuple[list[int], tuple[str, ...]]]:
        """The shape and the possible dtypes of each tensor of a matrix [rows, columns], the first being what `pack` gives;
        by the ends of their names."""
        rows, columns = shape
        scale = [rows, 1] if self.form == "int8" else scale_shape(self.dtype, rows, columns)
        if self.weight != PACKED:
            return {self.weight: ([rows, columns], (PLAIN[self.form],)), self.scale: (scale, SCALES)}
        width = -(-columns * BITS[self.form] // 32)
        return {PACKED: ([rows, width], ("I32",)), self.scale: (scale, SCALES), SHAPE: ([2], ("I64", "I32"))}

    def unpack(self, name: str, parts: dict[str, torch.Tensor], columns: int) -> Matrix:
        """The matrix NAME.weight from its tensors."""
        module = name.removesuffix("weight")
        weight, scale = parts[module + self.weight], parts[module + self.scale]
        if self.weight == PACKED:
            weight = weight.view(torch.uint8)[:, : stored_columns(self.dtype, columns)]
            weight = (weight ^ 0x80).view(torch.int8) if self.form == "int8" else weight
        return Matrix(weight, scale.flatten() if self.form == "int8" else scale)

    def pack(self, name: str, matrix: Matrix) -> dict[str, torch.Tensor]:
        """The tensors of the matrix NAME.weight."""
        weight, scale = matrix
        parts = {self.weight: weight, self.scale: scale[:, None] if self.form == "int8" else scale}
        if self.weight == PACKED:
            data = weight.view(torch.uint8)
            data = data ^ 0x80 if self.form == "int8" else data
            parts[PACKED] = F.pad(data, (0, -data.shape[1] % 4)).view(torch.int32)
            parts[SHAPE] = torch.tensor(matrix.shape)
        return {name.removesuffix("weight") + end: tensor for end, tensor in parts.items()}


# What is written, by format. SGLang's and vLLM's MoE layers take weight-only integers packed alone, 8 bits too.
WRITTEN = {
    "fp8": Storage("fp8", scale="weight_scale_inv"),
    "int8": Storage("int8", PACKED),
    "int4": Storage("int4", PACKED),
}
# By format of compressed-tensors, type, bits, strategy, and size of the groups or blocks.
COMPRESSED = {
    ("pack-quantized", "int", 4, "group", GROUP): WRITTEN["int4"],
    ("pack-quantized", "int", 8, "channel", None): WRITTEN["int8"],
    **{(name, "int", 8, "channel", None): Storage("int8") for name in ("int-quantized", "naive-quantized")},
    **{(name, "float", 8, "block", (GROUP, GROUP)): Storage("fp8") for name in ("float-quantized", "naive-quantized")},
}
NEUTRAL = (None, {}, [])


def dequantize(matrix: Matrix, columns: int) -> torch.Tensor:
    """float32 [rows, columns]."""
    return reference.dequantize(matrix.weight, matrix.scale.float())[:, :columns]


def storage_of(config: dict) -> Storage:
    """What a quantization_config says. Raises ValueError, naming the method or the key, for what is not supported."""
    method = config.get("quant_method", config)
    if method == "fp8":
        return _of_fp8(config)
    if method == "compressed-tensors":
        return _of_compressed_tensors(config)
    raise ValueError(
        f"quantization_config must be null or of quant_method fp8 or compressed-tensors, got {method!r:.200}"
    )


def _of_fp8(config: dict) -> Storage:
    _check(config, "weight_block_size", [[GROUP, GROUP]])
    _check(config, "activation_scheme", [None, "dynamic"])
    _check(config, "fmt", [None, "e4m3"])
    return WRITTEN["fp8"]


def _of_compressed_tensors(config: dict) -> Storage:
    sparsity = config.get("sparsity_config")
    if not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        _check(config, "sparsity_config", NEUTRAL)
    for name in ("kv_cache_scheme", "transform_config"):
        _check(config, name, NEUTRAL)
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"quantization_config.config_groups must hold groups, got {groups!r:.200}")
    found = {_of_group(f"config_groups.{name}", group, config.get("format")) for name, group in groups.items()}
    if len(found) > 1:
        forms = " and ".join(sorted(storage.form for storage in found))
        raise ValueError(f"quantization_config.config_groups must all be of one format, got {forms}")
    return found.pop()


def _of_group(name: str, group: dict, default) -> Storage:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise ValueError(f"quantization_config.{name}.weights must be an object, got {weights!r:.200}")
    if inputs is not None and not (isinstance(inputs, dict) and inputs.get("dynamic")):
        raise ValueError(f"quantization_config.{name}.input_activations must be null or dynamic, got {inputs!r:.200}")
    _check(group, "output_activations", NEUTRAL, name)
    _check(weights, "symmetric", [True], f"{name}.weights", default=True)
    _check(weights, "dynamic", [False], f"{name}.weights", default=False)
    blocks = weights.get("block_structure")
    size = tuple(blocks) if isinstance(blocks, list) else blocks
    size = weights.get("group_size") if size is None else size
    strategy = weights.get("strategy")
    size = None if strategy == "channel" else size
    key = (group.get("format") or default, weights.get("type", "int"), weights.get("num_bits", 8), strategy, size)
    found = next((storage for known, storage in COMPRESSED.items() if known == key), None)
    if found is None:
        known = "; ".join(" ".join(str(part) for part in one if part is not None) for one in COMPRESSED)
        raise ValueError(f"quantization_config.{name} must be one of {known}, got {key!r:.200}")
    return found


def _check(values: dict, key: str, allowed, name: str = "", default=None) -> None:
    value = values.get(key, default)
    if not any(value == one and type(value) is type(one) for one in allowed):
        path = ".".join(part for part in ("quantization_config", name, key) if part)
        raise ValueError(f"{path} must be {' or '.join(str(one) for one in allowed)}, got {value!r:.200}")


EMBEDDINGS = ("word_embeddings.weight", "embed_tokens.weight")


def config_of(form: str, tensors: dict[str, torch.Tensor | Matrix]) -> dict:
    """The quantization_config of a checkpoint that holds these tensors; it lists every other matrix but the embedding.
    The head is among them where it is tied to the embedding, too."""
    floats = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, Matrix) and tensor.dim() == 2}
    ignore = [name.removesuffix(".weight") for name in floats if not name.endswith(EMBEDDINGS)]
    # Engines that hold gate_proj and up_proj as one module may ask for its name alone (SGLang's LLaDA2).
    ignore += [name.replace("gate_proj", "gate_up_proj") for name in ignore if name.endswith("gate_proj")]
    ignore = sorted({"lm_head", *ignore})
    if form == "fp8":
        config = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[GROUP, GROUP])
        return dict(**config, modules_to_not_convert=ignore)
    size = dict(strategy="group", group_size=GROUP) if form == "int4" else dict(strategy="channel", group_size=None)
    weights = dict(num_bits=BITS[form], type="int", symmetric=True, dynamic=False, **size)
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    return dict(
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status="compressed",
        config_groups=dict(group_0=dict(**group, format="pack-quantized")),
        ignore=ignore,
    )
