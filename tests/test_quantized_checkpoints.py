"""Checkpoints with quantised matrices: what is read and what is written, against a description of the formats of its own."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from dmoe_ops.bench import decode
from safetensors.torch import load_file, save_file
from shards import shard
from sizes import SIZES as SMALL
from torch import nn

from dmoe_ops import BlockMoE, BlockRouting, reference
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion
from dmoe_ops.models.checkpoint import Checkpoint
from dmoe_ops.models.quantized import WRITTEN, Matrix
from dmoe_ops.models.quantized import config_of as quantization_config
from dmoe_ops.quantize import quantize

FORMS = ["fp8", "int8", "int4"]
# Nothing is divisible: rows and columns of blocks and groups are ragged, and int4 does not fill its last int32.
SIZES = SMALL | dict(hidden_size=144, head_dim=32, moe_intermediate_size=20, num_experts=8, initializer_range=0.2)
CONFIG = LLaDA2Config(**SIZES)
EXPERT = "model.layers.1.mlp.experts.3.up_proj"
NAMES = {  # of safetensors
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.int64: "I64",
}
QUANTIZED = ("w13", "w2", "w13_scale", "w2_scale")


def build(config: LLaDA2Config = CONFIG, dtype=torch.float32) -> LLaDA2ForDiffusion:
    return LLaDA2ForDiffusion(config, dtype=dtype).init_weights(0).eval()


def load(folder, **options) -> LLaDA2ForDiffusion:
    return LLaDA2ForDiffusion.from_pretrained(folder, policy="token", **options)


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 62, (1, length), generator=torch.Generator().manual_seed(0))


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.shape == other[name].shape, name
        assert torch.equal(value.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


# How others store a matrix, by the words of their documentation ----------------------------------------------------------

WEIGHTS = dict(symmetric=True, dynamic=False, observer="minmax", actorder=None)
GROUPS = dict(targets=["Linear"], input_activations=None, output_activations=None)
CONFIGS = {
    "deepseek": dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]),
    "float-quantized": dict(num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
    "int-quantized": dict(num_bits=8, type="int", strategy="channel"),
    "8 bits": dict(num_bits=8, type="int", strategy="channel"),
    "4 bits": dict(num_bits=4, type="int", strategy="group", group_size=128),
}
FORM_OF = dict(zip(CONFIGS, ("fp8", "fp8", "int8", "int8", "int4")))


def config_of(kind: str) -> dict:
    if kind == "deepseek":
        return CONFIGS[kind]
    name = "pack-quantized" if kind.endswith("bits") else kind
    group = {**GROUPS, "weights": {**WEIGHTS, **CONFIGS[kind]}, "format": name}
    return dict(quant_method="compressed-tensors", format=name, ignore=["lm_head"], config_groups=dict(group_0=group))


def packed(values, bits: int):
    """int32 [rows, ceil(columns / per)]: value i of a row at bit bits * i, offset by half of the range."""
    per, rows = 32 // bits, len(values)
    unsigned = values.long() + 2 ** (bits - 1)
    words = nn.functional.pad(unsigned, (0, -unsigned.shape[1] % per)).view(rows, -1, per)
    words = sum(words[:, :, i] << bits * i for i in range(per))
    return torch.where(words < 2**31, words, words - 2**32).int()


def nibbles(weight):
    return torch.stack([weight & 15, weight >> 4], -1).flatten(-2).long() - 8


def stored(name: str, weight, kind: str, scale_dtype=None) -> dict:
    """The tensors of a matrix of the module `name`."""
    values, scale = quantize(weight, FORM_OF[kind])
    scale = scale.to(scale_dtype or scale.dtype)
    if kind in ("deepseek", "float-quantized"):
        return {f"{name}.weight": values, f"{name}.weight_scale" + "_inv" * (kind == "deepseek"): scale}
    if kind == "int-quantized":
        return {f"{name}.weight": values, f"{name}.weight_scale": scale[:, None]}
    plain, scale = (values, scale[:, None]) if kind == "8 bits" else (nibbles(values), scale)
    data = packed(plain, 8 if kind == "8 bits" else 4)
    return {
        f"{name}.weight_packed": data,
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def quantize_folder(folder, kind: str, which, **options) -> None:
    """Quantises the matrices of a checkpoint whose modules `which` takes."""
    tensors, found = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        taken = tensor.dim() == 2 and "word_embeddings" not in name and which(module)
        found |= stored(module, tensor, kind, **options) if taken else {name: tensor}
    save_file(found, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config_of(kind)}))


def experts_alone(module: str) -> bool:
    return ".mlp.experts." in module


def all_but_router_and_head(module: str) -> bool:
    return not module.endswith(("mlp.gate", "lm_head"))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shared", [False, True])
def test_what_others_store_is_read_to_the_bit(kind, shared, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    quantize_folder(tmp_path, kind, all_but_router_and_head if shared else experts_alone)
    loaded = load(tmp_path)
    for moe in model.moe_layers:
        moe.quantize(FORM_OF[kind], shared=shared)
    state = model.state_dict()
    for name, value in state.items() if shared else ():
        if value.dim() == 2 and any(part in name for part in ("attention", "layers.0.mlp")):
            state[name] = reference.dequantize(*quantize(value, FORM_OF[kind]))
    assert_same_bits(loaded.state_dict(), state)
    assert loaded(prompt(40)).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["int-quantized", "8 bits"])
def test_the_lowest_of_int8(kind, tmp_path):
    """-128, which the quantisers here leave out, and others do not."""
    build().save_pretrained(tmp_path)
    quantize_folder(tmp_path, kind, experts_alone)
    tensors = load_file(tmp_path / "model.safetensors")
    lowest = torch.full((20, 144), -128, dtype=torch.int8)
    tensors |= (
        {f"{EXPERT}.weight": lowest} if kind == "int-quantized" else {f"{EXPERT}.weight_packed": packed(lowest, 8)}
    )
    save_file(tensors, tmp_path / "model.safetensors")
    assert (load(tmp_path).moe_layers[0].w13[3, 20:] == -128).all()


@pytest.mark.parametrize("kind", ["deepseek", "int-quantized", "4 bits"])
def test_scales_of_any_precision_are_held_as_they_are(kind, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        build().save_pretrained(tmp_path)
        quantize_folder(tmp_path, kind, experts_alone, scale_dtype=dtype)
        layer, (_, scale) = load(tmp_path).moe_layers[0], quantize(build().moe_layers[0].w2.data, FORM_OF[kind])
        held = torch.bfloat16 if dtype == torch.bfloat16 and kind == "4 bits" else torch.float32
        assert layer.w2_scale.dtype == layer.w13_scale.dtype == held
        assert torch.equal(layer.w2_scale.float(), scale.to(dtype).float())
    assert load(tmp_path, dtype="bfloat16").moe_layers[0].w2_scale.dtype == torch.float32


def test_layers_that_are_not_quantised_stay_floats(tmp_path):
    build().save_pretrained(tmp_path)
    quantize_folder(tmp_path, "4 bits", lambda module: module.startswith("model.layers.2.mlp.experts."))
    first, second = load(tmp_path).moe_layers
    assert (first.form, second.form) == (None, "int4") and first.w13.requires_grad
    again = tmp_path / "again"
    load(tmp_path).save_pretrained(again)
    assert_same_bits(load(again).state_dict(), load(tmp_path).state_dict())
    ignored = json.loads((again / "config.json").read_text())["quantization_config"]["ignore"]
    assert EXPERT in ignored and EXPERT.replace("layers.1", "layers.2") not in ignored
    assert load(tmp_path).bytes_per_expert == (first.bytes_per_expert + second.bytes_per_expert) // 2


def test_parts_of_a_matrix_in_different_shards(tmp_path):
    build().save_pretrained(tmp_path)
    quantize_folder(tmp_path, "4 bits", all_but_router_and_head)
    before = load(tmp_path).state_dict()
    shard(tmp_path, files=4)
    assert_same_bits(load(tmp_path).state_dict(), before)


# What is written ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_saving_and_loading_is_a_round_trip_to_the_bit(form, shared, dtype, tmp_path):
    model = build(dtype=dtype)
    for moe in model.moe_layers:
        moe.quantize(form, shared=shared)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_bits(loaded.state_dict(), model.state_dict())
    ids = prompt(70)
    model.set_routing("token")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_bits(*(load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again")))
    assert (tmp_path / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_the_tensors_that_are_written(form, tmp_path):
    """As `stored` has them: the same as others store, under the same names."""
    model = build()
    model.save_pretrained(tmp_path / "float")
    model.quantize(form).save_pretrained(tmp_path)
    kind = dict(fp8="deepseek", int8="8 bits", int4="4 bits")[form]
    quantize_folder(tmp_path / "float", kind, experts_alone)
    assert_same_bits(*(load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "float")))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    ignored = config.pop("modules_to_not_convert" if form == "fp8" else "ignore")
    attention = [f"model.layers.{i}.attention.{name}" for i in range(3) for name in ("query_key_value", "dense")]
    mlps = ["model.layers.0.mlp", "model.layers.1.mlp.shared_experts", "model.layers.2.mlp.shared_experts"]
    parts = [f"{mlp}.{name}_proj" for mlp in mlps for name in ("gate", "up", "down", "gate_up")]
    gates = ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert ignored == sorted(["lm_head", *attention, *parts, *gates])
    if form == "fp8":
        assert config == config_of(kind)
    else:
        assert config["config_groups"]["group_0"]["weights"].items() >= CONFIGS[kind].items()


def test_what_is_saved_in_another_dtype(tmp_path):
    model = build().quantize("int4")
    model.save_pretrained(tmp_path, dtype="bfloat16")
    loaded = load(tmp_path)
    for name, value in loaded.state_dict().items():
        wanted = model.state_dict()[name]
        kept = name.rpartition(".")[2] in (*QUANTIZED, "expert_bias")
        assert torch.equal(value, wanted if kept else wanted.bfloat16()), name
    assert loaded(prompt(40)).logits.isfinite().all()


def test_layers_in_different_formats_are_not_saved(tmp_path):
    model = build()
    for moe, form in zip(model.moe_layers, ("int8", "fp8")):
        moe.quantize(form)
    with pytest.raises(ValueError, match="experts must be in one format to be saved, got fp8 and int8"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What is refused ---------------------------------------------------------------------------------------------------------


def tensor(end, change, name=EXPERT):
    def fault(folder):
        tensors = load_file(folder / "model.safetensors")
        value = tensors.pop(f"{name}.{end}")
        changed = change(value.clone())
        save_file(
            tensors if changed is None else {**tensors, f"{name}.{end}": changed.contiguous()},
            folder / "model.safetensors",
        )

    return fault


def config(change):
    def fault(folder):
        path = folder / "config.json"
        values = json.loads(path.read_text())
        change(values["quantization_config"])
        path.write_text(json.dumps(values))

    return fault


def weights(**changes):
    return config(lambda c: c["config_groups"]["group_0"]["weights"].update(changes))


def group(**changes):
    return config(lambda c: c["config_groups"]["group_0"].update(changes))


def top(**changes):
    return config(lambda c: c.update(changes))


def fill(value):
    def change(tensor):
        tensor.view(-1)[1] = value
        return tensor

    return change


def fp8_nan(tensor):
    tensor.view(torch.uint8)[3, 5] = 0xFF
    return tensor


def add(name, value=None):
    def fault(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, name: torch.ones(2) if value is None else value}, folder / "model.safetensors")

    return fault


def other_shard(folder):
    """An index that has the scale in a file where it isn't."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "b.safetensors")
    weight_map = {**dict.fromkeys(tensors, "a.safetensors"), f"{EXPERT}.weight_scale": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))


NAN, INF = float("nan"), float("inf")
MUST = "must be one of pack-quantized int 4 group 128; pack-quantized int 8 channel; int-quantized int 8 channel"
FAULTS = [
    ("4 bits", tensor("weight_scale", lambda t: None), f"tensor {EXPERT}.weight_scale is missing"),
    ("4 bits", tensor("weight_packed", lambda t: None), f"tensor {EXPERT}.weight_packed is missing"),
    ("4 bits", tensor("weight_shape", lambda t: None), f"tensor {EXPERT}.weight_shape is missing"),
    ("deepseek", tensor("weight_scale_inv", lambda t: None), f"tensor {EXPERT}.weight_scale_inv is missing"),
    ("deepseek", tensor("weight", lambda t: t.float()), f"tensor {EXPERT}.weight must be one of F8_E4M3, got F32"),
    ("4 bits", tensor("weight_scale", lambda t: t[:-1]), f"{EXPERT}.weight_scale must have shape [20, 2], got [19, 2]"),
    ("4 bits", tensor("weight_scale", lambda t: t.T.contiguous()), f"{EXPERT}.weight_scale must have shape [20, 2]"),
    ("int-quantized", tensor("weight_scale", lambda t: t[:, 0]), "weight_scale must have shape [20, 1], got [20]"),
    ("deepseek", tensor("weight_scale_inv", lambda t: t[0, 0]), "weight_scale_inv must have shape [1, 2], got []"),
    ("4 bits", tensor("weight_scale", lambda t: t.int()), f"{EXPERT}.weight_scale must be one of F32, BF16, F16, got"),
    ("4 bits", tensor("weight_packed", lambda t: t.long()), f"{EXPERT}.weight_packed must be one of I32, got I64"),
    ("4 bits", tensor("weight_packed", lambda t: t[:, :-1]), f"{EXPERT}.weight_packed must have shape [20, 18]"),
    ("4 bits", tensor("weight_shape", lambda t: t.flip(0)), f"{EXPERT}.weight_shape must be [20, 144], got [144, 20]"),
    ("4 bits", tensor("weight_shape", lambda t: t.float()), f"{EXPERT}.weight_shape must be one of I64, I32, got F32"),
    ("4 bits", tensor("weight_scale", fill(NAN)), f"tensor {EXPERT}.weight_scale in"),
    ("4 bits", tensor("weight_scale", fill(-INF)), "model.safetensors must be finite, got NaN or infinity"),
    ("int-quantized", tensor("weight_scale", fill(INF)), f"tensor {EXPERT}.weight_scale in"),
    ("deepseek", tensor("weight_scale_inv", fill(NAN)), f"tensor {EXPERT}.weight_scale_inv in"),
    ("deepseek", tensor("weight", fp8_nan), f"tensor {EXPERT}.weight in"),
    (
        "deepseek",
        tensor("weight", fp8_nan, "model.layers.1.attention.dense"),
        "tensor model.layers.1.attention.dense.w",
    ),
    (
        "deepseek",
        tensor("weight_scale_inv", fill(3e38), "model.layers.1.attention.dense"),
        "tensor model.layers.1.attention.dense.weight in",
    ),
    ("4 bits", add(f"{EXPERT}.weight"), f"tensor {EXPERT}.weight in"),
    ("4 bits", add(f"{EXPERT}.weight_zero_point"), f"tensor {EXPERT}.weight_zero_point in"),
    ("4 bits", add(f"{EXPERT}.weight_g_idx"), "has no place in this model"),
    ("deepseek", add(f"{EXPERT}.input_scale"), "has no place in this model"),
    ("4 bits", add("model.layers.1.mlp.experts.8.up_proj.weight_packed"), "has no place in this model"),
    ("4 bits", add("model.norm.weight_scale"), "tensor model.norm.weight_scale in"),
    ("4 bits", other_shard, f"tensor {EXPERT}.weight_scale is not in b.safetensors, where"),
    ("4 bits", config(lambda c: c.clear() or c.update(quant_method="gptq", bits=4)), "got 'gptq'"),
    ("4 bits", config(lambda c: c.pop("quant_method")), "must be null or of quant_method fp8 or compressed-tensors"),
    ("4 bits", top(quant_method=None), "must be null or of quant_method fp8 or compressed-tensors, got None"),
    ("4 bits", top(quant_method="fp8"), "quantization_config.weight_block_size must be [128, 128], got None"),
    ("4 bits", top(config_groups=None), "quantization_config.config_groups must hold groups, got None"),
    ("4 bits", top(config_groups={}), "quantization_config.config_groups must hold groups, got {}"),
    ("4 bits", top(config_groups=dict(a=3)), "quantization_config.config_groups must hold groups"),
    ("4 bits", top(kv_cache_scheme=dict(num_bits=8)), "quantization_config.kv_cache_scheme must be None"),
    ("4 bits", top(transform_config=dict(a=1)), "quantization_config.transform_config must be None"),
    ("4 bits", top(sparsity_config=dict(format="sparse-24")), "quantization_config.sparsity_config must be None"),
    ("4 bits", weights(symmetric=False), "config_groups.group_0.weights.symmetric must be True, got False"),
    ("4 bits", weights(dynamic=True), "config_groups.group_0.weights.dynamic must be False, got True"),
    ("4 bits", weights(group_size=32), MUST),
    ("4 bits", weights(num_bits=3), MUST),
    ("4 bits", weights(strategy="channel"), MUST),
    ("4 bits", weights(type="float"), MUST),
    ("4 bits", weights(type=[4]), MUST),
    ("float-quantized", weights(block_structure=[64, 64]), "got ('float-quantized', 'float', 8, 'block', (64, 64))"),
    ("4 bits", group(format="nvfp4-pack-quantized"), "got ('nvfp4-pack-quantized', 'int', 4, 'group', 128)"),
    ("4 bits", group(weights=None), "config_groups.group_0.weights must be an object, got None"),
    ("4 bits", group(input_activations=dict(dynamic=False)), "group_0.input_activations must be null or dynamic"),
    ("4 bits", group(output_activations=dict(num_bits=8)), "group_0.output_activations must be None"),
    (
        "4 bits",
        config(lambda c: c["config_groups"].update(other=config_of("8 bits")["config_groups"]["group_0"])),
        "quantization_config.config_groups must all be of one format, got int4 and int8",
    ),
    (
        "deepseek",
        top(weight_block_size=[1, 128]),
        "quantization_config.weight_block_size must be [128, 128], got [1, 128]",
    ),
    ("deepseek", top(activation_scheme="static"), "quantization_config.activation_scheme must be None or dynamic"),
    ("deepseek", top(fmt="e5m2"), "quantization_config.fmt must be None or e4m3, got 'e5m2'"),
    ("8 bits", top(quant_method="compressed-tensors\n" * 300), "must be null or of quant_method"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each kind, everything quantised but router and head."""
    found = {}
    for kind in CONFIGS:
        found[kind] = tmp_path_factory.mktemp("kind")
        build().save_pretrained(found[kind])
        quantize_folder(found[kind], kind, all_but_router_and_head)
    return found


@pytest.mark.parametrize("kind, fault, says", FAULTS, ids=[f"{kind}: {says}" for kind, _, says in FAULTS])
def test_a_broken_folder_is_refused_in_one_line(kind, fault, says, folders, tmp_path):
    for file in folders[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fault(tmp_path)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "change",
    [
        top(
            kv_cache_scheme=None, sparsity_config={}, transform_config={}, global_compression_ratio=1.2, version="0.20"
        ),
        top(sparsity_config=dict(format="dense", ignore=[], targets=[])),
        group(input_activations=dict(num_bits=8, dynamic=True, strategy="token", type="int")),
        group(format=None),
        weights(actorder="weight", zp_dtype=None, scale_dtype=None),
        config(lambda c: c["config_groups"].update(other=c["config_groups"]["group_0"])),
    ],
)
def test_settings_that_change_nothing_here(change, folders, tmp_path):
    for file in folders["4 bits"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = load(tmp_path).state_dict()
    change(tmp_path)
    assert_same_bits(load(tmp_path).state_dict(), before)


def test_int4_with_odd_columns_is_refused(tmp_path):
    odd = dataclasses.replace(CONFIG, moe_intermediate_size=15)
    build(odd).save_pretrained(tmp_path)
    quantize_folder(tmp_path, "int-quantized", experts_alone)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config_of("4 bits")}))
    with pytest.raises(ValueError, match=r"w2 must have an even number of columns for int4, got \[8, 144, 15\]"):
        load(tmp_path)


# The layer ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_layer_is_that_of_its_dequantised_weights(form, shared, backend):
    layer, x = build().moe_layers[0], torch.randn(40, 144, generator=torch.Generator().manual_seed(1))
    layer.routing = CONFIG.routing("token")
    other = copy.deepcopy(layer)
    layer.quantize(form, shared=shared)
    assert layer.form == form
    for name in ("w13", "w2", *(["shared_w13", "shared_w2"] if shared else [])):
        halves = 2 if name.endswith("w13") else 1
        wide = reference.dequantize(getattr(layer, name), getattr(layer, f"{name}_scale"), halves=halves)
        getattr(other, name).copy_(wide)
    torch.testing.assert_close(layer(x)[0], other(x)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_casts_leave_quantised_weights_alone(form):
    model = build().quantize(form)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for cast in (lambda: model.half(), lambda: model.to(torch.bfloat16), lambda: model.double(), lambda: model.float()):
        cast()
        for name, value in model.state_dict().items():
            if name.rpartition(".")[2] in QUANTIZED:
                assert value.dtype == before[name].dtype and torch.equal(value.float(), before[name].float())
    assert model.model.word_embeddings.weight.dtype == torch.float32
    assert_same_bits(copy.deepcopy(model).state_dict(), model.state_dict())
    other = build().quantize(form)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other.state_dict(), model.state_dict())
    meta = model.to("meta").state_dict()
    assert all(value.is_meta and value.dtype == before[name].dtype for name, value in meta.items())


def test_the_rest_of_a_quantised_model_trains():
    model = build().quantize("int4").requires_grad_(True)
    model.set_routing("token")
    model(prompt(40)).logits.sum().backward()
    assert not any(name.endswith((".w13", ".w2")) for name, _ in model.named_parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_layer_of_one_expert_is_as_large_as_that():
    layer = BlockMoE(8, 4, BlockRouting(num_experts=1, top_k=1, n_group=1, topk_group=1), dtype=torch.bfloat16)
    for weight in layer.parameters():
        weight.data.fill_(0.5)
    assert layer.bytes_per_expert == 2 * 3 * 8 * 4
    assert layer.quantize("int8") is layer and layer.bytes_per_expert == 3 * 8 * 4 + 4 * (2 * 4 + 8)
    assert layer.widen_scales() is layer


def test_what_quantising_refuses():
    layer = build().moe_layers[0]
    for form, says in (("int3", "format must be one of fp8, int8, int4, got 'int3'"), (None, "format must be one of")):
        for device in ("cpu", "meta"):
            with pytest.raises(ValueError, match=says):
                copy.deepcopy(layer).to(device).quantize(form)
    layer.quantize("int8")
    with pytest.raises(ValueError, match=r"w13 must be float to be quantised, got torch\.int8"):
        layer.quantize("int4")
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight must be float to be drawn, got torch\.int8"):
        build().quantize("int8").init_weights(0)
    odd = build(dataclasses.replace(CONFIG, moe_intermediate_size=15)).moe_layers[0]
    with pytest.raises(ValueError, match="w2 must have an even number of columns"):
        odd.quantize("int4")
    assert odd.form is None and odd.w13_scale is None
    assert isinstance(build().quantize("int8").checkpoint_tensors()[f"{EXPERT}.weight"], Matrix)


def test_bytes_of_the_experts_that_a_step_reads():
    model = build().quantize("int4")
    expert = 2 * 20 * 72 + 144 * 10 + 2 * (2 * 20 * 2 + 144)
    assert model.bytes_per_expert == model.moe_layers[1].bytes_per_expert == expert
    stats = model.generate(prompt(8), gen_length=24, eos_id=None).stats
    assert stats.expert_bytes_per_step == pytest.approx(sum(stats.unique_experts_denoising_by_layer) * expert)


MINI = dataclasses.asdict(decode.CONFIGS["llada2-mini"])


def write_hole(folder, form: str, model: LLaDA2ForDiffusion) -> None:
    """The checkpoint of a model on the meta device, in which all tensors are holes of the file: it takes no room."""
    tensors, stored = model.quantize(form).checkpoint_tensors(), {}
    for name, tensor in tensors.items():
        stored |= WRITTEN[form].pack(name, tensor) if isinstance(tensor, Matrix) else {name: tensor}
    header, end = {}, 0
    for name, tensor in stored.items():
        at = [end, end := end + tensor.nbytes]
        header[name] = dict(dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=at)
    header = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config = {**MINI, "quantization_config": quantization_config(form, tensors)}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form, most", [("int4", 0.35), ("int8", 0.54), ("fp8", 0.54)])
def test_memory_of_a_loaded_full_size_model(form, most, tmp_path, monkeypatch):
    """LLaDA2.0-mini by its tensors, scales included: loaded, but neither allocated nor read. -s shows the shares, and what
    they are made of."""

    def sizes(model):
        """Of the routed experts, of the embedding and the head, and of the rest."""
        found = dict(experts=0, vocabulary=0, rest=0)
        for name, value in model.state_dict().items():
            experts = name.rpartition(".")[2].startswith(("w13", "w2"))
            part = "experts" if experts else "vocabulary" if value.shape[:1] == (MINI["vocab_size"],) else "rest"
            found[part] += value.nbytes
        return found

    whole = LLaDA2ForDiffusion(LLaDA2Config(**MINI), dtype=torch.bfloat16, device="meta")
    before = sizes(whole)
    assert 32e9 < sum(before.values()) < 33e9
    write_hole(tmp_path, form, whole)
    monkeypatch.setattr(LLaDA2ForDiffusion, "to_empty", lambda self, device: self)
    monkeypatch.setattr(Checkpoint, "read", lambda self, targets: None)
    model = load(tmp_path)
    after, share = sizes(model), sum(sizes(model).values()) / sum(before.values())
    for part in ("vocabulary", "rest"):
        assert after[part] == before[part]
    parts = ", ".join(f"{part} {before[part] / 1e9:.2f} -> {size / 1e9:.2f} GB" for part, size in after.items())
    print(f"{form}: {share:.3f} of bfloat16 ({parts})")
    assert share <= most
