"""Models in the shape of Qwen3-MoE: SDAR-30B-A3B, by blocks of 4 (or 8 to 64, as its config.json says).

Facts from the authors' generate.py and dense models (github JetAstra/SDAR), from transformers' Qwen3-MoE, whose layers they
are, and from SGLang's models/sdar_moe.py; tensor names are theirs.
"""

from typing import ClassVar

from ..model import DiffusionModel
from .config import SDARConfig

__all__ = ["SDARConfig", "SDARForDiffusion"]


class SDARForDiffusion(DiffusionModel):
    """An SDAR model that routes by block; see `DiffusionModel`."""

    config_type: ClassVar[type[SDARConfig]] = SDARConfig
