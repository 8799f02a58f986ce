"""The miniature: LLaDA2's architecture with 2.7 million weights, and texts as its token ids."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

from . import tasks

HERE = Path(__file__).resolve().parent
BASE, DMOE = HERE / "checkpoints" / "base", HERE / "checkpoints" / "dmoe"
BLOCK = 32
# Paper to miniature: 256 experts, top 8, groups 8 -> 4, at least 16 in a coreset.
MIN_EXPERTS = 8
# Blocks that a task's prompt and answer take, the final eos included: short ones train at a third of the cost.
BLOCKS = {"arithmetic": 2, "story": 2, "sort": 1, "close": 1}


def config(tokenizer: Tokenizer) -> LLaDA2Config:
    return LLaDA2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        moe_intermediate_size=32,
        num_experts=64,
        num_experts_per_tok=4,
        num_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        rope_theta=100.0,  # texts are short
        rms_norm_eps=1e-6,
        max_position_embeddings=1024,
        initializer_range=0.06,
        mask_token_id=tokenizer.token_to_id(tasks.MASK),
        eos_token_id=tokenizer.token_to_id(tasks.EOS),
    )


@torch.no_grad()
def new_model(tokenizer: Tokenizer, seed: int) -> LLaDA2ForDiffusion:
    """float32, drawn from a seed; embeddings large and outputs small, so that layers add to a token and do not drown it."""
    model = LLaDA2ForDiffusion(config(tokenizer), "token", dtype=torch.float32).init_weights(seed)
    for name, weight in model.named_parameters():
        if "word_embeddings" in name:
            weight *= 8
        elif name.endswith(("attention.dense.weight", "w2", "down_proj.weight", "lm_head.weight")):
            weight *= 0.35
    return model


def encode(tokenizer: Tokenizer, texts, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, answer) pairs to int64 [n, length], filled up with eos, and the lengths of the prompts int64 [n]."""
    prompts = [e.ids for e in tokenizer.encode_batch([prompt for prompt, _ in texts])]
    answers = [e.ids for e in tokenizer.encode_batch([answer for _, answer in texts])]
    tokens = torch.full((len(prompts), length), tokenizer.token_to_id(tasks.EOS))
    for row, prompt, answer in zip(tokens, prompts, answers):
        if len(prompt) + len(answer) >= len(row):
            raise ValueError(
                f"a text must leave room for eos in {len(row)} tokens: {tokenizer.decode(prompt + answer)}"
            )
        row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    return tokens, torch.tensor([len(prompt) for prompt in prompts])


def load(folder, policy: str = "token", **overrides) -> LLaDA2ForDiffusion:
    """A checkpoint in float32, which a CPU without bfloat16 arithmetic is fastest at."""
    model = LLaDA2ForDiffusion.from_pretrained(folder, policy="token", dtype=torch.float32)
    model.set_routing(policy, **overrides)
    return model


def answer(
    model, tokenizer, prompts, blocks: int, *, batch: int = 500, block_length: int = BLOCK, threshold: float = 0.95
):
    """The answers to prompts, None for one that did not end within `blocks`, and the stats of every batch."""
    answers, stats = [], []
    for begin in range(0, len(prompts), batch):
        part = prompts[begin : begin + batch]
        tokens, lengths = encode(tokenizer, [(prompt, "") for prompt in part], blocks * BLOCK)
        decoded = model.generate(
            tokens[:, : int(lengths.max())],
            prompt_lengths=lengths,
            gen_length=blocks * BLOCK - int(lengths.min()),
            block_length=block_length,
            threshold=threshold,
        )
        stats.append(decoded.stats)
        ends = decoded.tokens == model.config.eos_token_id
        # Shorter prompts than the batch's longest could go on for a while behind the last block.
        ended = (ends.any(1) & (lengths + ends.int().argmax(1) < blocks * BLOCK)).tolist()
        texts = tokenizer.decode_batch(decoded.tokens.tolist(), skip_special_tokens=False)
        answers += [text.split(tasks.EOS)[0] if end else None for text, end in zip(texts, ended)]
    return answers, stats


def pyplot(file: Path):
    """matplotlib's, to draw `file`; None, with a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"{file} is left out: matplotlib is not installed (pip install matplotlib)", flush=True)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
