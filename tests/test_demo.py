"""`dmoe demo` on the checkpoint that ships with the repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
        code = __main__.main(["demo", "--device", "cpu", "--seconds", "0", "--json", str(file), *extra])
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
        stats = run["stats"]
        assert stats["tokens"] == sum(map(len, run["tokens"])) + len(answers)  # and an eos each
        assert stats["forwards"] >= stats["denoising_forwards"] > 0
        # One decode of each says nothing about speed.
        assert run["speedup"] is run["tokens_per_second"] is run["seconds"] is run["moe_seconds"] is None
    assert stock["equal_tokens"] == 1 and token["equal_tokens"] == 1
    unique = [run["stats"]["unique_experts_denoising"] for run in (stock, token)]
    assert unique[0] == pytest.approx(unique[1], rel=0.02)
    assert dmoe["stats"]["unique_experts_denoising"] < 0.5 * token["stats"]["unique_experts_denoising"]
    assert dmoe["stats"]["expert_bytes_per_step"] < 0.5 * token["stats"]["expert_bytes_per_step"]
    for word in ("loading", "4 prompts, ", "unique experts", "expert MB", "speeds: not measured", "has Ada? 4-7-0=17"):
        assert word in said
    assert "x)" not in said and " 1.00" not in said


def test_speeds_are_of_interleaved_rounds(short_demo, monkeypatch):
    monkeypatch.setattr(demo, "MAX_ROUNDS", 6)
    order, real = [], demo.Way.decode

    def decode(way, **options):
        order.append(way.name)
        done = real(way, **options)
        # Times that drift from round to round, alike for all three: only a ratio within a round is free of it.
        part = {"stock": 4.0, "ours, token": 2.0, "ours, dmoe": 1.0}[way.name]
        seconds = part * 2.0 ** ((len(order) - 1) // 3) if len(order) > 3 else 1e-3
        return done._replace(seconds=seconds, moe_seconds=seconds / 2)

    monkeypatch.setattr(demo.Way, "decode", decode)
    code, report, said = short_demo("--gen-length", "4", "--prompt-ids", "5", "6", "--seconds", "60")
    assert code == 0
    names = ["stock", "ours, token", "ours, dmoe"]
    rounds = [names, names, names[1:] + names[:1], names[2:] + names[:2]]
    assert order == [name for each in [*rounds, *rounds[1:]] for name in each]
    for run, factor in zip(report["runs"], (1, 2, 4)):
        assert run["rounds"] == 6 and run["speedup"] == dict(median=factor, p10=factor, p90=factor)
        rate = run["tokens_per_second"]
        assert rate["p10"] < rate["median"] < rate["p90"]
        assert run["seconds"]["median"] == pytest.approx(2 * run["moe_seconds"]["median"])
    assert "4.00 (4.00–4.00)" in said and "medians of 6 rounds" in said


def test_another_policy_and_one_prompt(short_demo):
    code, report, _ = short_demo("--gen-length", "32", "--policy", "top4", "--prompt", "sort 93,73,16,72,12:")
    assert code == 0 and report["runs"][2]["policy"] == "top4" and report["runs"][0]["texts"] == ["12,16,72,73,93"]


def test_prompt_ids_and_settings_of_dmoe(short_demo):
    code, report, _ = short_demo("--gen-length", "8", "--prompt-ids", "5", "6", "--top-p", "1", "--min-experts", "64")
    assert code == 0 and report["prompt_ids"] == [[5, 6]]
    token, dmoe = report["runs"][1:]
    assert token["tokens"] == dmoe["tokens"]


BAD_ARGUMENTS = [
    (["--gen-length", "0"], "gen_length must be an integer"),
    (["--prompt-ids", "999"], "input_ids must be in [0, vocab_size=68)"),
    (["--model", "nowhere"], "config.json is missing in nowhere"),
    (["--model", "x" * 5000], "config.json is missing in xxx"),
    (["--device", "foo"], "device must be one that torch can use here, got 'foo'"),
    (["--device", "meta"], "device must be one that torch can use here, got 'meta'"),
    (["--device", "cuda:99"], "device must be one that torch can use here, got 'cuda:99'"),
    (["--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
    (["--top-p", "nan"], "top_p must be in (0, 1], got nan"),
    (["--min-experts", "-1"], "min_experts must be an integer of at least 0, got -1"),
    (["--seconds", "-1"], "--seconds must be a number of at least 0, got -1"),
    (["--json", "/missing/folder/x.json"], "/missing/folder/x.json can't be written: No such file"),
    (["--json", "."], ". can't be written: Is a directory"),
]


@pytest.mark.parametrize("arguments, says", BAD_ARGUMENTS, ids=[" ".join(a)[:40] for a, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_one_line(arguments, says, short_demo):
    code, _, said = short_demo(*arguments)
    assert code == 2 and f"dmoe demo: {says}" in said.splitlines()[-1]
    if "must be an integer" not in says and "input_ids" not in says:
        assert "loading" not in said  # before the weights are read, let alone decoded with


def test_a_backend_that_can_not_serve_is_one_line(short_demo, monkeypatch):
    monkeypatch.setenv("DMOE_BACKEND", "fast")
    code, _, said = short_demo()
    assert code == 2 and said.splitlines()[-1].startswith("dmoe demo: DMOE_BACKEND must be auto or one of")
    assert "loading" not in said


@pytest.fixture
def copy_of_the_shipped(tmp_path):
    return Path(shutil.copytree(demo.shipped_checkpoint(), tmp_path / "my folder"))


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[]", b'{"version": "1.0"}'])
def test_a_corrupt_tokenizer_is_one_line(content, copy_of_the_shipped, short_demo):
    (copy_of_the_shipped / "tokenizer.json").write_bytes(content)
    code, _, said = short_demo("--model", str(copy_of_the_shipped))
    last = said.splitlines()[-1]
    assert code == 2 and last.startswith("dmoe demo: ") and "tokenizer.json is corrupt: " in last


def test_the_demo_uses_the_chat_template(copy_of_the_shipped, short_demo):
    template = "{% for m in messages %}sort {{ m['content'] }}:{% endfor %}"
    (copy_of_the_shipped / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=template)))
    few = ["--model", str(copy_of_the_shipped), "--gen-length", "32", "--dtype", "float32", "--prompt"]
    code, report, said = short_demo(*few, "93,73,16,72,12")
    assert code == 0 and report["runs"][0]["texts"] == ["12,16,72,73,93"] and "chat template" in said
    assert report["prompts"] == ["93,73,16,72,12"]
    code, report, said = short_demo(*few, "sort 93,73,16,72,12:", "--raw")
    assert code == 0 and report["runs"][0]["texts"] == ["12,16,72,73,93"] and "chat template" not in said


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
        torch.testing.assert_close(ours.sort(-1).values, stock.sort(-1).values.to(ours.dtype))
    torch.testing.assert_close(moe(x)[0], demo.EagerMoE(moe)(x)[0])
