"""One life of a run: what stops it, what it may go on from, and what it leaves in the run folder about itself.

RUN/config.yaml        the settings in force       RUN/identity.json    what a later life is compared with
RUN/environment.txt    hosts and versions, a block for every life
RUN/outcome.json       how the last life ended: finished, refused, failed, or unfinished
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import signal
import socket
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from ccd_train import distributed
from ccd_train.config.options import describe, to_dict
from ccd_train.config.run import RunConfig, identity
from ccd_train.errors import FAILED, FINISHED, REFUSED, UNFINISHED, OccupiedError, UserError
from ccd_train.files import replace_file, write_json

log = logging.getLogger(__name__)

WORDS = {FINISHED: "finished", REFUSED: "refused", FAILED: "failed", UNFINISHED: "unfinished"}
LOCK_SECONDS = 60.0  # for the life before this one to save and end
PACKAGES = ("torch", "deepspeed", "numpy", "opencv-python", "webdataset", "lmdb", "safetensors")


class Stop:
    """Whether this life should end: a signal has come, or the time is nearly over."""

    def __init__(self, max_minutes: float | None) -> None:
        """From now on SIGTERM, SIGUSR1 and SIGINT only ask; a second one changes nothing."""
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal: str | None = None
        self.save_seconds = 0.0
        """What the longest save so far took; twice as much is kept for the last one."""
        self.validation_seconds = 0.0
        """What the longest validation so far took, if there are any: one may come before the last save."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def wanted(self) -> bool:
        return self._signal is not None or self._time_is_over()

    def reason(self) -> str:
        return self._signal or ("--max-minutes is nearly over" if self._time_is_over() else "another rank was asked to")

    def _time_is_over(self) -> bool:
        margin = 2 * self.save_seconds + self.validation_seconds
        return self._deadline is not None and time.monotonic() + margin >= self._deadline

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number).name


def open_run_dir(config: RunConfig) -> Path:
    """Makes the run folder (rank 0); UserError on every rank where that cannot be."""
    assert config.run_dir is not None
    with distributed.together():
        if distributed.rank() == 0:
            try:
                config.run_dir.mkdir(parents=True, exist_ok=True)
                # a file without a name: two starts at the same moment do not meet in it
                tempfile.TemporaryFile(dir=config.run_dir).close()
            except OSError as error:
                raise UserError(
                    f"--run_dir {config.run_dir}: {error.strerror}; name a folder you may write to"
                ) from None
    return config.run_dir


def lock(run_dir: Path, patience: float = LOCK_SECONDS) -> IO[str] | None:
    """Holds the run folder for this life (rank 0) until the file is closed, or the process ends in whatever way.

    A life that was told to stop gets a minute to save. UserError on every rank where another one is alive after that.
    """
    if distributed.rank() != 0:
        return None
    file = (run_dir / "lock").open("a")
    limit = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > limit:
                raise OccupiedError(
                    f"{run_dir} is in use by another process that trains; stop that, or wait for it"
                ) from None
            time.sleep(0.2)
        except OSError:
            log.warning("%s: its file system has no locks; see to it that no two runs write there", run_dir)
            return file


def describe_run(run_dir: Path, config: RunConfig, facts: dict[str, str], global_batch: int) -> None:
    """Writes config.yaml, identity.json and a block of environment.txt (rank 0)."""
    hosts = distributed.gather_objects(socket.gethostname())
    if distributed.rank() == 0:
        mine = identity(to_dict(config)) | facts | {"train.global_batch_size": global_batch}
        write_json(run_dir / "identity.json", mine)
        replace_file(run_dir / "config.yaml", describe(config).encode())
        with (run_dir / "environment.txt").open("a", encoding="utf8") as file:
            file.write(environment(hosts))


def environment(hosts: list[str]) -> str:
    """Hosts, versions and the commit of the code, as text."""
    lines = [
        f"started {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"hosts {', '.join(f'{host} × {hosts.count(host)}' for host in dict.fromkeys(hosts))}",
        f"device {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
        f"python {platform.python_version()} on {platform.platform()}",
        *(f"{package} {_version(package)}" for package in PACKAGES),
        f"commit {_commit()}",
    ]
    return "\n".join(lines) + "\n\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # opencv-python-headless, say: the same under another name
        return "under another name"


def _commit() -> str:
    """Of the checkout that this code lies in, if it lies in one."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git: usual in containers
        return "unknown"
    return found.stdout.strip() or "unknown"


def write_outcome(run_dir: Path | None, code: int, message: str, mine: bool = True) -> None:
    """Says in RUN/outcome.json how this life ended, for launchers: torchrun hides exit codes.

    An end that concerns all is written by rank 0. One that this rank met alone is not `mine` to decide if another
    rank has said already what went wrong.
    """
    if run_dir is None or not run_dir.is_dir() or not os.access(run_dir, os.W_OK):
        return
    if not mine and (run_dir / "outcome.json").exists():
        return
    if distributed.rank() == 0 or not mine or code == FAILED:
        values: dict[str, Any] = {"outcome": WORDS[code], "code": code, "message": message, "time": time.time()}
        try:
            write_json(run_dir / "outcome.json", values)
        except OSError as error:  # a full disk; the log is left to say it
            log.error("%s: %s; the outcome is %s (%d)", run_dir / "outcome.json", error.strerror, WORDS[code], code)
