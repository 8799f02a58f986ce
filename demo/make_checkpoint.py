"""Trains the small LLaDA2 checkpoint that `dmoe demo` decodes, from nothing but a seed, on one core.

    python demo/make_checkpoint.py [--steps N] [--out demo/checkpoint]

A byte-level model learns chains of sums: the text starts "08+13=", and every line takes the result of the line before it
until two digits no longer hold the sum ("08+13=21\\n21+13=34\\n ... 86+13=99\\n99+13=^"). Masked block diffusion: of a
random block a random share is masked, and the model, which sees the blocks before it clean, predicts what was there.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

BLOCK, LENGTH = 32, 128
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


def chain(start: int, step: int) -> tuple[str, str]:
    """A prompt and its answer."""
    prompt, answer = f"{start:02}+{step:02}=", ""
    while start + step <= 99:
        start += step
        answer += f"{start:02}\n{start:02}+{step:02}="
    return prompt, answer + "^"


def problems(held_out: bool) -> list[tuple[int, int]]:
    """All (start, step) whose chain fits into LENGTH bytes; every tenth is held out."""
    every = [(a, b) for b in range(8, 60) for a in range(100) if len("".join(chain(a, b))) < LENGTH]
    random.Random(0).shuffle(every)
    return every[: len(every) // 10] if held_out else every[len(every) // 10 :]


def encode(text: str) -> torch.Tensor:
    """int64 [LENGTH], filled up with eos."""
    data = list(text.encode())
    return torch.tensor(data + [EOS] * (LENGTH - len(data)))


def accuracy(model: LLaDA2ForDiffusion, policy: str, count: int) -> tuple[float, float]:
    """Share of held-out problems that are answered without a mistake, and the mean unique experts per block."""
    model.set_routing(policy)
    right, unique = 0, 0.0
    chosen = problems(held_out=True)[:count]
    for start, step in chosen:
        prompt, answer = chain(start, step)
        decoded = model.generate(torch.tensor([list(prompt.encode())]), gen_length=LENGTH - len(prompt), threshold=0.9)
        right += bytes(t for t in decoded.tokens[0].tolist() if t < 256).decode(errors="replace") == answer
        unique += decoded.stats.unique_experts_denoising
    return right / len(chosen), unique / len(chosen)


def train(steps: int, batch: int = 64, seed: int = 0) -> LLaDA2ForDiffusion:
    generator = torch.Generator().manual_seed(seed)
    model = LLaDA2ForDiffusion(CONFIG, "token", dtype=torch.float32).init_weights(seed)
    texts = torch.stack([encode("".join(chain(*problem))) for problem in problems(held_out=False)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        # Token routing first; then, in turns, block routing too, so that the model serves both.
        model.set_routing("dmoe" if step > steps // 2 and step % 2 else "token")
        clean = texts[torch.randint(len(texts), (batch,), generator=generator)]
        begin = BLOCK * int(torch.randint(LENGTH // BLOCK, (1,), generator=generator))
        clean = clean[:, : begin + BLOCK]
        share = torch.rand(batch, 1, generator=generator)
        masked = torch.rand(batch, BLOCK, generator=generator) < share
        if begin == 0:
            masked[:, :6] = False  # the prompt
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
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


@torch.no_grad()
def balance(model: LLaDA2ForDiffusion, routed, rate: float = 1e-3) -> None:
    """Moves the selection bias against the load, as the released models were balanced."""
    for moe, (_, topk_ids) in zip(model.moe_layers, routed):
        load = torch.bincount(topk_ids.flatten(), minlength=CONFIG.num_experts).float()
        moe.expert_bias.add_(rate * torch.sign(load.mean() - load))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
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
        right, unique = accuracy(model, policy, 100)
        print(f"{policy}: {right:.0%} of 100 held-out chains without a mistake, {unique:.1f} unique experts per block")


if __name__ == "__main__":
    main()
