"""From logits to the tokens that a denoising step may unmask."""

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
