"""Decoding on a GPU: steps that a CUDA graph replays give the tokens and the counts of steps that are launched singly."""

from __future__ import annotations

import pytest
import torch
from test_step import build, decodes

from dmoe_ops import _backends

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU; there is none here")


@pytest.fixture(params=["cuda", "triton"])
def model(request, monkeypatch):
    if why := _backends.BACKENDS[request.param].unavailable_reason(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(why)
    monkeypatch.setenv("DMOE_BACKEND", request.param)
    return build().to("cuda")


@pytest.mark.parametrize("policy", ["dmoe", "token"])
def test_replayed_steps_decode_the_same(model, policy, monkeypatch):
    """A CPU's tokens too, but for what rounding decides."""
    model.set_routing(policy)
    same, all_ = 0, 0
    for ids, options in decodes():
        want = model.generate(ids.cuda(), use_graphs=False, **options)
        for _ in range(2):
            got = model.generate(ids.cuda(), use_graphs=True, **options)
            assert torch.equal(got.tokens, want.tokens) and got.stats == want.stats
        on_cpu = build()
        on_cpu.set_routing(policy)
        with monkeypatch.context() as patch:
            patch.setenv("DMOE_BACKEND", "auto")
            tokens = on_cpu.generate(ids, **options).tokens
        n = min(tokens.shape[1], want.tokens.shape[1])
        same, all_ = same + int((tokens[:, :n] == want.tokens.cpu()[:, :n]).sum()), all_ + tokens[:, :n].numel()
    assert same >= 0.95 * all_, f"{same} of {all_} tokens"
