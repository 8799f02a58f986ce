"""Tokens per second of SGLang on a CPU: its own torch path against the same engine with our block, same requests, in turns.
In an environment of `make test-sglang`, from a checkout:

    python -m dmoe_ops.bench.served --json served.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import results, timing
from .decode import CONFIGS, TARGET_UNIQUE, calibrate, random_model, reduced

LAUNCHER = Path(__file__).resolve().parents[1] / "tests" / "engines" / "sglang_on_cpu.py"
LAYERS, VOCAB, PROMPT = 3, 8192, 32
# What each engine finds in its environment.
WAYS = {
    "SGLang": {},
    "token": dict(DMOE_POLICY="token"),
    "dmoe": dict(DMOE_POLICY="dmoe", DMOE_ROUTING='{"top_p": 0.4}'),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dmoe_ops.bench.served", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1, help="at once (default: 1)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each request (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--checkpoint", type=Path, help="folder to keep the random checkpoint in (default: none)")
    parser.add_argument("--json", help="also write the figures to a file")
    args = parser.parse_args(argv)
    if args.json:
        results.check_writable(args.json)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or Path(scratch) / "checkpoint"
        if not (folder / "config.json").exists():
            write_checkpoint(folder)
        out = results.new("python -m dmoe_ops.bench.served", "cpu", dtype="bf16", seed=0, model=about(args))
        with contextlib.ExitStack() as stack:
            engines = [Engine(key, folder, Path(scratch), args) for key in WAYS]
            for engine in engines:
                stack.enter_context(engine)
            for engine in engines:
                engine.run(0)  # what is built lazily
            timing.take_turns(engines, args.rounds, "serving")
    out["rows"] = [row(engine, engines) for engine in engines]
    results.print_header(out)
    for found in out["rows"]:
        rate, ratio = found["tokens_per_s"], found["ratios"].get("SGLang")
        unique = "" if found["unique"] is None else f", {found['unique']:.1f} unique experts per block"
        faster = f", {ratio['median']:.2f} ({ratio['p10']:.2f}-{ratio['p90']:.2f}) x SGLang's" if ratio else ""
        print(f"{found['key']:8} {rate['median']:.2f} tokens/s ({rate['p10']:.2f}-{rate['p90']:.2f}){faster}{unique}")
    results.write(out, args.json)
    return 0


def about(args) -> str:
    return (
        f"llada2-mini, random weights, {LAYERS} of 20 layers (each of full size), {VOCAB} tokens; at once {args.requests} "
        f"requests of {PROMPT} tokens, with {args.new_tokens} new ones"
    )


@torch.no_grad()
def write_checkpoint(folder: Path) -> None:
    """LLaDA2.0-mini's layers with routers that touch as many experts as its own, in bf16."""
    model = random_model(reduced(CONFIGS["llada2-mini"], LAYERS, VOCAB), torch.bfloat16, "cpu", seed=0)
    ids = prompts(1)
    calibrate(model, lambda: model.generate(torch.tensor(ids), gen_length=32, steps=8, eos_id=None), TARGET_UNIQUE, 0)
    model.save_pretrained(folder)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB - 2, (count, PROMPT), generator=generator).tolist()


class Engine:
    """SGLang in its own process, which answers the requests when it is told to. samples: seconds of each round."""

    def __init__(self, key: str, folder: Path, scratch: Path, args):
        self.key, self.samples, self.tokens = key, [], args.requests * args.new_tokens
        self.out, self.log = scratch / f"{key}.out", scratch / f"{key}.log"
        engine = dict(model_path=str(folder), device="cpu", dtype="bfloat16", dllm_algorithm="LowConfidence")
        engine |= dict(attention_backend="torch_native", disable_cuda_graph=True, trust_remote_code=True)
        engine |= dict(
            skip_tokenizer_init=True, max_running_requests=8, max_total_tokens=4096, disable_radix_cache=True
        )
        batch = dict(input_ids=prompts(args.requests), new_tokens=[args.new_tokens] * args.requests, ignore_eos=True)
        job = scratch / f"{key}.json"
        job.write_text(json.dumps(dict(engine=engine | dict(log_level="info"), batch=batch, out=str(self.out))))
        env = {name: value for name, value in os.environ.items() if not name.startswith(("DMOE_", "SGLANG_"))}
        env |= dict(HF_HUB_OFFLINE="1", SGLANG_USE_CPU_ENGINE="1", OMP_WAIT_POLICY="passive", **WAYS[key])
        env |= dict(DMOE_STATISTICS="20") if "DMOE_POLICY" in env else {}
        with self.log.open("w") as log:
            command = [sys.executable, str(LAUNCHER), "rounds", str(job)]
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)

    def __enter__(self) -> Engine:
        self.lines = self._wait(lambda: self.out.exists() and self.out.open())
        self._line()
        return self

    def __exit__(self, *exc) -> None:
        """The statistics are the engine's last line on them."""
        self.process.stdin.close()
        self.process.wait(60)
        found = re.findall(r"dmoe: \d+ blocks routed, ([\d.]+) unique", self.log.read_text())
        self.unique = float(found[-1]) if found else None

    def run(self, turn: int) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = json.loads(self._line())
        assert sum(map(len, answer["tokens"])) == self.tokens, answer
        return answer["seconds"]

    def _line(self) -> str:
        return self._wait(self.lines.readline)

    def _wait(self, ready):
        while not (found := ready()):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.key}: the engine has ended\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        return found


def row(engine: Engine, engines: list[Engine]) -> dict:
    ratios = {other.key: timing.ratio(other.samples, engine.samples) for other in engines if other is not engine}
    rates = timing.spread([engine.tokens / seconds for seconds in engine.samples])
    return dict(
        op="served", key=engine.key, tokens=engine.tokens, tokens_per_s=rates, unique=engine.unique, ratios=ratios
    )


if __name__ == "__main__":
    sys.exit(main())
