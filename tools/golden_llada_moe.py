"""Writes tests/golden/llada_moe.safetensors: what the authors' code for LLaDA-MoE makes of a small random model.

python tools/golden_llada_moe.py MODELS GENERATE OUT, in an environment with transformers 4 (4.57 wrote the file). MODELS is
a folder with modeling_lladamoe.py and configuration_lladamoe.py of the hub's inclusionAI/LLaDA-MoE-7B-A1B-Base; the file was
written by their copies in github ZHZisZZ/dllm ca17675, dllm/pipelines/llada/models. GENERATE is generate.py of github
ML-GSAI/LLaDA (b7e6c35 wrote the file), which is the one of LLaDA-MoE's model card.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

MASK, EOS = 62, 63
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(num_experts=16, num_experts_per_tok=4, expert_intermediate_size=16, dense_intermediate_size=40)
SIZES |= dict(moe_layer_freq=[1, 0, 1], qk_layernorm=True, rms_norm_eps=1e-5, max_position_embeddings=256)
SIZES |= dict(rope_theta=100.0, partial_rotary_factor=1, moe_router_score_function="softmax", routed_scaling_factor=1)
SIZES |= dict(moe_router_enable_expert_bias=False, initializer_range=0.3, eos_token_id=EOS, pad_token_id=EOS)
SIZES |= dict(router_num_group=None, router_topk_group=None, shared_expert_intermediate_size=None)
OTHER = dict(moe_layer_freq=[1, 1, 1], qk_layernorm=False, attention_bias=True, num_key_value_heads=4)

# The prompt's length and seed; the rest are arguments of generate, whose steps are those of all blocks together.
DECODES = {
    "one_block": dict(prompt=(9, 1), gen_length=16, block_length=16, steps=16),
    "blocks_of_8": dict(prompt=(13, 2), gen_length=24, block_length=8, steps=24),
    "several_at_a_time": dict(prompt=(8, 3), gen_length=24, block_length=8, steps=12),
    "uneven_steps": dict(prompt=(5, 4), gen_length=16, block_length=8, steps=6),
    "from_one_token": dict(prompt=(1, 5), gen_length=16, block_length=4, steps=8),
    "a_second_prompt": dict(prompt=(13, 6), gen_length=24, block_length=8, steps=24),
}


def module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def authors(folder: Path):
    package = type(sys)("authors")
    package.__path__ = [str(folder)]
    sys.modules["authors"] = package
    config = module("authors.configuration_lladamoe", folder / "configuration_lladamoe.py").LLaDAMoEConfig
    return config, module("authors.modeling_lladamoe", folder / "modeling_lladamoe.py").LLaDAMoEModelLM


@torch.no_grad()
def random_model(seed: int, config, cls, **sizes):
    torch.manual_seed(seed)
    model = cls._from_config(config(**sizes), attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(std=0.5 if "self_attn" in name else 0.3)
    model.lm_head.weight[MASK] = 0  # a mask that is predicted is no token
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("generate", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    classes, generate = authors(args.models), module("generate", args.generate).generate
    tensors, about = {}, {}
    for name, seed, changes in (("model", 1, {}), ("other", 2, OTHER)):
        model = random_model(seed, *classes, **SIZES | changes)
        ids = torch.randint(0, MASK + 1, (2, 21), generator=torch.Generator().manual_seed(9))
        tensors |= {f"{name}.weights.{key}": value.detach().clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            tensors |= {f"{name}.input_ids": ids, f"{name}.logits": model(ids).logits}
        config = dict(architectures=["LLaDAMoEModelLM"], model_type="llada", mask_token_id=MASK)
        about[f"{name}.config"] = json.dumps(config | SIZES | changes)
        for which, settings in DECODES.items() if name == "model" else ():
            length, seed = settings["prompt"]
            prompt = torch.randint(0, MASK, (1, length), generator=torch.Generator().manual_seed(seed))
            options = {key: value for key, value in settings.items() if key != "prompt"}
            with torch.no_grad():
                text = generate(model, prompt, mask_id=MASK, **options)
            tensors[f"prompt.{which}"], tensors[f"tokens.{which}"] = prompt, text[0, length:].clone()
            print(which, tensors[f"tokens.{which}"].tolist())
    about["decodes"] = json.dumps(DECODES)
    about["source"] = (
        "github ZHZisZZ/dllm ca17675 (the hub's modeling_lladamoe.py) under generate of ML-GSAI/LLaDA b7e6c35"
    )
    save_file(tensors, args.out, metadata=about)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
