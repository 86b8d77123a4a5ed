"""Runs the command of a launcher and ends as the training run ended, which launchers hide.

    python -m launch.outcome torchrun --standalone --nproc_per_node 2 -m ccd_train pretrain --run_dir DIR …

torchrun and srun turn every exit code of their workers into 1, so the run writes `outcome.json` and this program reads
it. The settings are checked before anything is started: what is refused costs no start of N processes.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ccd_train.config.options import parse
from ccd_train.config.pixels import Segmenting, Upscaling
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.errors import FAILED, UNFINISHED, UserError, run

AnyTraining = Config | FineTuning | Segmenting | Upscaling
SETTINGS: dict[str, tuple[type[AnyTraining], ...]] = {
    "pretrain": (Config,),
    "finetune": (FineTuning, Segmenting, Upscaling),
}
"""The settings of the verbs that train: a recipe chooses among them."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAVING_SECONDS = 60.0  # for workers whose launcher was killed; a start of the same run waits as long
WRITING_SECONDS = 5.0  # between the end of a life's work and its outcome


@dataclass(frozen=True)
class Outcome:
    """How a life of a run ended: a word for people, an exit code for programs, and one line."""

    word: str
    code: int
    message: str


def read_outcome(run_dir: Path) -> Outcome | None:
    """What the run wrote last; None where it wrote nothing that can be read."""
    try:
        values = json.loads((run_dir / "outcome.json").read_text(encoding="utf-8"))
        return Outcome(str(values["outcome"]), int(values["code"]), str(values["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def outcome_identity(run_dir: Path) -> list[int] | None:
    """Changes whenever an outcome is written; tells the outcome of this life from that of the one before."""
    try:
        status = (run_dir / "outcome.json").stat()
    except OSError:
        return None
    return [status.st_ino, status.st_mtime_ns]


def in_use(run_dir: Path) -> bool:
    """Whether a life of the run holds its folder."""
    try:
        with (run_dir / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no life has been here, or the file system has no locks
        return False
    return False


def await_outcome(run_dir: Path, before: list[int] | None) -> None:
    """Returns when the run's workers have said how they ended, or after a minute.

    They outlive a launcher that was killed: each is told so by the system, saves, and ends.
    """
    limit = time.monotonic() + SAVING_SECONDS
    while in_use(run_dir) and time.monotonic() < limit:
        time.sleep(0.2)
    limit = min(limit, time.monotonic() + WRITING_SECONDS)
    while outcome_identity(run_dir) == before and time.monotonic() < limit:
        time.sleep(0.2)


def parse_training(verb: str, argv: list[str]) -> AnyTraining:
    """The settings of a verb that trains. Raises UserError."""
    first, *others = SETTINGS[verb]
    return parse(first, argv, f"ccd-train {verb}", *others)


def checked_run_dir(command: list[str]) -> Path:
    """The run folder of a command `… ccd_train VERB SETTINGS`. Raises UserError where the settings are refused."""
    for index, (word, verb) in enumerate(itertools.pairwise(command)):
        if word == "ccd_train" and verb in SETTINGS:
            config = parse_training(verb, command[index + 2 :])
            config.check()
            assert config.run_dir is not None
            return config.run_dir
    raise UserError("launch.outcome: the command has no `-m ccd_train pretrain` or `finetune` with an outcome to read")


def follow(command: list[str]) -> tuple[int, str]:
    """Runs the command and passes signals on to it; returns its exit code and the first signal's name, or nothing."""
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}; activate the environment of this program") from None

    told: list[str] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        told.append(signal.Signals(number).name)
        process.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    return process.wait(), "".join(told[:1])


def main(command: list[str]) -> int:
    run_dir = checked_run_dir(command)
    before, occupied = outcome_identity(run_dir), in_use(run_dir)
    code, told = follow(command)
    if outcome_identity(run_dir) == before and in_use(run_dir):
        if occupied:  # the other life is still at work: this one has met it and gave up
            raise UserError(f"{run_dir} is in use by another process that trains; stop that, or wait for it")
        await_outcome(run_dir, before)
    outcome = read_outcome(run_dir)
    if outcome is None or outcome_identity(run_dir) == before:
        if told:
            print(f"unfinished: {told} before the run could save; start the same command again", file=sys.stderr)
            return UNFINISHED
        print(f"failed: the run ended without an outcome; its launcher ended with {code}", file=sys.stderr)
        return code if code > 1 else FAILED
    print(f"the run ended with {outcome.code} ({outcome.word})", flush=True)
    return outcome.code


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
