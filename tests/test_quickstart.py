"""The README's first command, as a user types it. Slow: minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Tiny

CHECKOUT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHECKOUT / ".venv").exists(), reason="launch/test.sh makes .venv; here there is none"),
]


def quickstart(*arguments: str, steps: int, cwd: Path = CHECKOUT) -> tuple[str, Path]:
    """Runs the script as from a fresh terminal; returns what it printed, and the run folder that it names."""
    environment = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    environment |= {"STEPS": str(steps), "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    command = ["bash", str(CHECKOUT / "launch/quickstart.sh"), *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"run folder +(.+)", result.stdout)
    assert found is not None
    return result.stdout + result.stderr, CHECKOUT / found[1]


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_from_nothing_to_a_run_that_went_on() -> None:
    began = time.monotonic()
    text, run_dir = quickstart(steps=120)
    assert time.monotonic() - began < 360
    assert "Traceback" not in text
    assert "the run ended with 75 (unfinished)" in text
    assert re.search(r"going on from .*step_000000[67]\d", text)
    assert steps_of(run_dir) == list(range(5, 121, 5))
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "finished"
    assert (run_dir / "report.html").stat().st_size > 1000
    assert list((run_dir / "tensorboard").glob("events.*"))


def test_on_an_lmdb_twice(tiny: Tiny, tmp_path: Path) -> None:
    """The second time nothing is installed or sharded again, and the first run stays."""
    (tmp_path / "my words").symlink_to(tiny.lmdb)
    first_text, first = quickstart("my words", steps=10, cwd=tmp_path)
    shards = list((first.parent / "shards").iterdir())
    times = [path.stat().st_mtime_ns for path in shards]
    second_text, second = quickstart("my words", steps=10, cwd=tmp_path)
    assert first != second and first.parent == second.parent
    assert [path.stat().st_mtime_ns for path in shards] == times
    assert "installing" not in second_text and "rendering" not in second_text
    assert steps_of(first) == steps_of(second) == [5, 10]
    assert "240 samples" in first_text
