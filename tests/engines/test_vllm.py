"""Block routing inside vLLM itself, on a CPU: one rank, tensor and expert parallelism. `make test-vllm`.

vLLM has no LLaDA2; a checkpoint of it loads as BailingMoeV2, its base family: causal, with the same grouped MoE layers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm sets up an environment with it", allow_module_level=True)

from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

torch.set_num_threads(1)  # of models as small as these
HERE = Path(__file__).resolve().parent
NEW_TOKENS = 12
CONFIG = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # what the attention of the CPU build takes
    num_experts=64,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    moe_intermediate_size=64,
    intermediate_size=128,
    first_k_dense_replace=1,
    num_shared_experts=1,
    rope_theta=100.0,
    rms_norm_eps=1e-6,
    initializer_range=0.3,
    max_position_embeddings=256,
    eos_token_id=0,
    mask_token_id=1,
)
ENGINE = dict(
    dtype="float32",
    trust_remote_code=True,
    skip_tokenizer_init=True,
    max_model_len=192,
    max_num_seqs=8,
    enforce_eager=True,
)
PLACES = {
    "TP1": {},
    "TP2": dict(tensor_parallel_size=2),
    "EP2": dict(tensor_parallel_size=2, enable_expert_parallel=True),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = LLaDA2ForDiffusion(LLaDA2Config(**CONFIG), dtype=torch.float32).init_weights(seed=3)
    with torch.no_grad():
        for i, layer in enumerate(model.moe_layers):  # an untrained bias is zero
            layer.expert_bias.copy_(torch.randn(64, generator=torch.Generator().manual_seed(i)) * 0.05)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(architectures=["BailingMoeV2ForCausalLM"])))
    return folder


@functools.cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(2, 96, (n,), generator=generator).tolist() for n in (1, 5, 31, 32, 33, 47, 64, 75)]


@pytest.fixture(scope="session")
def answers(checkpoint, tmp_path_factory):
    """answers(policy, place): of all prompts as one batch, and of three of them alone, as (tokens, log-probability)."""

    @functools.cache
    def run(policy: str | None, place: str, **more: str):
        out = tmp_path_factory.mktemp("vllm")
        engine = ENGINE | dict(model=str(checkpoint)) | PLACES[place]
        batches = [prompts(), *([prompts()[i]] for i in (1, 4, 7))]
        job = dict(engine=engine, batches=batches, new_tokens=NEW_TOKENS, out=str(out / "answers.json"))
        (out / "job.json").write_text(json.dumps(job))
        env = {name: value for name, value in os.environ.items() if not name.startswith(("DMOE_", "VLLM_"))}
        env |= dict(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", OMP_WAIT_POLICY="passive")
        if place != "TP1":
            env["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        if policy:
            env["DMOE_POLICY"] = policy
        env |= more
        log = run_process([sys.executable, str(HERE / "vllm_on_cpu.py"), str(out / "job.json")], env, out / "log.txt")
        assert (out / "answers.json").exists(), log[-4000:]
        return json.loads((out / "answers.json").read_text()), [line for line in log.splitlines() if "dmoe:" in line]

    return run


def run_process(command: list[str], env: dict, log: Path) -> str:
    """Runs a process and ends those that it has started."""
    with log.open("w") as output:
        child = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            child.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return log.read_text()


def check_equal(got, want) -> None:
    places = sum(len(tokens) for tokens, _ in want)
    equal = sum(a == b for (mine, _), (theirs, _) in zip(got, want) for a, b in zip(mine, theirs))
    print(f"{equal} of {places} tokens equal")
    assert equal == places
    torch.testing.assert_close(
        torch.tensor([p for _, p in got]), torch.tensor([p for _, p in want]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("place", PLACES)
def test_token_routing_is_vllms_own(place, answers):
    (ours, said), (stock, silent) = answers("token", place), answers(None, "TP1")
    check_equal(ours[0], stock[0])
    assert len(said) == 1 and "MoE layers of BailingMoeV2ForCausalLM are replaced" in said[0] and not silent


@pytest.mark.parametrize("place", PLACES)
def test_dmoe_depends_on_neither_the_batch_nor_the_ranks(place, answers):
    here, alone = answers("dmoe", place)[0], answers("dmoe", "TP1")[0]
    check_equal(here[0], alone[0])
    check_equal([batch[0] for batch in here[1:]], [here[0][i] for i in (1, 4, 7)])


def test_dmoe_routes_prompts_by_block(answers, checkpoint):
    """The first token of every answer is that of our own model with vLLM's causal mask."""
    model = LLaDA2ForDiffusion.from_pretrained(checkpoint, policy="dmoe")
    differ = 0
    for ids, (tokens, _), (stock, _) in zip(prompts(), answers("dmoe", "TP1")[0][0], answers(None, "TP1")[0][0]):
        position = torch.arange(len(ids))
        mask = position[:, None] >= position
        with torch.no_grad():
            hidden, _ = model.hidden_states(torch.tensor([ids]), layout=(position, mask), block_length=32)
            assert tokens[0] == model.logits(hidden)[0, -1].argmax().item()
        differ += tokens != stock
    assert differ > 4  # of eight: the policy does something


def test_a_policy_that_does_not_exist_changes_nothing(answers):
    (unknown, said), (stock, _) = answers("dMoE", "TP1"), answers(None, "TP1")
    assert unknown == stock
    assert len(said) == 1 and "DMOE_POLICY must be one of" in said[0] and "routing stays vLLM's own" in said[0]


def test_statistics(answers, tmp_path):
    """Means per block in the log, and sums where the metrics of the engine's processes are collected."""
    more = dict(DMOE_STATISTICS="4", PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    counted, said = answers("dmoe", "TP1", **more)
    assert counted == answers("dmoe", "TP1")[0]
    found = [
        re.search(r"dmoe: (\d+) blocks routed, ([\d.]+) unique experts and ([\d.]+) in the coreset", line)
        for line in said
    ]
    found = [[float(value) for value in line.groups()] for line in found if line]
    layers = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
    assert len(found) >= (4 * NEW_TOKENS - 1) // 4  # four batches of at least so many forwards
    assert all(blocks % layers == 0 and 8 <= unique <= coreset <= 64 for blocks, unique, coreset in found)
    assert [blocks for blocks, _, _ in found] == sorted(blocks for blocks, _, _ in found)
    assert any(b"dmoe:unique_experts" in file.read_bytes() for file in tmp_path.glob("gauge_*.db"))
