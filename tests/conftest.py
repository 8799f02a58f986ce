"""Fixtures that several test files share: the backends, poisoned memory, and an oracle that knows only the specification."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
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
def make_block():
    """make_block(dtype=..., **sizes) builds a module with the members of LLaDA2's sparse MoE block, randomly filled."""
    return _make_block


@pytest.fixture(scope="session")
def oracle():
    """The specification as plain loops over NumPy scalars; shares no code with the package.

    cut(tokens, seq_len, block_size, offsets) -> the rows of every block
    route(logits, bias, routing, blocks) -> (ids [T, k], weights [T, k], coresets, one ascending list per block)
    votes(scores, selection, routing, rows), choose(selection, members, routing): stages 1 and 3 by themselves
    experts(x, w13, w2, ids, weights), mlp(x, w13, w2) -> float64
    """
    return types.SimpleNamespace(
        cut=_cut, route=_route, scores=_scores, votes=_votes, choose=_choose, experts=_experts, mlp=_mlp
    )


f32 = np.float32


def _cut(tokens, seq_len, block_size, offsets=None):
    if offsets is not None:
        return [range(a, b) for a, b in itertools.pairwise(offsets)]
    starts = [s + p for s in range(0, tokens, max(seq_len, 1)) for p in range(0, seq_len, block_size)]
    return [range(s, min(s + block_size, s // seq_len * seq_len + seq_len)) for s in starts]


def _scores(logits, kind):
    """s [T, E], rounded to float32 once; a NaN logit scores 0 and takes no share."""
    result = np.zeros(logits.shape, f32)
    with np.errstate(over="ignore"):
        for t, row in enumerate(logits.astype(np.float64)):
            alive = ~np.isnan(row)
            if kind == "sigmoid":
                result[t, alive] = 1 / (1 + np.exp(-row[alive]))
            elif alive.any():
                top = row[alive].max()
                share = (row[alive] == top) * 1.0 if np.isinf(top) else np.exp(row[alive] - top)
                result[t, alive] = share / share.sum()
    return result


def _best(selection, experts, k):
    """The k largest of `experts`, ties to the lower id; an expert at -inf is never chosen."""
    return sorted((e for e in experts if selection[e] > -np.inf), key=lambda e: (-selection[e], e))[:k]


def _votes(scores, selection, routing, rows):
    """Stage 1, v [E] of one block."""
    n = routing.num_experts
    votes = np.full(n, -np.inf) if routing.aggregate == "max" else np.zeros(n)
    for t in rows:
        if routing.aggregate == "topk_sum":
            for e in _best(selection[t], range(n), routing.top_k):
                votes[e] += selection[t, e]
        elif routing.aggregate == "union":
            for e in _best(selection[t], range(n), routing.union_k):
                votes[e] += 1
        elif routing.aggregate == "sum":
            votes += scores[t] / (f32(scores[t].sum(dtype=np.float64)) + f32(1e-20))
        else:
            votes = np.maximum(votes, selection[t])
    return votes.astype(f32)


def _coreset(votes, routing):
    """Stage 2, from the votes of one block."""
    n = routing.num_experts
    order = sorted(range(n), key=lambda e: (-votes[e], e))
    if routing.select == "nonzero":
        return [e for e in range(n) if votes[e] > 0]
    if routing.select == "top_n":
        return sorted(order[: routing.capacity])
    covered, size = 0.0, 1
    with np.errstate(all="ignore"):
        total = f32(votes.sum(dtype=np.float64)) + f32(1e-20)
        for e in order:
            covered += float(votes[e] / total)
            size += f32(covered) <= f32(routing.top_p)
    limit = n if routing.max_experts is None else routing.max_experts
    return sorted(order[: min(max(size, routing.min_experts), limit, n)])


def _choose(selection, members, routing):
    """Stage 3, the experts of one token."""
    members = [e for e in members if selection[e] > -np.inf]
    k, group_size = routing.top_k, routing.num_experts // routing.n_group
    if routing.n_group == 1:
        return _best(selection, members, k)
    group_scores = []
    for g in range(routing.n_group):
        two = _best(selection, [e for e in members if e // group_size == g], 2)
        group_scores.append(selection[two[0]] + selection[two[1]] if len(two) == 2 else -np.inf)
    kept = sorted(range(routing.n_group), key=lambda g: (-group_scores[g], g))[: routing.topk_group]
    inside = [e for e in members if e // group_size in kept]
    outside = [e for e in members if e // group_size not in kept]
    return (_best(selection, inside, k) + _best(selection, outside, k))[:k]


def _route(logits, bias, routing, blocks):
    scores = _scores(logits, routing.score)
    selection = scores if bias is None else scores + bias
    selection = np.where(np.isnan(logits), f32(-np.inf), selection)
    ids = np.full((len(logits), routing.top_k), -1)
    weights, coresets = np.zeros(ids.shape, f32), []
    for rows in blocks:
        everyone = routing.select == "all"
        members = (
            list(range(routing.num_experts))
            if everyone
            else _coreset(_votes(scores, selection, routing, rows), routing)
        )
        coresets.append(members)
        for t in rows:
            chosen = _choose(selection[t], members, routing)
            w = scores[t, chosen]
            if routing.norm_topk_prob:
                w = w / (f32(w.sum(dtype=np.float64)) + f32(1e-20))
            ids[t, : len(chosen)] = chosen
            weights[t, : len(chosen)] = w * f32(routing.routed_scaling_factor)
    return ids, weights, coresets


def _mlp(x, w13, w2, absolute=False):
    """W_down (silu(W_gate x) * (W_up x)) of one token, in float64; with `absolute` the sum of its terms' magnitudes."""
    x, w13, w2 = (v.double().numpy() for v in (x, w13, w2))
    gate, up = np.split(w13 @ x, 2)
    with np.errstate(over="ignore"):
        hidden = gate / (1 + np.exp(-gate)) * up
        return abs(w2) @ abs(hidden) if absolute else w2 @ hidden


def _experts(x, w13, w2, ids, weights, absolute=False):
    y = np.zeros(x.shape)
    for t in range(x.shape[0]):
        for e, w in zip(ids[t].tolist(), weights[t].tolist()):
            if e >= 0:
                y[t] += w * _mlp(x[t], w13[e], w2[e], absolute)
    return torch.from_numpy(y)


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
def build_host_library(tmp_path_factory):
    """Builds a file of tests/cpp, which runs device code on the CPU, and loads it."""

    def build(source: str) -> ctypes.CDLL:
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            pytest.skip(f"tests/cpp/{source} needs a C++ compiler")
        root = Path(__file__).resolve().parents[1]
        library = (tmp_path_factory.mktemp("emulator") / source).with_suffix(".so")
        flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
        include = [f"-I{root / 'csrc'}", f"-I{root / 'tests/cpp'}"]
        subprocess.run([compiler, *flags, *include, root / "tests/cpp" / source, "-o", library], check=True)
        return ctypes.CDLL(str(library))

    return build
