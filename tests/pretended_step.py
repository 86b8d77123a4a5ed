"""A step of pretraining on a device that is not there, as a run builds it but for DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pretend import DEVICE, Pretended, move, up

from ccd_train import distributed
from ccd_train.augment.views import Augmentation
from ccd_train.config.pretraining import Config
from ccd_train.data.batches import Batch
from ccd_train.models.ccd import Student
from ccd_train.models.losses import Center
from ccd_train.tasks.pretrain import health
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.ahead import Prepared


def on_device(config: Config) -> tuple[Pretraining, Student]:
    torch.manual_seed(0)
    task, student = Pretraining(config), Student(config.model)
    teacher: Any = task.copy(student)
    move(student)
    move(teacher)
    task.augmentation = Augmentation(config.augment, config.affine)
    task.center = Center(config.model.prototypes)
    task.center.value = up(task.center.value)
    task.engine = SimpleNamespace(forward=student, dtype=torch.float32, student=student)  # type: ignore[assignment]
    task.average = SimpleNamespace(ready=lambda: teacher)  # type: ignore[assignment]
    return task, student


def pretended_step(config: Config, batch: Batch, from_student: bool = False) -> tuple[Pretended, Any, Student]:
    """What the second of two steps takes, its figures of health too; the loss and the student, with its gradients."""
    task, student = on_device(config)
    task.now = SimpleNamespace(regions_from_student=from_student)  # type: ignore[assignment]
    with mock.patch.object(distributed, "device", lambda: DEVICE), Pretended() as device:
        with torch.no_grad():
            task.losses_of(batch)  # what is made once and kept
        device.waits.clear()
        device.launches.clear()
        device.phase = "views"
        look = task.look(batch)
        device.phase = "forward, loss"
        found = task.losses_of(Prepared(**vars(batch), made=look))
        loss: Any = found.distillation + found.segmentation
        device.phase = "backward"
        loss.backward()
        device.phase = "centre, health"
        if not config.distillation.sinkhorn_rounds:
            task.center.update(found.targets, 0.9)
        loss = found.distillation.detach()
        health.statistics(found.targets, task.center.value, 0.04, loss, found.features, found.has_regions)
    return device, loss.inner, student
