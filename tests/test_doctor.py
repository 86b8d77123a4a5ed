"""The doctor finds what would end a run, and a run that would go is told so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, Tiny

from ccd_train.config.pretraining import Config, Data
from ccd_train.tasks.pretrain.checkup import Finding, disks, limits, table, versions


def doctor(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "launch.torchrun", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "ccd_train", "doctor", *words],
        cwd=CHECKOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_what_is_wrong_stands_out_and_has_a_remedy() -> None:
    good, slow, bad = Finding("a", "fine"), Finding("b", "slow", "faster"), Finding("c", "gone", "bring it", fatal=True)
    lines = ["node1", "ok a fine", "look b slow", "→ faster", "FAIL c gone", "→ bring it"]
    assert [" ".join(line.split()) for line in table("node1", [good, slow, bad]).splitlines()] == lines


def test_disks_are_measured_and_missing_shards_are_fatal(tiny: Tiny, tmp_path: Path) -> None:
    shards, folder = disks(Config(run_dir=tmp_path / "run", data=Data(shards=(tiny.shards,))))
    assert "240 samples" in shards.result and not shards.fatal
    assert "MB/s" in folder.result and not folder.fatal
    (missing,) = disks(Config(data=Data(shards=(tmp_path,))))
    assert missing.fatal


def test_a_run_folder_that_cannot_be_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = disks(Config(run_dir=tmp_path / "file" / "run"))
    assert finding.fatal


def test_limits_of_this_machine_are_read() -> None:
    memory, files = limits()
    assert "MB free" in memory.result
    assert int(files.result) != 0


def test_a_missing_package_is_fatal_and_one_under_another_name_is_not() -> None:
    _, known, missing, _ = versions({"torch": "torch", "opencv-of-others": "cv2", "no-such-package": "no_such_module"})
    assert "opencv-of-others as another package" in known.result and not known.fatal
    assert missing == Finding(
        "packages", "no-such-package is missing", "pip install -c launch/constraints.txt no-such-package", fatal=True
    )


@pytest.mark.slow
def test_two_ranks_do_a_step(tiny: Tiny, tmp_path: Path) -> None:
    values = ["--data.shards", str(tiny.shards), "--train.micro_batch_size", "4", "--data.workers", "0"]
    values += ["--resume.mode", "must"]  # of the run, not of the step that is tried
    (tmp_path / "run/doctor").mkdir(parents=True)  # of a doctor that was killed, on another run
    (tmp_path / "run/doctor/identity.json").write_text('{"seed": 5}')
    result = doctor("--nodes", "--config", "vit_nano", "--run_dir", str(tmp_path / "run"), *values, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "64 MB between 2 ranks" in result.stdout
    assert "done, with a checkpoint" in result.stdout
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_run_that_would_fail_ends_with_1(tiny: Tiny, tmp_path: Path) -> None:
    result = doctor("--config", "vit_nano", "--run_dir", str(tmp_path / "run"), "--data.shards", str(tmp_path / "no"))
    assert result.returncode == 1
    assert "FAIL shards" in result.stdout
