"""`dmoe demo` on the checkpoint that ships with the repository."""

from __future__ import annotations

import json

import pytest
import torch

from dmoe_ops import __main__, demo
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion


@pytest.fixture
def short_demo(tmp_path, capsys):
    """Runs the demo on the checkpoint that ships; (exit code, figures, what it printed)."""
    pytest.importorskip("tokenizers")

    def run(*extra):
        file = tmp_path / "figures.json"
        code = __main__.main(["demo", "--device", "cpu", "--json", str(file), *extra])
        out = capsys.readouterr()
        return code, json.loads(file.read_text()) if file.exists() else None, out.out + out.err

    return run


def test_the_demo_decodes_three_ways(short_demo):
    code, report, said = short_demo("--gen-length", "60")
    assert code == 0
    stock, token, dmoe = report["runs"]
    assert [run["policy"] for run in report["runs"]] == ["token", "token", "dmoe"]
    assert report["prompts"] == list(demo.SHIPPED_PROMPTS)
    answers = ["4-7-0=17;7-3-1=03;7-3-0=04;437", "7+4+0=11;6+6+1=13;7+0+1=08;8+2+0=10;10831"]
    answers += ["15,21,39,58,62", "]})]"]
    for run in report["runs"]:
        assert run["texts"] == answers
        assert 0 < run["moe_seconds"] < run["seconds"]
        assert run["tokens_per_second"] == pytest.approx(run["stats"]["tokens"] / run["seconds"])
        assert run["speedup"] == pytest.approx(run["tokens_per_second"] / stock["tokens_per_second"])
        stats = run["stats"]
        assert stats["tokens"] == sum(map(len, run["tokens"])) + len(answers)  # and an eos each
        assert stats["forwards"] >= stats["denoising_forwards"] > 0
    assert stock["equal_tokens"] == 1 and token["equal_tokens"] == 1
    unique = [run["stats"]["unique_experts_denoising"] for run in (stock, token)]
    assert unique[0] == pytest.approx(unique[1], rel=0.02)
    assert dmoe["stats"]["unique_experts_denoising"] < 0.5 * token["stats"]["unique_experts_denoising"]
    assert dmoe["stats"]["expert_bytes_per_step"] < 0.5 * token["stats"]["expert_bytes_per_step"]
    for word in ("loading", "4 prompts, ", "unique experts", "expert MB", "tokens/s", "vs stock", "has Ada? 4-7-0=17"):
        assert word in said


def test_another_policy_and_one_prompt(short_demo):
    code, report, _ = short_demo("--gen-length", "32", "--policy", "top4", "--prompt", "sort 93,73,16,72,12:")
    assert code == 0 and report["runs"][2]["policy"] == "top4" and report["runs"][0]["texts"] == ["12,16,72,73,93"]


def test_prompt_ids_and_settings_of_dmoe(short_demo):
    code, report, _ = short_demo("--gen-length", "8", "--prompt-ids", "5", "6", "--top-p", "1", "--min-experts", "64")
    assert code == 0 and report["prompt_ids"] == [[5, 6]]
    token, dmoe = report["runs"][1:]
    assert token["tokens"] == dmoe["tokens"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gen-length", "0"], "gen_length must be an integer"),
        (["--prompt-ids", "999"], "input_ids must be in [0, vocab_size=68)"),
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
    codec = demo.Codec(tmp_path)
    assert codec.decode([1, 2, 999]) == "1 2 999"
    with pytest.raises(ValueError, match="--prompt-ids must be given"):
        codec.encode("text")


def test_the_codec_reads_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"block": 0, "expert": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    codec = demo.Codec(tmp_path)
    assert codec.encode("expert block") == [1, 0] and codec.decode([0, 1]) == "block expert"
