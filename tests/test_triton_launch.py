"""Repeated launches are those that Triton makes: the same kernels, grids and arguments, with this call's addresses.

In its own process, as under TRITON_INTERPRET nothing is compiled: Triton compiles for an H100, and a stand-in for its
launcher keeps what it gets (tools/host_cost.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TOOLS = Path(__file__).resolve().parents[1] / "tools"
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("triton"))


# ---- in its own process ----


class Launch:
    """What a launch gets; of a compiled kernel it is the launcher."""

    made: list = []

    def __init__(self, source, metadata):
        self.names = source.fn.arg_names

    def __call__(self, x, y, z, stream, kernel, _metadata, launch_metadata, enter, exit, *args):
        if enter is not None:
            enter(launch_metadata)
        Launch.made.append((kernel, (x, y, z), stream, dict(zip(self.names, args, strict=True))))


def launches(function) -> list:
    Launch.made = []
    function()
    return Launch.made


def backend(name: str, *args):
    from dmoe_ops.triton_kernels.backend import Triton

    from dmoe_ops._call import LayerCall

    args = (LayerCall(*args),) if name == "block_moe" else args
    return launches(lambda: getattr(Triton, name)(*args))


def compare(made: list, repeated: list, given: list) -> None:
    """`made` by Triton, whose arguments are tensors, `repeated` with addresses; both for the tensors in `given`."""
    inside = {tensor.untyped_storage().data_ptr() for tensor in given}
    bases, sizes, kept = {}, {}, []
    assert made and len(made) == len(repeated)
    for (kernel, grid, _, want), (*other, _, got) in zip(made, repeated):
        assert [kernel, grid] == other and want.keys() == got.keys()
        for name, value in want.items():
            if not isinstance(value, torch.Tensor):
                assert got[name] == value, name
                continue
            kept.append(value)
            assert type(got[name]) is int, name
            storage = value.untyped_storage()
            if storage.data_ptr() in inside:
                assert got[name] == value.data_ptr(), name
                continue
            base = got[name] - (value.data_ptr() - storage.data_ptr())
            assert bases.setdefault(storage.data_ptr(), base) == base and base % 16 == 0, name
            sizes[base] = storage.nbytes()
    ordered = sorted(sizes)
    assert len(ordered) == len(bases)
    assert all(at + sizes[at] <= following for at, following in itertools.pairwise(ordered))


def agree(name: str, make) -> list:
    """make() -> the backend's arguments: recorded, then repeated for these and for others."""
    from dmoe_ops.triton_kernels import launch

    given = make()
    made = backend(name, *given)
    assert isinstance(next(iter(made[0][3].values())), torch.Tensor)
    compare(made, backend(name, *given), tensors(given))
    others = make()
    repeated = backend(name, *others)
    assert len(launch._plans) == 1
    launch._plans.clear()
    compare(backend(name, *others), repeated, tensors(others))
    launch._plans.clear()
    return made


def tensors(given) -> list:
    if isinstance(given, torch.Tensor):
        return [given]
    return [t for part in given for t in tensors(part)] if isinstance(given, tuple) else []


def layer(tokens: int, *, hidden=64, inner=32, shared=32, offsets=None, expert_map=False, **settings):
    """The fields of a `LayerCall`."""
    from dmoe_ops import BlockRouting, router
    from dmoe_ops.formats import ExpertWeights

    settings = dict(num_experts=16, top_k=2, n_group=1, topk_group=1, min_experts=4) | settings
    routing, dtype = BlockRouting(**settings), torch.bfloat16
    empty = lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype)  # noqa: E731
    x, experts = empty(tokens, hidden), routing.num_experts
    weights = ExpertWeights(
        empty(experts, 2 * inner, hidden),
        empty(experts, hidden, inner),
        empty(2 * shared, hidden) if shared else None,
        empty(hidden, shared) if shared else None,
        expert_map=empty(experts, dtype=torch.int32) if expert_map else None,
    )
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    out = router.allocate_routing(tokens, tokens, offsets, routing, x)
    logits, bias = (empty(*shape, dtype=torch.float32) for shape in ((tokens, experts), (experts,)))
    return x, empty(experts, hidden), bias, weights, offsets, tokens, routing, empty(tokens, hidden), out, logits


@check
def a_layer_of_few_tokens():
    made = agree("block_moe", lambda: layer(32))
    assert [kernel for kernel, *_ in made] == ["gate_kernel", "route_kernel", "dense_up_kernel", "dense_down_kernel"]
    agree("block_moe", lambda: layer(9, shared=16, offsets=[0, 4, 9], expert_map=True, score="softmax"))


@check
def a_layer_whose_blocks_share_a_pool():
    def pooled():
        *call, logits = layer(64, choose="pool")
        return *call, logits, torch.tensor([0, 2], dtype=torch.int32)

    def given():
        *call, logits = layer(32)
        ids = torch.zeros(1, 16, dtype=torch.int32)
        return *call, logits, None, ids

    made = agree("block_moe", pooled)
    assert [kernel for kernel, *_ in made][:3] == ["gate_kernel", "votes_kernel", "route_kernel"]
    made = agree("block_moe", given)
    assert [kernel for kernel, *_ in made][:3] == ["gate_kernel", "route_kernel", "dense_up_kernel"]


@check
def a_layer_of_many_tokens():
    made = agree("block_moe", lambda: layer(256, shared=0))
    assert [kernel for kernel, *_ in made][2:] == ["gathered_up_kernel", "gathered_down_kernel", "combine_kernel"]
    agree("block_moe", lambda: layer(256))


@check
def parts_of_a_layer():
    def experts(tokens, of=lambda weights: weights):
        x, _, _, weights, *_, y, out, _ = layer(tokens, shared=0)
        return x, of(weights), out.topk_ids, out.topk_weights, y

    def fp8(weights):
        scales = torch.ones(16, 2, 1), torch.ones(16, 1, 1)
        w13, w2 = (weight.to(torch.float8_e4m3fn) for weight in weights[:2])
        return weights._replace(w13=w13, w2=w2, w13_scale=scales[0], w2_scale=scales[1])

    def route():
        _, _, bias, _, offsets, seq_len, routing, _, out, logits = layer(48)
        return logits, bias, offsets, seq_len, routing, out

    def gradient(of_weights):
        x, weights, ids, scale, y = experts(40)
        of = tuple(map(torch.empty_like, weights[:2])) if of_weights else (None, None)
        return y, x, weights, ids, scale, (torch.empty_like(x), *of, torch.empty_like(scale))

    assert len(agree("moe_experts", lambda: experts(40, fp8))) == 3
    assert len(agree("moe_experts", lambda: experts(40))) == 3
    assert len(agree("moe_experts", lambda: experts(100))) == 5
    assert len(agree("block_route", route)) == 1
    assert len(agree("moe_experts_backward", lambda: gradient(True))) == 7
    assert len(agree("moe_experts_backward", lambda: gradient(False))) == 5


@check
def few_specialisations():
    """Numbers of tokens share kernels: each is compiled at most 8 times for T = 1 .. 4096."""
    import triton_resources

    seen = {}
    for tokens in (*range(1, 70), 127, 128, 129, 500, 512, 791, 793, 2048, 4095, 4096):
        for ops in (False, True):
            for call in triton_resources.launches(triton_resources.CHIPS["sm_90"], "mini", tokens, ops=ops):
                made = triton_resources.source(call)
                parts = (*made.constants.items(), *made.signature.items(), *made.attrs.items(), *call.options.items())
                seen.setdefault((call.fn.__name__, ops), set()).add(repr(sorted(parts, key=repr)))
    assert max(map(len, seen.values())) <= 8, {name: len(made) for name, made in seen.items()}


@check
def what_makes_another_call():
    from dmoe_ops.triton_kernels import launch, tiles

    names = ("x", "gate", "bias", "weights", "offsets", "seq_len", "routing", "y", "out", "logits")
    usual = dict(zip(names, layer(32)))

    def call(**changed):
        return backend("block_moe", *(usual | changed).values())

    call()
    changes = [
        dict(gate=usual["gate"].float()),
        dict(bias=None),
        dict(seq_len=16),
        dict(routing=dataclasses.replace(usual["routing"], top_p=0.5)),
        dict(weights=usual["weights"]._replace(shared_w13=None, shared_w2=None)),
        dict(weights=usual["weights"]._replace(expert_map=torch.zeros(16, dtype=torch.int32))),
        dict(weights=usual["weights"]._replace(activation="gelu_tanh")),
    ]
    for count, changed in enumerate(changes, 2):
        made = call(**changed)
        assert len(launch._plans) == count, changed
        assert isinstance(next(iter(made[0][3].values())), torch.Tensor)
    with tiles.using(tiles.for_name("A100", 163 << 10, 108)):
        first = call()
        assert len(launch._plans) == count + 1
        assert len(first) == len(call()) and len(launch._plans) == count + 1


@check
def what_is_made_anew_every_time():
    from dmoe_ops.triton_kernels import launch, router, tiles

    calls = []

    def counted(name, function):
        def run(*args):
            calls.append(name)
            function(*args)

        return launch.repeated(run)

    tile = tiles.for_device(torch.device("cuda", 0)).gate

    def gate(x, weight, logits):
        router.gate(x, weight, logits, None, x.new_empty(1, dtype=torch.int32), tile, False)

    def another_op(x, weight, logits):
        gate(x, weight, logits)
        logits.add_(1)

    def reads(x, weight, logits):
        gate(x, weight, logits)
        assert x.flatten()[0].item() == 0

    def shares(x, weight, logits):
        gate(x, weight.view(-1)[64:].view(15, 64), logits)

    given = torch.zeros(32, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(32, 16)
    fifteen = *given[:2], torch.zeros(32, 15)
    both = torch.zeros(48, 64, dtype=torch.bfloat16)
    for function, args, times in (
        (gate, given, 1),
        (another_op, given, 3),
        (reads, given, 3),
        (lambda *args: None, given, 3),
        (shares, fifteen, 1),
        (shares, (both[:32], both[32:], fifteen[2]), 3),
        (gate, (both[:32], both[:16], given[2]), 3),  # two that begin at one address
    ):
        calls.clear()
        run = counted(function, function)
        made = [launches(lambda run=run, args=args: run(*args)) for _ in range(3)]
        assert len(calls) == times, function
        assert len({len(each) for each in made}) == 1

    x, *rest = layer(32)
    backend("block_moe", x, *rest)
    off = torch.zeros(32 * 64 + 1, dtype=torch.bfloat16)[1:].view(32, 64)
    made = backend("block_moe", off, *rest)
    assert made[0][3]["x_ptr"] is off  # Triton's own way, which compiles for this alignment


@check
def stream_and_hooks():
    from triton import knobs

    given = layer(32)
    backend("block_moe", *given)
    GPU.get_current_stream = lambda device: 77
    assert {stream for _, _, stream, _ in backend("block_moe", *given)} == {77}
    names = []
    knobs.runtime.launch_enter_hook.add(lambda metadata: names.append(metadata.get()["name"]))
    backend("block_moe", *given)
    assert names == ["gate_kernel", "route_kernel", "dense_up_kernel", "dense_down_kernel"]


@check
def settings_of_triton():
    """A kernel is compiled again under TRITON_DEBUG, and one with hooks of its own is launched by Triton."""
    from dmoe_ops.triton_kernels import launch, router, tiles
    from triton import knobs

    tile = tiles.for_device(torch.device("cuda", 0)).gate

    @launch.repeated
    def gate(x, weight, logits, done):
        router.gate(x, weight, logits, None, done, tile, False)

    given = torch.zeros(32, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(32, 16)
    done = given[0].new_empty(1, dtype=torch.int32)
    for debug in (False, True, False):
        knobs.runtime.debug = debug
        gate(*given, done)
    assert len(launch._plans) == 2
    seen = []
    router.gate_kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    for count in (1, 2):
        gate(*given, done)
        assert len(seen) == count


@check
def two_threads():
    """A second thread's launches are not part of what the first one records."""
    import threading

    from dmoe_ops.triton_kernels import launch, router, tiles

    tile = tiles.for_device(torch.device("cuda", 0)).gate
    given = torch.zeros(32, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(32, 16)
    done = given[0].new_empty(1, dtype=torch.int32)
    meanwhile = []

    def gate(x, weight, logits, done):
        router.gate(x, weight, logits, None, done, tile, False)
        if threading.current_thread() is threading.main_thread() and not meanwhile:
            meanwhile.append(1)
            thread = threading.Thread(target=run, args=(*given, done))
            thread.start()
            thread.join()

    run = launch.repeated(gate)
    assert len(launches(lambda: run(*given, done))) == 2
    assert len(launches(lambda: run(*given, done))) == 1


@pytest.mark.parametrize("name", CHECKS)
def test_repeated_launches(name, cache):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= dict(PYTHONPATH=os.pathsep.join([str(TOOLS), env.get("PYTHONPATH", "")]), TRITON_CACHE_DIR=cache)
    done = subprocess.run([sys.executable, __file__, name], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    import host_cost

    with host_cost.triton_backend() as GPU:
        GPU.launcher_cls = Launch
        CHECKS[sys.argv[1]]()
