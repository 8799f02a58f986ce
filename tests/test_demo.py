"""`dmoe demo` on the checkpoint that ships with the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dmoe_ops import __main__, demo
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion

CHECKPOINT = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"


@pytest.fixture
def short_demo(tmp_path, capsys):
    """Runs the demo on its own checkpoint; (exit code, figures, what it printed)."""

    def run(*extra):
        file = tmp_path / "figures.json"
        code = __main__.main(["demo", "--model", str(CHECKPOINT), "--device", "cpu", "--json", str(file), *extra])
        out = capsys.readouterr()
        return code, json.loads(file.read_text()) if file.exists() else None, out.out + out.err

    return run


def test_the_demo_decodes_three_ways(short_demo):
    code, report, said = short_demo("--gen-length", "60", "--prompt", "What is a coreset?")
    assert code == 0
    stock, token, dmoe = report["runs"]
    assert [run["policy"] for run in report["runs"]] == ["token", "token", "dmoe"]
    assert stock["text"].startswith("The few experts that one block")
    assert stock["equal_tokens"] == 1 and token["equal_tokens"] == 1
    for run in report["runs"]:
        assert 0 < run["moe_seconds"] < run["seconds"]
        assert run["tokens_per_second"] == pytest.approx(len(run["tokens"]) / run["seconds"])
        assert run["speedup"] == pytest.approx(run["tokens_per_second"] / stock["tokens_per_second"])
        stats = run["stats"]
        assert stats["tokens"] == len(run["tokens"]) <= 60
        assert stats["forwards"] >= stats["denoising_forwards"] > 0
    # The stock loop rounds each expert's output to bf16, which may move a token to another expert.
    unique = [run["stats"]["unique_experts_denoising"] for run in (stock, token)]
    assert unique[0] == pytest.approx(unique[1], rel=0.02)
    assert dmoe["stats"]["unique_experts_denoising"] < token["stats"]["unique_experts_denoising"]
    assert dmoe["stats"]["expert_bytes_per_step"] < token["stats"]["expert_bytes_per_step"]
    for word in (
        "loading",
        "prompt, 19 tokens",
        "unique experts",
        "expert MB",
        "tokens/s",
        "vs stock",
        "stock:\nThe few",
    ):
        assert word in said


def test_another_policy_and_prompt_ids(short_demo):
    ids = list(b"What is a coreset?\n")
    code, report, _ = short_demo("--gen-length", "32", "--policy", "top4", "--prompt-ids", *map(str, ids))
    assert code == 0 and report["prompt_ids"] == ids and report["runs"][2]["policy"] == "top4"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gen-length", "0"], "gen_length must be an integer"),
        (["--prompt-ids", "999"], "input_ids must be in [0, vocab_size=258)"),
        (["--model", "nowhere"], "config.json is missing in nowhere"),
    ],
)
def test_bad_arguments_are_one_line(arguments, says, short_demo):
    code, _, said = short_demo(*arguments)
    assert code == 2 and f"dmoe demo: {says}" in said.splitlines()[-1]


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, dict(n_group=1, topk_group=1), dict(score_function="softmax")])
def test_the_stock_layer_is_ours_under_token_routing(change):
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, moe_intermediate_size=16)
    sizes.update(num_experts=16, num_experts_per_tok=4, rope_theta=1e4, rms_norm_eps=1e-6, num_shared_experts=1)
    sizes.update(n_group=4, topk_group=2, initializer_range=0.2)
    config = LLaDA2Config(**{**sizes, **change})
    moe = LLaDA2ForDiffusion(config, "token", dtype=torch.float32).init_weights(0).moe_layers[0]
    moe.expert_bias.copy_(torch.linspace(-0.1, 0.1, 16))
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    for ours, stock in zip(moe(x)[1], demo.EagerMoE(moe)(x)[1]):
        torch.testing.assert_close(ours.sort(-1).values, stock.sort(-1).values)
    torch.testing.assert_close(moe(x)[0], demo.EagerMoE(moe)(x)[0])


def test_the_codec_shows_numbers_where_no_tokenizer_is(tmp_path):
    codec = demo.Codec(tmp_path, 1000)
    assert codec.decode([1, 2, 999]) == "1 2 999"
    with pytest.raises(ValueError, match="--prompt-ids must be given"):
        codec.encode("text")
    assert demo.Codec(tmp_path, 258).decode(demo.Codec(tmp_path, 258).encode("Grüße")) == "Grüße"


def test_the_codec_reads_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"block": 0, "expert": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    codec = demo.Codec(tmp_path, 1000)
    assert codec.encode("expert block") == [1, 0] and codec.decode([0, 1]) == "block expert"
