"""Models that decode with block routing."""

from .decoding import Decoded, DecodingStats, KVCache
from .llada2 import LLaDA2Config, LLaDA2ForDiffusion, LLaDA2Output
from .text import TextCodec

__all__ = ["Decoded", "DecodingStats", "KVCache", "LLaDA2Config", "LLaDA2ForDiffusion", "LLaDA2Output", "TextCodec"]
