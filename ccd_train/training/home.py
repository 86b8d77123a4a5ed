"""The folder of a run, held for one life: whose it is, what it goes on from, how many steps there are."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ccd_train import distributed
from ccd_train.config.options import to_dict
from ccd_train.config.run import RunConfig
from ccd_train.config.stored import claim
from ccd_train.data.loader import Share
from ccd_train.errors import UserError
from ccd_train.training import checkpoint
from ccd_train.training.life import Stop, describe_run, lock, open_run_dir
from ccd_train.training.presence import introduce


@dataclass
class Progress:
    """How far a run has come: with the weights, its whole state."""

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
        """Takes its values from a checkpoint's state."""
        for name in asdict(self):
            setattr(self, name, state[name])


class Home:
    """A run folder that is ours for this life."""

    def __init__(self, config: RunConfig) -> None:
        """Takes signals and the folder's lock (all ranks together). UserError on all ranks if the lock is taken."""
        introduce(to_dict(config))
        self.config = config
        self.run_dir = open_run_dir(config)
        self.stop = Stop(config.max_minutes)
        use_threads(config)
        with distributed.together():
            self.lock: IO[str] | None = lock(self.run_dir)
        if distributed.rank() == 0:
            (self.run_dir / "outcome.json").unlink(missing_ok=True)  # the previous life's
        self.facts: dict[str, str] = {}
        self.global_batch = 0
        """Samples per step, over all ranks and micro-batches."""
        self.schedule_steps = 0
        """The step at which the schedules end."""
        self.last_step = 0
        """The step at which the run ends: the same, or --max-steps."""
        self.found: Path | None = None
        """The checkpoint to go on from."""

    def settle(self, facts: dict[str, str]) -> None:
        """Finds where the run goes on. `facts`, beside its settings, tell this run from others: hashes of its data.

        UserError on all ranks if the folder belongs to another run.
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
        """Makes the folder this run's (all ranks together), once it is built: a refused start takes none."""
        describe_run(self.run_dir, self.config, self.facts, self.global_batch)

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each rank."""
        return self.global_batch // (self.config.train.micro_batch_size * distributed.world_size())

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on all ranks."""
        return self.accumulation * distributed.world_size()

    def share(self, position: int) -> Share:
        """What this rank reads from `position` to the end of the run."""
        end = max(self.last_step * self.global_batch, position)
        micro_batch = self.config.train.micro_batch_size
        return Share(position, end, self.global_batch, micro_batch, distributed.rank(), distributed.world_size())


def use_threads(config: RunConfig) -> None:
    """Sets the thread count: it is part of what makes sums repeat bit for bit, so it is ours, not the environment's."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.train.threads or max(1, cores // distributed.local_world_size()))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


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
