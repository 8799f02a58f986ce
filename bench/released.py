"""The authors' released generate() as a contender: their code from a folder, on our weights, held once."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import torch

from ..models.llada2 import LLaDA2ForDiffusion

PACKAGE = "released_llada2"


def load(folder, model: LLaDA2ForDiffusion):
    """The class LLaDA2MoeModelLM of FOLDER/modeling_llada2_moe.py, whose weights are views of the model's. Needs
    transformers of the version that the code is written for (4.57). Raises ValueError, one line."""
    folder = Path(folder)
    for name in ("modeling_llada2_moe.py", "configuration_llada2_moe.py"):
        if not (folder / name).is_file():
            raise ValueError(f"--released must be a folder with {name}, got {folder}")
    try:
        modeling = _module(folder, "modeling_llada2_moe")
    except ImportError as error:
        raise ValueError(f"--released: the code in {folder} can't be imported: {error}") from None
    settings = _settings(model.config)
    config = modeling.LLaDA2MoeConfig(**settings)
    for name, value in settings.items():  # some versions of the configuration don't know all that the model reads
        setattr(config, name, value)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        released = modeling.LLaDA2MoeModelLM(config)
    released.load_state_dict(model.checkpoint_tensors(), strict=True, assign=True)
    rotary = type(released.model.rotary_emb)(config=config)  # its buffer is not among the weights
    released.model.rotary_emb = rotary.to(model.device)
    return released.eval()


def decoder(released, config, prompt, gen_length: int, steps: int):
    """A function that decodes once and returns how many tokens came out and the experts per block that it counted."""

    def run() -> tuple[int, float]:
        tokens, unique = released.generate(
            inputs=prompt, gen_length=gen_length, steps=steps, block_length=config.block_length,
            mask_id=config.mask_token_id, eos_id=-1,
        )  # fmt: skip
        return tokens.shape[1], float(unique)

    return run


def prefill(released, config, prompt):
    """A function that runs all layers once over a prompt of whole blocks, each of which sees itself and those before it."""
    position = torch.arange(prompt.shape[1], device=prompt.device)
    block = position // config.block_length
    mask = torch.where(block <= block[:, None], 0.0, float("-inf")).to(released.dtype)[None, None]

    @torch.no_grad()
    def run():
        released.model(input_ids=prompt, attention_mask=mask, position_ids=position[None])

    return run


def _module(folder: Path, name: str):
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")


def _settings(config) -> dict:
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "num_experts num_experts_per_tok num_shared_experts moe_intermediate_size first_k_dense_replace n_group topk_group "
        "routed_scaling_factor rope_theta rms_norm_eps partial_rotary_factor use_qk_norm use_qkv_bias use_bias norm_head "
        "max_position_embeddings tie_word_embeddings"
    )
    return {name: getattr(config, name) for name in names.split()} | dict(pad_token_id=0, attention_dropout=0.0)
