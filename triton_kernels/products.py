"""The matrix product that all kernels share."""

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
