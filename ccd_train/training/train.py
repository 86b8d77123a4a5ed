"""The loop that trains every task: `live` is a whole life of a run, `train` its steps, `train_step` one of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.config.deepspeed import read_deepspeed_file
from ccd_train.data.batches import Batch
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
from ccd_train.files import allow_open_files
from ccd_train.models.budget import gpu_called
from ccd_train.training.life import write_outcome
from ccd_train.training.metrics import Metrics
from ccd_train.training.profiler import Profiler, memory_is_full
from ccd_train.training.run import Run, begin
from ccd_train.training.task import Task
from ccd_train.training.watch import lost_in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What is known of a step when it is done."""

    figures: dict[str, float]
    """For metrics.jsonl."""
    waited: float
    """Seconds for which this rank waited for data."""
    stop: bool
    """Some rank was asked to stop; the same on all ranks."""
    written: bool
    """All ranks have written their part of the pending checkpoint; the same on all ranks."""


class StepBatches(Iterator[Batch]):
    """The micro-batches of one step, and what the loop wants to know of them."""

    def __init__(self, run: Run[Any], step: int) -> None:
        self._run, self._step = run, step
        self.sample_ids: list[Tensor] = []
        self.waited = 0.0
        """Seconds spent waiting for them."""

    def __next__(self) -> Batch:
        if len(self.sample_ids) == self._run.accumulation:
            raise StopIteration
        self._run.watch.at(self._step, "data")
        began = time.monotonic()
        batch = next(self._run.batches)
        self.waited += time.monotonic() - began
        self.sample_ids.append(batch.sample_ids)
        self._run.watch.at(self._step, "forward")
        return batch


class Pace:
    """Samples per second, the share of time spent waiting for data, and that of the GPUs' peak, since `begin`."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        gpu = gpu_called(name)
        self._peak = None if gpu is None else gpu.matrix_flops * distributed.world_size()
        self.begin()

    def begin(self) -> None:
        """Forgets what was counted."""
        self._began, self._waited, self._steps = time.monotonic(), 0.0, 0

    def count(self, waited: float) -> None:
        """Counts a step, in which this rank waited so many seconds for data."""
        self._waited, self._steps = self._waited + waited, self._steps + 1

    def figures(self, operations: float | None) -> dict[str, float]:
        """`operations`: of a step."""
        seconds = time.monotonic() - self._began
        rate = self._steps / seconds
        found = {"samples_per_second": rate * self._global_batch, "data_wait": self._waited / seconds}
        if operations is not None and self._peak is not None:
            found["of_peak"] = rate * operations / self._peak
        return found


def train_step(run: Run[Any], logged: bool) -> Step:
    """One step on the next global batch: losses, gradients, clipping, and the update if all is finite."""
    task, engine, step = run.task, run.engine, run.progress.step + 1
    task.begin_step(logged)
    batches, sums = StepBatches(run, step), torch.zeros((), device=distributed.device())
    for number, (loss, parts) in enumerate(task.losses(batches), start=1):
        run.watch.at(step, "backward")
        engine.backward(loss, last=number == run.accumulation)
        sums = sums + parts
    run.watch.at(step, "update")
    norms, limit = engine.gradient_norms(), run.config.optimizer.clip_gradient or math.inf
    written = run.pending is not None and run.pending.written()
    known = torch.tensor([float(run.stop.wanted()), float(written), float(run.batches.damaged)])
    totals = distributed.all_reduce_sum(torch.cat([sums, norms.square().sum()[None], distributed.upload(known)]))
    # the one wait for the device; what arrives is the same on all ranks, and so are the decisions
    totals, norms = torch.cat([totals, norms]).cpu().split([len(totals), len(norms)])
    *parts_total, squares, stops, writers, damaged = totals.tolist()
    finite = bool(totals.isfinite().all())
    if finite:
        engine.clip(norms, limit)
    applied = engine.step(finite)
    task.end_step(applied)
    run.advance(applied, torch.cat(batches.sample_ids))
    ranks = distributed.world_size()
    figures = {
        "step": run.progress.step,
        "samples": run.progress.position,
        "epoch": run.progress.position / task.samples_per_epoch,
        **task.figures(parts_total),
        "grad_norm": math.sqrt(squares / ranks) if math.isfinite(squares) else math.nan,
        "loss_scale": engine.loss_scale,
        "skipped_steps": run.progress.skipped_steps,
        "damaged_samples": int(damaged),
    }
    return Step(figures, batches.waited, stops > 0, writers == ranks)


def train(run: Run[Any], metrics: Metrics | None) -> bool:
    """Steps until the end of the run (True), or until a rank was asked to stop (False)."""
    task, settings, pace = run.task, run.config.log, Pace(run.global_batch)
    profiler = Profiler(run.run_dir, settings.profile_steps)
    while not run.over:
        coming = run.progress.step + 1
        due = task.validate_every > 0 and (coming % task.validate_every == 0 or coming == run.last_step)
        logged = due or coming % settings.every_steps == 0 or coming == run.last_step
        profiler.before(coming)
        step = train_step(run, logged)
        profiler.after(coming)
        pace.count(step.waited)
        if metrics is not None:
            metrics.advance()
        if logged:
            log_step(run, step.figures | pace.figures(task.operations(step.figures)), due, metrics)
        if metrics is not None and settings.pictures_due(coming):
            for name, sheet in task.pictures().items():
                metrics.picture(name, sheet, coming)
        if logged:
            pace.begin()
        run.keep(step.stop, step.written)
        if step.stop:
            break
    profiler.close(run.progress.step)
    return run.over


def log_step(run: Run[Any], figures: dict[str, float], due: bool, metrics: Metrics | None) -> None:
    """Writes a step's figures, with those of a validation if it is `due`, and any alarm that they raise."""
    task = run.task
    if due:
        began = time.monotonic()
        figures = figures | task.validate()
        run.stop.validation_seconds = max(run.stop.validation_seconds, time.monotonic() - began)
    if metrics is not None:
        metrics.write(figures)
    for alarm in task.alarms(figures):
        if metrics is not None:
            metrics.alarm(alarm)


@contextmanager
def guarded(run: Run[Any]) -> Iterator[Metrics | None]:
    """A run's metrics on rank 0, until its end. Names what ends it from outside: no memory left, or a rank lost."""
    metrics = None
    try:
        if distributed.rank() == 0:
            config = run.config
            metrics = Metrics(run.run_dir, run.progress.step, run.last_step, config.log.wandb, config.score)
        yield metrics
    except torch.OutOfMemoryError:
        peak, snapshot = torch.cuda.max_memory_allocated() / 2**30, memory_is_full(run.run_dir)
        raise TrainingError(
            f"rank {distributed.rank()}: out of GPU memory in step {run.progress.step + 1} (peak {peak:.1f} GiB); "
            f"lower --train.micro_batch_size, or use --train.activation_checkpointing; what lay there: {snapshot}"
        ) from None
    except RuntimeError as error:
        if lost_in(error):
            run.watch.lost()  # does not return
        raise
    finally:
        run.close()
        if metrics is not None:
            metrics.close()


def live(task: Task) -> tuple[int, str]:
    """One life of a run, from its start or resume to its exit code and a line about it."""
    config = task.config
    config.check()
    allow_open_files()
    read_deepspeed_file(config.deepspeed, torch.cuda.is_available())  # refused now, not after the data was opened
    distributed.initialize(config.distributed.timeout)
    run = begin(task)
    with guarded(run) as metrics:
        finished = train(run, metrics)
    progress = run.progress
    if finished:
        message = f"{progress.step} steps, {progress.position} samples; the run is in {run.run_dir}"
        return FINISHED, message + task.remarks()
    done = "stopped, but not saved," if run.failed_saves else "saved"
    reason = f"{run.stop.reason()}: {done} after step {progress.step} of {run.last_step}"
    return UNFINISHED, f"{reason}; start the same command again to go on{task.remarks()}"


def conclude(run_dir: Path | None, life: Callable[[], tuple[int, str]]) -> int:
    """Lives, then says how it ended, in RUN/outcome.json and in the log. Returns the exit code."""
    with ExitStack() as ending:
        ending.push(partial(_note_fault, run_dir))
        try:
            code, message = life()
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
