"""What would fail after hours in the queue, looked at before."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from ccd_train.config.deepspeed import read_deepspeed_file
from ccd_train.config.run import RunConfig
from ccd_train.errors import UserError
from ccd_train.training.life import claim
from ccd_train.training.task import Task
from launch.lives import newest_step

CHECKPOINT_BYTES = 20  # per parameter: fp32 weights, two moments of AdamW, the teacher, and weights in half precision


def check_training(task: Task, ranks: int, gpus: bool) -> None:
    """Raises UserError for whatever would refuse or end this run on `ranks` ranks, with GPUs or without."""
    config = task.config
    config.check()
    assert config.run_dir is not None
    read_deepspeed_file(config.deepspeed, gpus)
    facts = task.open()
    check_writable(config.run_dir)
    check_batch(config, ranks, claim(config.run_dir, config, facts, config.train.global_batch_size))
    check_start(task)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in task.network().parameters())
    check_space(config, parameters)


def check_start(task: Task) -> None:
    """Looks at what the run goes on from, and reads the weights that a new one starts from."""
    config = task.config
    assert config.run_dir is not None
    step = newest_step(config.run_dir)
    if step == 0 and config.resume.mode == "must":
        raise UserError(f"--resume.mode must: no complete checkpoint in {config.run_dir}; check --run_dir, or drop it")
    if step and config.resume.mode == "never":
        raise UserError(f"--resume.mode never: {config.run_dir} has a checkpoint; take another --run_dir")
    if not step and config.init is not None:
        task.start(task.network())


def check_batch(config: RunConfig, ranks: int, batch: int | None) -> None:
    """Refuses a global batch, of the settings or of the run folder, that so many ranks cannot share evenly."""
    micro = config.train.micro_batch_size
    if batch is not None and batch % (micro * ranks):
        raise UserError(
            f"train.global_batch_size = {batch}: not a multiple of {ranks} ranks × {micro} (train.micro_batch_size); "
            "change one of the three"
        )


def check_writable(folder: Path) -> None:
    """Tries a file in the folder, or where the folder will be made."""
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; choose a run folder that you can write to") from None


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.resolve().parents) if place.exists())


def check_space(config: RunConfig, parameters: int) -> None:
    """Room for the checkpoints that are kept and the one that is being written."""
    assert config.run_dir is not None
    needed = parameters * CHECKPOINT_BYTES * (config.checkpoint.keep + 1)
    present = sum(path.stat().st_size for path in (config.run_dir / "checkpoints").rglob("*") if path.is_file())
    free = shutil.disk_usage(existing(config.run_dir)).free
    if free + present < needed:
        raise UserError(
            f"{config.run_dir}: {free / 1e9:.1f} GB free, but {config.checkpoint.keep + 1} checkpoints take "
            f"{needed / 1e9:.1f} GB; free some or lower --checkpoint.keep"
        )
