"""Training by masked block diffusion: one forward denoises every block of a sequence behind the clean ones before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..routing import is_int
from . import decoding
from .model import DiffusionModel


def two_halves(tokens: int, block_length: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions int64 [n] and attention mask bool [n, n] of a sequence that is laid out twice, n = 2 tokens - block_length:
    all blocks noisy, then all but the last one clean (nothing looks at that one).

    A noisy block sees itself and the clean blocks before it, which is what it sees in decoding; a clean block sees itself
    and the clean blocks before it. Source: block diffusion (arXiv 2503.09573), section 3.
    """
    position = torch.arange(tokens, device=device)
    position = torch.cat([position, position[: tokens - block_length]])
    block, clean = position // block_length, torch.arange(len(position), device=device) >= tokens
    same = (clean[:, None] == clean[None, :]) & (block[:, None] == block[None, :])
    return position, same | (clean[None, :] & (block[None, :] < block[:, None]))


def denoising_loss(
    model: DiffusionModel, clean, masked, *, block_length: int | None = None, mask_id: int | None = None
):
    """Mean cross entropy of the masked tokens, every block denoised given the clean ones before it.

    clean: int64 [bsz, T], T a multiple of `block_length` (by default config.block_length); masked: bool [bsz, T],
    true where the model has to predict. The model's routing policy applies to each block, noisy or clean, as it does in
    decoding; the selection passes no gradient, the weights of the chosen experts do.

    Returns (loss, routed): routed as in `DiffusionOutput`, over the 2T - block_length tokens of both halves, or, where every
    token sees all others, over the T noisy ones, which are all there is then.
    Raises ValueError that names the argument and its value.
    Source: dMoE (arXiv 2605.30876), section 4.2 and figure 4.
    """
    vocab_size = model.config.vocab_size
    mask_id = model.config.mask_token_id if mask_id is None else mask_id
    if mask_id is None:
        raise ValueError("mask_id must be given where config.json has no mask_token_id, got None")
    if not is_int(mask_id) or not 0 <= mask_id < vocab_size:
        raise ValueError(f"mask_id must be in [0, vocab_size={vocab_size}), got {mask_id!r}")
    block_length = model.config.block_length if block_length is None else block_length
    if not is_int(block_length) or block_length < 1:
        raise ValueError(f"block_length must be an integer of at least 1, got {block_length!r}")
    decoding.check_ids(clean, vocab_size, "clean")
    if clean.shape[1] % block_length or not clean.numel():
        shape = list(clean.shape)
        raise ValueError(f"clean must be [bsz, T] with T a multiple of block_length={block_length}, got {shape}")
    if not isinstance(masked, torch.Tensor) or masked.shape != clean.shape or masked.dtype != torch.bool:
        got = f"{list(masked.shape)} {masked.dtype}" if isinstance(masked, torch.Tensor) else masked
        raise ValueError(f"masked must be a bool tensor of the shape of clean, {list(clean.shape)}, got {got}")
    if not masked.any():
        raise ValueError("masked must be true somewhere, got no masked token")
    tokens = clean.shape[1]
    noisy = clean.masked_fill(masked, mask_id)
    if model.config.sees_all:
        hidden, routed = model.hidden_states(noisy, block_length=block_length)
        return F.cross_entropy(model.logits(hidden[masked]), clean[masked]), routed
    layout = two_halves(tokens, block_length, clean.device)
    halves = torch.cat([noisy, clean[:, : tokens - block_length]], 1)
    hidden, routed = model.hidden_states(halves, block_length=block_length, layout=layout)
    return F.cross_entropy(model.logits(hidden[:, :tokens][masked]), clean[masked]), routed
