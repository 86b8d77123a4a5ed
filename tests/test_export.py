"""A run's weights as other verbs see them: out of its newest checkpoint, into exports and official files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Tiny
from safetensors.torch import load_file

from ccd_train import checkpoint, export, probe, weights
from ccd_train.errors import UserError

SMALL = {
    "model": {
        "width": 32, "depth": 6, "heads": 2, "taps": [1, 2, 3], "segmentation_width": 8,
        "head_hidden": 16, "head_bottleneck": 8, "prototypes": 24, "freeze_gain": True,
    },
    "optimizer": {"lr": 0.1, "warmup_samples": 4},
    "train": {"micro_batch_size": 4},
    "data": {"workers": 0},
    "checkpoint": {"every_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps in one process, with checkpoints after steps 2 and 3."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "ccd_train", "pretrain", "--config", str(folder / "small.yaml")]
    command += ["--run_dir", str(folder / "run"), "--data.shards", str(tiny.shards), "--max-steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_a_run_is_exported_from_its_newest_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    assert export.main(["--weights", str(run_dir), "--out", str(tmp_path)]) == 0
    expected = checkpoint.read_weights(run_dir / "checkpoints" / "step_00000003")
    for network in weights.NETWORKS:
        found = load_file(tmp_path / f"{network}.safetensors")
        assert found.keys() == expected[network].keys()
        assert all(torch.equal(tensor, expected[network][name]) for name, tensor in found.items())
    about = json.loads((tmp_path / "config.json").read_text())["about"]
    assert (about["step"], about["samples"], about["global_batch_size"]) == (3, 12, 4)
    assert str(run_dir) not in json.dumps(about)


def test_without_a_place_it_goes_into_the_run_folder(run_dir: Path) -> None:
    assert export.main(["--weights", str(run_dir)]) == 0
    assert weights.read(run_dir / "export").model.prototypes == 24


def test_an_older_checkpoint_can_be_named(run_dir: Path) -> None:
    older = checkpoint.open_weights(run_dir / "checkpoints" / "step_00000002")
    newer = checkpoint.open_weights(run_dir)
    assert older.model == newer.model
    assert not torch.equal(older.student["vit.norm.weight"], newer.student["vit.norm.weight"])
    assert newer.teacher.keys() < newer.student.keys()


def test_a_run_goes_out_in_the_official_layout_and_comes_back(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "ccd.pth"
    with pytest.raises(UserError, match="--lossy"):
        export.main(["--weights", str(run_dir), "--out", str(path)])
    assert export.main(["--weights", str(run_dir), "--out", str(path), "--lossy"]) == 0
    back, run = weights.read(path, heads=2), checkpoint.open_weights(run_dir)
    for name, tensor in run.teacher.items():
        if name != weights.EMBEDDING:
            assert torch.equal(back.teacher[name], tensor), name
    assert back.model.freeze_gain


def test_a_run_is_probed(run_dir: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    for network in weights.NETWORKS:
        options = ["--network", network, "--words", "60"]
        assert probe.main(["--weights", str(run_dir), "--data", str(tiny.lmdb), *options]) == 0
        assert f"{network} of {run_dir / 'checkpoints' / 'step_00000003'}" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.open_weights(tmp_path)
