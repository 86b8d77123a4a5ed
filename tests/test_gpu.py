"""The command for whoever has a GPU is never broken when the minutes come: all of it, with nano sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "gpu"
KINDS = {
    "views and regions against the CPU", "kill and resume", "precision and stages", "matrix products",
    "images per second, one fixed batch", "the estimate", "fed by the loader", "beside the step", "launches of a step",
    "milliseconds by phase", "probe of the teacher", "pretraining", "reading",
}  # fmt: skip


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU), str(tmp_path), "--rehearse", "--minutes", "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["parts"]) == {"right", "fast", "learn"}
    assert {row["kind"] for row in found["rows"]} >= KINDS
    assert all(row["exit_code"] == 0 for row in found["rows"] if "exit_code" in row)
    assert "### reading" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(GPU), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: torch sees no GPU here; --rehearse" in result.stderr
