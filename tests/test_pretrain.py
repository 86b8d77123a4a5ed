"""The pretraining command as a user meets it: what it refuses, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Tiny
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine import SMALL, small

from ccd_train.config.pretraining import Config
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.tasks.pretrain.weights import read_weights
from ccd_train.training import checkpoint
from ccd_train.training.run import begin


def pretrain(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, "-m", "ccd_train", "pretrain", *arguments],
        capture_output=True, text=True, timeout=240, cwd=cwd, env=clean | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"log": {"every_steps": 2, "pictures_every_steps": 3}}))
    return str(path)


@pytest.fixture(scope="module")
def run(tiny: Tiny, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 steps, alone, without any environment variable set."""
    run_dir = tmp_path_factory.mktemp("run") / "it's a, run"
    arguments = ("--config", recipe, "--run_dir", str(run_dir), "--data.shards", str(tiny.shards), "--max-steps", "7")
    result = pretrain(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return run_dir


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_what_a_run_leaves_behind(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert [line["samples"] for line in lines] == [4, 8, 12, 14]
    expected = {
        "step", "samples", "epoch", "loss", "loss_distillation", "loss_segmentation", "lr", "weight_decay", "momentum",
        "grad_norm", "characters", "teacher_entropy", "samples_per_second", "data_wait",
    }  # fmt: skip
    assert all(expected <= line.keys() for line in lines)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [2, 4, 6, 7]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in board.Images("step")] == [1, 3, 6]
    (settings,) = board.Tensors("settings/text_summary")
    assert b"    max_steps: 7" in settings.tensor_proto.string_val[0]
    assert len(list((run / "pictures").glob("step_*.png"))) == 3
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"
    assert "torch " in (run / "environment.txt").read_text() and "hosts " in (run / "environment.txt").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 7
    assert checkpoint.newest(run) == run / "checkpoints" / "step_00000007"
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000007"


def differentiated(config: Config) -> tuple[float, float]:
    """The loss whose gradients are taken in a step, and the one that is told."""
    run = begin(Pretraining(config))
    run.task.begin_step(True)
    made = [(loss.item(), parts) for loss, parts in run.task.losses(iter([next(run.batches)]))]
    told = run.task.figures(sum(parts for _, parts in made).tolist())
    run.close()
    return made[0][0], told["loss"]


def test_the_loss_that_is_told_is_the_one_that_is_differentiated(tiny: Tiny, tmp_path: Path) -> None:
    """A new term has to be in both; see docs/architecture.md, How to add a loss term."""
    config = small(tiny, tmp_path / "run", distillation={"segmentation_weight": 0.3})
    ((taken, told),) = run_ranks(
        1, differentiated, replace(config, train=replace(config.train, global_batch_size=config.train.micro_batch_size))
    )
    assert told == pytest.approx(taken, rel=1e-5)


def test_a_finished_run_started_again_changes_nothing(tiny: Tiny, recipe: str, run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    arguments = ("--config", recipe, "--run_dir", str(run), "--data.shards", str(tiny.shards), "--max-steps")
    for steps in ("7", "2"):  # fewer than are done are done as well
        result = pretrain(*arguments, steps)
        assert result.returncode == 0 and "going on from" in result.stderr, result.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_with_the_differences(tiny: Tiny, recipe: str, run: Path) -> None:
    arguments = ("--config", recipe, "--run_dir", str(run), "--data.shards", str(tiny.shards))
    line = refused(pretrain(*arguments, "--optimizer.lr", "0.5", "--seed", "3"))
    assert "optimizer.lr: 0.01 → 0.5" in line and "seed: 0 → 3" in line and "--resume.allow_change" in line
    assert json.loads((run / "outcome.json").read_text())["code"] == 2
    changed = pretrain(*arguments, "--seed", "3", "--resume.allow_change", "--max-steps", "8")
    assert changed.returncode == 0, changed.stderr
    assert "seed" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.shards", "nowhere"], "nowhere"),
        (["--data.shards", "empty"], "empty"),
        (["--train.micro_batch_size", "0"], "train.micro_batch_size = 0"),
        (["--train.micro_bath_size", "4"], "did you mean train.micro_batch_size"),
        (["--train.global_batch_size", "3"], "train.global_batch_size = 3"),
        (["--deepspeed", "zero9"], "--deepspeed zero9"),
        (["--deepspeed", "zero1_fp16"], "fp16 needs a GPU"),
        (["--resume.mode", "must"], "--resume.mode must"),
        (["--run_dir", "/proc/no/run"], "--run_dir /proc/no/run"),
    ],
)
def test_bad_input_is_one_line(tiny: Tiny, recipe: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    good = ["--config", recipe, "--run_dir", str(tmp_path / "run"), "--data.shards", str(tiny.shards)]
    assert message in refused(pretrain(*good, *arguments, cwd=tmp_path))


def test_a_port_in_use_is_one_line(tiny: Tiny, recipe: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        good = ["--config", recipe, "--run_dir", str(tmp_path / "run"), "--data.shards", str(tiny.shards)]
        line = refused(pretrain(*good, **rank))
    assert f"127.0.0.1:{port}: the port is in use" in line


def test_half_an_environment_is_one_line(tiny: Tiny, recipe: str, tmp_path: Path) -> None:
    good = ["--config", recipe, "--run_dir", str(tmp_path / "run"), "--data.shards", str(tiny.shards)]
    assert "MASTER_ADDR, MASTER_PORT not set" in refused(pretrain(*good, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"))


def test_init_starts_from_the_weights_of_another_run(tiny: Tiny, recipe: str, run: Path, tmp_path: Path) -> None:
    """The first step of a warm-up has a learning rate of 0, so the weights saved after it are those of the start."""
    new = tmp_path / "new"
    arguments = ["--config", recipe, "--run_dir", str(new), "--data.shards", str(tiny.shards), "--max-steps", "1"]
    arguments += ["--probe.every_steps", "1", "--probe.data", str(tiny.lmdb), "--probe.words", "120"]
    arguments += ["--model.initial_std", "0.05", "--model.contrast_std", "0.1"]  # of a beginning that does not come
    result = pretrain(*arguments, "--init", str(run), "--optimizer.freeze_last_layer_samples", "0")
    assert result.returncode == 0, result.stderr
    mine, theirs = (read_weights(found) for found in map(checkpoint.newest, (new, run)) if found)
    trained = [name for name in theirs["student"] if "running" not in name]
    assert all(torch.equal(mine["student"][name], theirs["student"][name]) for name in trained)
    (line,) = (new / "metrics.jsonl").read_text().splitlines()
    assert 0 <= json.loads(line)["probe_linear"] <= 1 and json.loads(line)["probe_chance"] > 0


def test_init_from_another_network_is_one_line(tiny: Tiny, recipe: str, run: Path, tmp_path: Path) -> None:
    arguments = ["--config", recipe, "--run_dir", str(tmp_path / "new"), "--data.shards", str(tiny.shards)]
    line = refused(pretrain(*arguments, "--init", str(run), "--model.prototypes", "48"))
    assert "model.prototypes: 32 → 48" in line
    assert not (tmp_path / "new" / "identity.json").exists()  # the corrected command is not another run's
