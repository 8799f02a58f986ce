"""A layer of LLaDA2.0-mini's size on a GPU: weights, logits, activations, and what outputs are compared with."""

import pytest
import torch

from dmoe_ops import _backends, reference

H, I, E = 2048, 512, 256
POLICIES = ("dmoe", "token", "top4", "des_seq", "des_vote", "capacity")


def why_no_cuda() -> str | None:
    """Why the backend cuda can't run its experts here."""
    if not torch.cuda.is_available():
        return "needs a GPU; there is none here"
    device = torch.device("cuda", torch.cuda.current_device())
    if not _backends._has_cuda_experts(device):
        return f"needs compute capability 9.0 or 10.x, got {torch.cuda.get_device_capability()}"
    return _backends.Cuda.unavailable_reason(device)


def filled(*shape, dtype=torch.bfloat16):
    return (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).to(dtype)


@pytest.fixture(scope="module")
def weights():
    """gate, bias, w13, w2, shared_w13, shared_w2 in bf16."""
    torch.manual_seed(0)
    bias = torch.randn(E, device="cuda") * 0.05
    return filled(E, H), bias, filled(E, 2 * I, H), filled(E, H, I), filled(2 * I, H), filled(H, I)


def calibrated(tokens, block=32, experts=E, seed=0):
    """Logits with the statistics of LLaDA2.0-mini, [T, E] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block)
    common = torch.randn(blocks, 1, experts, generator=generator)
    return (-1 + 1.2 * common + torch.randn(blocks, block, experts, generator=generator)).flatten(0, 1)[:tokens]


def activations(tokens, hidden=H, seed=0, dtype=torch.bfloat16):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def same_routing(got, want):
    """ids and coresets to the bit. The GPU's exp in float64 may differ from the CPU's in its last bit, which moves a
    float32 score once in about 2^29."""
    for name in ("coreset_sizes", "coreset_ids", "topk_ids"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name).cpu()), name
    torch.testing.assert_close(got.topk_weights.cpu(), want.topk_weights.cpu(), rtol=1e-6, atol=1e-9)


def distance(got, want):
    assert got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm())


def expert_sum(x, weights, ids, scale, dtype, activation="silu"):
    """The experts by plain torch in a dtype."""
    x = x.to(dtype)
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        if e >= 0:
            rows, slots = (ids == e).nonzero(as_tuple=True)
            out = reference.mlp(x[rows], weights[2][e], weights[3][e], activation=activation)
            y.index_add_(0, rows, out * scale[rows, slots, None].to(dtype))
    return y if weights[4] is None else y + reference.mlp(x, weights[4], weights[5], activation=activation)


def kernels_of(call) -> list[str]:
    """The kernels and copies that the profiler sees in a call, which has been made once before."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith("Activity")]
