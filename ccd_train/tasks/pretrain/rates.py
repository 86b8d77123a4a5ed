"""What the schedules say for one step of a run: a pure function of the configuration and of the samples seen."""

from __future__ import annotations

from dataclasses import dataclass

from ccd_train.config.pretraining import Config
from ccd_train.training import schedules


@dataclass(frozen=True)
class Rates:
    lr: float
    weight_decay: float
    momentum: float
    """Of the teacher."""
    center_momentum: float
    prototypes_frozen: bool
    prototypes_thaw: bool
    """This is the first step in which they move."""
    regions_from_student: bool
    """The characters come from the student's segmentation, not from the pseudo-mask."""


def rates(config: Config, batch: int, samples: int) -> Rates:
    """Of a step of `batch` samples over all ranks that begins after `samples` samples."""
    optimizer, distillation, total = config.optimizer, config.distillation, config.train.total_samples
    peak = schedules.scaled_learning_rate(optimizer.lr, batch, optimizer.linear_lr_up_to)
    momentum = schedules.cosine(samples, distillation.teacher_momentum, 1.0, total)
    center_momentum = distillation.center_momentum
    if distillation.scale_teacher_momentum:
        momentum = schedules.scaled_momentum(momentum, batch)
    if distillation.scale_center_momentum:
        center_momentum = schedules.scaled_momentum(center_momentum, batch)
    frozen_samples = optimizer.freeze_last_layer_samples
    return Rates(
        lr=schedules.warmup_cosine(samples, batch, peak, optimizer.final_lr, optimizer.warmup_samples, total),
        weight_decay=schedules.cosine(samples, optimizer.weight_decay, optimizer.final_weight_decay, total),
        momentum=momentum,
        center_momentum=center_momentum,
        prototypes_frozen=samples < frozen_samples,
        prototypes_thaw=samples - batch < frozen_samples <= samples,
        regions_from_student=samples >= distillation.student_regions_after,
    )
