"""LLaDA2: a block-diffusion transformer with sparse MoE layers, on `BlockMoE`.

Facts from the released code and checkpoints (LLaDA2.0-mini, LLaDA2.0-flash, dMoE-16B); tensor names are theirs.
"""

from ..devices import default_device, usable
from .config import OWN, LLaDA2Config, own_policy, routing_for, trained_for
from .layers import MLP, Attention, Decoder, Layer, RMSNorm, rotary
from .model import LLaDA2ForDiffusion, LLaDA2Output, open_checkpoint
from .names import checkpoint_tensors

__all__ = [
    "MLP",
    "OWN",
    "Attention",
    "Decoder",
    "LLaDA2Config",
    "LLaDA2ForDiffusion",
    "LLaDA2Output",
    "Layer",
    "RMSNorm",
    "checkpoint_tensors",
    "default_device",
    "open_checkpoint",
    "own_policy",
    "rotary",
    "routing_for",
    "trained_for",
    "usable",
]
