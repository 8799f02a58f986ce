"""The formats of quantised expert weights, and the tuple in which the weights of a layer travel.

The dtype of a weight [..., rows, columns] decides its format; dequantised, it is float32(q) * float32(scale).

| format | dtype | scale |
|---|---|---|
| fp8 | float8_e4m3fn | float32 [..., ceil(rows / 128), ceil(columns / 128)], one per 128 x 128 block |
| int8 | int8 | float32 [..., rows], one per output row |
| int4 | uint8 [..., rows, columns / 2] | bfloat16 or float32 [..., rows, ceil(columns / 128)], one per 128 columns |

fp8 is the layout of DeepSeek-V3's checkpoints; the gate rows and the up rows of a w13 are blocked apart in it: 2 *
ceil(I / 128) rows of scales. int4 holds two values per byte, q = nibble - 8, the even column in the low nibble; columns
must be even. The last block or group may be ragged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

GROUP = 128
NOT_LOADED = -2  # in an expert_map
FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
QUANTIZED = tuple(FORMATS.values())
ACTIVATIONS = ("silu", "gelu_tanh")  # of gate; csrc/activation.h has them too
MATRICES = ("w13", "w2", "shared_w13", "shared_w2")


def stored_columns(dtype: torch.dtype, columns: int) -> int:
    """Elements of a row of `columns` weights."""
    return -(-columns // 2) if dtype == torch.uint8 else columns


def scale_shape(dtype: torch.dtype, rows: int, columns: int, halves: int = 1) -> list[int]:
    """Shape of the scale of one quantised weight [rows, columns]; halves: 2 for a w13, else 1."""
    if dtype == torch.int8:
        return [rows]
    groups = -(-columns // GROUP)
    return [rows if dtype == torch.uint8 else halves * -(-(rows // halves) // GROUP), groups]


def scale_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float32) if dtype == torch.uint8 else (torch.float32,)


def empty(weight, form: str, *, halves: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """An uninitialised (quantised weight, scale) for a weight [..., rows, columns] in a format; `halves`: see `scale_shape`.
    Scales of int4 are bfloat16. Raises ValueError for int4 with an odd number of columns."""
    check_columns(weight, form)
    *lead, rows, columns = weight.shape
    dtype = FORMATS[form]
    values = weight.new_empty([*lead, rows, stored_columns(dtype, columns)], dtype=dtype)
    scale = weight.new_empty([*lead, *scale_shape(dtype, rows, columns, halves)], dtype=scale_dtypes(dtype)[0])
    return values, scale


def check_columns(weight, form: str, name: str = "weight") -> None:
    if form == "int4" and weight.shape[-1] % 2:
        raise ValueError(f"{name} must have an even number of columns for int4, got {list(weight.shape)}")


class ExpertWeights(NamedTuple):
    """The experts of a layer, in the order of `dmoe::_moe_experts_out`. Scales stand beside quantised weights alone;
    `quantize_activations`: x and h are rounded to int8 as well; `expert_map`: where each of the model's experts lies in w13
    and w2, see `reference.moe_experts`; `activation`: one of `ACTIVATIONS`."""

    w13: torch.Tensor
    w2: torch.Tensor
    shared_w13: torch.Tensor | None = None
    shared_w2: torch.Tensor | None = None
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    shared_w13_scale: torch.Tensor | None = None
    shared_w2_scale: torch.Tensor | None = None
    quantize_activations: bool = False
    expert_map: torch.Tensor | None = None
    activation: str = "silu"

    @property
    def experts(self) -> int:
        """Of the model: topk_ids count up to it."""
        return (self.w13 if self.expert_map is None else self.expert_map).shape[0]

    @property
    def quantized(self) -> bool:
        return self.w13.dtype in QUANTIZED

    def tensors(self) -> tuple:
        """All fields but `quantize_activations` and `activation`."""
        return *self[:8], self.expert_map

    def local(self, topk_ids) -> torch.Tensor:
        """topk_ids with the rows of w13 and w2 in place of the experts' ids. Waits for no device."""
        if self.expert_map is None:
            return topk_ids
        experts = self.expert_map.shape[0]
        rows = self.expert_map[topk_ids.clamp(0, experts - 1).long()]
        return rows.masked_fill((rows < 0) | (topk_ids < 0) | (topk_ids >= experts), -1)
