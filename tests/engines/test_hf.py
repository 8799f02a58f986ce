"""Block routing inside transformers 5: what AutoModelForCausalLM loads after `register`, against our own model.
`make test-hf`."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers 5 is not installed: make test-hf sets up an environment with it", allow_module_level=True)

from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextExperts
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

import dmoe_ops
from dmoe_ops.engines import hf_loading
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

CONFIG = LLaDA2Config(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe_intermediate_size=32,
    intermediate_size=128,
    num_experts=32,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    num_shared_experts=1,
    n_group=8,
    topk_group=4,
    rope_theta=100.0,
    rms_norm_eps=1e-6,
    initializer_range=0.3,
    eos_token_id=0,
    mask_token_id=1,
)
GELU = [(DiffusionGemmaTextExperts, DiffusionGemmaTextConfig), (Gemma4TextExperts, Gemma4TextConfig)]
HERE = Path(__file__).resolve().parent
IDS = torch.randint(2, 96, (2, 75), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ours() -> LLaDA2ForDiffusion:
    model = LLaDA2ForDiffusion(CONFIG, dtype=torch.float32).init_weights(seed=3).eval()
    for i, moe in enumerate(model.moe_layers):
        moe.expert_bias.copy_(torch.randn(32, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


@pytest.fixture
def own_code(ours, tmp_path) -> Path:
    """A folder as save_pretrained writes it."""
    ours.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def released_code(ours, tmp_path) -> Path:
    """The same with a model of the released one's classes; transformers keeps the code of a folder by its name."""
    ours.save_pretrained(tmp_path / "released")
    shutil.copyfile(HERE / "remote_llada2.py", tmp_path / "released" / "modeling_llada2_moe.py")
    return tmp_path / "released"


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def check_equal(model, ours, policy: str, **overrides) -> None:
    """With gradients, under which ours runs no fused op outside its MoE layers."""
    ours.set_routing(policy, **overrides)
    difference = (model(IDS).logits - ours(IDS).logits).abs().max().item()
    print(f"difference {difference}")
    assert difference == 0.0


def test_a_saved_folder_is_our_model(own_code, ours):
    model = load(own_code)
    assert isinstance(model, LLaDA2ForDiffusion)
    check_equal(model, ours, "dmoe")


@pytest.mark.parametrize("policy", ["own", "token", "top4", "des_seq", "des_vote", "capacity", "dmoe"])
def test_remote_code_loads_into_stacked_weights(policy, released_code, ours):
    overrides = dict(top4=dict(top_k=2), capacity=dict(capacity=6), dmoe=dict(min_experts=8)).get(policy, {})
    hf_loading.register(policy, **overrides)
    model = load(released_code, dtype=torch.float32)
    for layer, own in zip(model.model.layers[1:], ours.moe_layers):
        assert isinstance(layer.mlp, dmoe_ops.BlockMoE)
        for name, value in own.state_dict().items():
            assert torch.equal(layer.mlp.state_dict()[name], value), name
    check_equal(model, ours, policy, **overrides)


def test_what_is_loaded_is_saved_as_it_was(released_code, tmp_path):
    hf_loading.register()
    load(released_code, dtype=torch.float32).save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (released_code, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_half_widths(released_code, ours, tmp_path):
    """expert_bias keeps its digits."""
    hf_loading.register("dmoe")
    model = load(released_code, dtype=torch.bfloat16)
    own = LLaDA2ForDiffusion.from_pretrained(released_code, dtype="bfloat16")
    for layer, moe in zip(model.model.layers[1:], own.moe_layers):
        assert layer.mlp.w13.dtype == torch.bfloat16
        assert layer.mlp.expert_bias.dtype == torch.float32 and torch.equal(layer.mlp.expert_bias, moe.expert_bias)
    check_equal(model, own, "dmoe")


def test_rotary_embeddings_of_the_released_class(released_code):
    """Without `register`: an error of transformers, or frequencies that `patch` refuses."""
    from transformers.monkey_patching import clear_patch_mapping

    clear_patch_mapping()
    USER_REGISTERED_MAPPINGS.discard(hf_loading.MODEL_TYPE)
    with pytest.raises(KeyError, match="default"):
        load(released_code)
    code = (released_code / "modeling_llada2_moe.py").read_text()
    wanted = 'ROPE_INIT_FUNCTIONS["default"](config)'
    assert wanted in code
    size = CONFIG.rotary_dim // 2
    (released_code / "modeling_llada2_moe.py").write_text(
        code.replace(wanted, f"config.rope_theta ** -(torch.arange({size}) / {size}), 1")
    )
    renamed = released_code.rename(released_code.with_name("renamed"))
    model = load(renamed)
    model.model.rotary_emb.inv_freq.fill_(3.0)  # what was in the memory
    with pytest.raises(ValueError, match="inv_freq must hold the frequencies of a rotary embedding"):
        dmoe_ops.patch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [Qwen3MoeConfig, DeepseekV3Config])
def test_experts_of_transformers_own_models(family, dtype):
    hf_loading.register()
    small = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=96)
    small |= dict(num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=4)
    if family is DeepseekV3Config:
        small |= dict(n_routed_experts=16, n_group=4, topk_group=2, q_lora_rank=16, kv_lora_rank=16, v_head_dim=16)
        small |= dict(qk_rope_head_dim=8, qk_nope_head_dim=8, first_k_dense_replace=1)
    else:
        small |= dict(num_experts=16, head_dim=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family(**small), dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
        want = model(IDS).logits.float()
        model.set_experts_implementation("dmoe")
        got = model(IDS).logits.float()
    assert model.config._experts_implementation == "dmoe"
    error = ((got - want).abs().max() / want.abs().max()).item()
    print(f"relative error {error:.2g}")
    assert 0 < error < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts, config", GELU)
def test_experts_with_gelu_tanh(experts, config, dtype):
    """A module by its own forward and by our ops, with gradients, against its own in float64: at most twice as far. Ids are
    int64, and one is that of no expert, as another rank's is."""
    hf_loading.register()
    config = config(hidden_size=64, moe_intermediate_size=32, num_experts=16, top_k_experts=4)
    module, generator = experts(config), torch.Generator().manual_seed(0)
    assert config.hidden_activation == "gelu_pytorch_tanh"
    values = [torch.randn(p.shape, generator=generator).div(p.shape[-1] ** 0.5) for p in module.parameters()]
    x, weights = torch.randn(40, 64, generator=generator), torch.rand(40, 4, generator=generator)
    ids = torch.rand(40, 16, generator=generator).argsort(1)[:, :4]
    ids[7, 2] = 16
    results = []
    for how, kind in (("eager", torch.float64), ("eager", dtype), ("dmoe", dtype)):
        config._experts_implementation = how
        module.to(kind).zero_grad()
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), values):
                parameter.copy_(value.to(dtype))
        given = x.to(dtype).to(kind, copy=True).requires_grad_()
        y = module(given, ids, weights.to(dtype).to(kind))
        y.square().sum().backward()
        results.append([t.detach().double() for t in (y, given.grad, *(p.grad for p in module.parameters()))])
    for truth, eager, ours in zip(*results):
        error, torchs = ((other - truth).norm() / truth.norm() for other in (ours, eager))
        print(f"relative error {error:.2g}, torch's own {torchs:.2g}")
        assert 0 < error <= 2 * torchs


def test_a_model_with_gelu_tanh():
    hf_loading.register()
    small = dict(
        hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=96, num_experts=8, head_dim=16
    )
    config = Qwen3MoeConfig(**small, num_attention_heads=4, num_key_value_heads=4, hidden_act="gelu_pytorch_tanh")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    want = model(IDS).logits
    model.set_experts_implementation("dmoe")
    assert 0 < (model(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()


def test_experts_that_are_not_ours_are_refused():
    hf_loading.register()
    small = dict(hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, vocab_size=96, num_experts=8)
    config = Qwen3MoeConfig(**small, num_attention_heads=4, num_key_value_heads=4, hidden_act="gelu")
    model = AutoModelForCausalLM.from_config(config, experts_implementation="dmoe")
    with pytest.raises(ValueError, match="must not be 'dmoe' for Qwen3MoeExperts: it has hidden_act='gelu'"):
        model(IDS)


def test_what_register_refuses():
    with pytest.raises(ValueError, match=r"policy must be one of own, token, .*, got 'dMoE'"):
        hf_loading.register("dMoE")
    with pytest.raises(ValueError, match="overrides must be fields of BlockRouting, got top_q=1"):
        hf_loading.register("dmoe", top_q=1)


@torch.no_grad()
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_patch_takes_a_qwen3_moe(norm_topk_prob):
    """A whole model, its experts stacked as transformers 5 does; `token` is its own routing."""
    small = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, vocab_size=96)
    small |= dict(num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=4, num_experts=16, head_dim=16)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**small, norm_topk_prob=norm_topk_prob, mlp_only_layers=[1])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    for weight in model.parameters():
        weight.mul_(3 if weight.dim() > 1 else 1)
    want, state = model(IDS).logits, {name: value.clone() for name, value in model.state_dict().items()}
    with dmoe_ops.patch(model) as handle:
        assert list(handle.layers) == ["model.layers.0.mlp", "model.layers.2.mlp"]
        assert handle.routing.select == "all" and handle.routing.norm_topk_prob == norm_topk_prob
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    with dmoe_ops.patch(model, "dmoe", top_p=0.3, min_experts=4):
        assert not torch.allclose(model(IDS).logits, want, atol=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("experts, config", GELU)
def test_a_block_with_gelu_tanh(experts, config):
    """DiffusionGemma's and Gemma 4's experts behind a gate: `BlockMoE.from_hf` of them against their own forward."""
    block, torch_seed = torch.nn.Module(), torch.manual_seed(0)
    config = config(hidden_size=64, moe_intermediate_size=44, num_experts=16, top_k_experts=4)
    config._experts_implementation = "eager"
    block.gate, block.experts = torch.nn.Linear(64, 16, bias=False), experts(config)
    for weight in block.experts.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=torch_seed)
    routing = dmoe_ops.BlockRouting.policy("token", num_experts=16, top_k=4, n_group=1, topk_group=1, score="softmax")
    x = torch.randn(2, 20, 64)
    layer = dmoe_ops.BlockMoE.from_hf(block, routing)
    y, (logits, ids) = layer(x)
    weights = logits.softmax(-1).gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * routing.routed_scaling_factor
    want = block.experts(x.flatten(0, 1), ids.flatten(0, 1), weights.flatten(0, 1)).view_as(x)
    assert layer.activation == "gelu_tanh" and layer.w13.data_ptr() == block.experts.gate_up_proj.data_ptr()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
