"""The experts' weights as kernels read them, plain or in a format of `dmoe_ops.formats`.

Products take the quantised numbers themselves: each is exact in bfloat16 and in float16, so nothing is rounded before the
product. What they sum up to over a group of 128 columns (int8: over a whole row) is multiplied by the scale in float32.

FORMAT is "plain", "int8", "int4", "fp8", or "fp8_bits": fp8 on a chip without that conversion.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import ExpertWeights
from .products import INTERPRETED, multiply, rounded

GROUP = tl.constexpr(128)
TWO_TO_120 = tl.constexpr(2.0**120)


class Stored(NamedTuple):
    """The weights of a layer as launchers pass them on. up, down: the weight, its scale, the shared expert's weight and its
    scale, None where there is none; formats: the FORMAT and SHARED_FORMAT of kernels; intermediate: I of the experts and
    of the shared one, 0 without one; expert_map, activation: as in `ExpertWeights`."""

    up: tuple
    down: tuple
    formats: dict[str, str]
    intermediate: int
    shared_intermediate: int
    expert_map: torch.Tensor | None
    activation: str

    @property
    def shared_alike(self) -> bool:
        """Whether the shared expert can pass for one more of the experts."""
        alike = self.formats["FORMAT"] == self.formats["SHARED_FORMAT"]
        return alike and self.intermediate == self.shared_intermediate


def stored(weights: ExpertWeights, has_fp8: bool) -> Stored:
    """has_fp8: whether the chip converts float8_e4m3fn."""
    w13, w2, shared_w13, shared_w2, *scales, _, expert_map, activation = weights
    formats = {torch.float8_e4m3fn: "fp8" if has_fp8 else "fp8_bits", torch.int8: "int8", torch.uint8: "int4"}
    form = formats.get(w13.dtype, "plain")
    shared_form = form if shared_w13 is None else formats.get(shared_w13.dtype, "plain")
    return Stored(
        (_bytes(w13), scales[0], _bytes(shared_w13), scales[2]),
        (_bytes(w2), scales[1], _bytes(shared_w2), scales[3]),
        dict(FORMAT=form, SHARED_FORMAT=shared_form),
        w13.shape[1] // 2,
        0 if shared_w13 is None else shared_w13.shape[0] // 2,
        expert_map,
        activation,
    )


def _bytes(weight):
    """fp8 as uint8: not every chip has a pointer to it."""
    return weight.view(torch.uint8) if weight is not None and weight.dtype == torch.float8_e4m3fn else weight


@triton.constexpr_function
def stored_columns(columns, form):
    """Elements of a row of `columns` weights."""
    return columns // 2 if form == "int4" else columns


@triton.constexpr_function
def row_block(form):
    """Rows that share a scale."""
    return 128 if form.startswith("fp8") else 1


@triton.constexpr_function
def scales_per_row(columns, form):
    return 1 if form == "int8" else (columns + 127) // 128


@triton.constexpr_function
def scales_per_half(rows, columns, form):
    """Scales of `rows` rows, the gate's or the up's of a w13, or all of a w2."""
    return (rows + row_block(form) - 1) // row_block(form) * scales_per_row(columns, form)


@triton.constexpr_function
def scaled_by_group(form):
    return form not in ("plain", "int8")


@triton.jit
def of_expert(
    w_ptr,
    scale_ptr,
    expert,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Where the weight [HALVES * ROWS, COLUMNS] of one expert begins, and its scales."""
    w_ptr += expert * (HALVES * ROWS * stored_columns(COLUMNS, FORMAT))
    if FORMAT == "plain":
        scale_ptr = w_ptr  # there are none, and a function returns no None
    else:
        scale_ptr += expert * (HALVES * scales_per_half(ROWS, COLUMNS, FORMAT))
    return w_ptr, scale_ptr


@triton.jit
def from_e4m3(byte):
    """float32 of float8_e4m3fn, by its bits: the exponent is moved to where float32 has its own, 120 steps too low."""
    bits = (byte.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    value = bits.to(tl.float32, bitcast=True) * TWO_TO_120
    return tl.where(tl.abs(value) == 480, float("nan"), value)  # 0x7F and 0xFF


@triton.jit
def from_nibbles(byte, DTYPE: tl.constexpr):
    """[rows, 2 * columns] of packed bytes [rows, columns], the low nibbles in the even columns. A nibble n is put into the
    last bits of 128.0 (bfloat16) or of 1024.0 (float16): both nibbles of a byte at once."""
    BF16: tl.constexpr = tl.bfloat16 == DTYPE and not INTERPRETED
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    offset = tl.full([1, 1], 136.0 if BF16 else 1032.0, FLOAT)  # the constant that the bits add, and 8
    bits = byte.to(tl.uint32)
    pair = ((bits | (bits << 12)) & 0x000F000F) | (0x43004300 if BF16 else 0x64006400)
    low = (pair & 0xFFFF).to(tl.uint16).to(FLOAT, bitcast=True) - offset
    high = (pair >> 16).to(tl.uint16).to(FLOAT, bitcast=True) - offset
    return tl.reshape(tl.join(low, high), [byte.shape[0], 2 * byte.shape[1]]).to(DTYPE)


@triton.jit
def numbers(stored, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers of a tile as it is stored, in DTYPE, exactly; without their scale."""
    if FORMAT == "fp8":
        stored = stored.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    elif FORMAT == "fp8_bits":
        stored = from_e4m3(stored)
    elif FORMAT == "int4":
        stored = from_nibbles(stored, DTYPE)
    elif INTERPRETED:  # Triton 3.6's interpreter casts to the bits of bfloat16
        stored = stored.to(tl.float32)
    return stored.to(DTYPE)


@triton.jit
def load_numbers(
    rows_ptr,
    row_mask,
    first,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Columns first .. first + BLOCK_K of rows of a weight: [rows, BLOCK_K]. rows_ptr [rows, 1]: where each begins."""
    column = (first // 2 if FORMAT == "int4" else first) + tl.arange(0, stored_columns(BLOCK_K, FORMAT))
    if MASKED:
        mask = row_mask[:, None] & (column < stored_columns(COLUMNS, FORMAT))[None, :]
        stored = tl.load(rows_ptr + column[None, :], mask=mask, other=0)
    else:
        stored = tl.load(rows_ptr + column[None, :])
    return numbers(stored, FORMAT, DTYPE)


@triton.jit
def scale_rows(scale_ptr, half, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Pointers to the first scale of each row of a half; `half` is 0 for a w2."""
    block = row // row_block(FORMAT) * scales_per_row(COLUMNS, FORMAT)
    return scale_ptr + half * scales_per_half(ROWS, COLUMNS, FORMAT) + block


@triton.jit
def load_scales(rows_ptr, row_mask, first, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """float32 [rows]: the scales of column `first` (at most that of the last column); rows_ptr: from `scale_rows`."""
    group = tl.minimum(first // GROUP, scales_per_row(COLUMNS, FORMAT) - 1)
    return tl.load(rows_ptr + group, mask=row_mask, other=0.0).to(tl.float32)


@triton.jit
def product(
    w_ptr,
    scale_ptr,
    half,
    row,
    row_mask,
    column_ptr,
    column_mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Rows of one weight [halves * ROWS, COLUMNS] times columns: float32 [rows, columns]. column_ptr [1, columns]: where
    each begins. MASKED: not all rows are there, or COLUMNS is no multiple of BLOCK_K."""
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + (half * ROWS + row).to(tl.int64)[:, None] * stored_columns(COLUMNS, FORMAT)
    acc = tl.zeros([row.shape[0], column_mask.shape[0]], tl.float32)
    if FORMAT != "plain":
        scales = scale_rows(scale_ptr, half, row, ROWS, COLUMNS, FORMAT)
        scale = load_scales(scales, row_mask, 0, COLUMNS, FORMAT)
    for first in tl.range(0, COLUMNS, BLOCK_K, num_stages=STAGES):
        at = first + k
        x = tl.load(column_ptr + at[:, None], mask=column_mask[None, :] & (at < COLUMNS)[:, None], other=0.0)
        w = load_numbers(w_rows, row_mask, first, COLUMNS, BLOCK_K, MASKED, FORMAT, x.dtype)
        if scaled_by_group(FORMAT):
            following = load_scales(scales, row_mask, first + BLOCK_K, COLUMNS, FORMAT)  # ahead: it is not pipelined
            acc += multiply(w, x, tl.zeros(acc.shape, tl.float32)) * scale[:, None]
            scale = following
        else:
            acc = multiply(w, x, acc)
    if FORMAT == "int8":
        acc *= scale[:, None]
    return acc


@triton.jit
def dequantised(
    w_ptr,
    scale_ptr,
    half,
    row,
    column,
    mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Values of a weight at row and column, two tensors that broadcast to the shape of `mask`, rounded to DTYPE: what a
    gradient takes, whose sums run along rows or across the groups of columns."""
    at = (half * ROWS + row).to(tl.int64) * stored_columns(COLUMNS, FORMAT)
    if FORMAT == "plain":
        return tl.load(w_ptr + at + column, mask=mask, other=0.0)
    if FORMAT == "int4":
        byte = tl.load(w_ptr + at + column // 2, mask=mask, other=0)
        value = ((byte >> (column % 2 * 4).to(tl.uint8)) & 15).to(tl.float32) - 8.0
    else:
        value = numbers(tl.load(w_ptr + at + column, mask=mask, other=0), FORMAT, tl.float32)
    group = 0 if FORMAT == "int8" else column // GROUP
    scale = tl.load(scale_rows(scale_ptr, half, row, ROWS, COLUMNS, FORMAT) + group, mask=mask, other=0.0)
    return rounded(value * scale.to(tl.float32), DTYPE)
