"""From logits to the tokens that a denoising step unmasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sample(logits, temperature: float = 0.0, top_k=None, top_p=None, generator=None):
    """A token for every row of logits [T, V], int64 [T], and its probability float32 [T] after the filters."""
    if temperature > 0:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        beyond = F.pad(ordered.softmax(1).cumsum(1)[:, :-1], (1, 0)) > top_p  # what all that are more probable sum to
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    probability = logits.softmax(1)
    if temperature > 0:
        # NaN would be an error of multinomial's, on a GPU one that ends the process; `finite` in step.py tells it.
        token = torch.multinomial(probability.nan_to_num(1.0), 1, generator=generator)
    else:
        token = logits.argmax(1, keepdim=True)
    return token[:, 0], probability.gather(1, token)[:, 0]


def choose(confidence, active, threshold: float, share) -> torch.Tensor:
    """Which tokens a step unmasks, bool [..., B]: the active ones above the threshold, or, in a block where those are
    fewer, the `share` most confident ones. share: a number, or int64 [..., 1]."""
    confidence = confidence.masked_fill(~active, -torch.inf)
    sure = confidence > threshold
    order = confidence.sort(descending=True, stable=True).indices
    first = torch.arange(order.shape[-1], device=order.device) < share
    best = torch.zeros_like(active).scatter(-1, order, first.expand_as(active)) & active
    return torch.where(sure.sum(-1, keepdim=True) >= share, sure, best)


def ended(x, new, eos_id: int, mask_id: int) -> torch.Tensor:
    """bool [bsz]: whether an eos stands in the new tokens with no mask before it."""
    eos, masks = new & (x == eos_id), new & (x == mask_id)
    return eos.any(1) & (masks.cumsum(1).gather(1, eos.int().argmax(1, keepdim=True))[:, 0] == 0)
