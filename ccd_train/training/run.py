"""What every run has, whatever it trains: its folder, engine, batches, progress and checkpoints, and how it ends.

The tasks in `ccd_train/tasks/` build their runs on it and train them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.config.deepspeed import read_deepspeed_file
from ccd_train.config.options import to_dict
from ccd_train.config.run import RunConfig
from ccd_train.data.loader import Batches
from ccd_train.errors import (
    FAILED,
    FINISHED,
    REFUSED,
    UNFINISHED,
    MissingRanksError,
    OccupiedError,
    TrainingError,
    UserError,
)
from ccd_train.models.vit import VisionTransformer
from ccd_train.training import checkpoint
from ccd_train.training.engine import Engine
from ccd_train.training.life import Stop, claim, describe_run, lock, open_run_dir, write_outcome
from ccd_train.training.metrics import Metrics
from ccd_train.training.presence import introduce
from ccd_train.training.watch import Watch, lost_in

log = logging.getLogger(__name__)

FAILED_SAVES = 3  # so many in a row end the run


@dataclass
class Progress:
    """Where a run stands: with the weights, its whole state."""

    step: int = 0
    """Steps done, skipped ones included."""
    position: int = 0
    """Samples consumed, over all epochs: where the data goes on."""
    samples: int = 0
    """Samples of the steps that were not skipped: where the schedules stand."""
    skipped_steps: int = 0
    bad_steps: int = 0
    """Skipped steps in a row, up to now."""

    def restore(self, state: dict[str, Any]) -> None:
        """Takes its values out of a checkpoint's state."""
        for name in asdict(self):
            setattr(self, name, state[name])


class Home:
    """A run folder that is ours for this life."""

    def __init__(self, config: RunConfig) -> None:
        """Takes signals and the folder's lock (all ranks together). UserError on all ranks where it cannot be had."""
        introduce(to_dict(config))
        self.config = config
        self.run_dir = open_run_dir(config)
        self.stop = Stop(config.max_minutes)
        use_threads(config)
        with distributed.together():
            self.lock: IO[str] | None = lock(self.run_dir)
        if distributed.rank() == 0:
            (self.run_dir / "outcome.json").unlink(missing_ok=True)  # of the life before
        self.facts: dict[str, str] = {}
        self.global_batch = 0
        """Samples of a step, over all ranks and micro-batches."""
        self.schedule_steps = 0
        """Where the schedules end."""
        self.last_step = 0
        """Where the run ends: there, or at --max-steps."""
        self.found: Path | None = None
        """The checkpoint to go on from."""

    def settle(self, facts: dict[str, str]) -> None:
        """Finds where the run goes on. `facts`, beside its settings, tell this run from others: hashes of its data.

        UserError on all ranks where the folder is another run's.
        """
        config, self.facts = self.config, facts
        with distributed.together():
            claimed = claim(self.run_dir, config, facts, config.train.global_batch_size)
            self.global_batch = claimed or config.train.micro_batch_size * distributed.world_size()
            check_batches(config, self.global_batch)
        self.schedule_steps = steps = -(-config.train.total_samples // self.global_batch)
        self.last_step = steps if config.max_steps is None else min(steps, config.max_steps)
        self.found = find(self.run_dir, config)
        if self.found is not None:
            state = checkpoint.read_state(self.found)
            self.stop.save_seconds = state.get("save_seconds", 0.0)
            self.stop.validation_seconds = state.get("validation_seconds", 0.0)

    def take(self) -> None:
        """Makes the folder this run's (all ranks together). Once the run is built: a refused start takes no folder."""
        describe_run(self.run_dir, self.config, self.facts, self.global_batch)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch // (self.config.train.micro_batch_size * distributed.world_size())


class Training:
    """A run under way."""

    def __init__(
        self,
        home: Home,
        engine: Engine,
        batches: Batches,
        progress: Progress,
    ) -> None:
        self.home, self.engine, self.batches, self.progress = home, engine, batches, progress
        self.run_dir, self.stop = home.run_dir, home.stop
        self.global_batch, self.accumulation, self.last_step = home.global_batch, home.accumulation, home.last_step
        self.pending: checkpoint.Save | None = None
        """The checkpoint that is being written behind the steps."""
        self.failed_saves = 0
        """In a row, up to now."""
        self.watch = Watch(
            home.config.distributed.timeout,
            lambda message: write_outcome(home.run_dir, UNFINISHED, message, mine=False),
        )
        if distributed.rank() == 0:
            log.info("going on from %s", home.found) if home.found else log.info("starting from the beginning")

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """What its checkpoints keep beside the engine's files, by file and name: copies (all ranks together)."""
        return {}

    def advance(self, applied: bool, sample_ids: Tensor) -> None:
        """Counts a step; ends the run where too many in a row were skipped, with their samples listed."""
        progress = self.progress
        progress.step += 1
        progress.position += self.global_batch
        if applied:
            progress.samples += self.global_batch
            progress.bad_steps = 0
            return
        progress.skipped_steps += 1
        if self.engine.loss_scale > 1:
            return  # fp16 is looking for its scale
        progress.bad_steps += 1
        samples = [sample for part in distributed.gather_objects(sample_ids.tolist()) for sample in part]
        path = self.run_dir / "bad_steps.jsonl"
        if distributed.rank() == 0:
            try:
                with path.open("a", encoding="utf8") as file:
                    file.write(json.dumps({"step": progress.step, "samples": samples}) + "\n")
            except OSError as error:
                log.warning("%s: %s; the samples are %s", path, error.strerror, samples)
            log.warning("step %d skipped: loss or gradient not finite; its samples are in %s", progress.step, path)
        if progress.bad_steps >= self.home.config.train.max_bad_steps:
            raise TrainingError(
                f"{progress.bad_steps} steps in a row with a loss or gradient that is not finite, up to step "
                f"{progress.step}; their samples are in {path}; lower --optimizer.lr or look at them"
            )

    def keep(self, stop: bool, written: bool) -> None:
        """Completes the checkpoint under way where it is `written`, and begins one where it is due (all together)."""
        finished = self.progress.step == self.last_step
        if written:
            self.finish_save()
        if stop or finished or self.progress.step % self.home.config.checkpoint.every_steps == 0:
            self.save(wait=stop or finished)

    def save(self, wait: bool = True) -> None:
        """Begins a checkpoint of this step (all ranks together), and waits for it, or leaves it to `finish_save`."""
        self.finish_save()  # the one before: the disk is slower than the interval
        self.watch.at(self.progress.step, "save")
        description = {
            **asdict(self.progress),
            "seed": self.home.config.seed,
            **self.home.facts,
            "global_batch_size": self.global_batch,
            "world_size": distributed.world_size(),
            "deepspeed": self.engine.description,
            "loss_scale": self.engine.loss_scale,
            "save_seconds": self.stop.save_seconds,
            "validation_seconds": self.stop.validation_seconds,
            "settings": to_dict(self.home.config),
        }
        self.pending = checkpoint.Save(self.run_dir, self.engine, self.beside, description)
        if wait:
            self.finish_save()

    def finish_save(self) -> None:
        """Completes the checkpoint under way, if any (all ranks together); goes on where it fails, but not for ever."""
        if self.pending is None:
            return
        self.watch.at(self.progress.step, "save")
        save, self.pending = self.pending, None
        problem = save.finish()
        self.stop.save_seconds = max(self.stop.save_seconds, save.seconds)
        if problem is None:
            self.failed_saves = 0
            checkpoint.thin(self.run_dir, self.home.config.checkpoint.keep, self.home.config.checkpoint.keep_every)
            return
        self.failed_saves += 1
        log.warning("step %d: its checkpoint could not be written (%s); the run goes on", save.step, problem)
        if self.failed_saves >= FAILED_SAVES or save.step >= self.last_step:
            raise TrainingError(
                f"{self.failed_saves} checkpoints in a row could not be written, the last: {problem}; "
                "make room, then start the same command again"
            )

    def close(self) -> None:
        self.watch.close()
        self.batches.close()
        if self.home.lock is not None:
            self.home.lock.close()


class Pace:
    """Samples per second and the share of time spent waiting, since the last time that somebody asked."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._began, self._waited, self._steps = time.monotonic(), 0.0, 0

    def count(self, waited: float) -> None:
        """A step, in which this rank waited so many seconds for data."""
        self._waited, self._steps = self._waited + waited, self._steps + 1

    def figures(self) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        return {"samples_per_second": self._steps * self._global_batch / seconds, "data_wait": self._waited / seconds}

    def begin(self) -> None:
        """Forgets what was counted."""
        self._began, self._waited, self._steps = time.monotonic(), 0.0, 0


def prepare(config: RunConfig) -> None:
    """Refuses impossible settings before any other work, then joins the other ranks."""
    config.check()
    read_deepspeed_file(config.deepspeed)  # refused now, not after the data was opened
    distributed.initialize(config.distributed.timeout)


@contextmanager
def guarded(run: Training) -> Iterator[Metrics | None]:
    """A run's metrics on rank 0, until its end; names what ends it from outside: no memory left, or a rank lost."""
    metrics = None
    try:
        if distributed.rank() == 0:
            metrics = Metrics(run.run_dir, run.progress.step, run.last_step, run.home.config.log.wandb)
        yield metrics
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() / 2**30
        raise TrainingError(
            f"rank {distributed.rank()}: out of GPU memory in step {run.progress.step + 1} (peak {peak:.1f} GiB); "
            "lower --train.micro_batch_size, or use --train.activation_checkpointing"
        ) from None
    except RuntimeError as error:
        if lost_in(error):
            run.watch.lost()  # does not return
        raise
    finally:
        run.close()
        if metrics is not None:
            metrics.close()


def ended(run: Training, finished: bool) -> tuple[int, str]:
    """The exit code of a life that came to its end, and a line about it."""
    progress = run.progress
    if finished:
        return FINISHED, f"{progress.step} steps, {progress.position} samples; the run is in {run.run_dir}"
    done = "stopped, but not saved," if run.failed_saves else "saved"
    reason = f"{run.stop.reason()}: {done} after step {progress.step} of {run.last_step}"
    return UNFINISHED, f"{reason}; start the same command again to go on"


def conclude(run_dir: Path | None, live: Callable[[], tuple[int, str]]) -> int:
    """Lives, then says how it ended, in RUN/outcome.json and in the log. Returns the exit code."""
    with ExitStack() as ending:
        ending.push(partial(_note_fault, run_dir))
        try:
            code, message = live()
        except MissingRanksError as error:
            code, message = UNFINISHED, str(error)
        except OccupiedError as error:
            code, message, run_dir = REFUSED, str(error), None  # the outcome there is the other life's
        except UserError as error:
            code, message = REFUSED, str(error)
        except TrainingError as error:
            code, message = FAILED, str(error)
    write_outcome(run_dir, code, message)
    alone = not distributed.joined()  # nobody else will say it
    if distributed.rank() == 0 or code == FAILED or alone:
        word = {FINISHED: "finished", UNFINISHED: "unfinished", REFUSED: "error", FAILED: "failed"}[code]
        well = code in (FINISHED, UNFINISHED) and not alone
        log.log(logging.INFO if well else logging.ERROR, "%s: %s", word, message)
    distributed.finalize()
    return code


def _note_fault(run_dir: Path | None, kind: type[BaseException] | None, fault: object, trace: object) -> None:
    """An error that nobody foresaw goes on to its traceback, but launchers must know that the run has failed."""
    if kind is not None and issubclass(kind, Exception):
        first = (str(fault).splitlines() or [""])[0]
        write_outcome(run_dir, FAILED, f"{kind.__name__}: {first}; its traceback is in the log", mine=False)


def use_threads(config: RunConfig) -> None:
    """The thread count is part of what makes sums repeat bit for bit, so it is ours, not the environment's."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.train.threads or max(1, cores // distributed.local_world_size()))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def compile_blocks(*backbones: VisionTransformer) -> None:
    """In place: names stay."""
    for block in (block for backbone in backbones for block in backbone.blocks):
        block.compile()


def check_batches(config: RunConfig, global_batch: int) -> None:
    """Refuses a global batch that the ranks cannot share evenly."""
    unit = config.train.micro_batch_size * distributed.world_size()
    if global_batch % unit:
        raise UserError(
            f"train.global_batch_size = {global_batch}: not a multiple of {unit} "
            f"({distributed.world_size()} ranks × train.micro_batch_size {config.train.micro_batch_size}); "
            "change --train.micro_batch_size or the number of ranks"
        )


def find(run_dir: Path, config: RunConfig) -> Path | None:
    """The checkpoint to go on from, as --resume.mode wants it."""
    found = checkpoint.newest(run_dir)
    mode = config.resume.mode
    if found is None and mode == "must":
        raise UserError(f"--resume.mode must: no complete checkpoint in {run_dir}; check --run_dir, or drop the option")
    if found is not None and mode == "never":
        raise UserError(f"--resume.mode never: {run_dir} has a checkpoint ({found.name}); take another --run_dir")
    return found


def refuse_other(
    section: str,
    path: Path,
    theirs: dict[str, Any],
    mine: dict[str, Any],
    remedy: str,
    except_for: tuple[str, ...] = (),
) -> None:
    """UserError that names the settings of a section in which the weights of --init and this run differ."""
    differences = [
        f"{section}.{name}: {theirs[name]} → {mine[name]}"
        for name in mine
        if theirs[name] != mine[name] and name not in except_for
    ]
    if differences:
        raise UserError(f"--init {path}: another network ({', '.join(differences)}); {remedy}")
