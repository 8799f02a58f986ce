"""The tile table, the user's own tiles, and what the command says without a GPU."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dmoe_ops import tune
from dmoe_ops.__main__ import main


@pytest.fixture
def tiles():
    """Imported late: other test files import triton under TRITON_INTERPRET=1, and must be the first to."""
    pytest.importorskip("triton")
    from dmoe_ops.triton_kernels import tiles

    return tiles


@pytest.fixture
def user_file(tiles, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiles.user_file() == tmp_path / "dmoe-ops" / "tiles.json"
    yield tiles.user_file()
    tiles.for_device.cache_clear()


def entry_of(table) -> dict:
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    return {name: value for name, value in fields.items() if name not in ("shared_memory", "processors")}


def test_every_entry_says_who_measured_it(tiles, user_file):
    for name, entry in tiles.TABLE.items():
        assert entry["measured_by"], name
        assert tiles.for_name(f"NVIDIA {name} 80GB", 1, 2).measured_by == entry["measured_by"]
    assert entry_of(tiles.for_name("something else", 1, 2)) == tiles.TABLE["default"]


def test_the_users_tiles_come_first(tiles, user_file):
    own = {**tiles.TABLE["default"], "dense_blocks": 7, "measured_by": "me: dmoe tune"}
    assert tiles.save("NVIDIA H100 80GB HBM3", own) == user_file
    tiles.save("another", tiles.TABLE["A100"])
    assert entry_of(tiles.for_name("NVIDIA H100 80GB HBM3", 1, 2)) == own
    assert entry_of(tiles.for_name("NVIDIA H100 PCIe", 1, 2)) == tiles.TABLE["H100"]


@pytest.mark.parametrize("text", ["{", "[]", '{"x": {}}', json.dumps({"x": {"gate": 3}})])
def test_a_broken_file_is_named(tiles, user_file, text):
    user_file.parent.mkdir()
    user_file.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json does not hold tiles .* dmoe tune"):
        tiles.for_name("NVIDIA H100", 1, 2)


def test_stages_fit_into_the_shared_memory(tiles):
    h100 = tiles.for_name("H100", 227 << 10, 132)
    assert h100.fit("dense_up", 32, torch.bfloat16, torch.bfloat16) == h100.dense_up
    wide = h100.fit("dense_down", 128, torch.bfloat16, torch.bfloat16)
    assert 1 <= wide.stages < h100.dense_down.stages
    assert (wide.rows + 128) * wide.depth * 2 * wide.stages <= h100.shared_memory


def test_every_candidate_is_a_tile(tiles):
    table = tiles.for_name("H100", 227 << 10, 132)
    for tokens, field, candidates in tune.plan():
        assert tokens > 0 and candidates
        for changes in candidates:
            dataclasses.replace(getattr(table, field), **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys, monkeypatch):
    assert main(["tune"]) == 2
    assert "no GPU here" in capsys.readouterr().err
