"""A pretraining run: everything that a step touches, built from its settings or restored from its newest checkpoint."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from ccd_train import checkpoint, distributed, weights
from ccd_train.augment import Augmentation
from ccd_train.config import Config
from ccd_train.data.loader import Batches, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.ema import Teacher
from ccd_train.engine import Engine
from ccd_train.errors import UNFINISHED, TrainingError, UserError
from ccd_train.life import Stop, claim, describe_run, lock, open_run_dir, write_outcome
from ccd_train.losses import Center
from ccd_train.models import ccd
from ccd_train.options import to_dict
from ccd_train.rates import Rates, rates
from ccd_train.watch import Watch

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


@dataclass
class Run:
    config: Config
    run_dir: Path
    corpus: Corpus
    global_batch: int
    """Samples of a step, over all ranks and micro-batches."""
    last_step: int
    """Where the run ends: at the end of the schedules, or at --max-steps."""
    engine: Engine
    teacher: Teacher
    center: Center
    augmentation: Augmentation
    batches: Batches
    progress: Progress
    stop: Stop
    watch: Watch
    lock: IO[str] | None
    """What keeps a second run out of the folder; rank 0 only."""
    pending: checkpoint.Save | None = None
    """The checkpoint that is being written behind the steps."""
    failed_saves: int = 0
    """In a row, up to now."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch // (self.config.train.micro_batch_size * distributed.world_size())

    def rates(self) -> Rates:
        """Of the step that comes next."""
        return rates(self.config, self.global_batch, self.progress.samples)

    def save(self, wait: bool = True) -> None:
        """Begins a checkpoint of this step (all ranks together), and waits for it, or leaves it to `finish_save`."""
        self.finish_save()  # the one before: the disk is slower than the interval
        self.watch.at(self.progress.step, "save")
        description = {
            **asdict(self.progress),
            "seed": self.config.seed,
            "corpus": self.corpus.hash,
            "global_batch_size": self.global_batch,
            "world_size": distributed.world_size(),
            "deepspeed": self.engine.description,
            "loss_scale": self.engine.loss_scale,
            "settings": to_dict(self.config),
        }
        self.pending = checkpoint.Save(self.run_dir, self.engine, self.teacher, self.center, description)
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
            checkpoint.thin(self.run_dir, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
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
        if self.lock is not None:
            self.lock.close()


def begin(config: Config) -> Run:
    """Builds a run, and goes on where its folder stands. Raises UserError on all ranks where that cannot be."""
    run_dir = open_run_dir(config)
    stop = Stop(config.max_minutes)
    use_threads(config)
    with distributed.together():
        held = lock(run_dir)
    with distributed.together():
        corpus = Corpus.open(config.data.shards, config.data.exclude)
    with distributed.together():
        global_batch = claim(run_dir, config, corpus.hash, config.train.global_batch_size)
        global_batch = global_batch or config.train.micro_batch_size * distributed.world_size()
        check_batches(config, global_batch)
    found = find(run_dir, config)
    describe_run(run_dir, config, corpus.hash, global_batch)

    torch.manual_seed(config.seed)
    student = ccd.Student(config.model, config.train.activation_checkpointing).to(distributed.device())
    network = ccd.Teacher(config.model)
    if found is None and config.init is not None:
        with distributed.together():
            start_from(config.init, config, student)
    shared = student.state_dict()
    network.load_state_dict({name: shared[name] for name in network.state_dict()})
    accumulation = global_batch // (config.train.micro_batch_size * distributed.world_size())
    if config.train.compile:
        for block in [*student.vit.blocks, *network.vit.blocks]:
            # in place: names stay. Not whole blocks: torch.compile fails on the integers that draw stochastic depth
            block.attention.compile()
            block.mlp.compile()
    engine = Engine(student, config, accumulation)
    teacher = Teacher(engine, network)
    center = Center(config.model.prototypes, distributed.device())
    progress = Progress()
    if found is not None:
        state = checkpoint.load(found, engine, teacher, center)
        progress = Progress(**{name: state[name] for name in asdict(progress)})
    if distributed.rank() == 0:
        log.info("going on from %s", found) if found else log.info("starting from the beginning")
    steps = -(-config.train.total_samples // global_batch)
    last_step = steps if config.max_steps is None else min(steps, config.max_steps)
    batches = loader(
        corpus,
        sample_order(corpus, config.data, config.seed),
        start_position=progress.position,
        end_position=max(last_step * global_batch, progress.position),
        global_batch_size=global_batch,
        micro_batch_size=config.train.micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=config.data.workers,
        mask_mode=config.data.mask_mode,
        max_damaged=config.data.max_damaged,
        stage=config.data.stage,
        stage_gb=config.data.stage_gb,
    )
    augmentation = Augmentation(config.augment, config.affine)
    watch = Watch(config.distributed.timeout, lambda message: write_outcome(run_dir, UNFINISHED, message, mine=False))
    return Run(
        config, run_dir, corpus, global_batch, last_step, engine, teacher, center, augmentation, batches, progress,
        stop, watch, held,
    )  # fmt: skip


def start_from(path: Path, config: Config, student: ccd.Student) -> None:
    """Gives a new run the student's weights of another one; UserError where the networks differ."""
    found = checkpoint.open_weights(path, config.model.heads)
    mine, theirs = to_dict(config.model), to_dict(found.model)
    differences = [f"model.{name}: {theirs[name]} → {mine[name]}" for name in mine if mine[name] != theirs[name]]
    # a path through the network and what stochastic depth leaves out of it are no matter of its weights
    differences = [text for text in differences if not text.startswith(("model.drop_path", "model.freeze_gain"))]
    if differences:
        raise UserError(f"--init {path}: another network ({', '.join(differences)}); give the model's own settings")
    weights.load(student, found.student, found.origin)


def use_threads(config: Config) -> None:
    """The thread count is part of what makes sums repeat bit for bit, so it is ours, not the environment's."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.train.threads or max(1, cores // distributed.local_world_size()))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def check_batches(config: Config, global_batch: int) -> None:
    """Refuses a global batch that the ranks cannot share evenly."""
    unit = config.train.micro_batch_size * distributed.world_size()
    if global_batch % unit:
        raise UserError(
            f"train.global_batch_size = {global_batch}: not a multiple of {unit} "
            f"({distributed.world_size()} ranks × train.micro_batch_size {config.train.micro_batch_size}); "
            "change --train.micro_batch_size or the number of ranks"
        )


def find(run_dir: Path, config: Config) -> Path | None:
    """The checkpoint to go on from, as --resume.mode wants it."""
    found = checkpoint.newest(run_dir)
    mode = config.resume.mode
    if found is None and mode == "must":
        raise UserError(f"--resume.mode must: no complete checkpoint in {run_dir}; check --run_dir, or drop the option")
    if found is not None and mode == "never":
        raise UserError(f"--resume.mode never: {run_dir} has a checkpoint ({found.name}); take another --run_dir")
    return found
