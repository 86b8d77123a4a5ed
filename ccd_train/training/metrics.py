"""What a run tells while it runs: metrics.jsonl, TensorBoard, alarms, and one line of progress (rank 0 only).

Weights & Biases is told the same where --log.wandb names a project; nothing else here depends on that package.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ccd_train.durations import duration
from ccd_train.errors import UserError
from ccd_train.files import replace_file

log = logging.getLogger(__name__)

QUIET_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Alarm:
    step: int
    kind: str
    message: str
    """One line: the figures, and what users do about it."""
    over: bool = False
    """The figures are well again."""


class Metrics:
    """Appends a JSON object per logged step; each line is on disk before the next step begins."""

    def __init__(
        self, run_dir: Path, first_step: int, last_step: int, wandb: str | None = None, score: str = ""
    ) -> None:
        """Goes on after `first_step` steps: what an earlier life wrote beyond them is dropped, a torn line too.

        score: as in RunConfig.
        """
        self._path = run_dir / "metrics.jsonl"
        self._alarms = run_dir / "alarms.jsonl"
        for path in (self._path, self._alarms):
            keep_lines(path, first_step)
        self._missed: set[str] = set()
        """What a full disk has kept from being written, so far."""
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        settings = run_dir / "config.yaml"
        if settings.is_file():  # as a block of code in Markdown
            self._board.add_text("settings", textwrap.indent(settings.read_text(encoding="utf-8"), "    "), first_step)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} {bar:10} {desc}",  # the time left is in ours
            disable=not self._terminal,
            leave=False,
        )
        self._last_step = last_step
        self._spoke = 0.0
        self._validated, self._score = "", score or "{:.1%} right"
        self._wandb = None if wandb is None else join_wandb(wandb, run_dir)

    def write(self, values: Mapping[str, float]) -> None:
        """One line of metrics, with the time (seconds since 1970); `step` must be among them."""
        with self._spared("metrics.jsonl"):
            append_line(self._path, {**values, "time": round(time.time(), 3)})
        with self._spared("tensorboard"):
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(values["step"]))
        if self._wandb is not None:
            self._wandb.log(dict(values), step=int(values["step"]))
        self._show(values)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """A uint8 RGB picture [H, W, 3] into TensorBoard, and as RUN/pictures/NAME_00000100.png."""
        png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        # encoded once, by OpenCV: TensorBoard's own way, through Pillow, takes five times as long
        height, width, _ = image.shape
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        with self._spared("tensorboard"):
            self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)
        with self._spared("pictures"):
            folder = self._path.parent / "pictures"
            folder.mkdir(exist_ok=True)
            replace_file(folder / f"{name}_{step:08d}.png", png)

    def alarm(self, alarm: Alarm) -> None:
        """Into the log, TensorBoard's texts, and RUN/alarms.jsonl, where `ccd-submit status` finds it."""
        with self._spared("alarms.jsonl"):
            append_line(self._alarms, asdict(alarm))
        with self._spared("tensorboard"):
            self._board.add_text("alarm", alarm.message, alarm.step)
            self._board.flush()
        self.say(f"{'note' if alarm.over else 'ALARM'}: step {alarm.step}: {alarm.message}")

    def advance(self) -> None:
        self._bar.update()

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        with self._spared("tensorboard"):
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """A disk that takes no more costs figures, not the run; said once of each file."""
        try:
            yield
        except OSError as error:
            if what not in self._missed:
                log.warning("%s: %s; the run goes on without it", self._path.with_name(what), error.strerror)
            self._missed.add(what)

    def _show(self, values: Mapping[str, float]) -> None:
        left = (self._last_step - values["step"]) * values["samples"] / values["step"] / values["samples_per_second"]
        peak = f"{values['of_peak']:.0%} of the peak, " if "of_peak" in values else ""
        text = (
            f"{values['samples']:,.0f} samples, epoch {values['epoch']:.2f}, loss {values['loss']:.4f}, "
            f"{values['samples_per_second']:.0f} samples/s, {peak}{values['data_wait']:.0%} waiting for data, "
            f"{duration(left)} left"
        )
        if "valid_best" in values:
            best = self._score.format(values["valid_best"])
            self._validated = f", {best} at best (step {values['step']:.0f})"
        text += self._validated
        if self._terminal:
            self._bar.set_description_str(text)
            return
        weighty = values["step"] >= self._last_step or "valid_best" in values
        if weighty or time.monotonic() - self._spoke >= QUIET_SECONDS:
            self._spoke = time.monotonic()
            self.say(f"{time.strftime('%H:%M:%S')} step {values['step']:.0f}/{self._last_step}, {text}")


def append_line(path: Path, values: Mapping[str, object]) -> None:
    """A JSON object as a line that is on disk when this returns; OSError leaves the file as it was."""
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        line = (json.dumps(values) + "\n").encode()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.truncate(file.fileno(), before)
            raise


def join_wandb(project: str, run_dir: Path) -> Any:
    """This run among those of a Weights & Biases project; a later life goes on in it."""
    wandb = importlib.import_module("wandb")
    name = run_dir.resolve().name
    return wandb.init(project=project, name=name, id=name, dir=str(run_dir), resume="allow")


def keep_lines(path: Path, last_step: int) -> None:
    """Cuts metrics.jsonl after the lines of steps up to `last_step`, where they are whole."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # torn by a kill
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(f"{path}: line {line[:60]!r} is not one of ours; move the file away") from None
            if step > last_step:
                break
            kept += len(line)
    os.truncate(path, kept)
