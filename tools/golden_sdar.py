"""Writes tests/golden/sdar.safetensors: what SDAR's decoder makes of transformers' Qwen3-MoE, whose layers are SDAR's.

python tools/golden_sdar.py GENERATE OUT, in an environment with transformers 5 (5.24 wrote the file). GENERATE is
generate.py of github JetAstra/SDAR (c2041a8 wrote the file). The authors' MoE model is on the hub alone. Their decoder calls
a model with store_kv, which `Keeps` gives to Qwen3MoeForCausalLM: no cache, the text so far anew each time, under the
block-causal mask. A prompt of no token is left out: its first masks are all alike, and rounding decides which goes first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

MASK, EOS = 62, 63
SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12
)
SIZES |= dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=16, intermediate_size=40, rms_norm_eps=1e-6)
SIZES |= dict(
    initializer_range=0.3, max_position_embeddings=256, rope_theta=100.0, norm_topk_prob=True, mlp_only_layers=[1]
)
# Everything that SDAR's config may say otherwise.
OTHER = dict(
    norm_topk_prob=False, mlp_only_layers=[], decoder_sparse_step=2, attention_bias=True, tie_word_embeddings=True
)

# prompt: its length and seed; the rest are arguments of the authors' generate.
GREEDY = dict(temperature=1.0, block_length=4, denoising_steps=4, confidence_threshold=0.5)
DECODES = {
    "at_a_block_end": dict(prompt=(8, 1), gen_length=24, **GREEDY),
    "inside_a_block": dict(prompt=(10, 2), gen_length=22, **GREEDY),
    "ends_inside_a_block": dict(prompt=(5, 3), gen_length=17, **GREEDY),
    "from_one_token": dict(prompt=(1, 4), gen_length=15, **GREEDY),
    "blocks_of_8": dict(prompt=(13, 5), gen_length=27, **GREEDY | dict(block_length=8, denoising_steps=8)),
    "by_confidence_alone": dict(
        prompt=(8, 6), gen_length=16, remasking_strategy="low_confidence_static", **GREEDY | dict(denoising_steps=2)
    ),
    "with_an_early_end": dict(prompt=(6, 7), gen_length=34, stopping_criteria_idx=[47], **GREEDY),
    "drawn": dict(prompt=(9, 8), gen_length=23, **GREEDY | dict(temperature=0.7, top_k=20, top_p=0.9)),
}


class Keeps:
    """A model that remembers what was stored."""

    device = torch.device("cpu")

    def __init__(self, model, block_length: int):
        self.model, self.block_length = model, block_length
        self.stored = torch.zeros(1, 0, dtype=torch.int64)

    def eval(self):
        self.model.eval()

    def __call__(self, ids, *, attention_mask, position_ids, past_key_values, use_cache, store_kv):
        text = torch.cat([self.stored, ids], 1)
        logits = block_causal(self.model, text, self.block_length)
        if store_kv:
            self.stored = text
        return SimpleNamespace(logits=logits[:, -ids.shape[1] :])


@torch.no_grad()
def block_causal(model, ids, block_length: int) -> torch.Tensor:
    block = torch.arange(ids.shape[1]) // block_length
    hidden = block[None, :] > block[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    return model(input_ids=ids, attention_mask=mask[None, None]).logits


def random_model(seed: int, **sizes) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=0.5 if "self_attn" in name else 0.3)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0  # a mask that is predicted is no token
    return model


def stored_names(model) -> dict[str, torch.Tensor]:
    """The weights as a checkpoint has them: an expert's projections apart."""
    tensors = {}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for i, expert in enumerate(value):
                tensors[f"{prefix}.{i}.gate_proj.weight"], tensors[f"{prefix}.{i}.up_proj.weight"] = expert.chunk(2)
        elif last == "down_proj" and value.dim() == 3:
            tensors |= {f"{prefix}.{i}.down_proj.weight": expert for i, expert in enumerate(value)}
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = value
    return {name: value.detach().clone() for name, value in tensors.items()}


def prompt_of(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, MASK, (1, length), generator=torch.Generator().manual_seed(seed))


def decoded(generate, model, prompt, gen_length: int, **options) -> torch.Tensor:
    asked = Keeps(model, options["block_length"])
    torch.manual_seed(0)
    with torch.no_grad():
        text = generate(asked, dict(input_ids=prompt), MASK, gen_length=gen_length, **options)
    return text[0, prompt.shape[1] : prompt.shape[1] + gen_length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("generate", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("authors", args.generate)
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    tensors, about = {}, {}
    for name, seed, changes in (("model", 1, {}), ("other", 2, OTHER)):
        model = random_model(seed, **SIZES | changes)
        ids = torch.randint(0, MASK + 1, (2, 24), generator=torch.Generator().manual_seed(9))
        tensors |= {f"{name}.weights.{key}": value for key, value in stored_names(model).items()}
        tensors |= {f"{name}.input_ids": ids, f"{name}.logits": block_causal(model, ids, 4)}
        config = dict(architectures=["SDARMoeForCausalLM"], model_type="sdar_moe", mask_token_id=MASK, eos_token_id=EOS)
        about[f"{name}.config"] = json.dumps(config | dict(block_size=4) | SIZES | changes)
        if name == "model":
            decodes(authors.block_diffusion_generate, model, tensors)
    about["decodes"] = json.dumps(DECODES)
    about["source"] = (
        "transformers' Qwen3-MoE under block_diffusion_generate of github JetAstra/SDAR c2041a8, generate.py"
    )
    save_file(tensors, args.out, metadata=about)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


def decodes(generate, model, tensors: dict) -> None:
    for name, settings in DECODES.items():
        prompt, options = prompt_of(*settings["prompt"]), {k: v for k, v in settings.items() if k != "prompt"}
        # Its sampler takes the most probable token where nothing is to be drawn.
        drawing = torch.multinomial if name == "drawn" else lambda p, num_samples: p.argmax(-1, keepdim=True)
        with mock.patch("torch.multinomial", drawing):
            tensors[f"prompt.{name}"], tensors[f"tokens.{name}"] = prompt, decoded(generate, model, prompt, **options)
        print(name, tensors[f"tokens.{name}"].tolist())


if __name__ == "__main__":
    main()
