"""Saves that meet a full disk, a read-only file system or a rank of its own: the run goes on, and knows it."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny
from ranks import run_ranks
from test_engine import small, stage_file, steps

from ccd_train import distributed
from ccd_train.config.pretraining import Config
from ccd_train.errors import FAILED, TrainingError
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training import checkpoint
from ccd_train.training.life import write_outcome
from ccd_train.training.metrics import Metrics
from ccd_train.training.run import begin
from ccd_train.training.train import train

MEGABYTE = 1 << 20


class Lines(logging.Handler):
    """What was logged, as text."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def listed(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def on_a_bad_disk(config: Config) -> dict[str, Any]:
    """Saves where rank 1 alone may not write, where the disk is full, and where it is read-only."""
    run, lines, seen = begin(Pretraining(config)), Lines(), {}
    checkpoints = run.run_dir / "checkpoints"
    logging.getLogger("ccd_train").addHandler(lines)

    def save(name: str) -> None:
        steps(run, 1)
        before = len(lines.texts)
        run.save()
        found = checkpoint.newest(run.run_dir)
        seen[name] = (run.failed_saves, found and found.name, lines.texts[before:], listed(run.run_dir))

    def on_rank_0(*command: str) -> None:
        distributed.barrier()
        if distributed.rank() == 0:
            subprocess.run(command, check=True, capture_output=True)
        distributed.barrier()

    save("good")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    save("rank 1 cannot")
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    on_rank_0("sh", "-c", f"cat /dev/zero > {checkpoints}/filler || true")
    save("full")
    on_rank_0("rm", f"{checkpoints}/filler")
    save("good again")
    on_rank_0("mount", "-o", "remount,ro", str(checkpoints))
    save("read-only")
    save("read-only still")
    steps(run, 1)
    with pytest.raises(TrainingError) as caught:
        run.save()
    seen["end"] = str(caught.value)
    run.close()
    return seen


def test_a_disk_that_fails_leaves_the_last_good_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    config = replace(small(tiny, tmp_path / "run"), deepspeed=stage_file(tmp_path, 1))
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("needs a root that may mount")
    try:
        results = run_ranks(2, on_a_bad_disk, config)
    finally:
        subprocess.run(["umount", folder], check=True)
    for seen in results:  # the same on both ranks, their logs too
        assert seen["good"] == (0, "step_00000001", [], ["latest", "step_00000001"])
        failures, newest, (line,), left = seen["rank 1 cannot"]
        assert (failures, newest, left) == (1, "step_00000001", ["latest", "step_00000001"])
        assert "step 2" in line and "rank 1" in line and "File too large" in line
        failures, newest, (line,), left = seen["full"]
        assert (failures, newest, left) == (2, "step_00000001", ["filler", "latest", "step_00000001"])
        assert "No space left on device" in line
        assert seen["good again"] == (0, "step_00000004", [], ["latest", "step_00000001", "step_00000004"])
        for name, count in (("read-only", 1), ("read-only still", 2)):
            failures, newest, (line,), _ = seen[name]
            assert (failures, newest) == (count, "step_00000004") and "Read-only file system" in line
        assert seen["end"].startswith("3 checkpoints in a row could not be written") and "Read-only" in seen["end"]


def behind_the_steps(config: Config) -> tuple[list[str], list[str], float]:
    """A training whose checkpoint folder vanishes on the way."""
    run = begin(Pretraining(config))
    run.last_step = 9
    train(run, None)
    distributed.barrier()  # rank 0 removes old ones
    first = listed(run.run_dir)
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(run.run_dir / "checkpoints")
    distributed.barrier()
    steps(run, 1)
    run.save()
    run.close()
    distributed.barrier()
    return first, listed(run.run_dir), run.stop.save_seconds


def test_saves_are_written_behind_the_steps_and_a_vanished_folder_is_made_anew(tiny: Tiny, tmp_path: Path) -> None:
    config = replace(small(tiny, tmp_path / "run", checkpoint={"every_steps": 2, "keep": 2}), max_steps=10)
    for first, after, seconds in run_ranks(2, behind_the_steps, config):
        assert first == ["latest", "step_00000008", "step_00000009"]
        assert after == ["latest", "step_00000010"]
        assert seconds > 0


def test_a_full_disk_costs_figures_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"samples": 8.0, "epoch": 0.1, "loss": 1.0, "samples_per_second": 1.0, "data_wait": 0.0}
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs a root that may mount")
    try:
        metrics = Metrics(tmp_path, 0, 9)
        metrics.write({"step": 1.0, **values})
        subprocess.run(["sh", "-c", f"cat /dev/zero > {tmp_path}/filler"], check=False, capture_output=True)
        for step in (2.0, 3.0):
            metrics.write({"step": step, **values, **{f"more_{number}": 0.1 for number in range(400)}})
            metrics.picture("step", picture, int(step))
        write_outcome(tmp_path, FAILED, "full")
        (tmp_path / "filler").unlink()
        metrics.write({"step": 4.0, **values})
        metrics.close()
        lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        left = list((tmp_path / "pictures").iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert lines == [1, 4] and left == []
    for name in ("metrics.jsonl", "pictures"):
        assert len([text for text in caplog.messages if f"{name}: No space left" in text]) == 1
    assert "the outcome is failed (3)" in caplog.text
