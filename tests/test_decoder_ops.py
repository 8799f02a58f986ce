"""The fused ops of a decoder layer against their torch forms: C++, and Triton under its interpreter or on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dmoe_ops import _backends, decoder, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("fused", "poisoned")
# A rounding or two apart; Triton's interpreter cuts off what bfloat16 has no room for.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture(params=["cpp", "triton"])
def fused(request, monkeypatch):
    """Runs a test with either set of kernels."""
    if request.param == "cpp" and (why := _backends.missing().get("cpp")):
        pytest.skip(f"backend cpp: {why}")
    if request.param == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("the package triton is not installed")
    monkeypatch.setenv("DMOE_BACKEND", request.param)
    device = DEVICE if request.param == "triton" else "cpu"
    if request.param == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1" if DEVICE == "cpu" else "0")
    return device


def drawn(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(got, want, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=tolerance, rtol=tolerance)


@dtypes
@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 100), (5, 7), (0, 8)])
def test_add_rms_norm(dtype, shape, fused):
    x, delta = (drawn(*shape, dtype=dtype, seed=seed, device=fused) for seed in (0, 1))
    weight = drawn(shape[-1], dtype=dtype, seed=2, device=fused)
    got, want = (form.add_rms_norm(x, delta, weight, 1e-2) for form in (decoder, reference))
    assert got[0].shape == got[1].shape == x.shape
    for ours, theirs in zip(got, want):
        close(ours, theirs, dtype)


@dtypes
@pytest.mark.parametrize("rotary", [4, 12])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_qk_norm_rope(dtype, rotary, norm, rows, fused):
    """The queries, and keys and values in their places; the rest of the cache stays as it was."""
    heads, kv_heads, size, tokens, capacity = 4, 2, 12, 3, 9
    qkv = drawn(3 if rows is None else 2, tokens, (heads + 2 * kv_heads) * size, dtype=dtype, device=fused)
    weights = [drawn(size, dtype=dtype, seed=seed, device=fused) if norm else None for seed in (1, 2)]
    cos, sin = (drawn(capacity, rotary, dtype=dtype, seed=seed, device=fused) for seed in (3, 4))
    rows = rows if rows is None else torch.tensor(rows, device=fused)
    past = torch.tensor([5], device=fused)
    results = []
    for form in (decoder, reference):
        keys, values = (drawn(3, kv_heads, capacity, size, dtype=dtype, seed=seed, device=fused) for seed in (5, 6))
        results.append((form.qk_norm_rope(qkv, *weights, 1e-2, cos, sin, rows, past, keys, values), keys, values))
    for got, want in zip(*results):
        assert got.shape == want.shape and got.is_contiguous()
        close(got, want, dtype)
    before = drawn(3, kv_heads, capacity, size, dtype=dtype, seed=5, device=fused)
    changed = (results[0][1] != before).any(-1).any(1)
    assert changed.any(1).nonzero().flatten().tolist() == sorted([0, 1, 2] if rows is None else rows.tolist())
    assert changed.any(0).nonzero().flatten().tolist() == [5, 6, 7]


@dtypes
@pytest.mark.parametrize(
    ["n", "heads", "kv_heads", "size", "block", "tokens", "past", "capacity"],
    [
        (1, 4, 2, 16, 8, 8, 24, 64),  # shares, of which some have no keys
        (1, 4, 1, 20, 8, 16, 0, 40),  # two blocks, and nothing before them
        (2, 2, 2, 12, 4, 4, 132, 136),  # to the end of the buffers
        (3, 48, 16, 16, 32, 32, 64, 128),  # one share
        (1, 2, 2, 16, 32, 96, 32, 200),  # more than a tile of queries
        (0, 2, 2, 16, 4, 4, 8, 16),
    ],
)
def test_block_attention(dtype, n, heads, kv_heads, size, block, tokens, past, capacity, fused):
    """Against softmax in float64, token by token. Triton looks at nothing behind the blocks; torch multiplies it by 0."""
    query = drawn(n, heads, tokens, size, dtype=dtype, device=fused)
    keys, values = (drawn(n, kv_heads, capacity, size, dtype=dtype, seed=seed, device=fused) for seed in (1, 2))
    end = past + tokens
    for buffer in (keys, values) if _backends.name_for(fused) == "triton" else ():
        buffer[:, :, end:] = float("nan")
    at = torch.tensor([past], device=fused)
    got = decoder.block_attention(query, keys, values, at, block)
    assert got.shape == (n, tokens, heads * size)
    for token in range(tokens):
        seen = past + (token // block + 1) * block
        k, v = (t[:, :, :seen].double().repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        weight = (query[:, :, token : token + 1].double() @ k.transpose(2, 3) * size**-0.5).softmax(-1)
        close(got[:, token], (weight @ v).transpose(1, 2).reshape(n, heads * size), dtype)


def test_the_keys_of_a_head_are_its_own(fused):
    """Sharper than an average: each query looks at one key alone."""
    n, heads, kv_heads, size, tokens, past = 2, 4, 2, 16, 4, 12
    keys = torch.zeros(n, kv_heads, 16, size, device=fused)
    keys[:, :, torch.arange(16), torch.arange(16)] = 200.0
    values, query = drawn(n, kv_heads, 16, size, device=fused), torch.zeros(n, heads, tokens, size, device=fused)
    wanted = torch.randint(16, (n, heads, tokens), generator=torch.Generator().manual_seed(3))
    query.scatter_(3, wanted[..., None].to(fused), 1e3)
    got = decoder.block_attention(query, keys, values, torch.tensor([past], device=fused), tokens)
    for s, head, token in wanted.ne(-1).nonzero().tolist():
        one = values[s, head // 2, wanted[s, head, token]]
        close(got[s, token, head * size : (head + 1) * size], one, torch.float32)


@dtypes
@pytest.mark.parametrize("vocab", [1, 5, 2048, 5001])
def test_greedy(dtype, vocab, fused):
    logits = drawn(4, vocab, dtype=dtype, device=fused) * 5
    want = logits.double().softmax(1).max(1).values.float()
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    for form in (decoder, reference):
        token, probability = form.greedy(logits)
        assert torch.equal(token, first) and probability.dtype == torch.float32
        torch.testing.assert_close(probability, want, atol=1e-6, rtol=1e-5)


def test_greedy_by_few_programs(fused, monkeypatch):
    """Of which each takes several chunks."""
    if _backends.name_for(fused) == "triton":
        from dmoe_ops.triton_kernels import decoder as kernels

        monkeypatch.setattr(kernels, "GREEDY_PROGRAMS", 4)
        monkeypatch.setattr(kernels, "GREEDY_CHUNK", 64)
    logits = drawn(2, 300, device=fused) * 5
    logits[0, [70, 250]] = 30.0
    token, probability = decoder.greedy(logits)
    assert token.tolist() == [70, int(logits[1].argmax())]
    torch.testing.assert_close(probability, logits.softmax(1).max(1).values, atol=1e-6, rtol=1e-5)


inf, nan = float("inf"), float("nan")


@pytest.mark.parametrize("form", [decoder, reference])
@pytest.mark.parametrize("size", [4, 2500])
def test_greedy_of_odd_logits(size, form, fused):
    """Of equal ones the first; -inf counts as nothing; NaN where there is no most probable one."""

    def probability(*values, at=0):
        logits = torch.full((1, size), -inf)
        logits[0, at : at + len(values)] = torch.tensor(values)
        token, probability = form.greedy(logits.to(fused))
        return token.item() - at, probability.item()

    for at in (0, size - 4):
        assert probability(1.0, 3.0, 3.0, at=at)[0] == 1
        assert probability(2.0, at=at) == (0, 1.0)
        assert probability(0.0, 0.0, at=at)[1] == pytest.approx(0.5)
        for values in ((nan, 1.0), (1.0, nan), (inf, 1.0), (inf, inf), (), (nan,)):
            assert probability(*values, at=at)[1] != probability(*values, at=at)[1], values


def test_whatever_torch_makes_tensors_on_by_default_the_inputs_say():
    """Of the torch forms."""
    qkv, keys, values, past = drawn(2, 3, 48), drawn(2, 1, 8, 8, seed=1), drawn(2, 1, 8, 8, seed=2), torch.tensor([3])
    cos, sin = (drawn(8, 4, seed=seed) for seed in (3, 4))

    def run():
        buffers = keys.clone(), values.clone()
        query = reference.qk_norm_rope(qkv, None, None, 1e-6, cos, sin, None, past, *buffers)
        return query, *buffers, reference.block_attention(query, *buffers, past, 3)

    wanted = run()
    with torch.device("meta"):
        assert all(map(torch.equal, run(), wanted))


@pytest.mark.parametrize("name", ["add_rms_norm", "qk_norm_rope", "block_attention", "greedy"])
def test_schema_and_fake_of_each_op(name, fused):
    x = drawn(2, 3, 48, device=fused)
    cache = [drawn(2, 1, 8, 8, seed=seed, device=fused) for seed in (1, 2)]
    turn = [drawn(8, 4, seed=seed, device=fused) for seed in (1, 2)]
    arguments = dict(
        add_rms_norm=(x, x + 1, x[0, 0].clone(), 1e-6),
        qk_norm_rope=(x, None, None, 1e-6, *turn, None, torch.tensor([2], device=fused), *cache),
        block_attention=(x.view(2, 3, 6, 8), *cache, torch.tensor([2], device=fused), 2),
        greedy=(x[0],),
    )[name]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.dmoe, name), arguments, test_utils=checks)
