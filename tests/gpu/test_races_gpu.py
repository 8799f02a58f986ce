"""What a race would change, on both GPU backends: scratch that holds the worst, inputs that alternate, thousands of replays
compared on the device, streams side by side, layers on one scratch.

Without a GPU the same tests are rehearsed at small sizes and without graphs: Triton's kernels by its interpreter, CUDA's by
the emulator (tests/emulated.py)."""

from __future__ import annotations

import contextlib
import dataclasses

import emulated
import pytest
import torch

from dmoe_ops import BlockRouting, _backends, block_moe, moe_experts, reference
from dmoe_ops.quantize import quantize

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
REPLAYS = 2000 if GPU else 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer: sizes, and the settings of its routing that differ from LLaDA2.0-mini's."""

    hidden: int
    inner: int
    experts: int
    tokens: int
    settings: dict
    dtype: torch.dtype = torch.bfloat16

    @property
    def routing(self) -> BlockRouting:
        return BlockRouting(num_experts=self.experts, **self.settings)


SMALL = dict(top_k=2, n_group=4, topk_group=2, min_experts=4)
SHAPES = {
    "one block": Shape(2048, 512, 256, 32, {}) if GPU else Shape(64, 32, 24, 9, dict(SMALL, block_size=12)),
    "two blocks": Shape(2048, 512, 256, 64, {}) if GPU else Shape(64, 32, 24, 9, dict(SMALL, block_size=5)),
    # Clusters of 4, and a schedule that 32 blocks add up to.
    "many blocks": Shape(512, 128, 64, 64, dict(SMALL, block_size=2))
    if GPU
    else Shape(64, 32, 24, 9, dict(SMALL, block_size=2)),
    "tails": Shape(192, 96, 40, 45, dict(SMALL, block_size=32))
    if GPU
    else Shape(192, 96, 12, 7, dict(SMALL, block_size=4)),
    "fp16": Shape(2048, 512, 256, 32, {}, torch.float16)
    if GPU
    else Shape(64, 32, 24, 9, dict(SMALL, block_size=12), torch.float16),
}
if GPU:
    SHAPES["many tokens"] = Shape(2048, 512, 256, 512, {})  # Triton's gathered form; CUDA's experts end at 64 tokens
# The interpreter takes seconds per layer, so a rehearsal has one layer of Triton's and all shapes of CUDA's.
CUDA_HAS = [name for name in SHAPES if name != "many tokens"]
TRITON_HAS = list(SHAPES) if GPU else ["two blocks"]
EVERY = [("cuda", name) for name in CUDA_HAS] + [("triton", name) for name in TRITON_HAS]
FEW = [(backend, name) for backend, name in EVERY if GPU or name in ("many blocks", "two blocks")]
each = pytest.mark.parametrize(["backend", "name"], EVERY, indirect=["backend"])
on_both = pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU; there is none here")


@pytest.fixture
def backend(request, monkeypatch):
    if GPU:
        device = torch.device("cuda", torch.cuda.current_device())
        if why := _backends.BACKENDS[request.param].unavailable_reason(device):
            pytest.skip(why)
        if request.param == "cuda" and not _backends._has_cuda_experts(device):
            pytest.skip(f"needs compute capability 9.0 or 10.x, got {torch.cuda.get_device_capability()}")
        monkeypatch.setenv("DMOE_BACKEND", request.param)
    elif request.param == "cuda":
        emulator = request.getfixturevalue("emulator")
        emulated.Backend(emulator, emulated.form(cluster=2, ctas=3, resident=4)).install(monkeypatch)
    else:
        monkeypatch.setenv("DMOE_BACKEND", "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


def filled(*shape, dtype, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)  # a CPU takes ten seconds for a layer
    return (torch.randn(shape, generator=generator, device=DEVICE) * shape[-1] ** -0.5).to(dtype)


def weights_of(shape: Shape, layer: int = 0):
    """gate, bias, w13, w2, shared_w13, shared_w2."""
    h, i, e = shape.hidden, shape.inner, shape.experts
    sizes = (e, h), (e, 2 * i, h), (e, h, i), (2 * i, h), (h, i)
    gate, *rest = (filled(*size, dtype=shape.dtype, seed=10 * layer + n) for n, size in enumerate(sizes))
    return gate, filled(e, dtype=torch.float32, seed=10 * layer + 9) * 0.05, *rest


def inputs_of(shape: Shape, n: int = 3):
    scale = shape.hidden**0.5
    return [filled(shape.tokens, shape.hidden, dtype=shape.dtype, seed=100 + i) * scale for i in range(n)]


def layers_of(shape: Shape, n: int):
    """x -> y of n layers, one on the other's result."""
    layers, routing = [weights_of(shape, i) for i in range(n)], shape.routing

    def function(x):
        for weights in layers:
            x = block_moe(x, *weights, routing=routing)[0]
        return x

    return function


def checked(shape: Shape, x):
    """y of one layer: its routing is that of its logits, and it is no further from float32 than twice torch's own way."""
    weights, routing = weights_of(shape), shape.routing
    y, routed, logits = block_moe(x, *weights, routing=routing)
    want = reference.block_route(logits.cpu(), weights[1].cpu(), routing=routing)
    assert torch.equal(routed.topk_ids.cpu(), want.topk_ids) and torch.equal(routed.coreset_ids.cpu(), want.coreset_ids)

    def plain(dtype):  # where the weights are: a CPU takes a minute for 256 experts
        of = [t.to(dtype) for t in (x, *weights[2:])]
        own = reference.moe_experts(*of[:3], want.topk_ids.to(DEVICE), want.topk_weights.to(DEVICE))
        return (own + reference.mlp(of[0], *of[3:])).float()

    exact = plain(torch.float32)
    assert y.isfinite().all()
    assert (y.float() - exact).norm() <= 2 * (plain(shape.dtype) - exact).norm() + 1e-6 * exact.norm()
    return y


def replayed(function, x):
    """(run, y): run() computes y from what x then holds; a graph where there is a GPU."""
    if not GPU:
        y = torch.empty_like(x)
        return lambda: y.copy_(function(x)), y
    function(x)  # compiles, and loads modules
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(x)
    return graph.replay, y


def compare(function, inputs, wanted, replays=REPLAYS) -> None:
    """Replays with alternating inputs give the bits of `wanted`; how many did not is counted on the device."""
    x = inputs[0].clone()
    run, y = replayed(function, x)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(replays):
        x.copy_(inputs[i % len(inputs)])
        y.fill_(float("nan"))
        run()
        wrong += (y.view(torch.int16) != wanted[i % len(inputs)].view(torch.int16)).any()
    assert int(wrong) == 0, f"{int(wrong)} of {replays} replays differ"


@contextlib.contextmanager
def poison():
    """Every tensor that nobody has written holds NaN, 0xFF or the largest number: in a graph, anew in every replay."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@each
def test_replays_of_a_layer(backend, name):
    """One layer, right, and then the same bits whatever the scratch holds from another input."""
    shape = SHAPES[name]
    function, inputs = layers_of(shape, 1), inputs_of(shape)
    compare(function, inputs, [checked(shape, x) for x in inputs])


@pytest.mark.parametrize(["backend", "name"], FEW, indirect=["backend"])
def test_replays_on_poisoned_scratch(backend, name):
    shape = SHAPES[name]
    function, inputs = layers_of(shape, 1), inputs_of(shape)
    wanted = [function(x) for x in inputs]
    with poison():
        compare(function, inputs, wanted, max(2, REPLAYS // 4))


@pytest.mark.parametrize(["backend", "name"], EVERY if GPU else FEW[:1] + FEW[-1:], indirect=["backend"])
def test_replays_of_layers_on_one_scratch(backend, name):
    """Layers in a row in one graph: each starts while the one before it runs, on the memory that it just used."""
    shape = SHAPES[name]
    function, inputs = layers_of(shape, 4 if GPU else 2), inputs_of(shape, 2)
    wanted = [function(x).clone() for x in inputs]
    compare(function, inputs, wanted, REPLAYS if GPU else 2)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", ["one block", "many blocks", "tails"] if GPU else ["many blocks"])
def test_replays_of_launches_on_given_scratch(backend, name, monkeypatch):
    """CUDA's launches follow each other without a fill in between, on a schedule and a workspace that the graph
    fills with 0xFF before it runs three layers on them."""
    shape, given = SHAPES[name], {}
    function, inputs = layers_of(shape, 3 if GPU else 2), inputs_of(shape, 2)
    wanted = [function(x).clone() for x in inputs]
    inner = _backends.torch

    def empty(*size, dtype, device):
        key = size, dtype
        if key not in given:
            given[key] = inner.empty(*size, dtype=dtype, device=device)
        return given[key]

    monkeypatch.setattr(_backends, "torch", emulated.with_attributes(inner, empty=empty))
    function(inputs[0])
    assert {dtype for _, dtype in given} == {torch.int32, torch.uint8}  # the schedule and the workspace

    def from_the_worst(x):
        for scratch in given.values():
            scratch.view(torch.uint8).fill_(255)
        return function(x)

    compare(from_the_worst, inputs, wanted, REPLAYS if GPU else 2)


@on_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if GPU else [torch.bfloat16])
def test_races_of_ids_without_the_router(backend, dtype):
    """-1 and the same expert twice; on CUDA ids out of range too, which add nothing."""
    shape = dataclasses.replace(SHAPES["tails" if GPU or backend == "cuda" else "two blocks"], dtype=dtype)
    _, _, w13, w2, *_ = weights_of(shape)
    ids = torch.randint(-1, shape.experts, (shape.tokens, 2), generator=torch.Generator().manual_seed(0)).int()
    ids[0], ids[1], ids[2, 1] = -1, 3, ids[2, 0]
    scale = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    given = ids.clone()
    if backend == "cuda":
        given[3, 0], given[4, 1], ids[3, 0], ids[4, 1] = 1 << 20, -5, -1, -1
    given = given.to(DEVICE)

    def function(x):
        return moe_experts(x, w13, w2, given, scale)

    inputs = inputs_of(shape, 2)
    wanted = [function(x).clone() for x in inputs]
    for x, y in zip(inputs, wanted):
        exact = reference.moe_experts(*(t.double().cpu() for t in (x, w13, w2)), ids, scale.cpu().double())
        assert (y.cpu().double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()
    compare(function, inputs, wanted, REPLAYS if GPU else 2)


@on_both
@pytest.mark.parametrize("shared", ["fp8", "plain"] if GPU else ["plain"])
def test_replays_of_a_layer_in_fp8(backend, shared):
    """Right, against float64 on the dequantised weights, and then the same bits."""
    shape = SHAPES["tails" if backend == "cuda" else "two blocks"]
    gate, bias, *matrices = weights_of(shape)
    names, arguments, wide = ("w13", "w2", "shared_w13", "shared_w2"), {}, []
    for i, (name, weight) in enumerate(zip(names, matrices)):
        arguments[name] = weight
        if i < 2 or shared == "fp8":
            arguments[name], arguments[f"{name}_scale"] = quantize(weight, "fp8", halves=2 - i % 2)
            weight = reference.dequantize(arguments[name], arguments[f"{name}_scale"], halves=2 - i % 2)
        wide.append(weight.double())

    def function(x):
        return block_moe(x, gate, bias, **arguments, routing=shape.routing)[0]

    inputs = inputs_of(shape, 2)
    wanted = [function(x).clone() for x in inputs]
    for x, y in zip(inputs, wanted):
        _, routed, _ = block_moe(x, gate, bias, **arguments, routing=shape.routing)
        exact = reference.moe_experts(x.double(), *wide[:2], routed.topk_ids, routed.topk_weights.double())
        exact += reference.mlp(x.double(), *wide[2:])
        assert (y.double() - exact).norm() <= 2 * torch.finfo(y.dtype).eps * exact.norm()
    compare(function, inputs, wanted, REPLAYS if GPU else 2)


@gpu_only
@on_both
def test_two_streams_of_replays(backend):
    """Two graphs side by side share the chip, not their scratch; each must end, and with its own results."""
    shape = SHAPES["one block"]
    function, inputs = layers_of(shape, 2), inputs_of(shape, 2)
    wanted = [function(x).clone() for x in inputs]
    own = [x.clone() for x in inputs]  # a graph holds no tensor
    runs = [replayed(function, x) for x in own]
    streams = [torch.cuda.Stream() for _ in runs]
    wrong = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(REPLAYS // 2):
        for i, (stream, (run, y)) in enumerate(zip(streams, runs)):
            with torch.cuda.stream(stream):
                run()
                wrong[i] += (y != wanted[i]).any()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]
