"""A random checkpoint with the shapes of LLaDA2.0-mini, to measure expert memory with: a shard per layer, written as fast as
the disk takes it. Its routers are set like those of `dmoe bench decode`, so that policies touch as many experts as on the
real model: python tools/random_checkpoint.py FOLDER --experts 64 (7.7 GB; all 256: 31 GB; --form fp8: half of that).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from dmoe_ops.bench.cases import fill, random_tile
from dmoe_ops.bench.decode import CONFIGS, calibrate, random_model, reduced
from safetensors.torch import save_file
from tqdm import tqdm

from dmoe_ops.models import LLaDA2ForDiffusion, checkpoint, quantized
from dmoe_ops.models.llada2 import LLaDA2Config, checkpoint_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=20, help="the first has no experts (default: 20)")
    parser.add_argument("--experts", type=int, default=256, help="of each layer (default: 256)")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens of the head (default: 8192)")
    parser.add_argument("--form", choices=quantized.WRITTEN, help="quantise routed experts (default: bfloat16)")
    parser.add_argument("--scale", type=float, help="of what tokens differ by in the routers' eyes (default: found)")
    parser.add_argument(
        "--unique", type=float, help="experts that token routing is to touch (default: 69.5, at most 85 %%)"
    )
    parser.add_argument("--tiny", action="store_true", help="the shapes of a test")
    args = parser.parse_args()
    config = reduced(CONFIGS["tiny" if args.tiny else "llada2-mini"], args.layers, args.vocab)
    config = dataclasses.replace(config, num_experts=args.experts)
    begin = time.perf_counter()
    written = write(args.folder, config, args.form)
    print(f"{written / 1e9:.2f} GB written in {time.perf_counter() - begin:.0f} s", flush=True)
    begin = time.perf_counter()
    touched = set_routers(args.folder, args.unique or min(69.5, 0.85 * args.experts), args.scale)
    print(f"routers set in {time.perf_counter() - begin:.0f} s: token routing touches {touched:.1f} experts of a block")


@torch.no_grad()
def write(folder: Path, config: LLaDA2Config, form: str | None) -> int:
    """config.json, a shard per layer, the index. Returns the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    small = dataclasses.replace(config, num_hidden_layers=config.first_k_dense_replace + 1)
    model = random_model(small, torch.bfloat16, "cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    tile = random_tile(config.initializer_range, generator).bfloat16()
    if form:
        model.quantize(form)
    model.save_pretrained(folder)  # config.json and the files beside it
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | dict(num_hidden_layers=config.num_hidden_layers), indent=2))
    (folder / checkpoint.SINGLE).unlink()
    where, total = {}, 0
    last = f"model.layers.{config.first_k_dense_replace}."
    for i in tqdm(range(config.first_k_dense_replace, config.num_hidden_layers), unit="layer", disable=None):
        roll(model, tile, generator, form)
        tensors = packed(model.checkpoint_tensors(), form)
        first = i == config.first_k_dense_replace
        tensors = {name: tensor for name, tensor in tensors.items() if first or name.startswith(last)}
        tensors = {name.replace(last, f"model.layers.{i}."): tensor for name, tensor in tensors.items()}
        shard = f"model-{i:05}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / checkpoint.INDEX).write_text(json.dumps(dict(metadata=dict(total_size=total), weight_map=where)))
    return total


def roll(model, tile, generator, form: str | None) -> None:
    """Other experts for the next layer."""
    moe = model.moe_layers[0]
    for weight in (moe.w13, moe.w2):
        if form:  # rows of experts in another order
            weight.copy_(weight[torch.randperm(len(weight), generator=generator)])
        else:
            fill(weight, tile, generator)


def packed(tensors: dict, form: str | None) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, quantized.Matrix):
            made |= quantized.WRITTEN[form].pack(name, tensor)
        else:
            made[name] = tensor
    return {name: tensor.contiguous() for name, tensor in made.items()}


@torch.no_grad()
def set_routers(folder: Path, unique: float, scale: float | None) -> float:
    """Calibrates the routers, and writes them into their places in the files."""
    model = LLaDA2ForDiffusion.from_pretrained(folder, policy="token", expert_memory="8GB")
    prompt = torch.randint(model.config.mask_token_id - 1, (1, 32), generator=torch.Generator().manual_seed(1))
    touched = calibrate(
        model, lambda: model.generate(prompt, gen_length=32, steps=2, eos_id=None), unique, 0, scale=scale
    )
    stored = checkpoint.Checkpoint(folder, model.config.storage)
    gates = checkpoint_tensors(dict(model.named_parameters()) | dict(model.named_buffers()), model.config)
    for name, gate in gates.items():
        if ".gate." in name:
            path, offset, _ = stored.extent(name)
            with open(path, "r+b") as file:
                file.seek(offset)
                file.write(gate.contiguous().view(torch.uint8).numpy().tobytes())
    return touched


if __name__ == "__main__":
    main()
