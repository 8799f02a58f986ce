"""Fixtures that several test files share: the backends, poisoned memory, and an oracle that knows only the specification."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import oracle as oracle_
import pytest
import torch
from torch import nn

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the property tests skip themselves
    pass
else:
    # The fixtures below set an environment variable and a mode of torch, so they may span the examples of a test.
    settings.register_profile(
        "repository",
        deadline=None,
        derandomize=True,
        max_examples=60,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("repository")

# Triton and the kernels read TRITON_INTERPRET when they are imported; whoever imports them first decides for all.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import dmoe_ops.triton_kernels.backend  # noqa: F401


@pytest.fixture
def golden_folder() -> Path:
    """Inputs and outputs of the authors' released code; they lie beside the checkout, not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden files (../shared/golden) are not there")
    return folder


@pytest.fixture(params=["reference", "cpp"])
def backend(request, monkeypatch) -> str:
    """Runs a test once per backend of the CPU."""
    from dmoe_ops import _backends

    if request.param in _backends.missing():
        pytest.skip(f"backend cpp: {_backends.missing()['cpp']}")
    monkeypatch.setenv("DMOE_BACKEND", request.param)
    return request.param


@pytest.fixture
def poisoned():
    """Every uninitialised tensor holds NaN or the largest integer, so an element that a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(64).isnan().all()
    assert torch.zeros(1).new_empty(64, dtype=torch.int32).min() > 10**9
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def threads():
    """torch.set_num_threads, restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    threads(1)


@pytest.fixture
def make_block():
    """make_block(dtype=..., **sizes) builds a module with the members of LLaDA2's sparse MoE block, randomly filled."""
    return _make_block


@pytest.fixture(scope="session")
def oracle():
    """The specification as plain loops, see tests/oracle.py."""
    return oracle_


def _make_block(hidden=16, intermediate=8, experts=8, top_k=2, n_group=2, topk_group=1, shared=1, dtype=None):
    def linear(rows, columns):
        return nn.Linear(columns, rows, bias=False, dtype=dtype)

    def mlp(width):
        module = nn.Module()
        module.gate_proj, module.up_proj = linear(width, hidden), linear(width, hidden)
        module.down_proj = linear(hidden, width)
        return module

    block = nn.Module()
    block.gate = nn.Module()
    block.gate.weight = nn.Parameter(torch.randn(experts, hidden, dtype=dtype))
    block.gate.register_buffer("expert_bias", torch.randn(experts) * 0.1)
    block.gate.top_k, block.gate.n_group, block.gate.topk_group = top_k, n_group, topk_group
    block.gate.routed_scaling_factor = 2.5
    block.experts = nn.ModuleList(mlp(intermediate) for _ in range(experts))
    block.shared_experts = mlp(intermediate * shared) if shared else None
    return block


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The kernels of csrc/cuda, run thread by thread on the CPU."""
    import emulated

    if emulated.compiler() is None:
        pytest.skip("tests/cpp needs a C++ compiler")
    return emulated.Emulator(emulated.build(tmp_path_factory.mktemp("emulator")))


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(params=["dense", "gathered"])
def form(request, monkeypatch):
    """Both forms of the Triton kernels serve every call; the rule on the host only chooses the faster."""
    from dmoe_ops.triton_kernels import backend, launch

    monkeypatch.setattr(backend, "form_of", lambda *args: request.param)
    monkeypatch.setattr(backend, "DENSE_TOKENS", 10**6 if request.param == "dense" else 0)
    monkeypatch.setattr(launch, "_plans", {})
    return request.param
