"""What a task costs: a toy of less than 60 lines trains on the loop, is killed, goes on, validates and exports."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHECKOUT, Tiny
from safetensors.torch import load_file

TOY = CHECKOUT / "tests/toy.py"
STEPS = 24


def start(run_dir: Path, tiny: Tiny, ranks: int) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    options = ["--train.global_batch_size", "16", "--log.every_steps", "1", "--checkpoint.every_steps", "6"]
    program = launcher if ranks > 1 else [sys.executable]
    return subprocess.Popen([*program, str(TOY), str(run_dir), str(tiny.shards), *options], cwd=CHECKOUT)


def figures(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    dropped = ("time", "samples_per_second", "data_wait")
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in row.items() if name not in dropped} for row in rows]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_task_of_sixty_lines(tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    assert start(calm, tiny, ranks).wait() == 0
    life = start(hunted, tiny, ranks)
    while len(figures(hunted)) < 9:  # beyond the first checkpoint
        assert life.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    life.send_signal(signal.SIGKILL)
    life.wait()
    assert start(hunted, tiny, ranks).wait() == 0
    assert figures(hunted) == figures(calm) and len(figures(calm)) == STEPS
    assert [row["step"] for row in figures(calm) if "valid_error" in row] == [8, 16, 24]
    assert figures(calm)[-1]["loss"] < figures(calm)[0]["loss"]
    assert (hunted / "export/colour.safetensors").read_bytes() == (calm / "export/colour.safetensors").read_bytes()
    assert load_file(calm / "export/colour.safetensors")["layer.weight"].shape == (3, 3, 8, 8)


def test_it_has_at_most_sixty_lines() -> None:
    (task,) = (node for node in ast.parse(TOY.read_text()).body if getattr(node, "name", "") == "MeanColour")
    assert task.end_lineno - task.lineno < 60  # type: ignore[attr-defined]
