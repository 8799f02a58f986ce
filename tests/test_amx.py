"""The AMX body of the C++ experts: its own source with the tile instructions in plain C++ (tests/cpp/emulated_tiles.h), on
any machine, memory guarded, and the instructions themselves where `dmoe info` says amx. The AVX512-BF16 body beside it."""

from __future__ import annotations

import ctypes
import subprocess

import emulated
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from test_experts import inputs, torch_loop
from test_quantized import layer, routed, wide

from dmoe_ops import _library, moe_experts
from dmoe_ops.formats import ACTIVATIONS

ISAS = ["plain", "avx2", "avx512", "avx512_bf16", "amx"]  # in the order of dmoe::cpu::Isa
FORMATS = [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8]  # of dmoe::cpu::Format
SOURCES = ["csrc/cpu/experts", "csrc/cpu/matrix", "csrc/cpu/dot", "csrc/cpu/dot_avx512", "csrc/cpu/dot_amx"]
EPS = torch.finfo(torch.bfloat16).eps
Layer = emulated.structure(
    "Layer",
    ("tokens hidden intermediate experts top_k shared_intermediate", ctypes.c_int64),
    ("isa threads format shared_format quantize_activations activation", ctypes.c_int32),
    ("x w13 w13_scale w2 w2_scale shared_w13 shared_w13_scale shared_w2 shared_w2_scale", ctypes.c_void_p),
    ("topk_ids topk_weights y", ctypes.c_void_p),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if emulated.compiler() is None:
        pytest.skip("tests/cpp needs a C++ compiler")
    folder, root = tmp_path_factory.mktemp("amx"), emulated.ROOT
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fPIC", "-DDMOE_EMULATE"]
    include = [f"-I{root / 'csrc'}", f"-I{root / 'tests/cpp'}"]
    objects = []
    for source in [*SOURCES, "tests/cpp/dot_host"]:
        objects.append(folder / source.replace("/", "_"))
        command = [emulated.compiler(), *flags, *include, "-c", root / f"{source}.cpp", "-o", objects[-1]]
        subprocess.run(command, check=True)
    target = folder / "libdot.so"
    subprocess.run([emulated.compiler(), "-shared", "-pthread", "-Wl,-z,defs", *objects, "-o", target], check=True)
    library = ctypes.CDLL(str(target))
    library.forward.restype, library.products.restype = ctypes.c_char_p, ctypes.c_int64
    return library


def emulate(
    library, x, w13, w2, topk_ids, topk_weights, *, isa="amx", threads=2, activations=None, activation="silu",
    shared=(), **scales
):  # fmt: skip
    """y. `shared` is w13, w2 and, where they are quantised, their scales."""
    y = torch.full_like(x, torch.nan)
    shared_w13, shared_w2, *shared_scales = (*shared, None, None)[: max(len(shared), 2)]
    tensors = dict(
        x=x,
        w13=w13,
        w2=w2,
        shared_w13=shared_w13,
        shared_w2=shared_w2,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        y=y,
        **scales,
        **dict(zip(("shared_w13_scale", "shared_w2_scale"), shared_scales)),
    )
    args = Layer(
        tokens=len(x),
        hidden=x.shape[1],
        intermediate=w13.shape[1] // 2,
        experts=len(w13),
        top_k=topk_ids.shape[1],
        shared_intermediate=0 if shared_w13 is None else len(shared_w13) // 2,
        isa=ISAS.index(isa),
        threads=threads,
        format=FORMATS.index(w13.dtype),
        shared_format=FORMATS.index(shared_w13.dtype) if shared else 0,
        quantize_activations=activations is not None,
        activation=ACTIVATIONS.index(activation),
        **{name: emulated.pointer(tensor) for name, tensor in tensors.items()},
    )
    problem = library.forward(ctypes.byref(args))
    assert problem is None, problem.decode()
    return y


@pytest.fixture(params=["emulated", "here"])
def experts(request, monkeypatch, threads):
    """moe_experts on tiles: emulated, and by this machine's own instructions."""
    if request.param == "emulated":
        library = request.getfixturevalue("library")
        return lambda *args, **how: emulate(library, *args, **how)
    if _library._C is None or _library._C.cpu_isa() != "amx":
        pytest.skip("no AMX here, or DMOE_CPU_ISA lowers it")
    monkeypatch.setenv("DMOE_BACKEND", "cpp")

    def run(x, w13, w2, topk_ids, topk_weights, *, threads_=threads, threads=2, **how):
        threads_(threads)
        return moe_experts(x, w13, w2, topk_ids, topk_weights, **how)

    return run


def int8(hidden, inter, experts, seed=0):
    weights = layer("int8", hidden, inter, experts, seed)
    return weights, {name: weights[name] for name in ("w13_scale", "w2_scale")}


def check(y, arguments, oracle, vectors=None, **how):
    """Error at most twice torch's own, or a rounding; between two bodies, the order of the additions and a rounding."""
    truth = oracle.experts(*arguments, **how)
    scale = truth.abs().max().item() + 1e-6
    error, torchs = ((v.double() - truth).abs().max().item() for v in (y, torch_loop(*arguments, **how)))
    assert y.isfinite().all() and error <= max(2 * torchs, EPS / 2 * scale) + 5e-7 * scale, (error, torchs, scale)
    if vectors is not None:
        assert (y.double() - vectors.double()).abs().max() <= (EPS + 1e-6) * scale


@settings(max_examples=50)
@given(
    tokens=st.integers(1, 200),
    hidden=st.one_of(st.integers(1, 140), st.sampled_from([32, 64, 128])),
    inter=st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48, 64])),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    empty=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_any_shape(library, tokens, hidden, inter, experts, top_k, seed, empty, oracle):
    arguments = inputs(tokens, hidden, inter, experts, top_k, torch.bfloat16, seed, empty)
    check(emulate(library, *arguments), arguments, oracle, emulate(library, *arguments, isa="avx512_bf16"))


@pytest.mark.parametrize("shape", [(1, 96, 64, 2, 1), (33, 257, 65, 4, 2), (200, 64, 48, 3, 2), (600, 40, 33, 2, 1)])
def test_against_float64(experts, shape, oracle):
    arguments = inputs(*shape, torch.bfloat16)
    check(experts(*arguments), arguments, oracle)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16"])
def test_gelu_tanh(library, isa, oracle):
    how = dict(activation="gelu_tanh")
    arguments = inputs(40, 66, 34, 3, 2, torch.bfloat16)
    check(emulate(library, *arguments, isa=isa, **how), arguments, oracle, **how)
    for form in ("fp8", "int8", "int4"):  # int8 by integers, whose h is rounded apart
        weights, given = layer(form, 66, 34, 3), routed(40, 66, 3, dtype=torch.bfloat16)
        truth = oracle.experts(given["x"], *wide(weights), given["topk_ids"], given["topk_weights"], **how)
        y, size = emulate(library, **given, **weights, isa=isa, **how), truth.abs().max()
        assert (y.double() - truth).abs().max() <= (EPS + 2e-6) * size


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16"])
@pytest.mark.parametrize("form", ["plain", "int8", "int8 activations"])
def test_a_token_has_the_same_bits_alone_and_among_others(library, isa, form):
    """Any number of them: tiles that are full, narrow, single or in pairs."""
    x, w13, w2, _, weights = inputs(200, 70, 37, 2, 1, torch.bfloat16)
    ids, how = torch.zeros(200, 1, dtype=torch.int32), dict(isa=isa)
    ids[150:] = 1
    if form != "plain":
        quantized, scales = int8(70, 37, 2)
        w13, w2 = quantized["w13"], quantized["w2"]
        how.update(scales, activations="int8" if "activations" in form else None)
    everybody = emulate(library, x, w13, w2, ids, weights, **how)
    for n in [*range(1, 36), 47, 48, 49, 63, 64, 65, 96, 97, 129, 150, 151]:
        few = emulate(library, x[:n], w13, w2, ids[:n], weights[:n], **how)
        assert torch.equal(few, everybody[:n]), n


@pytest.mark.parametrize("form", ["plain", "int8", "int8 activations"])
def test_the_same_bits_for_every_number_of_threads(experts, form):
    x, w13, w2, ids, weights = inputs(90, 128, 96, 5, 2, torch.bfloat16)
    how = {}
    if form != "plain":
        quantized, how = int8(128, 96, 5)
        w13, w2 = quantized["w13"], quantized["w2"]
        how["activations"] = "int8" if "activations" in form else None
    results = [experts(x, w13, w2, ids, weights, threads=n, **how) for n in (1, 2, 5, 2)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_bad_token_stays_in_its_row(experts, value):
    x, w13, w2, ids, weights = inputs(40, 33, 18, 3, 2, torch.bfloat16, empty=0.1)
    ids[7] = torch.tensor([1, -1])
    y = experts(x, w13, w2, ids, weights)
    bad = x.clone()
    bad[7] = value
    changed = experts(bad, w13, w2, ids, weights)
    others = torch.arange(40) != 7
    assert torch.equal(changed[others], y[others]) and not changed[7].isfinite().any()


def test_a_bad_expert_stays_with_the_tokens_that_chose_it(experts):
    x, w13, w2, ids, weights = inputs(40, 33, 18, 4, 2, torch.bfloat16)
    y = experts(x, w13, w2, ids, weights)
    w13[2], w2[2] = float("nan"), float("inf")
    changed = experts(x, w13, w2, ids, weights)
    chose = (ids == 2).any(1)
    assert chose.any() and torch.equal(changed[~chose], y[~chose]) and changed[chose].isnan().all()


def test_no_slot_at_all(experts):
    x, w13, w2, ids, weights = inputs(20, 33, 18, 3, 2, torch.bfloat16)
    assert torch.equal(experts(x, w13, w2, torch.full_like(ids, -1), weights), torch.zeros_like(x))


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("shape", [(1, 66, 34), (9, 131, 129), (50, 64, 128), (200, 30, 22)])
def test_int8(library, experts, shape, activations, oracle):
    """The integers' sums are exact; what remains is the rounding of h, of y and of a few products."""
    tokens, hidden, inter = shape
    weights, scales = int8(hidden, inter, 3)
    arguments = routed(tokens, hidden, 3, dtype=torch.bfloat16)
    given = (arguments["x"], weights["w13"], weights["w2"], arguments["topk_ids"], arguments["topk_weights"])
    y = experts(*given, **scales, activations=activations)
    truth = oracle.experts(arguments["x"], *wide(weights), *given[3:])
    vectors = emulate(library, *given, **scales, activations=activations, isa="avx512_bf16")
    size = truth.abs().max()
    assert (y.double() - vectors.double()).abs().max() <= (EPS + 2e-3 * (activations is not None)) * size
    assert (y.double() - truth).abs().max() <= (0.05 if activations else EPS + 2e-6) * size


def test_a_bad_scale_stays_with_the_tokens_that_chose_the_expert(experts):
    weights, scales = int8(30, 22, 5)
    arguments = routed(40, 30, dtype=torch.bfloat16)
    given = (arguments["x"], weights["w13"], weights["w2"], arguments["topk_ids"], arguments["topk_weights"])
    y = experts(*given, **scales)
    chose = (arguments["topk_ids"] == 2).any(1)
    for value in (float("nan"), float("inf")):
        scales["w13_scale"][2] = value
        changed = experts(*given, **scales)
        assert chose.any() and torch.equal(changed[~chose], y[~chose])
        assert not changed[chose].isfinite().all(1).any()


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_weights_that_are_decoded_keep_the_vectors(library, form):
    weights, arguments = layer(form, 64, 48), routed(40, 64, dtype=torch.bfloat16)
    results = [emulate(library, **arguments, **weights, isa=isa) for isa in ("amx", "avx512_bf16")]
    assert torch.equal(*results) and library.products() == 0


@pytest.mark.parametrize(
    "form, shared_form", [("plain", "int8"), ("int8", "plain"), ("fp8", "plain"), ("plain", "fp8")]
)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_a_shared_expert_of_another_format(library, form, shared_form, activations, oracle):
    """A call then has activations of two kinds, and may have tiles of both bodies."""
    x, w13, w2, ids, weights = inputs(40, 70, 36, 3, 2, torch.bfloat16)
    scales, activations = {}, activations if "int8" in (form, shared_form) else None
    wide13, wide2 = w13, w2
    if form != "plain":
        quantized = layer(form, 70, 36, 3)
        wide13, wide2 = wide(quantized)
        w13, w2 = quantized.pop("w13"), quantized.pop("w2")
        scales = quantized
    shared, shared_wide = [t[0].contiguous() for t in inputs(1, 70, 50, 1, 1, torch.bfloat16)[1:3]], None
    if shared_form != "plain":
        quantized = layer(shared_form, 70, 50, 1, seed=7)
        shared_wide = [t[0] for t in wide(quantized)]
        shared = [quantized[name][0].contiguous() for name in ("w13", "w2", "w13_scale", "w2_scale")]
    truth = oracle.experts(x, wide13, wide2, ids, weights)
    truth += torch.stack([torch.from_numpy(oracle.mlp(row, *(shared_wide or shared))) for row in x])
    y, vectors = (
        emulate(library, x, w13, w2, ids, weights, **scales, shared=shared, activations=activations, isa=isa)
        for isa in ("amx", "avx512_bf16")
    )
    size = truth.abs().max()
    assert (y.double() - truth).abs().max() <= (0.05 if activations else EPS + 2e-6) * size
    assert (y.double() - vectors.double()).abs().max() <= (EPS + 2e-3 * (activations is not None)) * size


@pytest.mark.parametrize("hidden, inter", [(50, 32), (40, 64), (32, 41), (64, 17), (96, 33)])
def test_nothing_past_the_weights_is_read(library, hidden, inter, oracle):
    """Rows of whole steps come straight from memory, whose end is guarded; the last tile of rows has fewer."""
    x, w13, w2, _, weights = inputs(40, hidden, inter, 2, 1, torch.bfloat16)
    arguments = (x, w13, w2, torch.ones(40, 1, dtype=torch.int32), weights)
    check(emulate(library, *arguments), arguments, oracle)


@pytest.mark.parametrize("tokens", [1, 16, 17, 48, 80, 200])
def test_tiles_are_as_few_as_possible(library, tokens):
    hidden, inter = 96, 64
    x, w13, w2, _, weights = inputs(tokens, hidden, inter, 1, 1, torch.bfloat16)
    emulate(library, x, w13, w2, torch.zeros(tokens, 1, dtype=torch.int32), weights)
    steps = 2 * inter // 16 * hidden // 32 + hidden // 16 * inter // 32
    assert library.products() == -(-tokens // 16) * steps
