"""What would fail after hours in the queue, looked at before."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from ccd_train.config import Config
from ccd_train.data.shards import Corpus
from ccd_train.errors import UserError
from ccd_train.life import claim
from ccd_train.models.ccd import Student

CHECKPOINT_BYTES = 20  # per parameter: fp32 weights, two moments of AdamW, the teacher, and weights in half precision


def check_pretraining(config: Config, ranks: int) -> None:
    """Raises UserError for whatever would refuse or end this run on `ranks` ranks."""
    config.check()
    assert config.run_dir is not None
    check_batch(config, ranks)
    corpus = Corpus.open(config.data.shards, config.data.exclude)
    check_writable(config.run_dir)
    claim(config.run_dir, config, {"corpus": corpus.hash}, config.train.global_batch_size)
    check_space(config)


def check_batch(config: Config, ranks: int) -> None:
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
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


def check_space(config: Config) -> None:
    """Room for the checkpoints that are kept and the one that is being written."""
    assert config.run_dir is not None
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Student(config.model).parameters())
    needed = parameters * CHECKPOINT_BYTES * (config.checkpoint.keep + 1)
    present = sum(path.stat().st_size for path in (config.run_dir / "checkpoints").rglob("*") if path.is_file())
    free = shutil.disk_usage(existing(config.run_dir)).free
    if free + present < needed:
        raise UserError(
            f"{config.run_dir}: {free / 1e9:.1f} GB free, but {config.checkpoint.keep + 1} checkpoints take "
            f"{needed / 1e9:.1f} GB; free some or lower --checkpoint.keep"
        )
