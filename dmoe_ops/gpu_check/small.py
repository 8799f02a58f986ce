"""What runs under compute-sanitizer: a layer and its experts, on shapes that fill no tile.
python -m dmoe_ops.gpu_check.small --backend cuda"""

from __future__ import annotations

import argparse
import os

import torch

from .. import BlockRouting, block_moe, moe_experts

# H, I, I of the shared expert, numbers of tokens; CUDA's experts take H in 64s and I in 32s only.
SHAPES = {"cuda": (128, 64, 32, (7, 29)), "triton": (80, 48, 16, (13, 70))}
EXPERTS = 48


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="*", help="in place of the backend's")
    args = parser.parse_args()
    hidden, intermediate, shared, tokens = SHAPES[args.backend]
    # No GPU: C++ stands in for CUDA, and Triton's interpreter for Triton.
    os.environ["DMOE_BACKEND"] = "cpp" if (args.backend, args.device) == ("cuda", "cpu") else args.backend
    routing = BlockRouting(EXPERTS, 4, 8, 4, 2, min_experts=6)

    def filled(*shape):
        return (torch.randn(shape, device=args.device) * shape[-1] ** -0.5).to(torch.bfloat16)

    w13, w2 = filled(EXPERTS, 2 * intermediate, hidden), filled(EXPERTS, hidden, intermediate)
    bias = torch.zeros(EXPERTS, device=args.device)
    weights = filled(EXPERTS, hidden), bias, w13, w2, filled(2 * shared, hidden), filled(hidden, shared)
    for count in args.tokens or tokens:
        y, routed, _ = block_moe(filled(count, hidden), *weights, routing=routing)
        alone = moe_experts(filled(count, hidden), w13, w2, routed.topk_ids, routed.topk_weights)
        assert y.isfinite().all() and alone.isfinite().all()


if __name__ == "__main__":
    with torch.no_grad():
        main()
