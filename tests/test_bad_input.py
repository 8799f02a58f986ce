"""Bad input: a ValueError of one line that names the argument and its value, before anything runs."""

from __future__ import annotations

import inspect
import math
import re
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dmoe_ops
from dmoe_ops import BlockMoE, BlockRouting, _library, layer, reference
from dmoe_ops.formats import ExpertWeights

T, H, I, E, K = 6, 8, 3, 4, 2
ROUTING = BlockRouting(num_experts=E, top_k=K, block_size=4, n_group=2, topk_group=1, min_experts=2)


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def good(op):
    arguments = dict(
        block_route=dict(logits=torch.randn(T, E), expert_bias=torch.zeros(E), routing=ROUTING, block_offsets=None),
        moe_experts=dict(
            x=torch.randn(T, H),
            w13=torch.randn(E, 2 * I, H),
            w2=torch.randn(E, H, I),
            topk_ids=torch.zeros(T, K, dtype=torch.int32),
            topk_weights=torch.ones(T, K),
        ),
        block_moe=dict(
            x=torch.randn(T, H),
            gate_weight=torch.randn(E, H),
            expert_bias=torch.zeros(E),
            w13=torch.randn(E, 2 * I, H),
            w2=torch.randn(E, H, I),
            shared_w13=torch.randn(2 * I, H),
            shared_w2=torch.randn(H, I),
            routing=ROUTING,
            block_offsets=None,
        ),
    )
    return arguments[op]


def wrong_tensor(shape, *others, dtype=torch.int64):
    """One fault of each kind: rank, size, dtype, device."""
    zeros = torch.zeros(shape, dtype=torch.int32 if dtype == torch.int64 else torch.float32)
    for other in others:
        yield torch.zeros(other, dtype=zeros.dtype), str(list(other))
    yield zeros.to(dtype), str(dtype).removeprefix("torch.")
    yield zeros.to("meta"), "meta"


EXPERT_WEIGHTS = {
    "w13": [
        *wrong_tensor(
            (E, 2 * I, H), (2 * I, H), (E, 2 * I, H + 1), (E, 2 * I + 1, H), (E, H, 2 * I), dtype=torch.int32
        ),
        (torch.zeros(E, 2 * I, H, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(E, H, 2 * I).transpose(1, 2), "(48, 1, 6)"),
    ],
    "w2": [
        *wrong_tensor((E, H, I), (H, I), (E, H, I + 1), (E + 1, H, I), (E, H + 1, I), dtype=torch.int32),
        (torch.zeros(E, H, I, dtype=torch.float16), "float16"),
        (torch.zeros(E, I, H).transpose(1, 2), "(24, 1, 8)"),
    ],
}
BIAS = list(wrong_tensor((E,), (E + 1,), (1, E), (), dtype=torch.int32)) + [(torch.zeros(E).half(), "float16")]
OFFSETS = [
    *[(offsets(*v), str(s)) for v, s in (((0, 3), 3), ((1, 4, 6), 1), ((0, 4, 7), 7), ((0, 4, 3, 6), 3))],
    (offsets(0, 3, 3, 6), "3 then 3"),
    (offsets(-1, 3, 6), "-1"),
    (offsets(0, 5, 6), "5"),  # longer than block_size
    (offsets(), "[]"),
    (offsets(0), "0"),
    (offsets(0, 4, 6, dtype=torch.int64), "int64"),
    (offsets(0, 4, 6, dtype=torch.float32), "float32"),
    (offsets(0, 4, 6)[None], "[1, 3]"),
    (offsets(0, 4, 6).to("meta"), "meta"),
]
MAP = [
    (offsets(0, 1, 2, 4), "from 0 to 3, -1 or -2, got 4"),
    (offsets(0, -3, 2, 3), "got -3"),
    (offsets(0, 1, 2, 3, dtype=torch.int64), "int64"),
    (offsets(0, 1, 2, 3).to("meta"), "meta"),
    (offsets(0, 1, 2, 3)[None], "[1, 4]"),
    (offsets(0, 1, 2, 3).repeat_interleave(2)[::2], "(2,)"),
    ([0, 1, 2, 3], "[0, 1, 2, 3]"),
]
NO_ROUTING = [(None, "None"), ("dmoe", "dmoe"), (dict(top_p=0.6), "top_p")]
ACTIVATION = [("gelu", "'gelu'"), ("SiLU", "'SiLU'"), (None, "None"), (["silu"], "['silu']"), (0, "got 0")]
NO_TENSOR = [(None, "None"), ([1.0], "[1.0]")]

FAULTS = {
    "block_route": {
        "logits": [
            *wrong_tensor((T, E), (E,), (T, E + 1), (1, 1, T, E), (2, T, E - 1), dtype=torch.int32),
            (torch.zeros(T, E).bfloat16(), "bfloat16"),
            (torch.zeros(T, E).half(), "float16"),
            *NO_TENSOR,
        ],
        "expert_bias": [*BIAS, ([0.0] * E, "[0.0")],
        "routing": NO_ROUTING,
        "block_offsets": [*OFFSETS, ([0, 4, 6], "[0, 4, 6]")],
    },
    "moe_experts": {
        "x": [
            *wrong_tensor((T, H), (H,), (1, T, H), dtype=torch.int32),
            (torch.zeros(T, H, dtype=torch.complex64), "complex64"),
            *NO_TENSOR,
        ],
        **{name: [*faults, *NO_TENSOR] for name, faults in EXPERT_WEIGHTS.items()},
        "topk_ids": [
            *(fault for fault in wrong_tensor((T, K), (T,), (T + 1, K), (1, T, K)) if fault[1] != "int64"),
            (torch.zeros(T, K, dtype=torch.int16), "int16"),
            (torch.zeros(T, K), "float32"),
            *NO_TENSOR,
        ],
        "topk_weights": [
            *wrong_tensor((T, K), (T,), (T, K + 1), (T + 1, K), dtype=torch.int32),
            (torch.zeros(T, K).bfloat16(), "bfloat16"),
            *NO_TENSOR,
        ],
        "expert_map": [*MAP, (offsets(), "[]")],
        "activation": ACTIVATION,
    },
    "block_moe": {
        "x": [*wrong_tensor((T, H), (H,), (1, 1, T, H), dtype=torch.int32), *NO_TENSOR],
        "gate_weight": [*wrong_tensor((E, H), (H,), (E + 1, H), (E, H + 1), dtype=torch.int32), *NO_TENSOR],
        "expert_bias": [*BIAS, ([0.0] * E, "[0.0")],
        **{name: [*faults, *NO_TENSOR] for name, faults in EXPERT_WEIGHTS.items()},
        "shared_w13": [
            *wrong_tensor((2 * I, H), (H,), (2 * I, H + 1), (2 * I + 1, H), dtype=torch.int32),
            (torch.zeros(2 * I, H).bfloat16(), "bfloat16"),
            (None, "None"),
            (torch.zeros(H, 2 * I).T, "(1, 6)"),
            ("w", "'w'"),
        ],
        "shared_w2": [
            *wrong_tensor((H, I), (H,), (H, I + 1), (H + 1, I), dtype=torch.int32),
            (torch.zeros(H, I).bfloat16(), "bfloat16"),
            (None, "None"),
            (torch.zeros(I, H).T, "(1, 8)"),
            ("w", "'w'"),
        ],
        "routing": [*NO_ROUTING, (BlockRouting(num_experts=8, top_k=2, n_group=2, topk_group=1), "8")],
        "block_offsets": [*OFFSETS, ([0, 4, 6], "[0, 4, 6]")],
        "expert_map": [*MAP, (offsets(0, 1, 2), "[3]")],
        "activation": ACTIVATION,
    },
}
CASES = [
    pytest.param(op, name, value, says, id=f"{op}-{name}-{says}")
    for op, arguments in FAULTS.items()
    for name, faults in arguments.items()
    for value, says in faults
]


def named(name, value):
    """Where two arguments disagree with each other, either may be the one that is named."""
    first_on_another_device = name in ("x", "logits") and isinstance(value, torch.Tensor) and value.is_meta
    return "" if first_on_another_device or isinstance(value, BlockRouting) else name


def refused(call, name, says):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert says in message
    assert re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message.split("got")[0]), message


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op, name, value, says", CASES)
def test_an_op_refuses(op, name, value, says):
    arguments = {**good(op), name: value}
    refused(lambda: getattr(dmoe_ops, op)(**arguments), named(name, value), says)


class Listener(TorchDispatchMode):
    """Passes every call on; ops can't go past the dispatcher then."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op, name, value, says", CASES)
def test_an_op_refuses_where_somebody_listens(op, name, value, says):
    arguments = {**good(op), name: value}
    with Listener():
        refused(lambda: getattr(dmoe_ops, op)(**arguments), named(name, value), says)


def halves(x, gate_weight, expert_bias, routing, block_offsets, **weights):
    weights = ExpertWeights(**weights)
    routed = layer.route(x, gate_weight, expert_bias, weights, routing=routing, block_offsets=block_offsets)
    return layer.experts(x, weights, routed)


HALVES = [case.values[1:] for case in CASES if case.values[0] == "block_moe" and not isinstance(case.values[2], list)]


@pytest.mark.parametrize("name, value, says", HALVES)
def test_the_halves_of_a_layer_refuse_the_same(name, value, says):
    refused(lambda: halves(**{**good("block_moe"), name: value}), named(name, value), says)


@pytest.mark.parametrize("op, name, value, says", CASES)
def test_the_reference_refuses_the_same(op, name, value, says):
    arguments = {**good(op), name: value}
    refused(lambda: getattr(reference, op)(**arguments), named(name, value), says)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("module", [dmoe_ops, reference])
@pytest.mark.parametrize("op", ["moe_experts", "block_moe"])
def test_rows_without_columns_are_refused(op, module):
    arguments = good(op)
    for name, dim in dict(x=1, gate_weight=1, w13=2, w2=1, shared_w13=1, shared_w2=0).items():
        if name in arguments:
            arguments[name] = arguments[name].narrow(dim, 0, 0)
    refused(lambda: getattr(module, op)(**arguments), "x", f"must have H of at least 1, got [{T}, 0]")


# What C++ implements, past the checks in Python.
PRIVATE = {
    "_block_route_out": dict(
        logits=torch.zeros(T, E),
        expert_bias=torch.zeros(E),
        block_offsets=offsets(0, 4, 6),
        seq_len=T,
        ints=_library.packed_routing(ROUTING)[0],
        floats=[0.6, 2.5],
        topk_ids=torch.zeros(T, K, dtype=torch.int32),
        topk_weights=torch.zeros(T, K),
        coreset_ids=torch.zeros(2, E, dtype=torch.int32),
        coreset_sizes=torch.zeros(2, dtype=torch.int32),
    ),
    "_gate_out": dict(x=torch.zeros(T, H), gate_weight=torch.zeros(E, H), logits=torch.zeros(T, E)),
    "_moe_experts_out": dict(
        x=torch.zeros(T, H),
        w13=torch.zeros(E, 2 * I, H),
        w2=torch.zeros(E, H, I),
        shared_w13=torch.zeros(2 * I, H),
        shared_w2=torch.zeros(H, I),
        w13_scale=None,
        w2_scale=None,
        shared_w13_scale=None,
        shared_w2_scale=None,
        quantize_activations=False,
        expert_map=offsets(*range(E)),
        activation="silu",
        topk_ids=torch.zeros(T, K, dtype=torch.int32),
        topk_weights=torch.zeros(T, K),
        y=torch.zeros(T, H),
        carry=torch.zeros(T, H),
        begin=0,
        end=E,
    ),
}


def private_quantized(form):
    """The arguments of _moe_experts_out for weights of a format, as the ops pass them: shared_w13's scale has no E."""
    arguments = dict(PRIVATE["_moe_experts_out"])
    for name in ["w13", "w2", "shared_w13", "shared_w2"]:
        halves = 2 if name.endswith("w13") else 1
        *lead, rows, columns = arguments[name].shape
        tile = halves * math.ceil(rows / halves / 128), math.ceil(columns / 128)
        dtype, width, scale = dict(
            fp8=(torch.float8_e4m3fn, columns, tile),
            int8=(torch.int8, columns, (rows,)),
            int4=(torch.uint8, (columns + 1) // 2, (rows, tile[1])),
        )[form]
        arguments[name] = torch.zeros(*lead, rows, width, dtype=torch.uint8).view(dtype)
        arguments[f"{name}_scale"] = torch.ones(*lead, *scale)
    return arguments


def private_quantized_faults():
    for form in ["fp8", "int8", "int4"]:
        arguments = private_quantized(form)
        for name in [name for name in arguments if name.endswith("_scale")]:
            scale = arguments[name]
            weight = name.removesuffix("_scale")
            faults = [(name, None), (name, scale.unsqueeze(0)), (name, scale[..., :-1].clone()), (name, scale.double())]
            faults += [(weight, torch.zeros(arguments[weight].shape)), (weight, arguments[weight][..., :-1].clone())]
            for fault, value in faults:
                yield "_moe_experts_out", {**arguments, fault: value}


def private_faults():
    for op, arguments in PRIVATE.items():
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                yield op, name, value.unsqueeze(0)
                yield op, name, value.flatten()[:1].clone()
                yield op, name, value[:-1].clone() if name != "block_offsets" else offsets(0, 4, 5)
                yield op, name, value.to(torch.int64 if value.dtype == torch.int32 else torch.float64)
                if value.dim() > 1:
                    yield op, name, value[..., :-1].clone()
                    yield op, name, value.new_zeros(value.shape[::-1]).permute(*reversed(range(value.dim())))
    yield "_block_route_out", "seq_len", 0
    yield "_block_route_out", "block_offsets", offsets(0, 9, 6)
    yield "_block_route_out", "block_offsets", offsets(0, 5, 6)
    yield "_block_route_out", "ints", []
    for at, value in [
        (0, 0),
        (0, E + 1),
        (1, 0),
        (2, 0),
        (2, 3),
        (3, 0),
        (3, 3),
        (4, 2),
        (5, 4),
        (6, -1),
        (8, 0),
        (9, -1),
    ]:
        yield (
            "_block_route_out",
            "ints",
            [value if i == at else v for i, v in enumerate(PRIVATE["_block_route_out"]["ints"])],
        )
    yield "_moe_experts_out", "shared_w2", None
    yield "_moe_experts_out", "expert_map", offsets(*range(1, E + 1))
    yield "_moe_experts_out", "expert_map", offsets(*[-3] * E)
    yield "_moe_experts_out", "activation", "gelu"
    yield "_moe_experts_out", "begin", -1
    yield "_moe_experts_out", "begin", E + 1
    yield "_moe_experts_out", "end", E + 1


@pytest.mark.skipif(_library._C is None, reason="the extension module is not built")
def test_private_ops_refuse_what_would_read_out_of_bounds():
    refused = 0
    for op, name, value in private_faults():
        arguments = {**PRIVATE[op], name: value}
        if op == "_block_route_out" and name == "seq_len":
            arguments["block_offsets"] = None
        with pytest.raises(RuntimeError, match="dmoe"):
            getattr(torch.ops.dmoe, op)(*arguments.values())
        refused += 1
    for op, arguments in private_quantized_faults():
        with pytest.raises(RuntimeError, match="dmoe"):
            getattr(torch.ops.dmoe, op)(*arguments.values())
        refused += 1
    assert refused > 100
    for op, arguments in PRIVATE.items():
        getattr(torch.ops.dmoe, op)(*arguments.values())
    for form in ["fp8", "int8", "int4"]:
        torch.ops.dmoe._moe_experts_out(*private_quantized(form).values())


@pytest.mark.parametrize("op", FAULTS)
def test_the_arguments_that_the_faults_start_from_are_good(op):
    getattr(dmoe_ops, op)(**good(op))
    getattr(reference, op)(**good(op))
    if op == "block_moe":
        halves(**{**good(op), "block_offsets": offsets(0, 4, T)})


@pytest.mark.parametrize("op", FAULTS)
def test_an_op_has_the_signature_of_its_contract(op):
    public, contract = (inspect.signature(getattr(module, op)).parameters for module in (dmoe_ops, reference))
    plain = [[(p.name, p.kind, p.default) for p in each.values()] for each in (public, contract)]
    assert plain[0] == plain[1]
    assert all(p.annotation is not p.empty for p in public.values())
    assert not [name for name in public if not re.search(rf"\b{name}\b", getattr(dmoe_ops, op).__doc__)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("seq_len", [0, -1, 4, 12])
def test_sequences_have_to_fill_the_rows(seq_len, device):
    """Of the ops themselves, real and fake: the functions derive the length of a sequence from a shape."""
    x, *weights = (tensor.to(device) for tensor in list(good("block_moe").values())[:7])
    logits, settings = torch.randn(T, E, device=device), ROUTING.args()
    refused(lambda: torch.ops.dmoe.block_route(logits, None, None, seq_len, *settings), "seq_len", "T=6")
    refused(lambda: torch.ops.dmoe.block_moe(x, *weights, None, seq_len, *settings), "seq_len", "T=6")


@pytest.mark.parametrize("module", [dmoe_ops, reference])
@pytest.mark.parametrize("op, name, shape", [("block_moe", "x", "H"), ("block_route", "logits", "E")])
def test_the_shapes_that_are_taken_are_told(op, name, shape, module):
    with pytest.raises(
        ValueError, match=rf"^{name} must have shape \[T, {shape}\] or \[bsz, seq, {shape}\], got \[8\]$"
    ):
        getattr(module, op)(**{**good(op), name: torch.zeros(8)})


@pytest.mark.parametrize("backend_name", ["", "fast", "CPP"])
def test_an_unknown_backend_is_refused(backend_name, monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", backend_name)
    refused(lambda: dmoe_ops.block_route(**good("block_route")), "DMOE_BACKEND", repr(backend_name))


@pytest.fixture
def model(make_block):
    torch.manual_seed(0)
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Linear(16, 16), make_block(), make_block()])
    return network


def set_bias(block):
    block.experts[7].up_proj.bias = nn.Parameter(torch.zeros(8))


def put(path, *shape, **kwargs):
    owner, _, name = path.rpartition(".")
    value = kwargs.pop("value", None)
    value = nn.Parameter(torch.zeros(*shape, **kwargs), requires_grad=False) if value is None else value
    return lambda block: setattr(block.get_submodule(owner), name, value)


BROKEN_BLOCKS = [
    ("experts[7].down_proj.weight", "[16, 7]", put("experts.7.down_proj.weight", 16, 7)),
    ("experts[3].gate_proj.weight", "float16", put("experts.3.gate_proj.weight", 8, 16, dtype=torch.float16)),
    ("experts[5].up_proj.weight", "meta", put("experts.5.up_proj.weight", 8, 16, device="meta")),
    ("experts[2].up_proj.weight", "None", put("experts.2.up_proj", value=nn.Identity())),
    ("experts[7].up_proj", "[8]", set_bias),
    ("experts[0].gate_proj.weight", "meta", put("experts.0.gate_proj.weight", 8, 16, device="meta")),
    ("experts[0].gate_proj.weight", "int32", put("experts.0.gate_proj.weight", 8, 16, dtype=torch.int32)),
    ("experts[0].gate_proj.weight", "[8]", put("experts.0.gate_proj.weight", 8)),
    ("config.hidden_act", "'gelu'", put("config", value=types.SimpleNamespace(hidden_act="gelu"))),
    ("shared_experts.gate_proj.weight", "None", put("shared_experts.gate_proj", value=nn.Identity())),
    ("gate.weight", "[7, 16]", put("gate.weight", 7, 16)),
    ("gate.expert_bias", "[7]", put("gate.expert_bias", value=torch.zeros(7))),
    ("shared_experts.gate_proj.weight", "[I_shared, 16], got [8, 15]", put("shared_experts.gate_proj.weight", 8, 15)),
    ("shared_experts.down_proj.weight", "[16, 9]", put("shared_experts.down_proj.weight", 16, 9)),
    ("n_group", "3", put("gate.n_group", value=3)),
    ("top_k", "9", put("gate.top_k", value=9)),
]


@pytest.mark.parametrize("name, says, fault", [pytest.param(*case, id=case[0] + case[1]) for case in BROKEN_BLOCKS])
def test_patch_refuses_a_broken_block_and_leaves_the_model_alone(name, says, fault, model):
    fault(model.layers[2])
    before = dict(model.named_modules())
    bits = {key: value.clone() for key, value in model.layers[1].state_dict().items()}
    storages = {key: value.data_ptr() for key, value in model.layers[1].state_dict().items()}
    refused(lambda: dmoe_ops.patch(model), name, says)
    with pytest.raises(ValueError, match=r"layers\.2"):
        dmoe_ops.patch(model)
    assert all(module is before[key] for key, module in model.named_modules())
    assert all(torch.equal(value, bits[key]) for key, value in model.layers[1].state_dict().items())
    assert {key: value.data_ptr() for key, value in model.layers[1].state_dict().items()} == storages


@pytest.mark.parametrize(
    "name, says, settings",
    [
        ("policy", "'dMoE'", dict(policy="dMoE")),
        ("policy", "None", dict(policy=None)),
        ("threshold", "0.6", dict(threshold=0.6)),
        ("top_p", "0", dict(top_p=0)),
        ("top_p", "1.2", dict(top_p=1.2)),
        ("top_k", "9", dict(top_k=9)),
        ("n_group", "3", dict(n_group=3)),
        ("num_experts", "16", dict(num_experts=16)),
        ("capacity", "0", dict(policy="capacity", capacity=0)),
        ("block_size", "0", dict(block_size=0)),
    ],
)
def test_patch_refuses_a_bad_setting_and_leaves_the_model_alone(name, says, settings, model):
    before = dict(model.named_modules())
    with pytest.raises(ValueError) as error:
        dmoe_ops.patch(model, **settings)
    assert name in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert all(module is before[key] for key, module in model.named_modules())


@pytest.mark.parametrize(
    "value, says", [(None, "None"), ("model", "'model'"), (nn.Linear(2, 2), "Linear"), (nn.Module(), "Module")]
)
def test_patch_refuses_what_has_no_moe_block(value, says):
    refused(lambda: dmoe_ops.patch(value), "model", says)


def test_patch_refuses_a_patched_model(model):
    handle = dmoe_ops.patch(model)
    with pytest.raises(ValueError, match="patched already"):
        dmoe_ops.patch(model)
    handle.undo()
    dmoe_ops.patch(model).undo()


@pytest.mark.parametrize("missing", ["gate_proj", "up_proj", "down_proj", "experts"])
def test_a_block_that_lacks_a_member_is_none(missing, make_block):
    block = make_block()
    for expert in block.experts:
        if missing != "experts":
            delattr(expert, missing)
    if missing == "experts":
        block.experts = nn.ModuleList()
    routing = BlockRouting(num_experts=8, top_k=2, n_group=2, topk_group=1)
    refused(lambda: BlockMoE.from_hf(block, routing), "module", "Module")
    refused(lambda: dmoe_ops.patch(nn.Sequential(block)), "model", "without any")


def test_swish_is_silu(make_block):
    block = make_block()
    block.config = types.SimpleNamespace(hidden_act="swish")
    BlockMoE.from_hf(block, BlockRouting(num_experts=8, top_k=2, n_group=2, topk_group=1))


@pytest.mark.parametrize("routing, says", [(None, "None"), (BlockRouting(), "8"), ("dmoe", "'dmoe'")])
def test_block_moe_modules_refuse_a_bad_routing(routing, says, make_block):
    name = "" if isinstance(routing, BlockRouting) else "routing"
    refused(lambda: BlockMoE.from_hf(make_block(), routing), name, says)
    if not isinstance(routing, BlockRouting):
        refused(lambda: BlockMoE(16, 8, routing), name, says)
    refused(lambda: BlockMoE(16, 8, ROUTING, activation="gelu"), "activation", "'gelu'")
    refused(lambda: BlockMoE.from_hf(nn.Linear(2, 2), ROUTING), "module", "Linear")
