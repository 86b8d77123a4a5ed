"""What would fail after hours in the queue, looked at before, as far as settings, files and arithmetic tell.

Nothing here needs torch: a dry run has its answer at once. `rehearsal.py` has the rest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ccd_train.config.deepspeed import read_deepspeed_file
from ccd_train.config.pixels import PixelTuning
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import SCRATCH, FineTuning
from ccd_train.config.run import RunConfig
from ccd_train.data.charset import read_charset
from ccd_train.data.records import LmdbReader, find_lmdbs
from ccd_train.data.shards import Corpus
from ccd_train.data.trees import look_into
from ccd_train.errors import UserError
from ccd_train.models import budget
from launch.lives import newest_step

CHECKPOINT_BYTES = 20  # per parameter: fp32 weights, two moments of AdamW, the teacher, and weights in half precision


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    samples: int | None
    """Records of its corpus, before labels are looked at; None: pictures with truth, which are not counted here."""
    parameters: int


def check_settings(config: Config | FineTuning | PixelTuning, gpus: bool, later: bool) -> Size:
    """Raises UserError for what no number of ranks can run, with GPUs or without.

    `later`: the job waits for another one, which will have written the weights of --init by then.
    """
    config.check()
    assert config.run_dir is not None
    read_deepspeed_file(config.deepspeed, gpus)
    if isinstance(config, FineTuning):
        samples = count_words(config.data.train)
        count_words(config.data.valid)
        classes = read_charset(config.data.charset).classes
        parameters = budget.recognizer_parameters(config.model, config.recognizer, classes)
    elif isinstance(config, PixelTuning):
        for folder in (*config.data.train, *config.data.valid):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; give pictures with their truth")
        samples, parameters = None, budget.pixel_parameters(config.model, config.head)
    else:
        samples = Corpus.open(config.data.shards, config.data.exclude).num_samples
        count_words(config.probe.data if config.probe.every_steps else ())
        parameters = sum(budget.parameters(config.model).values())
    check_writable(config.run_dir)
    check_start(config, later)
    check_space(config, parameters)
    return Size(samples, parameters)


def count_words(folders: Iterable[Path]) -> int:
    """Records in shards and LMDBs, at and below the folders. Refuses a folder with neither."""
    count = 0
    for folder in folders:
        tree = look_into(folder)
        if not tree.lmdbs and not tree.shards:
            find_lmdbs(folder)  # says what is missing
        count += sum(Corpus.open(path).num_samples for path in tree.shards)
        for path in tree.lmdbs:
            with LmdbReader(path) as reader:
                count += len(reader)
    return count


def check_start(config: RunConfig, later: bool) -> None:
    """Looks whether the run may go on, or start, as --resume.mode and --init say."""
    assert config.run_dir is not None
    step, init = newest_step(config.run_dir), config.init
    if step == 0 and config.resume.mode == "must":
        raise UserError(f"--resume.mode must: no complete checkpoint in {config.run_dir}; check --run_dir, or drop it")
    if step and config.resume.mode == "never":
        raise UserError(f"--resume.mode never: {config.run_dir} has a checkpoint; take another --run_dir")
    if not (step or later or init in (None, SCRATCH) or init.exists()):
        raise UserError(f"{init}: no such file or folder; give --init a run folder, an export, or an official .pth")


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


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of one checkpoint."""
    return parameters * CHECKPOINT_BYTES


def check_space(config: RunConfig, parameters: int) -> None:
    """Room for the checkpoints that are kept and the one that is being written."""
    assert config.run_dir is not None
    needed = checkpoint_bytes(parameters) * (config.checkpoint.keep + 1)
    present = sum(path.stat().st_size for path in (config.run_dir / "checkpoints").rglob("*") if path.is_file())
    free = shutil.disk_usage(existing(config.run_dir)).free
    if free + present < needed:
        raise UserError(
            f"{config.run_dir}: {free / 1e9:.1f} GB free, but {config.checkpoint.keep + 1} checkpoints take "
            f"{needed / 1e9:.1f} GB; free some or lower --checkpoint.keep"
        )
