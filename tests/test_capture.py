"""CUDA graphs hold launches and allocations only: what a backend asks of torch on the host, with the launches left out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe_ops import BlockRouting, _checks, layer

pytest.importorskip("triton")

ALLOCATIONS = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"}
VIEWS = {"aten.view.default", "aten.split_with_sizes.default", "aten.slice.Tensor", "aten.detach.default"}


class Log(TorchDispatchMode):
    """The names of the ops of torch that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.fixture
def no_launches(monkeypatch):
    from dmoe_ops.triton_kernels import dense, gathered, router, schedule

    for module in (router, dense, gathered, schedule):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(_checks, "expert_map_values", lambda weights: None)  # it reads maps on the CPU alone
    monkeypatch.setenv("DMOE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("tokens", [32, 64, 512])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_layer_on_a_gpu_can_be_captured(tokens, mapped, no_launches):
    """Under Triton, in the dense and in the gathered form: allocations and views, the same in the first call as in later
    ones; no value is read, nothing is copied."""
    routing = BlockRouting(num_experts=16, top_k=4, n_group=4, topk_group=2)
    local = 8 if mapped else 16
    weights = torch.randn(16, 64), torch.zeros(16), torch.randn(local, 64, 64), torch.randn(local, 64, 32)
    expert_map = torch.arange(16, dtype=torch.int32).remainder(8) if mapped else None
    x, seen = torch.randn(tokens, 64), []
    for _ in range(3):
        with Log() as log:
            layer.block_moe_impl(x, *weights, None, None, None, tokens, *routing.args(), *[None] * 4, False, expert_map)
        seen.append(log.names)
    assert set(seen[0]) <= ALLOCATIONS | VIEWS and set(seen[0]) & ALLOCATIONS, set(seen[0])
    assert seen[0] == seen[1] == seen[2]
