"""The miniature: its tasks, its training and its tables."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import re
import sys
import types

import numpy
import pytest
import torch

pytest.importorskip("tokenizers")

from dmoe_ops.eval import paper
from examples.miniature import model, table, tasks, train, trainings


def of(name: str, count: int = 200, test: bool = False, seed: int = 0):
    return tasks.examples(name, random.Random(seed), count, test=test)


def item(example) -> tuple:
    """What decides an answer: the numbers in order, or the brackets."""
    if example.task == "close":
        return (example.prompt.removeprefix("close ").removesuffix(":"),)
    numbers = tuple(map(int, re.findall(r"\d+", example.prompt)))
    return numbers if example.task == "sort" else tuple(sorted(numbers))


# The tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arithmetic", "story"])
def test_worked_answers_are_right_in_every_column(name):
    for example in of(name):
        *columns, result = example.answer.split(";")
        low, high = item(example)
        sign = "+" if "+" in columns[0] else "-"
        assert int(result) == (high + low if sign == "+" else high - low)
        carry = 0
        for place, column in enumerate(columns):
            x, y, before, after, digit = re.fullmatch(r"(\d)[+-](\d)[+-](\d)=(\d)(\d)", column).groups()
            assert (int(x), int(y)) == (high // 10**place % 10, low // 10**place % 10)
            assert int(before) == carry
            carry = int(after)
            value = int(x) + int(y) + int(before) if sign == "+" else int(x) - int(y) - int(before)
            assert value == (10 * carry + int(digit) if sign == "+" else int(digit) - 10 * carry)


@pytest.mark.parametrize("name, least, most", [("arithmetic", 2, 4), ("story", 2, 3)])
def test_numbers_of_all_lengths(name, least, most):
    found = {tuple(len(str(number)) for number in item(example)) for example in of(name, 1000)}
    assert found == {(a, b) for a in range(least, most + 1) for b in range(a, most + 1)}
    assert all(low < high for low, high in map(item, of(name, 1000)))


def test_the_words_of_a_story_tell_the_sign():
    less = ("away", "fewer", "sold")
    for example in of("story"):
        assert ("-" in example.answer) == any(word in example.prompt for word in less)


def test_drills_are_columns_that_are_right():
    for seed in range(300):
        prompt, answer = tasks.drill(random.Random(seed))
        for column in (prompt + answer).split(";"):
            x, sign, y, before, after, digit = re.fullmatch(r"(\d)([+-])(\d)\2(\d)=(\d)(\d)", column).groups()
            x, y, before, after, digit = map(int, (x, y, before, after, digit))
            assert (x + y + before == 10 * after + digit) if sign == "+" else (x - y - before == digit - 10 * after)


def test_sorted_lists_and_closed_brackets():
    for example in of("sort"):
        assert list(map(int, example.answer.split(","))) == sorted(item(example))
    for example in of("close"):
        text = item(example)[0] + example.answer
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
            text = shorter
        assert text == ""


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_test_item_is_trained_on(name):
    test, trained = ({item(e) for e in of(name, 3000, kind)} for kind in (True, False))
    assert not test & trained
    assert of(name, 50) == of(name, 50) != of(name, 50, seed=1)


def test_the_tokenizer_writes_every_text_back():
    tokenizer = tasks.tokenizer()
    config = model.config(tokenizer)
    assert (config.eos_token_id, config.mask_token_id) == (0, 1)
    for name in tasks.TASKS:
        for example in of(name, 500):
            ids = tokenizer.encode(example.prompt + example.answer).ids
            assert tokenizer.decode(ids) == example.prompt + example.answer and not {0, 1} & set(ids)
            assert len(ids) < model.BLOCKS[name] * model.BLOCK
    with pytest.raises(ValueError, match="must leave room for eos"):
        model.encode(tokenizer, [("sort 1,2:", "1" * 40)], 32)


# Training --------------------------------------------------------------------------------------------------------------


def test_generations_without_an_end_are_dropped(tmp_path, monkeypatch):
    given = iter([["1", None, ""], ["2"] * 3, [None] * 3])
    monkeypatch.setattr(train, "answer", lambda *args: (next(given), []))
    with pytest.raises(ValueError, match="must end some of its answers, got none of 3 in sort"):
        train.generations(None, None, 3, 0, tmp_path / "file.json")
    given = iter([["1", None, ""]] * 4)
    texts = train.generations(None, None, 3, 0, tmp_path / "file.json")
    prompts = [e.prompt for e in tasks.examples("arithmetic", random.Random("generations 0"), 3)]
    assert texts["arithmetic"] == [(prompts[0], "1"), (prompts[2], "")]
    assert json.loads((tmp_path / "file.json").read_text())["story"][0][1] == "1"


def test_masks_leave_prompts_alone():
    _, masked = train.mask(torch.zeros(500, 64), torch.arange(500) % 40, 0.3, 0.8, torch.Generator().manual_seed(0))
    position, start = torch.arange(64), (torch.arange(500) % 40)[:, None]
    assert not masked[position.expand(500, -1) < start].any()
    assert masked.gather(1, start).float().mean() == pytest.approx(0.55, abs=0.08)  # the first token like any other
    share = masked[position.expand(500, -1) >= start].float().mean()
    assert share == pytest.approx(0.55, abs=0.02)


def test_the_base_model_sees_every_block_size():
    """A step has one block size, its sequences are whole blocks, and their prompts are those of the tasks."""
    tokenizer = tasks.tokenizer()
    seen = set()
    for step in range(40):
        batches = list(train.task_batches(tokenizer, 0, step))
        assert len({size for *_, size in batches}) == 1
        for (tokens, masked, size), names in zip(batches, train.BY_LENGTH):
            assert tokens.shape == masked.shape and tokens.shape[1] % size == 0
            assert tokens.shape[1] - size < model.BLOCKS[names[0]] * model.BLOCK <= tokens.shape[1]
            drills = train.DRILLS if model.BLOCKS[names[0]] == 1 else 0
            assert len(tokens) == sum(train.BATCH[name] for name in names) + drills
            seen.add(size)
        again = list(train.task_batches(tokenizer, 0, step))
        assert all(torch.equal(a, b) for one, two in zip(batches, again) for a, b in zip(one[:2], two[:2]))
    assert seen == set(paper.TABLE_4)


def assert_drawn(file, size: int):
    if importlib.util.find_spec("matplotlib"):
        assert file.stat().st_size > size
    else:
        assert not file.exists()


def test_without_matplotlib_a_training_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shipped = model.load(model.DMOE)
    tokenizer = model.Tokenizer.from_file(str(model.DMOE / "tokenizer.json"))
    train.save(shipped, tokenizer, tmp_path, dict(steps=2, seconds=1, losses=[2.0, 1.0]))
    assert model.load(tmp_path).config == shipped.config
    assert json.loads((tmp_path / "training.json").read_text())["loss_of_last_steps"] == 1.0
    table.picture({}, tmp_path / "tradeoff.png")
    assert capsys.readouterr().out.count("is left out: matplotlib is not installed") == 2
    assert not list(tmp_path.glob("*.png"))


@pytest.fixture
def small(monkeypatch):
    """Training in seconds."""
    monkeypatch.setattr(train, "BATCH", dict.fromkeys(tasks.TASKS, 1))
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


def run_training(folder, *extra, steps=3):
    arguments = ["--steps", str(steps), "--distil-steps", "2", "--prompts", "3", *extra]
    assert train.main([*arguments, "--out", str(folder / "out"), "--work", str(folder / "work")]) == 0
    return folder / "out"


def test_a_training_that_was_cut_off_goes_on_where_it_was(small, tmp_path, monkeypatch):
    # With no step taken the models do not answer; their generations are not what is looked at here.
    monkeypatch.setattr(train, "answer", lambda net, tokenizer, prompts, blocks: (["1;2" for _ in prompts], []))
    whole = run_training(tmp_path / "whole")
    real, taken = train.denoising_loss, []

    def cut_off(*args, **kwargs):
        if len(taken) == 5:  # in the middle of the third step: the state was saved after the second
            raise KeyboardInterrupt
        taken.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "denoising_loss", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut")
    assert not (tmp_path / "cut" / "out").exists()
    monkeypatch.setattr(train, "denoising_loss", real)
    (tmp_path / "cut" / "work" / "notes.txt").write_text("somebody's own")
    with pytest.raises(SystemExit):  # other settings do not take up its checkpoints
        run_training(tmp_path / "cut", "--seed", "1")
    resumed = run_training(tmp_path / "cut")
    for name in ("base", "dmoe"):
        files = [folder / name / "model.safetensors" for folder in (whole, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()
        log = json.loads((resumed / name / "training.json").read_text())
        assert log["seed"] == 0 and log["steps"] == (3 if name == "base" else 2)
        assert_drawn(resumed / name / "loss.png", 1000)
        model.load(resumed / name)
    assert [file.name for file in (tmp_path / "cut" / "work").iterdir()] == ["notes.txt"]
    again = run_training(tmp_path / "again", "--base", str(whole / "base"))
    assert not (again / "base").exists()
    files = [folder / "dmoe" / "model.safetensors" for folder in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


# The tables ------------------------------------------------------------------------------------------------------------


def test_the_papers_figures():
    """Section 5.2 states 69.5 experts, 14.575 and 99.11 % kept; section 5.3 the reductions by block size."""
    assert paper.mean(paper.BASE)[0] == pytest.approx(69.5)
    experts, share, kept = paper.summary(paper.TABLE_2["dMoE"])
    assert experts == pytest.approx(14.575) and 1 - share == pytest.approx(0.7904, abs=1e-3)
    assert kept == pytest.approx(0.9911, abs=1e-4)
    for size, reduction in ((32, 0.7904), (24, 0.7382), (16, 0.6633), (8, 0.5392)):
        base, ours = paper.TABLE_4[size]
        assert 1 - paper.summary(ours, base)[1] == pytest.approx(reduction, abs=2e-3)


def test_wilson_intervals():
    """Against the textbook's: 15 of 20, and the ends."""
    assert table.wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-3)
    assert table.wilson(0, 10)[0] == 0 and table.wilson(10, 10)[1] == 1
    assert table.wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-3)


def test_kept_accuracy():
    right = numpy.random.default_rng(1).random((4, 400)) < 0.8
    base = table.Run(dict.fromkeys(tasks.TASKS, 40.0), right, 10.0, 24576)
    assert table.kept(base, base) == pytest.approx((1, 1, 1))  # the same prompts, drawn together
    half = base._replace(right=right & (numpy.arange(400) % 2 == 0))
    share, low, high = table.kept(half, base)
    assert low < share < high and share == pytest.approx(0.5, abs=0.05) and high - low < 0.1


def test_the_interval_of_what_is_kept_holds_95_percent():
    """Half of 400 prompts against all of them: a normal distribution of deviation sqrt(0.25 / 400)."""
    right = numpy.arange(400)[None] % 2 == 0
    base = table.Run({"sum": 40.0}, numpy.ones((1, 400), bool), 10.0, 24576)
    share, low, high = table.kept(base._replace(right=right), base)
    assert share == 0.5
    assert (0.5 - low, high - 0.5) == pytest.approx((1.96 * 0.025,) * 2, rel=0.1)


def test_experts_are_counted_over_the_denoising_forwards_of_all_prompts(monkeypatch):
    """A batch that takes longer weighs more: 10 experts in 1 forward and 20 in 3 are 17.5."""

    def answer(net, tokenizer, prompts, blocks, block_length):
        found = [types.SimpleNamespace(unique_experts_denoising=e, denoising_forwards=n) for e, n in ((10, 1), (20, 3))]
        return ["right", "wrong"], found

    monkeypatch.setattr(table, "answer", answer)
    bench = object.__new__(table.Bench)
    net = types.SimpleNamespace(set_routing=lambda *a, **k: None, bytes_per_expert=100)
    examples = [tasks.Example("sum", "prompt", "right")] * 2
    bench.tokenizer, bench.models, bench.runs, bench.bar = None, {"base": net}, {}, table.tqdm(disable=True)
    bench.examples = dict.fromkeys(tasks.TASKS, examples)
    run = bench.run("base", "dmoe")
    assert run.experts == dict.fromkeys(tasks.TASKS, 17.5) and run.mean_experts == 17.5
    assert run.forwards == 2 and run.right.tolist() == [[True, False]] * len(run.experts)


def test_what_a_new_training_is_expected_to_do():
    """The interval holds one more draw 19 times of 20, and is the textbook's for 1, 2, 3, 4 (t = 3.182, s = 1.291)."""
    mean, low, high = trainings.expected([1, 2, 3, 4])
    assert mean == 2.5 and (high - mean, mean - low) == pytest.approx((4.593, 4.593), abs=2e-3)
    draws = numpy.random.default_rng(0).normal(size=(4000, 5))
    for n in (2, 4):
        found = [trainings.expected(list(row[:n])) for row in draws]
        inside = numpy.mean([low <= row[4] <= high for (_, low, high), row in zip(found, draws)])
        assert inside == pytest.approx(0.95, abs=0.015)
    for n in (1, 11):
        with pytest.raises(ValueError, match=f"must be 2 to 10, got {n}"):
            trainings.expected([0.0] * n)


def test_trainings_are_compared():
    stored = {"seed 0": {"base": 0.98, "dMoE": 1.0}, "seed 1": {"base": 0.97, "dMoE": 0.99}}
    said = trainings.compare("Accuracy", stored, {"base": 0.975, "dMoE": 0.7})
    assert re.search(r"base +98.0% +97.0% +97.5% +\d+.\d% to \d+.\d% +97.5% +inside", said)
    assert re.search(r"dMoE +100.0% +99.0% +99.5% +\d+.\d% to \d+.\d% +70.0% +OUTSIDE", said)
    assert "side" not in trainings.compare("Accuracy", stored, None)


def test_the_stored_trainings_and_another(printed, capsys):
    """The tables of the shipped checkpoints on a few prompts, as a training beside the stored ones."""
    _, _, out = printed
    assert trainings.main([str(out / "results.json")]) == 0
    text = capsys.readouterr().out
    for seed in trainings.STORED:
        assert text.count(seed) == 2
    for name in json.loads((out / "results.json").read_text())["table_2"]:
        lines = re.findall(rf"^{re.escape(name)} +[0-9.]+%.*(?:inside|OUTSIDE)$", text, re.M)
        assert len(lines) == (1 if name == "base" else 2), name


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The tables of a few prompts, from the checkpoints that ship."""
    out = tmp_path_factory.mktemp("table")
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert table.main(["--per-task", "6", "--out", str(out)]) == 0
    return text.getvalue(), json.loads((out / "results.json").read_text()), out


def test_the_tables_are_printed_and_drawn(printed):
    text, results, out = printed
    for words in (
        "Table 2",
        "Table 3",
        "Table 4",
        "DES-V*",
        "capacity*",
        "untrained p = 0.4",
        "8: dMoE p = 0.6",
        "69.5 (100%)",
        "Table 5",
        "dMoE p = 0.6: int4",
    ):
        assert words in text
    assert len(results["runs"]) > 20
    assert_drawn(out / "tradeoff.png", 10_000)


def test_what_the_tables_count(printed):
    """Counts that follow from a policy, whatever the weights: a coreset bounds what its block may use."""
    runs, rows = printed[1]["runs"], printed[1]["table_2"]
    assert rows["base"]["of_base"] == [1, 1, 1]
    for row in rows.values():
        share, low, high = row["of_base"]
        assert low <= share <= high and share == pytest.approx(row["right"] / rows["base"]["right"])
    base = runs["base: token, blocks of 32"]["experts"]["mean"]
    assert base > 25
    for key, run in runs.items():
        experts = run["experts"]["mean"]
        assert 4 <= experts <= base or "blocks of 32" not in key or " in " in key, key
        if "capacity=" in key:
            assert experts <= int(re.search(r"capacity=(\d+)", key)[1]), key
        assert all(0 <= value <= 1 for value in run["accuracy"].values())
        assert all(low <= run["accuracy"][name] <= high for name, (low, high) in run["interval"].items())
    by_p = [runs[f"dmoe: dmoe, top_p={p}, min_experts=8, blocks of 32"]["experts"]["mean"] for p in table.THRESHOLDS]
    assert by_p == sorted(by_p)


def test_what_quantising_changes(printed):
    """The finer the format, the more it chooses alike; and no format chooses at random."""
    results = printed[1]["quantized"]
    assert set(results) == {f"{name} in {form}" for name in ("base", "dmoe") for form in ("fp8", "int8", "int4")}
    for name in ("base", "dmoe"):
        int8, fp8, int4 = (results[f"{name} in {form}"] for form in ("int8", "fp8", "int4"))
        for part in ("coresets", "identical", "experts"):
            assert 1 >= int8[part] >= fp8[part] >= int4[part]
        assert int4["experts"] > 0.5 and int8["experts"] < 1
        for row in (int8, fp8, int4):
            share, low, high = row["of_bfloat16"]
            assert low <= share <= high


def test_agreement():
    """Of two models whose choices are known: a coreset of 2 and 3 with 1 in common is a quarter."""
    ids = torch.tensor([[[0, 1, -1], [2, 3, -1]]]), torch.tensor([[[0, 2, 3], [2, 3, -1]]])
    ours, theirs = (table.mask_of(part, 5) for part in ids)
    assert ours.tolist() == [[[True, True, False, False, False], [False, False, True, True, False]]]
    bench = types.SimpleNamespace(tokenizer=tasks.tokenizer(), models={}, examples={"sort": of("sort", 2, test=True)})
    config = types.SimpleNamespace(mask_token_id=1)
    bench.models = {name: types.SimpleNamespace(config=config, name=name) for name in ("ours", "theirs")}
    chosen = dict(ours=(ours, ours), theirs=(theirs, theirs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "choices", lambda net, tokens: chosen[net.name])
        assert table.agreement(bench, "ours", "theirs") == pytest.approx((0.625, 0.5, 0.75))


def test_what_ships_says_how_it_was_made():
    for folder in (model.BASE, model.DMOE):
        log = json.loads((folder / "training.json").read_text())
        assert log["command"].startswith("python -m examples.miniature.train") and log["seconds"] > 0
        config = json.loads((folder / "config.json").read_text())
        assert config["torch_dtype"] == "bfloat16" and config["num_experts"] == 64
        shipped = json.loads((folder / "tokenizer.json").read_text())
        assert shipped == json.loads(tasks.tokenizer().to_str())
