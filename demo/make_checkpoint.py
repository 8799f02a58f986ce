"""Trains the small LLaDA2 checkpoint that `dmoe demo` decodes, from nothing but a seed, on one core.

    python demo/make_checkpoint.py [--steps N] [--out demo/checkpoint]

A byte-level model learns the answers below by heart: enough to decode text that can be read and checked, no more. Masked
block diffusion: of a random block a random share is masked, and the model, which sees the blocks before it clean, predicts
what was there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

BLOCK, LENGTH = 32, 192
MASK, EOS = 256, 257
CONFIG = LLaDA2Config(
    vocab_size=258,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    moe_intermediate_size=32,
    num_experts=64,
    num_experts_per_tok=4,
    num_shared_experts=1,
    first_k_dense_replace=1,
    n_group=8,
    topk_group=4,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    max_position_embeddings=1024,
    initializer_range=0.06,
    mask_token_id=MASK,
    eos_token_id=EOS,
)


QUESTIONS = {
    "What is a coreset?": "The few experts that one block of tokens may use. Every token chooses its own experts, but only "
    "among those.",
    "What is block diffusion?": "Text is written block by block. A block starts as masks, and each step unmasks the tokens "
    "the model is sure of.",
    "Why route by block?": "A block of 32 tokens would touch most experts of a layer, and each one has to be read from "
    "memory. A coreset keeps them few.",
    "What does top_p do?": "It sets how much of the block's votes the coreset must hold. A larger share keeps more experts "
    "and costs more memory traffic.",
    "Who votes for experts?": "Each token of the block, for its best experts, with their scores. Padding never votes, and "
    "neither does a NaN.",
    "What is a shared expert?": "An expert that every token takes with weight one, whatever the router says. It is added "
    "to the sum of the routed ones.",
    "What is the KV cache for?": "It keeps the keys and values of finished blocks. A block is forwarded once more when it "
    "is done, and then it stays.",
    "What limits the speed?": "Memory. With few tokens in flight, the time of a layer is the time it takes to read the "
    "weights of the experts it uses.",
}


def encode(text: str) -> torch.Tensor:
    """int64 [LENGTH], filled up with eos."""
    data = list(text.encode())
    assert len(data) < LENGTH, f"too long by {len(data) - LENGTH + 1}: {text}"
    return torch.tensor(data + [EOS] * (LENGTH - len(data)))


def recite(model: LLaDA2ForDiffusion, policy: str) -> tuple[int, float]:
    """How many answers come out without a mistake under a policy, and the mean unique experts per block."""
    model.set_routing(policy)
    right, unique = 0, 0.0
    for question, answer in QUESTIONS.items():
        prompt = list(f"{question}\n".encode())
        decoded = model.generate(torch.tensor([prompt]), gen_length=LENGTH - len(prompt))
        right += bytes(t for t in decoded.tokens[0].tolist() if t < 256).decode(errors="replace") == answer
        unique += decoded.stats.unique_experts_denoising / len(QUESTIONS)
    return right, unique


def train(steps: int, batch: int = 32, seed: int = 0) -> LLaDA2ForDiffusion:
    generator = torch.Generator().manual_seed(seed)
    model = LLaDA2ForDiffusion(CONFIG, "token", dtype=torch.float32).init_weights(seed)
    texts = torch.stack([encode(f"{question}\n{answer}") for question, answer in QUESTIONS.items()])
    n_blocks = -(-max(int((text != EOS).sum()) + 1 for text in texts) // BLOCK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    mean_loss = 5.0
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        # Token routing first; then, in turns, block routing too, so that the model serves both.
        model.set_routing("dmoe" if step > steps // 2 and step % 2 else "token")
        clean = texts[torch.randint(len(texts), (batch,), generator=generator)]
        begin = BLOCK * int(torch.randint(n_blocks, (1,), generator=generator))
        clean = clean[:, : begin + BLOCK]
        share = torch.rand(batch, 1, generator=generator)
        masked = torch.rand(batch, BLOCK, generator=generator) < share
        if begin == 0:
            masked[:, :8] = False  # enough of every question to tell which it is
        tokens = clean.clone()
        tokens[:, begin:][masked] = MASK
        hidden, routed = model.hidden_states(tokens)
        loss = F.cross_entropy(model.logits(hidden[:, begin:][masked]), clean[:, begin:][masked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        balance(model, routed)
        mean_loss = 0.98 * mean_loss + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.3f}")
    return model


@torch.no_grad()
def balance(model: LLaDA2ForDiffusion, routed, rate: float = 1e-3) -> None:
    """Moves the selection bias against the load, as the released models were balanced."""
    for moe, (_, topk_ids) in zip(model.moe_layers, routed):
        load = torch.bincount(topk_ids.flatten(), minlength=CONFIG.num_experts).float()
        moe.expert_bias.add_(rate * torch.sign(load.mean() - load))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.time()
    model = train(args.steps).to(torch.bfloat16)
    for moe in model.moe_layers:
        moe.expert_bias = moe.expert_bias.float()
    model.save_pretrained(args.out)
    print(f"trained in {time.time() - begin:.0f} s, saved to {args.out}")
    model = LLaDA2ForDiffusion.from_pretrained(args.out)
    for policy in ("token", "dmoe"):
        right, unique = recite(model, policy)
        print(f"{policy}: {right} of {len(QUESTIONS)} answers without a mistake, {unique:.1f} unique experts per block")


if __name__ == "__main__":
    main()
