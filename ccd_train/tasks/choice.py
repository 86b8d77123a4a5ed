"""Which task a run's settings are for. Only those who start a run of any kind ask."""

from __future__ import annotations

from ccd_train.config.pixels import Segmenting, Upscaling
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.run import RunConfig
from ccd_train.tasks.pixels.segment import Segmentation
from ccd_train.tasks.pixels.superresolve import Superresolution
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.tasks.recognize.task import Recognition
from ccd_train.training.task import Task

TASKS: dict[type[RunConfig], type[Task]] = {
    Config: Pretraining,
    FineTuning: Recognition,
    Segmenting: Segmentation,
    Upscaling: Superresolution,
}


def task_of(config: RunConfig) -> Task:
    """The task, ready to be built."""
    return TASKS[type(config)](config)
