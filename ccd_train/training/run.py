"""A run under way: a task with its folder, engine, batches and progress; counting steps and keeping checkpoints."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.config.options import to_dict
from ccd_train.data.loader import Batches
from ccd_train.errors import UNFINISHED, TrainingError
from ccd_train.gpu.fusion import compile_all
from ccd_train.models.vit import Block
from ccd_train.training import checkpoint
from ccd_train.training.ahead import Ahead
from ccd_train.training.average import Average
from ccd_train.training.engine import Engine
from ccd_train.training.home import Home, Progress
from ccd_train.training.life import write_outcome
from ccd_train.training.task import Task
from ccd_train.training.watch import Watch

log = logging.getLogger(__name__)

FAILED_SAVES = 3  # so many in a row end the run

AnyTask = TypeVar("AnyTask", bound=Task)


class Run(Generic[AnyTask]):
    """A run under way."""

    def __init__(self, task: AnyTask, batches: Batches | Ahead) -> None:
        """`task` is built: it has its home, engine and progress."""
        self.task, self.batches = task, batches
        self.config, self.home, self.engine, self.progress = task.config, task.home, task.engine, task.progress
        self.run_dir, self.stop = self.home.run_dir, self.home.stop
        self.global_batch, self.accumulation = self.home.global_batch, self.home.accumulation
        self.last_step = self.home.last_step
        self.pending: checkpoint.Save | None = None
        """The checkpoint that is being written while the run goes on."""
        self.failed_saves = 0
        """In a row, up to now."""
        self.watch = task.watch = Watch(
            self.config.distributed.timeout,
            lambda message: write_outcome(self.run_dir, UNFINISHED, message, mine=False),
        )
        if distributed.rank() == 0:
            found = self.home.found
            log.info("going on from %s", found) if found else log.info("starting from the beginning")

    @property
    def over(self) -> bool:
        return self.progress.step >= self.last_step or self.task.over

    def advance(self, applied: bool, sample_ids: Tensor) -> None:
        """Counts a step. Ends the run if too many in a row were skipped, with their samples listed."""
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
        if progress.bad_steps >= self.config.train.max_bad_steps:
            raise TrainingError(
                f"{progress.bad_steps} steps in a row with a loss or gradient that is not finite, up to step "
                f"{progress.step}; their samples are in {path}; lower --optimizer.lr or look at them"
            )

    def keep(self, stop: bool, written: bool) -> None:
        """Completes the pending checkpoint if it is `written`, and begins one if it is due (all ranks together)."""
        last = stop or self.over
        if written:
            self.finish_save()
        if last or self.progress.step % self.config.checkpoint.every_steps == 0:
            self.save(wait=last)

    def save(self, wait: bool = True) -> None:
        """Begins a checkpoint of this step (all ranks together); waits for it, or leaves it to `finish_save`."""
        self.finish_save()  # the one before: the disk is slower than the interval
        self.watch.at(self.progress.step, "save")
        self.pending = checkpoint.Save(self.run_dir, self.engine, self.task.tensors, self._description())
        if wait:
            self.finish_save()

    def finish_save(self) -> None:
        """Completes the pending checkpoint, if any (all ranks together). A failure is forgiven, but not for ever."""
        if self.pending is None:
            return
        self.watch.at(self.progress.step, "save")
        save, self.pending = self.pending, None
        problem = save.finish()
        self.stop.save_seconds = max(self.stop.save_seconds, save.seconds)
        if problem is None:
            self.failed_saves = 0
            checkpoint.thin(self.run_dir, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
            return
        self.failed_saves += 1
        log.warning("step %d: its checkpoint could not be written (%s); the run goes on", save.step, problem)
        if self.failed_saves >= FAILED_SAVES or save.step >= self.last_step:
            raise TrainingError(
                f"{self.failed_saves} checkpoints in a row could not be written, the last: {problem}; "
                "make room, then start the same command again"
            )

    def _description(self) -> dict[str, Any]:
        """What state.json says of a checkpoint."""
        return {
            **asdict(self.progress),
            **self.task.state(),
            "seed": self.config.seed,
            **self.home.facts,
            "global_batch_size": self.global_batch,
            "world_size": distributed.world_size(),
            "deepspeed": self.engine.description,
            "loss_scale": self.engine.loss_scale,
            "save_seconds": self.stop.save_seconds,
            "validation_seconds": self.stop.validation_seconds,
            "settings": to_dict(self.config),
        }

    def close(self) -> None:
        self.watch.close()
        self.batches.close()
        if self.home.lock is not None:
            self.home.lock.close()


def begin(task: AnyTask) -> Run[AnyTask]:
    """Builds a run, and goes on where its folder stands. Raises UserError on all ranks if that cannot be."""
    config = task.config
    home = task.home = Home(config)
    home.settle(task.open())
    torch.manual_seed(config.seed)
    network = task.network()
    if home.found is None:
        with distributed.together():
            task.start(network)
    second = task.copy(network)
    compile_all(config.train.compile)
    if config.train.compile:
        for block in (part for part in (*network.modules(), *second.modules()) if isinstance(part, Block)):
            block.compile()  # in place: names stay
    task.engine = Engine(network.to(distributed.device()), config, home.accumulation)
    task.average = Average(task.engine, second)
    task.progress = Progress()
    if home.found is not None:
        state = checkpoint.load(home.found, task.engine)
        task.progress.restore(state)
        task.restore(state, home.found)
    batches = task.batches(home.share(task.progress.position))
    home.take()
    return Run(task, batches)
