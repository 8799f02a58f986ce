"""Models that decode with block routing."""

from .attention import KVCache
from .decoding import Block, Decoded, DecodingStats
from .llada2 import LLaDA2Config, LLaDA2ForDiffusion, LLaDA2Output
from .text import TextCodec

__all__ = [
    "Block",
    "Decoded",
    "DecodingStats",
    "KVCache",
    "LLaDA2Config",
    "LLaDA2ForDiffusion",
    "LLaDA2Output",
    "TextCodec",
]
