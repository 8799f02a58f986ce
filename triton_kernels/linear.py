"""A product with few rows, x [rows, K] @ weight [N, K].T, in parts along K: the kernels behind it add them up as they load.

Each program's piece of the weights is loaded before it waits for x, by programmatic dependent launch, while the kernels in
front of it run; so a product takes little more than its x and its dot. One launch, no barrier between programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import multiply, rounded

BLOCK_N, BLOCK_K = 64, 256  # 32 KB of weights: all 384 programs of 3072 x 2048 are resident at once. UNMEASURED


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    parts_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts: float32 [K / BLOCK_K, rows, N]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight = tl.load(weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :], mask=(n < N)[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=(row < rows)[:, None], other=0.0)
    out = multiply(x, tl.trans(weight), tl.zeros([ROWS, BLOCK_N], tl.float32))
    at = (tl.program_id(1) * rows + row)[:, None] * N + n[None, :]
    tl.store(parts_ptr + at, out, mask=(row < rows)[:, None] & (n < N)[None, :])


@triton.jit
def whole(part_ptr, stride, mask, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of parts that lie `stride` apart, in DTYPE; PARTS = 0: a value that is whole."""
    if PARTS == 0:
        return tl.load(part_ptr, mask=mask, other=0.0)
    total = tl.load(part_ptr, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(part_ptr + part * stride, mask=mask, other=0.0)
    return rounded(total, DTYPE)


def linear_parts(x, weight, parts, pdl: bool) -> None:
    n_parts, rows, n = parts.shape
    linear_kernel[(triton.cdiv(n, BLOCK_N), n_parts)](
        x,
        weight,
        parts,
        rows,
        N=n,
        K=x.shape[1],
        ROWS=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        PDL=pdl,
        num_warps=4,
        num_stages=1,
        **(dict(launch_pdl=True) if pdl else {}),
    )
