"""The matrix product and the rounding that all kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def multiply(a, b, acc):
    """acc + a @ b in float32; float32 operands stay float32 (no tf32)."""
    if INTERPRETED:  # Triton 3.6's interpreter multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """A float32 value in DTYPE, rounded to the nearest."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # Triton 3.6's interpreter cuts off the bits instead
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)
