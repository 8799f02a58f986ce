"""Training by block diffusion: the two halves, the loss, and its gradient under block routing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sizes import SIZES

from dmoe_ops import layer, reference
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion
from dmoe_ops.models.training import denoising_loss, two_halves

MASK, BLOCK = 30, 8
CHANGES = dict(vocab_size=32, num_hidden_layers=2, num_attention_heads=2, mask_token_id=MASK, eos_token_id=None)
CONFIG = LLaDA2Config(**SIZES | CHANGES)


def build(policy: str, **overrides) -> LLaDA2ForDiffusion:
    model = LLaDA2ForDiffusion(CONFIG, dtype=torch.float32).init_weights(3)
    model.set_routing(policy, **overrides)
    return model


def batch(rows: int = 3, blocks: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, MASK, (rows, blocks * BLOCK), generator=generator)
    return clean, torch.rand(clean.shape, generator=generator) < 0.5


@pytest.mark.parametrize("tokens, block", [(24, 8), (8, 8), (6, 1), (30, 10)])
def test_who_sees_whom(tokens, block):
    position, mask = two_halves(tokens, block)
    assert position.tolist() == [*range(tokens), *range(tokens - block)]
    halves = [(False, t) for t in range(tokens)] + [(True, t) for t in range(tokens - block)]
    for q, (q_clean, q_token) in enumerate(halves):
        for k, (k_clean, k_token) in enumerate(halves):
            own, other = q_token // block, k_token // block
            seen = own == other if q_clean == k_clean else False
            seen = seen or (k_clean and other < own)
            assert mask[q, k] == seen, (q, k)


@torch.no_grad()
@pytest.mark.parametrize(
    "policy, overrides", [("token", {}), ("dmoe", dict(min_experts=4)), ("des_seq", dict(union_k=1))]
)
def test_the_loss_is_that_of_denoising_each_block_behind_clean_ones(policy, overrides):
    """What decoding computes: one forward per block, noisy, behind its clean past."""
    model, (clean, masked) = build(policy, **overrides), batch()
    loss, routed = denoising_loss(model, clean, masked, block_length=BLOCK)
    losses = []
    for begin in range(0, clean.shape[1], BLOCK):
        text = clean[:, : begin + BLOCK].clone()
        hidden = masked.clone()
        hidden[:, :begin] = False
        text[hidden[:, : begin + BLOCK]] = MASK
        logits, expected = model(text, block_length=BLOCK)
        part = masked[:, begin : begin + BLOCK]
        losses.append(F.cross_entropy(logits[:, begin:][part], clean[:, begin : begin + BLOCK][part], reduction="none"))
        for (_, ids), (_, theirs) in zip(routed, expected):
            assert torch.equal(ids[:, begin : begin + BLOCK], theirs[:, begin:])
            if begin:
                clean_ids = ids[:, clean.shape[1] : clean.shape[1] + begin]
                assert torch.equal(clean_ids, theirs[:, :begin])
    torch.testing.assert_close(loss, torch.cat(losses).mean())


@pytest.mark.parametrize("policy, overrides", [("token", {}), ("dmoe", dict(min_experts=4))])
def test_the_gradient_is_that_of_plain_torch(policy, overrides, monkeypatch):
    """Autograd through the reference, which is plain torch, against the op's own backward, through the whole model."""
    model, (clean, masked) = build(policy, **overrides), batch()

    def gradients():
        model.zero_grad()
        denoising_loss(model, clean, masked, block_length=BLOCK)[0].backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    ours = gradients()
    monkeypatch.setattr(layer, "block_moe", reference.block_moe)
    for name, expected in gradients().items():
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, (name, error)
    gate = ours["model.layers.1.mlp.gate_weight"].abs().sum(1)
    assert 0 < (gate > 0).sum() <= 16


def test_training_learns_under_block_routing():
    model, (clean, _) = build("dmoe", min_experts=4), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    masked = torch.ones_like(clean, dtype=torch.bool)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, routed = denoising_loss(model, clean, masked, block_length=BLOCK)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for _, ids in routed:  # every block kept to a coreset
        assert max(len(block.unique()) for row in ids for block in row.split(BLOCK)) < 16


BAD = [
    (dict(clean=batch()[0][:, :20]), "clean must be [bsz, T] with T a multiple of block_length=8, got [3, 20]"),
    (dict(clean=batch()[0][0]), "clean must be an int64 tensor [bsz, T], got [24] torch.int64"),
    (dict(clean=[[1]]), "clean must be an int64 tensor [bsz, T], got [[1]]"),
    (dict(clean=batch()[0].float()), "clean must be an int64 tensor [bsz, T], got [3, 24] torch.float32"),
    (dict(clean=batch()[0] + 32), "clean must be in [0, vocab_size=32), got 3"),
    (dict(mask_id=32), "mask_id must be in [0, vocab_size=32), got 32"),
    (
        dict(masked=batch()[1][:, :8]),
        "masked must be a bool tensor of the shape of clean, [3, 24], got [3, 8] torch.bool",
    ),
    (
        dict(masked=batch()[1].int()),
        "masked must be a bool tensor of the shape of clean, [3, 24], got [3, 24] torch.int32",
    ),
    (dict(masked=torch.zeros(3, 24, dtype=torch.bool)), "masked must be true somewhere"),
    (dict(block_length=0), "block_length must be an integer of at least 1, got 0"),
]


@pytest.mark.parametrize("change, says", BAD, ids=[says for _, says in BAD])
def test_bad_arguments_are_named(change, says):
    clean, masked = batch()
    with pytest.raises(ValueError) as error:
        denoising_loss(build("token"), **{**dict(clean=clean, masked=masked, block_length=BLOCK), **change})
    assert says in str(error.value)
