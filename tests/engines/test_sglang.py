"""Block routing inside SGLang itself, on a CPU: Engine, HTTP server, tensor and expert parallelism. `make test-sglang`.

Every answer is compared, token by token, with what `LLaDA2ForDiffusion.generate` makes of the same prompt alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: make test-sglang sets up an environment with it", allow_module_level=True)

import psutil

from dmoe_ops import reference
from dmoe_ops.demo import SHIPPED_PROMPTS
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion, TextCodec
from dmoe_ops.routing import POLICIES

torch.set_num_threads(1)  # of models as small as these
HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "examples" / "miniature" / "checkpoints" / "dmoe"
RUN = [sys.executable, str(HERE / "sglang_on_cpu.py")]
NEW_TOKENS = 64
ENGINE = dict(
    device="cpu",
    dtype="float32",
    dllm_algorithm="LowConfidence",
    attention_backend="torch_native",
    disable_cuda_graph=True,
    trust_remote_code=True,
    skip_tokenizer_init=True,
    max_running_requests=8,
    max_total_tokens=4096,
    log_level="info",
)
# Eight groups of which four are kept, and LLaDA2.2's capacity routing, which has no groups.
GROUPED = dict(num_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4)
CAPACITY = dict(num_experts=64, num_experts_per_tok=4, expert_capacity=12, block_size=32)
SMALL = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe_intermediate_size=64,  # on a CPU SGLang pads what a rank has to 32 columns
    intermediate_size=128,
    first_k_dense_replace=1,
    num_shared_experts=1,
    rope_theta=100.0,
    rms_norm_eps=1e-6,
    initializer_range=0.3,
    max_position_embeddings=1024,
    eos_token_id=0,
    mask_token_id=1,
)
# DMOE_POLICY, DMOE_ROUTING, and the same for `from_pretrained`.
ROUTINGS = {name: (name, {}) for name in POLICIES} | {"dmoe at 6": ("dmoe", dict(top_p=0.3, min_experts=6))}
CASES = [
    *[("miniature", name) for name in POLICIES],
    *[("grouped", name) for name in ROUTINGS],
    ("capacity", "capacity"),
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders as SGLang reads them, float32."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = dict(miniature=LLaDA2ForDiffusion.from_pretrained(SHIPPED, dtype=torch.float32))
    for name, sizes in (("grouped", GROUPED), ("capacity", CAPACITY)):
        models[name] = LLaDA2ForDiffusion(LLaDA2Config(**SMALL, **sizes), dtype=torch.float32).init_weights(seed=3)
    with torch.no_grad():
        for name in ("grouped", "capacity"):
            head = models[name].lm_head.weight
            head[:2] = head[2:4] / 2  # neither the end nor the mask is ever the most probable token
            for i, layer in enumerate(models[name].moe_layers):  # an untrained bias is zero
                layer.expert_bias.copy_(torch.randn(64, generator=torch.Generator().manual_seed(i)) * 0.05)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@functools.cache
def prompts(name: str) -> list[list[int]]:
    """Eight of different lengths: within a block, a whole one, several."""
    if name == "miniature":
        codec, more = (
            TextCodec(SHIPPED),
            ("work 12-7:", "sort 40,3:", "close (<:", f"Tom has 12 keys. {SHIPPED_PROMPTS[0]}"),
        )
        return [codec.encode(text) for text in (*SHIPPED_PROMPTS, *more)]
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(2, 96, (n,), generator=generator).tolist() for n in (1, 5, 31, 32, 33, 47, 64, 75)]


@functools.cache
def model_of(folder: Path) -> LLaDA2ForDiffusion:
    return LLaDA2ForDiffusion.from_pretrained(folder)


@functools.cache
def expected(folder: Path, routing: str) -> list[list[int]]:
    policy, overrides = ROUTINGS[routing]
    model = model_of(folder)
    model.set_routing(policy, **overrides)
    decoded = (model.generate(torch.tensor([ids]), gen_length=NEW_TOKENS) for ids in prompts(folder.name))
    return [answer.tokens[0].tolist() for answer in decoded]


def up_to_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(0) + 1] if 0 in ids else ids


def check_equal(got: list[list[int]], want: list[list[int]]) -> None:
    got = [up_to_eos(ids) for ids in got]
    places = sum(max(len(a), len(b)) for a, b in zip(got, want))
    equal = sum(a == b for mine, theirs in zip(got, want) for a, b in zip(mine, theirs))
    print(f"{equal} of {places} tokens equal")
    assert got == want, f"{equal} of {places} tokens equal"


def environment(policy: str | None, overrides: dict | None = None, **more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DMOE_", "SGLANG_"))}
    env |= dict(HF_HUB_OFFLINE="1", SGLANG_USE_CPU_ENGINE="1", SGLANG_CPU_OMP_THREADS_BIND="0|1", **more)
    env["OMP_WAIT_POLICY"] = "passive"  # threads that wait do not spin: two ranks and the tests share the cores
    if policy:
        env["DMOE_POLICY"] = policy
    if overrides:
        env["DMOE_ROUTING"] = json.dumps(overrides)
    return env


def run_engine(folder: Path, out: Path, env: dict, batches=None, ranks: int = 1, **engine) -> tuple[list, str]:
    """The tokens of every batch, and what the engine has said."""
    batches = batches or [prompts(folder.name)]
    if ranks == 1:
        env.pop("SGLANG_CPU_OMP_THREADS_BIND", None)
    job = dict(
        engine=ENGINE | dict(model_path=str(folder), tp_size=ranks) | engine,
        batches=[dict(input_ids=batch, new_tokens=[NEW_TOKENS] * len(batch)) for batch in batches],
        out=str(out / "answers.json"),
    )
    (out / "job.json").write_text(json.dumps(job))
    with process([*RUN, "engine", str(out / "job.json")], env, out / "log.txt") as engine_process:
        code = engine_process.wait(timeout=500)
    log = (out / "log.txt").read_text()
    assert code == 0 and (out / "answers.json").exists(), log[-4000:]
    return json.loads((out / "answers.json").read_text()), log


@contextlib.contextmanager
def process(command: list[str], env: dict, log: Path):
    """A process with those that it starts, ended on leaving."""
    with log.open("w") as output:
        child = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


# ---- tokens ----


@pytest.mark.parametrize("name, routing", CASES)
def test_engine(name, routing, checkpoints, tmp_path):
    """Eight prompts as one batch, then two of them alone: what else is in the batch changes nothing."""
    policy, overrides = ROUTINGS[routing]
    few = prompts(name)[1:7:5]
    answers, log = run_engine(
        checkpoints[name], tmp_path, environment(policy, overrides), [prompts(name), *[[ids] for ids in few]]
    )
    want = expected(checkpoints[name], routing)
    check_equal([ids for batch in answers for ids in batch], [*want, *want[1:7:5]])
    layers = model_of(checkpoints[name]).config.num_hidden_layers - 1
    said = [line for line in log.splitlines() if "dmoe:" in line]
    assert len(said) == 1 and f"{layers} MoE blocks of LLaDA2MoeModelLM are replaced" in said[0], said


@pytest.mark.parametrize("name, routing", CASES)
def test_http_server_with_two_ranks(name, routing, checkpoints, tmp_path):
    """Eight requests of different lengths at once, and one that goes away before its answer."""
    policy, overrides = ROUTINGS[routing]
    with server(checkpoints[name], tmp_path, environment(policy, overrides), "--tp-size", "2") as url:
        with contextlib.suppress(TimeoutError):
            post(url, prompts(name)[2], timeout=0.05)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(functools.partial(post, url), prompts(name)))
    check_equal(answers, expected(checkpoints[name], routing))


@pytest.mark.parametrize(
    "name, routing", [("miniature", "token"), ("miniature", "dmoe"), ("grouped", "dmoe"), ("capacity", "capacity")]
)
def test_expert_parallelism(name, routing, checkpoints, tmp_path):
    policy, overrides = ROUTINGS[routing]
    answers, _ = run_engine(checkpoints[name], tmp_path, environment(policy, overrides), ranks=2, ep_size=2)
    check_equal(answers[0], expected(checkpoints[name], routing))


@contextlib.contextmanager
def server(folder: Path, out: Path, env: dict, *arguments: str):
    """The address of a server on loopback, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = []
    for key, value in (ENGINE | dict(model_path=folder, host="127.0.0.1", port=port)).items():
        options += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    with process([*RUN, "serve", *options, *arguments], env, out / "log.txt") as child:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1000):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            assert child.poll() is None, (out / "log.txt").read_text()[-4000:]
            time.sleep(0.5)
        yield url


def post(url: str, ids: list[int], timeout: float = 400, new_tokens: int = NEW_TOKENS, **more) -> list[int]:
    body = dict(input_ids=ids, sampling_params=dict(temperature=0, max_new_tokens=new_tokens), **more)
    return json.loads(fetch(f"{url}/generate", body, timeout))["output_ids"]


def fetch(url: str, body: dict, timeout: float = 60) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


# ---- what goes wrong ----


def test_an_aborted_request_and_a_killed_rank(checkpoints, tmp_path):
    """The others' answers stay what they are, and the server takes new requests; without one of its ranks it says so and
    ends, as it does without the plugin."""
    folder, want = checkpoints["grouped"], expected(checkpoints["grouped"], "dmoe")
    with server(folder, tmp_path, environment("dmoe"), "--tp-size", "2") as url:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            gone = pool.submit(post, url, prompts("grouped")[7], rid="gone", new_tokens=700)
            others = [pool.submit(post, url, ids) for ids in prompts("grouped")[:7]]
            time.sleep(1)
            fetch(f"{url}/abort_request", dict(rid="gone"))
            assert len(gone.result()) < 700
            check_equal([other.result() for other in others], want[:7])
        check_equal([post(url, prompts("grouped")[7])], want[7:])
        ranks = [
            p for p in psutil.Process().children(recursive=True) if "scheduler_TP1" in p.name() + " ".join(p.cmdline())
        ]
        (rank,) = ranks
        rank.kill()
        for _ in range(60):  # until nobody listens any more
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0:
                    break
            time.sleep(1)
        else:
            raise AssertionError("the server still listens")
    assert "SIGQUIT received" in (tmp_path / "log.txt").read_text()


# ---- the block ----

PLACES = {"TP1": dict(ranks=1), "TP2": dict(ranks=2), "EP2": dict(ranks=2, ep_size=2)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_block(dtype, place, checkpoints, tmp_path):
    """What every layer of a running engine was given and gave, on every rank: the sum over the ranks against the reference,
    the routing bit by bit. The reference scales by routed_scaling_factor once."""
    folder, ranks = checkpoints["grouped"], PLACES[place]["ranks"]
    env = environment("dmoe", dict(min_experts=12), DMOE_RECORD=str(tmp_path))
    run_engine(folder, tmp_path, env, dtype=dtype, **PLACES[place])
    layers = model_of(folder).moe_layers
    for call in range(1, 13):
        files = [tmp_path / f"rank{rank}-call{call:02}.pt" for rank in range(ranks)]
        records = [torch.load(file, weights_only=False) for file in files]
        (x, gate, bias, *weights), kwargs, _ = records[0]
        (layer,) = [layer for layer in layers if torch.equal(layer.gate_weight, gate)]
        assert torch.equal(layer.expert_bias, bias)
        whole = layer.w13.detach().to(x.dtype), layer.w2.detach().to(x.dtype)
        assert (place == "TP1") == (weights[0].shape == whole[0].shape and weights[1].shape == whole[1].shape)
        assert (place == "EP2") == (kwargs["expert_map"] is not None)
        error = error_of(records, whole)
        assert error <= dict(float32=1e-6, bfloat16=1e-2, float16=1.5e-3)[dtype], (call, error)
    check_capturable(json.loads((tmp_path / "ops-0.json").read_text()))


def error_of(records: list, whole: tuple) -> float:
    """Of the sum over the ranks, relative to the largest value of the reference in float64. The ranks' inputs, logits,
    ids, weights and coresets are the same bits, and those of the reference on these logits."""
    (x, gate, bias, *_), kwargs, (_, routed, logits) = records[0]
    for args, _, (_, theirs, their_logits) in records[1:]:
        assert torch.equal(args[0], x) and torch.equal(their_logits, logits)
        assert all(torch.equal(a, b) for a, b in zip(theirs, routed))
    torch.testing.assert_close(logits.double(), x.double() @ gate.double().T, rtol=1e-5, atol=1e-5)
    assert kwargs["routing"].routed_scaling_factor == 2.5
    want = reference.block_route(logits, bias, routing=kwargs["routing"])
    assert all(torch.equal(a, b) for a, b in zip(want, routed))
    truth = reference.moe_experts(x.double(), *(w.double() for w in whole), want.topk_ids, want.topk_weights.double())
    total = sum(result[0].double() for _, _, result in records)
    return ((total - truth).abs().max() / truth.abs().max()).item()


def check_capturable(seen: list[list[str]]) -> None:
    """The first call of a block asks of torch what the second does, and nothing that waits for the device."""
    allowed = {"aten.view.default", "aten.t.default", "aten.detach.default", "dmoe.block_moe.default"}
    assert seen and all(first == second for first, second in zip(seen[::2], seen[1::2]))
    assert {name for names in seen for name in names} <= allowed, seen[0]


# ---- left alone ----


def test_without_a_policy_nothing_changes(checkpoints, tmp_path):
    """With the plugin switched off, with no policy, and with a policy that does not exist: the same tokens."""
    outcomes = {}
    for name, env in dict(
        off=environment("dmoe", SGLANG_PLUGINS="none"), without=environment(None), unknown=environment("dMoE")
    ).items():
        (tmp_path / name).mkdir()
        outcomes[name] = run_engine(checkpoints["miniature"], tmp_path / name, env, [prompts("miniature")[:3]])
    assert outcomes["without"][0] == outcomes["off"][0] == outcomes["unknown"][0]
    lines = {name: [line for line in log.splitlines() if "dmoe:" in line] for name, (_, log) in outcomes.items()}
    assert not lines["off"] and not lines["without"]
    (line,) = lines["unknown"]
    assert re.search(r"dmoe: DMOE_POLICY must be one of own, token, .*, got 'dMoE'; routing stays SGLang's own", line)


@pytest.mark.parametrize(
    "why, overrides, says",
    [
        ("a block size that does not fit", dict(block_size=24), "block_size must divide the engine's 32 tokens"),
        ("settings that do not fit the model", dict(n_group=5), "n_group must divide num_experts=64, got 5"),
    ],
)
def test_what_can_not_be_served_is_left_alone(why, overrides, says, checkpoints, tmp_path):
    _, log = run_engine(checkpoints["miniature"], tmp_path, environment("dmoe", overrides), [prompts("miniature")[:1]])
    (line,) = [line for line in log.splitlines() if "dmoe:" in line]
    assert "LLaDA2MoeModelLM is left alone" in line and says in line


def test_a_model_without_moe_blocks_is_left_alone(tmp_path):
    write_llama(tmp_path / "llama")
    env = environment("dmoe")
    batches = [[[5, 6, 7]]]
    answers, log = run_engine(tmp_path / "llama", tmp_path, env, batches, dllm_algorithm=None)
    (line,) = [line for line in log.splitlines() if "dmoe:" in line]
    assert "LlamaForCausalLM is left alone: it has no MoE block" in line and len(answers[0][0]) == NEW_TOKENS


def write_llama(folder: Path) -> None:
    """A dense model of one layer."""
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    shapes = {f"self_attn.{name}_proj": (64, 64) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    shapes |= dict(input_layernorm=(64,), post_attention_layernorm=(64,))
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,), "lm_head.weight": (96, 64)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}, folder / "model.safetensors")


# ---- statistics ----


def test_statistics(checkpoints, tmp_path):
    """Means per block in the log, and sums among the engine's metrics."""
    env = environment("dmoe", DMOE_STATISTICS="1")
    env.pop("SGLANG_CPU_OMP_THREADS_BIND")
    with server(checkpoints["miniature"], tmp_path, env, "--enable-metrics") as url:
        for ids in prompts("miniature")[:2]:
            post(url, ids)
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            metrics = answer.read().decode()
    values = {name: float(value) for name, value in re.findall(r"^dmoe:(\w+)(?:\{[^}]*\})? ([\d.e+]+)$", metrics, re.M)}
    blocks, unique, coreset = (values[name] for name in ("blocks", "unique_experts", "coreset_experts"))
    model = model_of(checkpoints["miniature"])
    model.set_routing("dmoe")
    layers = model.config.num_hidden_layers - 1
    stats = [model.generate(torch.tensor([ids]), gen_length=NEW_TOKENS).stats for ids in prompts("miniature")[:2]]
    assert blocks % layers == 0 and blocks >= layers * sum(s.denoising_forwards for s in stats)
    assert 4 * blocks <= unique <= coreset <= 64 * blocks and coreset >= 16 * blocks
    assert re.search(
        r"dmoe: \d+ blocks routed, [\d.]+ unique experts and [\d.]+ in the coreset of each",
        (tmp_path / "log.txt").read_text(),
    )
