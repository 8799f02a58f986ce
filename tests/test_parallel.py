"""A model over two ranks (gloo): tokens, statistics and routing are those of one process; a rank that dies is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch

from dmoe_ops import __main__

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def test_two_ranks_do_what_one_process_does_and_a_killed_one_is_named(tmp_path):
    ranks.build().save_pretrained(tmp_path)
    # Its folder is on no path of its own under PYTHONSAFEPATH.
    path = os.pathsep.join(filter(None, [str(Path(ranks.__file__).parent), os.environ.get("PYTHONPATH")]))
    env = dict(os.environ, PYTHONPATH=path)
    command = [sys.executable, ranks.__file__, tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n") == ["equal", "equal", "[1, -9]", ""], done.stderr[-4000:]
    last = done.stderr.strip().splitlines()[-1]
    assert "RuntimeError: one of 2 ranks is gone or does not answer, says rank 0: " in last


def test_decode_under_torchrun(capsys):
    """The command says what it says on one process."""
    pytest.importorskip("tokenizers")
    options = ["decode", "--gen-length", "32", "--device", "cpu", "--dtype", "float32"]
    assert __main__.main(options) == 0
    alone = capsys.readouterr().out.splitlines()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dmoe_ops"]
    done = subprocess.run(
        [*launch, *options, "--experts", "expert"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    spread = done.stdout.splitlines()
    assert spread[:-1] == alone[:-1] and len(alone) == 5 and "Ada?" in alone[0]
    assert spread[-1].startswith("2 ranks, experts by expert: ") and alone[-1].startswith("one process: ")
    assert spread[-1].split(" s, ")[1] == alone[-1].split(" s, ")[1]  # forwards, unique experts, routing
