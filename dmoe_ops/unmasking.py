"""What a denoising step does behind its layers, fused: dmoe::count_step and dmoe::unmask.

The torch forms are in reference.py. Both write in place, and neither has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends, _library


def count_step(
    topk_ids: Tensor,
    router_logits: Tensor,
    rows: Tensor,
    active: Tensor,
    length: Tensor,
    begin: Tensor,
    block_length: int,
    forwards: Tensor,
    blocks: Tensor,
    unique: Tensor,
) -> Tensor:
    """Counts a step of the sequences `rows` int64 [n]: of those that are active, forwards, blocks int64 [3] and distinct
    experts, unique int64 [3, layers], for prefill, commit and denoising. Returns broken int32 [layers, n]: whether a router
    logit is NaN.

    topk_ids: int32 [layers, n, T, k], -1 for none; T is one block, or two, of which the first becomes part of the prefix: of
    a prompt, where length int64 [bsz] reaches begin int64 [1]. router_logits: float32 [layers, n, T, E]. active: bool [bsz].
    """
    args = (topk_ids, router_logits, rows, active, length, begin, block_length, forwards, blocks, unique)
    if _library.nobody_listens(*args[:6], *args[7:]):
        return count_step_impl(*args)
    return torch.ops.dmoe.count_step(*args)


def count_step_fake(topk_ids, *_):
    return topk_ids.new_empty(topk_ids.shape[:2], dtype=torch.int32)


def count_step_impl(topk_ids, router_logits, *args):
    broken = count_step_fake(topk_ids)
    if topk_ids.numel():
        topk_ids, router_logits = _library.contiguous(topk_ids, router_logits)
        _backends.backend(topk_ids).count_step(topk_ids, router_logits, *args, broken)
    return broken


def unmask(
    tokens: Tensor,
    confidence: Tensor,
    broken: Tensor,
    rows: Tensor,
    x: Tensor,
    new: Tensor,
    steps: Tensor,
    active: Tensor,
    begin: Tensor,
    step: Tensor,
    mask_id: int,
    eos_id: int | None,
    early_stop: bool,
    threshold: float,
) -> Tensor:
    """Puts predicted tokens into the block of `rows` int64 [n], ends sequences, and adds one to step. Returns int64 [n, 3]:
    the masks that are left, 0 where the block is done, or the text with `early_stop`; whether an eos stands in the answer;
    and whether all numbers were finite.

    tokens, confidence: int64 and float32 [n, B]; broken: of `count_step`; the rest: `models.step.Batch`, x, active and step
    written in place. Of the masks those above the threshold are unmasked, or the step's share of the block, the most
    confident ones, where those are fewer.
    """
    args = (tokens, confidence, broken, rows, x, new, steps, active, begin, step)
    settings = (mask_id, eos_id, early_stop, threshold)
    if _library.nobody_listens(*args):
        return unmask_impl(*args, *settings)
    return torch.ops.dmoe.unmask(*args, *settings)


def unmask_fake(tokens, *_):
    return tokens.new_empty(len(tokens), 3)


def unmask_impl(tokens, confidence, broken, rows, x, new, steps, active, begin, step, *settings):
    flags = unmask_fake(tokens)
    tokens, confidence = _library.contiguous(tokens, confidence)
    args = (tokens, confidence, broken, rows, x, new, steps, active, begin, step)
    _backends.backend(tokens).unmask(*args, *settings, flags)
    step.add_(1)  # by no program of a kernel: others read it
    return flags


for schema, impl, fake in (
    (
        "count_step(Tensor topk_ids, Tensor router_logits, Tensor rows, Tensor active, Tensor length, Tensor begin, "
        "int block_length, Tensor(a!) forwards, Tensor(b!) blocks, Tensor(c!) unique) -> Tensor broken",
        count_step_impl,
        count_step_fake,
    ),
    (
        "unmask(Tensor tokens, Tensor confidence, Tensor broken, Tensor rows, Tensor(a!) x, Tensor new, Tensor steps, "
        "Tensor(b!) active, Tensor begin, Tensor(c!) step, int mask_id, int? eos_id, bool early_stop, float threshold) "
        "-> Tensor flags",
        unmask_impl,
        unmask_fake,
    ),
):
    _library.lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.implement("dmoe::" + schema[: schema.index("(")], impl, fake)
