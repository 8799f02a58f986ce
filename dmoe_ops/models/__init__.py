"""Models that decode with block routing."""

from .attention import KVCache
from .config import DiffusionConfig
from .decoding import Block, Decoded, DecodingStats
from .families import load
from .llada2 import LLaDA2Config, LLaDA2ForDiffusion, LLaDA2Output
from .llada_moe import LLaDAMoEConfig, LLaDAMoEForDiffusion
from .model import DiffusionModel, DiffusionOutput
from .qwen3_moe import SDARConfig, SDARForDiffusion
from .text import TextCodec

__all__ = [
    "Block",
    "Decoded",
    "DecodingStats",
    "DiffusionConfig",
    "DiffusionModel",
    "DiffusionOutput",
    "KVCache",
    "LLaDA2Config",
    "LLaDA2ForDiffusion",
    "LLaDA2Output",
    "LLaDAMoEConfig",
    "LLaDAMoEForDiffusion",
    "SDARConfig",
    "SDARForDiffusion",
    "TextCodec",
    "load",
]
