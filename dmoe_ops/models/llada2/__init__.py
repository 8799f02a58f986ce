"""LLaDA2.0 to 2.2 and dMoE-16B.

Facts from the released code and checkpoints (LLaDA2.0-mini, LLaDA2.0-flash, dMoE-16B); tensor names are theirs.
"""

from typing import ClassVar

from ..config import OWN, own_policy, trained_for
from ..devices import default_device, usable
from ..layers import MLP, Attention, Decoder, Layer, RMSNorm, rotary
from ..model import DiffusionModel, open_checkpoint
from ..model import DiffusionOutput as LLaDA2Output
from ..names import checkpoint_tensors
from .config import LLaDA2Config, routing_for

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


class LLaDA2ForDiffusion(DiffusionModel):
    """A LLaDA2 model that routes by block; see `DiffusionModel`."""

    config_type: ClassVar[type[LLaDA2Config]] = LLaDA2Config
