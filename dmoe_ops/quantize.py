"""Quantisers: float weights to the formats of `dmoe_ops.formats`, rounded to nearest, ties to even."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .formats import FORMATS, GROUP, check_columns

# The largest value of each format, to which the largest of a block is mapped: nothing saturates, and no step is left
# unused. int8 and int4 give up -128 and -8, so that both signs reach equally far.
LARGEST = {"fp8": 448, "int8": 127, "int4": 7}


def check_form(form) -> None:
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")


def quantize(weight, form: str, *, halves: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(quantised weight, scale) of a float weight [..., rows, columns], in a format of `dmoe_ops.formats`; computed in
    float32, one matrix at a time. halves: 2 for a w13, whose gate and up rows are blocked apart in fp8.

    scale = max |w| of its block / 448 (fp8), / 127 (int8), / 7 (int4, in bfloat16: values are rounded by the scale as it is
    stored); 1 where that is 0. Raises ValueError, naming the argument, for an unknown format, int4 with an odd number of
    columns, and values that are not finite in float32.
    """
    check_form(form)
    if not weight.is_floating_point() or weight.dim() < 2 or not weight.numel():
        raise ValueError(f"weight must be float [..., rows, columns], got {weight.dtype} {list(weight.shape)}")
    if halves not in (1, 2) or weight.shape[-2] % halves:
        raise ValueError(f"weight must have rows in halves={halves!r} equal parts, got {list(weight.shape)}")
    check_columns(weight, form)
    if weight.dim() > 2:
        values, scales = zip(*(quantize(w, form, halves=halves) for w in weight))
        return torch.stack(values), torch.stack(scales)

    half, columns = weight.shape[0] // halves, weight.shape[1]
    rows, width = {"fp8": (GROUP, GROUP), "int8": (1, columns), "int4": (1, GROUP)}[form]
    wide = F.pad(weight.float().unflatten(0, (halves, half)), (0, -columns % width, 0, -half % rows))
    if not wide.isfinite().all():
        raise ValueError("weight must be finite in float32, got NaN or infinity")
    blocks = wide.unflatten(2, (-1, width)).unflatten(1, (-1, rows))  # [halves, blocks, rows, blocks, width]
    scale = blocks.abs().amax((2, 4), keepdim=True) / LARGEST[form]
    scale = scale.to(torch.bfloat16 if form == "int4" else torch.float32)
    scale = scale.masked_fill(scale == 0, 1)
    # A scale so small that it lost digits may leave a quotient above the largest value.
    values = (blocks / scale.float()).clamp(-LARGEST[form], LARGEST[form])
    values = values.flatten(3).flatten(1, 2)[:, :half, :columns].reshape(weight.shape)
    scale = scale.flatten(0, 2).flatten(1) if form != "int8" else scale.flatten()
    if form == "fp8":
        return values.to(FORMATS[form]), scale
    values = values.round().to(torch.int8)
    return (pack(values) if form == "int4" else values), scale


def pack(values) -> torch.Tensor:
    """uint8 [..., columns / 2] of whole numbers [..., columns] from -8 to 7; the even column in the low nibble."""
    low, high = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4
