"""A pretraining run: everything that a step touches, built from its settings or restored from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.augment.views import Augmentation
from ccd_train.config.options import to_dict
from ccd_train.config.pretraining import Config
from ccd_train.data.loader import Batches, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.models import ccd
from ccd_train.models.losses import Center
from ccd_train.tasks.pretrain.rates import Rates, rates
from ccd_train.training import checkpoint
from ccd_train.training.average import Average
from ccd_train.training.engine import Engine
from ccd_train.training.run import Home, Progress, Training, compile_blocks, refuse_other
from ccd_train.weights import backbone

Teacher = Average[ccd.Teacher]


class Run(Training):
    def __init__(
        self,
        config: Config,
        home: Home,
        corpus: Corpus,
        engine: Engine,
        batches: Batches,
        progress: Progress,
        teacher: Teacher,
        center: Center,
    ) -> None:
        super().__init__(home, engine, batches, progress)
        self.config, self.corpus, self.teacher, self.center = config, corpus, teacher, center
        self.augmentation = Augmentation(config.augment, config.affine)

    def beside(self) -> dict[str, dict[str, Tensor]]:
        center = self.center.value.to("cpu", copy=True)
        return {checkpoint.TEACHER: self.teacher.state_dict() | {checkpoint.CENTER: center}}

    def rates(self) -> Rates:
        """Of the step that comes next."""
        return rates(self.config, self.global_batch, self.progress.samples)


def begin(config: Config) -> Run:
    """Builds a run, and goes on where its folder stands. Raises UserError on all ranks where that cannot be."""
    home = Home(config)
    with distributed.together():
        corpus = Corpus.open(config.data.shards, config.data.exclude)
    home.settle({"corpus": corpus.hash})

    torch.manual_seed(config.seed)
    student = ccd.Student(config.model, config.train.activation_checkpointing).to(distributed.device())
    network = ccd.Teacher(config.model)
    if home.found is None and config.init is not None:
        with distributed.together():
            start_from(config.init, config, student)
    shared = student.state_dict()
    network.load_state_dict({name: shared[name] for name in network.state_dict()})
    if config.train.compile:
        compile_blocks(student.vit, network.vit)
    engine = Engine(student, config, config.optimizer.betas, home.accumulation)
    teacher = Teacher(engine, network)
    center = Center(config.model.prototypes, distributed.device())
    progress = Progress()
    if home.found is not None:
        progress.restore(checkpoint.load(home.found, engine))
        tensors = safetensors.torch.load_file(home.found / checkpoint.TEACHER)
        center.value.copy_(tensors.pop(checkpoint.CENTER))
        teacher.load_state_dict(tensors)
    batches = loader(
        corpus,
        sample_order(corpus, config.data, config.seed),
        start_position=progress.position,
        end_position=max(home.last_step * home.global_batch, progress.position),
        global_batch_size=home.global_batch,
        micro_batch_size=config.train.micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=config.data.workers,
        mask_mode=config.data.mask_mode,
        max_damaged=config.data.max_damaged,
        stage=config.data.stage,
        stage_gb=config.data.stage_gb,
    )
    home.take()
    return Run(config, home, corpus, engine, batches, progress, teacher, center)


def start_from(path: Path, config: Config, student: ccd.Student) -> None:
    """Gives a new run the student's weights of another one; UserError where the networks differ."""
    found = checkpoint.open_weights(path, config.model.heads)
    # what stochastic depth leaves out, what stands still and how it began are no matter of the weights
    free = ("drop_path", "freeze_gain", "initial_std", "contrast_std")
    refuse_other("model", path, to_dict(found.model), to_dict(config.model), "give the model's own settings", free)
    backbone.load(student, found.student, found.origin)
