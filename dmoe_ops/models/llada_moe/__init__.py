"""LLaDA-MoE-7B-A1B: every token sees all others, and no key or value is ever final, so each step computes the whole text.

Facts from the authors' modeling_lladamoe.py and the generate of their model card, which is LLaDA's (github ML-GSAI/LLaDA);
tensor names are theirs.
"""

from typing import ClassVar

from ..model import DiffusionModel
from .config import LLaDAMoEConfig

__all__ = ["LLaDAMoEConfig", "LLaDAMoEForDiffusion"]


class LLaDAMoEForDiffusion(DiffusionModel):
    """A LLaDA-MoE model that routes by block; see `DiffusionModel`."""

    config_type: ClassVar[type[LLaDAMoEConfig]] = LLaDAMoEConfig
