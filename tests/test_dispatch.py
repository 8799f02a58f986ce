"""Calls that go past torch's dispatcher: only where nobody would notice, and with the dispatcher's results."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe_ops import BlockRouting, _checks, _library, block_moe, block_route, moe_experts, router
from dmoe_ops.formats import ExpertWeights
from dmoe_ops.quantize import quantize

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

ROUTING = BlockRouting(num_experts=6, top_k=2, block_size=4, n_group=1, topk_group=1, min_experts=3)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(dtype=torch.float32):
    """x, gate_weight, expert_bias, w13, w2, shared_w13, shared_w2."""
    shapes = [(2, 5, 8), (6, 8), (6,), (6, 8, 8), (6, 8, 4), (4, 8), (8, 2)]
    return [values(*shape, seed=i).to(torch.float32 if len(shape) == 1 else dtype) for i, shape in enumerate(shapes)]


def ids_and_weights():
    return torch.tensor([[0, 5], [3, -1], [2, 2]], dtype=torch.int32), torch.tensor([[0.5, 0.25], [1, 0.5], [2, 1]])


CALLS = {
    "block_moe": lambda x, gate, bias, *rest: block_moe(x, gate, bias, *rest, routing=ROUTING),
    "moe_experts": lambda x, gate, bias, w13, w2, *_: moe_experts(x[0, :3], w13, w2, *ids_and_weights()),
    "block_route": lambda x, gate, bias, *_: block_route(x @ gate.T, bias, routing=ROUTING),
}
each = pytest.mark.parametrize("name", CALLS)


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


@pytest.fixture
def verdicts(monkeypatch):
    """What `nobody_listens` said, call by call."""
    said, ask = [], _library.nobody_listens

    def asked(*tensors):
        said.append(ask(*tensors))
        return said[-1]

    monkeypatch.setattr(_library, "nobody_listens", asked)
    return said


@each
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_same_either_way(name, mode, verdicts, monkeypatch):
    with mode():
        past = CALLS[name](*arguments())
        assert verdicts == [True]
        monkeypatch.setattr(_library, "nobody_listens", lambda *_: False)
        through = CALLS[name](*arguments())
    for a, b in zip(flat(past), flat(through), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad and a.is_inference() == b.is_inference()


def test_parameters_without_gradient_are_past_it(verdicts):
    with torch.no_grad():
        CALLS["block_moe"](*map(torch.nn.Parameter, arguments()))
    CALLS["block_moe"](*(torch.nn.Parameter(t, requires_grad=False) for t in arguments()))
    assert verdicts == [True, True]


# ---- who listens ----


class SeesOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func).replace(".", "::"))
        return func(*args, **(kwargs or {}))


@each
@pytest.mark.parametrize("mode", [SeesOps, SeesFunctions])
def test_a_mode_sees_the_op(name, mode):
    given = arguments()
    with mode() as listener:
        CALLS[name](*given)
    assert f"dmoe::{name}" in listener.seen


@each
def test_the_profiler_sees_the_op(name):
    with torch.profiler.profile() as profile:
        CALLS[name](*arguments())
    assert f"dmoe::{name}" in {event.key for event in profile.key_averages()}


@each
def test_a_trace_holds_the_op(name):
    traced = torch.jit.trace(lambda *given: flat(CALLS[name](*given))[0], arguments(), check_trace=False)
    assert f"dmoe::{name}" in str(traced.graph)


@each
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_holds_the_op(name, dynamic):
    targets = []

    def keep(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    function = torch.compile(lambda *given: flat(CALLS[name](*given))[0], backend=keep, fullgraph=True, dynamic=dynamic)
    given = arguments()
    got = function(*given)
    assert any(target.startswith(f"dmoe.{name}") for target in targets)
    assert torch.equal(got, flat(CALLS[name](*given))[0])


class Subclass(torch.Tensor):
    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func).replace(".", "::"))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("at", range(7))
def test_a_subclass_anywhere_sees_the_op(at):
    given = arguments()
    given[at] = given[at].as_subclass(Subclass)
    Subclass.seen.clear()
    CALLS["block_moe"](*given)
    assert "dmoe::block_moe" in Subclass.seen


def listeners():
    def graded(at):
        given = arguments()
        given[at].requires_grad_()
        return given

    def negated():
        given = arguments()
        return [torch._neg_view(-given[0]), *given[1:]]

    def under(mode):
        def call():
            with mode:
                return _library.nobody_listens(*arguments())

        return call

    def within(transform):
        said = []
        transform(lambda v: (said.append(_library.nobody_listens(v)), v.sum())[1])(torch.ones(2, 3))
        return said[0]

    return {
        **{f"a gradient of argument {at}": lambda at=at: _library.nobody_listens(*graded(at)) for at in (0, 1, 3, 6)},
        "autocast": under(torch.autocast("cpu", torch.bfloat16)),
        "a device": under(torch.device("cpu")),
        "forward AD": under(torch.autograd.forward_ad.dual_level()),
        "fake tensors": under(torch._subclasses.FakeTensorMode()),
        "vmap": lambda: within(torch.func.vmap),
        "torch.func.grad": lambda: within(torch.func.grad),
        "functionalize": lambda: within(torch.func.functionalize),
        "a lazy minus": lambda: _library.nobody_listens(*negated()),
        "meta": lambda: _library.nobody_listens(torch.empty(3, device="meta")),
        "sparse": lambda: _library.nobody_listens(torch.ones(2, 2).to_sparse()),
        "a list": lambda: _library.nobody_listens([1.0]),
    }


@pytest.mark.parametrize("name", listeners())
def test_who_else_listens(name):
    assert _library.nobody_listens(*arguments(), None)
    assert listeners()[name]() is False


def test_the_lazy_minus_is_taken():
    x, *rest = arguments()
    with torch.no_grad():
        got = CALLS["block_moe"](torch._neg_view(-x), *rest)
        assert torch.equal(got[0], CALLS["block_moe"](x, *rest)[0])


# ---- checks that are made once ----


def wrong(name: str):
    """A layer with one thing wrong, and what the message has to name."""
    given = dict(zip(("x", "gate_weight", "expert_bias", "w13", "w2", "shared_w13", "shared_w2"), arguments()))
    if name in ("columns", "rows"):
        given["w2"] = given["w2"][:, :, :3].contiguous() if name == "columns" else given["w2"][:5].clone()
        return given, "w2"
    if name == "dtype":
        given["w13"] = given["w13"].half()
        return given, "w13"
    if name == "strides":
        given["w13"] = given["w13"].transpose(1, 2)
        return given, "w13"
    if name == "device":
        given["shared_w2"] = given["shared_w2"].to("meta")
        return given, "shared_w2"
    given[name] = None
    return given, name


@pytest.mark.parametrize(
    "name", ["columns", "rows", "dtype", "strides", "device", "w13", "x", "shared_w13", "gate_weight"]
)
def test_a_checked_layer_that_changes_is_checked_again(name):
    given, culprit = wrong(name)
    for _ in range(2):
        block_moe(*arguments(), routing=ROUTING)
        with pytest.raises(ValueError, match=f"^{culprit}"):
            block_moe(**given, routing=ROUTING)


def test_a_storage_that_changes_in_place_is_checked_again():
    given = arguments()
    block_moe(*given, routing=ROUTING)
    given[3].data = given[3].data[:, :6].contiguous()
    with pytest.raises(ValueError, match=r"^w2"):
        block_moe(*given, routing=ROUTING)
    given = arguments()
    given[4].resize_(6, 8, 3)
    with pytest.raises(ValueError, match=r"^w2"):
        block_moe(*given, routing=ROUTING)


def test_other_settings_are_checked_again():
    block_moe(*arguments(), routing=ROUTING)
    with pytest.raises(ValueError, match=r"^gate_weight"):
        block_moe(*arguments(), routing=dataclasses.replace(ROUTING, num_experts=5))


def test_values_are_checked_at_every_call():
    offsets = torch.tensor([0, 4, 8, 10], dtype=torch.int32)
    block_moe(*arguments(), routing=ROUTING, block_offsets=offsets)
    offsets[1] = 5
    with pytest.raises(ValueError, match=r"^block_offsets"):
        block_moe(*arguments(), routing=ROUTING, block_offsets=offsets)
    offsets, expert_map = torch.tensor([0, 4, 8, 10], dtype=torch.int32), torch.arange(6, dtype=torch.int32)
    block_moe(*arguments(), routing=ROUTING, expert_map=expert_map)
    expert_map[2] = 6
    with pytest.raises(ValueError, match=r"^expert_map"):
        block_moe(*arguments(), routing=ROUTING, expert_map=expert_map)


def test_what_has_passed_is_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(_checks, "_passed", set())
    for tokens in range(1, 5000):
        _checks.once(lambda x: None, torch.empty(tokens, device="meta"))
    assert 0 < len(_checks._passed) <= 4096


def test_a_backend_is_called_once_either_way(monkeypatch, verdicts):
    """Past the dispatcher too, the implementation is the op's own."""
    count, run = [], router.block_route_run
    monkeypatch.setattr(router, "block_route_run", lambda *args: count.append(1) or run(*args))
    CALLS["block_route"](*arguments())
    CALLS["block_route"](*(t.requires_grad_(t.dim() > 1) for t in arguments()))
    assert verdicts == [True, False] and len(count) == 2


def test_int8_activations_past_the_dispatcher(verdicts):
    (w13, w13_scale), (w2, w2_scale) = (quantize(values(6, 8, n), "int8") for n in (8, 4))
    scales = dict(w13_scale=w13_scale, w2_scale=w2_scale, activations="int8")
    moe_experts(values(3, 8), w13, w2, *ids_and_weights(), **scales)
    with pytest.raises(ValueError, match=r"^activations"):
        moe_experts(values(3, 8), values(6, 8, 8), w2, *ids_and_weights(), **scales)
    assert verdicts == [True]


def test_the_tensors_of_weights():
    """All nine and nothing else: a flag among them would count as somebody who listens."""
    fields = [torch.full((1,), float(i)) for i in range(9)]
    weights = ExpertWeights(*fields[:8], quantize_activations=True, expert_map=fields[8])
    assert [float(tensor) for tensor in weights.tensors()] == list(range(9))
