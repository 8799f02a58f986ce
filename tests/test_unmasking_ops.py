"""The fused ops of a denoising step against plain Python: the torch forms, and Triton's, interpreted or on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dmoe_ops import reference, unmasking

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK, EOS = 50, 51
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("the package triton is not installed")
    monkeypatch.setenv("DMOE_BACKEND", request.param)
    if request.param == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1" if DEVICE == "cpu" else "0")
    return request.param


def step_state(seed: int, bsz: int, size: int, capacity: int, begin: int) -> dict:
    """Texts with masks in and behind the block, some ends, and counts of steps of every kind."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape, p=0.5):
        return torch.rand(shape, generator=g) < p

    x = torch.randint(0, 50, (bsz, capacity), generator=g)
    x[:, begin : begin + size][some(bsz, size, p=0.7)] = MASK
    x[:, begin + size :] = MASK
    x[some(bsz, capacity, p=0.02)] = EOS
    state = dict(
        x=x,
        new=torch.arange(capacity) >= torch.randint(0, begin + size, (bsz, 1), generator=g),
        steps=torch.randint(1, size + 3, (bsz,), generator=g),
        active=some(bsz, p=0.8),
        begin=torch.tensor([begin]),
        step=torch.randint(0, 3, (1,), generator=g),
    )
    return {name: value.to(DEVICE) for name, value in state.items()}


def predicted(seed: int, n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, of which some end the text or are masks, and confidences with ties."""
    g = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randint(44, 52, (n, size), generator=g)
    return tokens.to(DEVICE), (torch.randint(1, 9, (n, size), generator=g) / 8).to(DEVICE)


def plainly(tokens, confidence, x, new, steps, active, begin, step, eos, early, threshold) -> list[int]:
    """Of one sequence, lists in place of tensors: unmasks x and returns the flags but the last."""
    size = len(tokens)
    masked = [i for i in range(size) if active and x[begin + i] == MASK]
    sure = [i for i in masked if confidence[i] > threshold]
    share = size // steps + (step < size % steps)
    best = sorted(masked, key=lambda i: (-confidence[i], i))[:share]
    for i in sure if len(sure) >= share else best:
        x[begin + i] = tokens[i]
    left = sum(x[begin + i] == MASK for i in range(size))
    answer = [token for token, fresh in zip(x, new) if fresh]
    over = eos is not None and eos in answer
    if over and early and MASK not in answer[: answer.index(eos)]:
        left = 0
    return [left if active and step + 1 < steps else 0, int(over)]


@pytest.mark.parametrize("eos, early", [(EOS, True), (EOS, False), (None, True)])
@pytest.mark.parametrize(
    ["bsz", "size", "capacity", "begin", "rows"],
    [(1, 8, 16, 8, [0]), (5, 6, 40, 18, [0, 1, 2, 3, 4]), (4, 32, 1100, 1056, [3, 1]), (2, 4, 8, 0, [0, 1])],
)
def test_unmask(bsz, size, capacity, begin, rows, eos, early, backend):
    rows = torch.tensor(rows, device=DEVICE)
    for seed in range(8 if backend == "reference" else 4):
        state, threshold = step_state(seed, bsz, size, capacity, begin), (0.5, 0.75, 0.25, 1.0)[seed % 4]
        tokens, confidence = predicted(seed, len(rows), size)
        broken = torch.zeros(3, len(rows), dtype=torch.int32, device=DEVICE)
        before = {name: value.clone() for name, value in state.items()}
        flags = unmasking.unmask(tokens, confidence, broken, rows, **state, mask_id=MASK, eos_id=eos,
                                 early_stop=early, threshold=threshold)  # fmt: skip
        texts, active = before["x"].tolist(), before["active"].tolist()
        for i, row in enumerate(rows.tolist()):
            args = (before["new"].tolist()[row], int(before["steps"][row]), active[row], begin, int(before["step"]))
            want = plainly(tokens[i].tolist(), confidence[i].tolist(), texts[row], *args, eos, early, threshold)
            assert flags[i].tolist() == [*want, 1]
            active[row] = want[0] > 0
        assert state["x"].tolist() == texts and state["active"].tolist() == active
        assert int(state["step"]) == int(before["step"]) + 1
        assert all(torch.equal(state[name], before[name]) for name in ("new", "steps", "begin"))


def test_whatever_torch_makes_tensors_on_by_default_the_inputs_say():
    """Of the torch form."""
    state, rows = step_state(0, 2, 8, 16, 8), torch.arange(2, device=DEVICE)
    settings = dict(mask_id=MASK, eos_id=EOS, early_stop=True, threshold=0.5)
    broken = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)

    def run():
        given = {name: value.clone() for name, value in state.items()}
        return reference.unmask(*predicted(0, 2, 8), broken, rows, **given, **settings), given["x"]

    wanted, numbers = run(), predicted(0, 2, 8)
    with torch.device("meta"):
        given = {name: value.clone() for name, value in state.items()}
        got = reference.unmask(*numbers, broken, rows, **given, **settings), given["x"]
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_of_its_sequence(value, backend):
    state, rows = step_state(0, 3, 8, 16, 8), torch.arange(3, device=DEVICE)
    tokens, confidence = predicted(0, 3, 8)
    broken = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    confidence[1, 7], broken[1, 2] = value, 1
    flags = unmasking.unmask(tokens, confidence, broken, rows, **state, mask_id=MASK, eos_id=None, early_stop=True,
                             threshold=0.9)  # fmt: skip
    assert flags[:, 2].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ["n", "blocks", "block", "top_k", "experts"], [(1, 1, 32, 8, 256), (3, 2, 5, 3, 20), (2, 2, 1, 1, 1)]
)
def test_count_step(n, blocks, block, top_k, experts, backend):
    """Against sets; -1 is no expert, and what is not active is not counted."""
    layers, tokens, g = 3, blocks * block, torch.Generator().manual_seed(0)
    topk_ids = torch.randint(-1, experts, (layers, n, tokens, top_k), generator=g).int()
    logits = torch.randn(layers, n, tokens, experts, generator=g)
    logits[2, n - 1, -1, -1] = float("nan")
    rows, active = torch.arange(n).flip(0), torch.tensor([True, False, True, True])[: n + 1]
    length, begin = torch.tensor([9, 5, 3, 0])[: n + 1], torch.tensor([4])
    counts = [torch.full(size, 7, dtype=torch.int64) for size in ((3,), (3,), (3, layers))]
    want = [count.clone() for count in counts]
    for i, row in enumerate(rows.tolist()):
        for b in range(blocks if active[row] else 0):
            kind = 2 if b == blocks - 1 else 0 if length[row] >= begin else 1
            want[0][kind] += 1
            want[1][kind] += 1
            for layer in range(layers):
                ids = topk_ids[layer, i, b * block : (b + 1) * block].flatten().tolist()
                want[2][kind, layer] += len(set(ids) - {-1})
    inputs = [t.to(DEVICE) for t in (topk_ids, logits, rows, active, length, begin)]
    counts = [count.to(DEVICE) for count in counts]
    broken = unmasking.count_step(*inputs, block, *counts)
    assert [count.tolist() for count in counts] == [each.tolist() for each in want]
    wanted = torch.zeros(layers, n, dtype=torch.int32)
    wanted[2, n - 1] = 1
    assert torch.equal(broken.cpu(), wanted)


@pytest.mark.parametrize("name", ["count_step", "unmask"])
def test_schema_and_fake_of_each_op(name, backend):
    rows, state = torch.arange(2, device=DEVICE), step_state(0, 2, 4, 16, 8)
    broken = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    counts = [torch.zeros(size, dtype=torch.int64, device=DEVICE) for size in ((3,), (3,), (3, 3))]
    ids = torch.zeros(3, 2, 4, 2, dtype=torch.int32, device=DEVICE)
    logits = torch.zeros(3, 2, 4, 8, device=DEVICE)
    length = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    arguments = dict(
        count_step=(ids, logits, rows, state["active"], length, state["begin"], 4, *counts),
        unmask=(*predicted(0, 2, 4), broken, rows, *state.values(), MASK, EOS, True, 0.5),
    )[name]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.dmoe, name), arguments, test_utils=checks)
