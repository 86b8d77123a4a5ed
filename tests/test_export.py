"""A run's weights as other verbs see them: out of its newest checkpoint, into exports and official files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Tiny
from safetensors.torch import load_file, save_file

from ccd_train.commands import export, probe
from ccd_train.errors import UserError
from ccd_train.models.ccd import Teacher
from ccd_train.tasks.pretrain.weights import TEACHER, open_weights, read_weights
from ccd_train.training import checkpoint
from ccd_train.weights import backbone as weights
from ccd_train.weights import official

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
    expected = read_weights(run_dir / "checkpoints" / "step_00000003")
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


def test_a_step_of_a_run_is_exported(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run_dir), "--step", "2", "--out", str(tmp_path)]) == 0
    expected = read_weights(run_dir / "checkpoints" / "step_00000002")
    for network in weights.NETWORKS:
        found = load_file(tmp_path / f"{network}.safetensors")
        assert all(torch.equal(tensor, expected[network][name]) for name, tensor in found.items())
    assert json.loads((tmp_path / "config.json").read_text())["about"]["step"] == 2
    assert export.main([str(run_dir), "--step", "2"]) == 0
    assert str(run_dir / "export") in capsys.readouterr().out.splitlines()[-1]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name, complete in {"step_00000002": True, "step_00000004": False, "step_00000003.damaged": True}.items():
        (tmp_path / "checkpoints" / name).mkdir()
        if complete:
            (tmp_path / "checkpoints" / name / checkpoint.COMPLETE).touch()
    for step in ("1", "3", "4"):
        with pytest.raises(UserError, match=f"--step {step}: .* no complete checkpoint of that step; there are 2$"):
            export.main([str(tmp_path), "--step", step])
    with pytest.raises(UserError, match=r"--step 1: .*; there are none"):
        export.main([str(tmp_path / "checkpoints"), "--step", "1", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"there are 2, 3$"):
        export.main([str(run_dir), "--step", "7"])


def test_one_source_is_enough(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--weights = x: is y already; name one of them"):
        export.main(["y", "--weights", "x", "--out", str(tmp_path)])


def test_an_older_checkpoint_can_be_named(run_dir: Path) -> None:
    older = open_weights(run_dir / "checkpoints" / "step_00000002")
    newer = open_weights(run_dir)
    assert older.model == newer.model
    assert not torch.equal(older.student["vit.norm.weight"], newer.student["vit.norm.weight"])
    assert newer.teacher.keys() < newer.student.keys()


def test_a_run_goes_out_in_the_official_layout_and_comes_back(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "ccd.pth"
    with pytest.raises(UserError, match="--lossy"):
        export.main(["--weights", str(run_dir), "--out", str(path)])
    assert export.main(["--weights", str(run_dir), "--out", str(path), "--lossy"]) == 0
    back, run = weights.read(path, heads=2), open_weights(run_dir)
    for name, tensor in run.teacher.items():
        if name != official.EMBEDDING:
            assert torch.equal(back.teacher[name], tensor), name
    assert back.model.freeze_gain


def test_the_backbone_alone_is_read_in_three_lines(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    assert export.main(["--weights", str(run_dir), "--format", "backbone", "--out", str(path)]) == 0
    vit = weights.read_backbone(path).network()
    teacher = Teacher(open_weights(run_dir).model)
    teacher.load_state_dict(open_weights(run_dir).teacher)
    images = torch.randn(2, 3, 32, 128)
    with torch.no_grad():
        tokens, taps = vit(images)
        assert torch.equal(tokens, teacher.vit(images)[0])
    assert taps == []


def test_the_backbone_bears_the_names_of_timm(run_dir: Path, tmp_path: Path) -> None:
    """Those of timm.models.VisionTransformer without class token (timm 1.0), as far as their shapes go as well."""
    path = tmp_path / "vit.safetensors"
    assert export.main(["--weights", str(run_dir), "--format", "backbone", "--out", str(path)]) == 0
    block = {
        "norm1.weight": (32,), "norm1.bias": (32,), "attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,),
        "attn.proj.weight": (32, 32), "attn.proj.bias": (32,), "norm2.weight": (32,), "norm2.bias": (32,),
        "mlp.fc1.weight": (128, 32), "mlp.fc1.bias": (128,), "mlp.fc2.weight": (32, 128), "mlp.fc2.bias": (32,),
    }  # fmt: skip
    expected = {
        "pos_embed": (1, 256, 32), "patch_embed.proj.weight": (32, 3, 4, 4), "patch_embed.proj.bias": (32,),
        "norm.weight": (32,), "norm.bias": (32,),
    }  # fmt: skip
    expected |= {f"blocks.{number}.{name}": shape for number in range(6) for name, shape in block.items()}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == expected


def test_what_is_no_backbone_is_refused(run_dir: Path, tmp_path: Path) -> None:
    assert export.main(["--weights", str(run_dir), "--out", str(tmp_path)]) == 0
    save_file({"number": torch.zeros(1)}, tmp_path / "config.safetensors")
    with pytest.raises(UserError, match="no teacher, no student, and no ViT of ours"):
        weights.read_backbone(tmp_path / "config.safetensors")
    with pytest.raises(UserError, match="not a checkpoint"):
        weights.read_backbone(tmp_path / "config.json")


def test_suffix_and_format_agree(run_dir: Path, tmp_path: Path) -> None:
    """For a pretraining as well as for a recogniser, which is not opened before."""
    for name, form, said in [
        ("x.onnx", "weights", "x.onnx: a .onnx file is for --format onnx, not for --format weights; give that one"),
        ("x.pt", "onnx", "x.pt: a .pt file is for --format torchscript or weights, not for --format onnx"),
        ("x.pth", "onnx", "x.pth: a .pth file is for --format weights, not"),
        ("x.pth", "torchscript", "x.pth: a .pth file is for --format weights, not"),
        ("x.pth", "backbone", "x.pth: a .pth file is for --format weights, not"),
        ("x.safetensors", "onnx", "x.safetensors: a .safetensors file is for --format weights or backbone, not"),
        ("x.safetensors", "weights", "x.safetensors: a pretraining fills a folder; give one, or --format backbone"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            export.main([str(run_dir), "--format", form, "--out", str(tmp_path / name)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_a_pretraining_reads_nothing(run_dir: Path, tmp_path: Path, form: str) -> None:
    with pytest.raises(UserError, match=f"no recogniser, which --format {form} is for; fine-tune it first"):
        export.main(["--weights", str(run_dir), "--format", form, "--out", str(tmp_path / "x")])


def test_a_run_is_probed(run_dir: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    for network in weights.NETWORKS:
        options = ["--network", network, "--words", "60"]
        assert probe.main(["--weights", str(run_dir), "--data", str(tiny.lmdb), *options]) == 0
        assert f"{network} of {run_dir / 'checkpoints' / 'step_00000003'}" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_weights(tmp_path)


def test_a_fine_tuning_before_its_first_validation_is_no_pretraining(run_dir: Path, tmp_path: Path) -> None:
    found = tmp_path / "checkpoints" / "step_00000003"
    shutil.copytree(run_dir / "checkpoints" / "step_00000003", found)
    (found / TEACHER).unlink()
    files = json.loads((found / checkpoint.COMPLETE).read_text())
    del files[TEACHER]
    (found / checkpoint.COMPLETE).write_text(json.dumps(files))
    with pytest.raises(UserError, match="no teacher, so no pretraining"):
        export.main(["--weights", str(tmp_path)])
