"""Block-level expert routing for Mixture-of-Experts diffusion LLMs (dMoE, arXiv 2605.30876) as torch ops."""

from .engines.hf import PatchHandle, patch
from .experts import moe_experts
from .layer import BlockMoE, block_moe
from .models.families import load
from .router import block_route
from .routing import BlockRouting, RoutingResult

__version__ = "0.1.0"
__all__ = [
    "BlockMoE",
    "BlockRouting",
    "PatchHandle",
    "RoutingResult",
    "block_moe",
    "block_route",
    "load",
    "moe_experts",
    "patch",
]
