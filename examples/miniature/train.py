"""Trains the two checkpoints of the miniature from nothing but a seed.

    python -m examples.miniature.train

1. base: masked block diffusion on the tasks, every token routed alone.
2. generations: the base model answers prompts of the training set; answers without an end are dropped.
3. dmoe: the base model learns its own generations under the block-restricted forward (dMoE, arXiv 2605.30876, section 5.1:
   p = 0.6, masking ratio 0.3 to 0.8, full fine-tuning).

The learning rate of both is constant for the first half of the steps and falls linearly to zero in the second.

A run that was cut off goes on from its last checkpoint in --work when the same command is given again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import random
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dmoe_ops.models import LLaDA2ForDiffusion
from dmoe_ops.models.training import denoising_loss

from . import tasks
from .model import BASE, BLOCK, BLOCKS, DMOE, HERE, MIN_EXPERTS, answer, encode, load, new_model, pyplot

# Sequences of a step, by task: brackets are learned at once, and a sequence of one block costs a third of one of two.
BATCH = {"arithmetic": 16, "story": 12, "sort": 20, "close": 8}
DRILLS = 24  # columns of sums, among the short sequences of a step of the base model
# Block sizes of the base model's steps, drawn evenly: it decodes at all of them (table 4), at the first one mostly.
BLOCK_LENGTHS = (BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, 24, 16, 8)
BY_LENGTH = (("arithmetic", "story"), ("sort", "close"))  # each its own forward, with half of the loss
SAVE_EVERY = 500
WORK_FILES = ("settings.json", "base.pt", "generations.json", "dmoe.pt")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.miniature.train", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4800, help="of the base model (default: %(default)s)")
    parser.add_argument("--distil-steps", type=int, default=3000, help="of self-distillation (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8000, help="that it answers for that (%(default)s per task)")
    parser.add_argument("--p", type=float, default=0.6, help="top-p of the coreset in training (default: %(default)s)")
    parser.add_argument("--min-experts", type=int, default=MIN_EXPERTS, help="of the coreset (default: %(default)s)")
    parser.add_argument("--base", type=Path, help="start from this base checkpoint instead of training one")
    parser.add_argument(
        "--out", type=Path, default=HERE / "checkpoints", help="for the checkpoints (default: as shipped)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/miniature"), help="for what a cut-off run goes on from"
    )
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "examples.miniature.train", *(sys.argv[1:] if argv is None else argv)])
    claim(args.work, {key: str(value) for key, value in vars(args).items() if key not in ("out", "work")}, parser)
    tokenizer = tasks.tokenizer()

    base = args.base
    if base is None:
        base = args.out / BASE.name
        model = new_model(tokenizer, args.seed)
        log = fit(
            model,
            lambda step: task_batches(tokenizer, args.seed, step),
            args.steps,
            3e-3,
            args.work / "base.pt",
            balance=True,
        )
        save(model, tokenizer, base, dict(command=command, seed=args.seed, **log))
    model = load(base)
    texts = generations(model, tokenizer, args.prompts, args.seed, args.work / "generations.json")
    model.set_routing("dmoe", top_p=args.p, min_experts=args.min_experts)
    log = fit(
        model,
        lambda step: distil_batches(tokenizer, texts, args.seed, step),
        args.distil_steps,
        2e-3,
        args.work / "dmoe.pt",
    )
    settings = dict(command=command, seed=args.seed, top_p=args.p, min_experts=args.min_experts)
    save(model, tokenizer, args.out / DMOE.name, {**settings, **log})
    for name in WORK_FILES:
        (args.work / name).unlink(missing_ok=True)
    return 0


def claim(work: Path, settings: dict, parser: argparse.ArgumentParser) -> None:
    """Refuses a folder with the unfinished run of other settings, whose checkpoints would be taken up by mistake."""
    file = work / "settings.json"
    if file.is_file() and (other := json.loads(file.read_text())) != settings:
        differ = ", ".join(f"{key}={other.get(key)}" for key in settings if other.get(key) != settings[key])
        parser.error(f"--work must not hold an unfinished run of other settings, got {work} with {differ}")
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))


def task_batches(tokenizer, seed: int, step: int):
    """Fresh examples, the answer masked at a ratio that is drawn per sequence from 0.1 to 1, in blocks of a size that is
    drawn per step."""
    rng, generator = random.Random(f"{seed} {step}"), torch.Generator().manual_seed(seed * 1_000_003 + step)
    block_length = rng.choice(BLOCK_LENGTHS)
    for names in BY_LENGTH:
        texts = [e[1:] for name in names for e in tasks.examples(name, rng, BATCH[name])]
        if BLOCKS[names[0]] == 1:
            texts += [tasks.drill(rng) for _ in range(DRILLS)]
        length = math.ceil(BLOCKS[names[0]] * BLOCK / block_length) * block_length
        yield *mask(*encode(tokenizer, texts, length), 0.1, 1.0, generator), block_length


def distil_batches(tokenizer, texts, seed: int, step: int):
    """The model's own generations in an order of their own for every epoch, masked at a ratio from 0.3 to 0.8."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    for names in BY_LENGTH:
        chosen = []
        for name in names:
            for i in range(step * BATCH[name], (step + 1) * BATCH[name]):
                epoch, place = divmod(i, len(texts[name]))
                chosen.append(texts[name][epoch_order(len(texts[name]), f"{seed} {name} {epoch}")[place]])
        yield *mask(*encode(tokenizer, chosen, BLOCKS[names[0]] * BLOCK), 0.3, 0.8, generator), BLOCK


@functools.lru_cache(16)
def epoch_order(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def mask(tokens, prompt_lengths, least: float, most: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens and which of them are masked, never the prompt's."""
    position = torch.arange(tokens.shape[1])
    ratio = least + (most - least) * torch.rand(len(tokens), 1, generator=generator)
    masked = torch.rand(tokens.shape, generator=generator) < ratio
    return tokens, masked & (position >= prompt_lengths[:, None])


def fit(model, batches, steps: int, lr: float, state_file: Path, balance: bool = False) -> dict:
    """Trains in place; returns the losses and the seconds. Goes on from `state_file` where it exists."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    begin, seconds, losses = 0, 0.0, []
    if state_file.is_file():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin, seconds, losses = state["step"], state["seconds"], state["losses"]
    bar = tqdm(range(begin, steps), initial=begin, total=steps, unit="step", desc=state_file.stem)
    clock = time.perf_counter()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100, 2 * (1 - step / steps))
        optimizer.zero_grad()
        total, load = 0.0, 0
        for tokens, masked, block_length in batches(step):
            loss, routed = denoising_loss(model, tokens, masked, block_length=block_length)
            (loss / len(BY_LENGTH)).backward()
            total += loss.item() / len(BY_LENGTH)
            if balance:
                load += torch.stack(
                    [torch.bincount(i.flatten(), minlength=model.config.num_experts) for _, i in routed]
                )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if balance:
            rebalance(model, load.float())
        losses.append(total)
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            spent = seconds + time.perf_counter() - clock
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, seconds=spent)
            torch.save(dict(**state, losses=losses), state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    every = max(1, steps // 500)
    means = [sum(losses[i : i + every]) / len(losses[i : i + every]) for i in range(0, len(losses), every)]
    return dict(steps=steps, seconds=round(seconds + time.perf_counter() - clock), losses=[round(m, 5) for m in means])


@torch.no_grad()
def rebalance(model: LLaDA2ForDiffusion, load, rate: float = 1e-3) -> None:
    """Moves the selection bias against the load [layers, E], as the released models were balanced."""
    for moe, counts in zip(model.moe_layers, load):
        moe.expert_bias.add_(rate * torch.sign(counts.mean() - counts))


def generations(model, tokenizer, count: int, seed: int, file: Path) -> dict[str, list[tuple[str, str]]]:
    """`count` (prompt, answer) pairs per task, the answers the model's own, right or wrong, if they ended."""
    if file.is_file():
        return json.loads(file.read_text())
    texts = {}
    for name in tqdm(BLOCKS, desc="generations", unit="task"):
        rng = random.Random(f"generations {seed}")
        prompts = [example.prompt for example in tasks.examples(name, rng, count)]
        answers = answer(model, tokenizer, prompts, BLOCKS[name])[0]
        texts[name] = [(prompt, text) for prompt, text in zip(prompts, answers) if text is not None]
        if not texts[name]:
            raise ValueError(f"the base model must end some of its answers, got none of {count} in {name}")
    file.write_text(json.dumps(texts))
    return texts


def save(model, tokenizer, folder: Path, log: dict) -> None:
    """bfloat16 weights under the checkpoint's names, the tokenizer, how they were made, and the loss as a picture."""
    model.save_pretrained(folder, dtype=torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    losses = log.pop("losses")
    log["loss_of_last_steps"] = losses[-1]
    log["on"] = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    (folder / "training.json").write_text(json.dumps(log, indent=2) + "\n")
    plt = pyplot(folder / "loss.png")
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.semilogy([(i + 0.5) * log["steps"] / len(losses) for i in range(len(losses))], losses)
    axes.set(
        xlabel="step", ylabel="loss of masked tokens", title=f"{folder.name}: {log['steps']} steps, {log['seconds']} s"
    )
    axes.grid(True, alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
