"""Pretraining: what CCD computes in a step, what moves beside the optimiser, and what is logged.

    ccd-train pretrain --config vit_nano --run_dir RUN --data.shards SHARDS                       one process
    torchrun --nproc_per_node 8 -m ccd_train pretrain --config vit_small --run_dir RUN --data.shards SHARDS
    ccd-train pretrain --config vit_small --print_config                                          every setting

The same command again goes on where the run stopped, at the exact sample, on any number of ranks. The loop is in
`training/train.py`; `losses_of` here is the method, and what student and teacher compute is in `models/ccd.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ccd_train import distributed, draws
from ccd_train.augment.geometry import warp_masks
from ccd_train.augment.views import Augmentation
from ccd_train.config.pretraining import Config
from ccd_train.config.stored import TOLD
from ccd_train.data.batches import Batch, BatchReader
from ccd_train.data.guard import check_shards, refuse_twice
from ccd_train.data.loader import Batches, Share, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.errors import TrainingError
from ccd_train.models import budget, ccd
from ccd_train.models.losses import Center, distillation_loss, segmentation_loss
from ccd_train.tasks.pretrain import gallery, health, pictures
from ccd_train.tasks.pretrain.pictures import Seen
from ccd_train.tasks.pretrain.probe import probe, read_words
from ccd_train.tasks.pretrain.rates import Rates, rates
from ccd_train.tasks.pretrain.weights import CENTER, TEACHER, start_from
from ccd_train.training.ahead import Ahead, ahead, made_of
from ccd_train.training.average import Average
from ccd_train.training.metrics import Alarm
from ccd_train.training.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """Of a micro-batch on this rank; averaged over ranks they are those of the global micro-batch."""

    distillation: Tensor
    segmentation: Tensor
    characters: Tensor
    """Pairs of regions, float32 []."""
    targets: Tensor
    """The teacher's logits, float32 [2M, P]."""
    features: Tensor
    """What the student's projections are of, float32 [2M, D]."""
    has_regions: Tensor
    """bool [B]: images with a character in both views."""
    seen: Seen
    """For a picture."""


class Look(NamedTuple):
    """What the networks see of a batch. All on the device."""

    images_u8: Tensor
    pseudo_mask: Tensor
    keys: Tensor
    """int64 [B]: of the draws."""
    regular: Tensor
    irregular: Tensor
    theta: Tensor


class Pretraining(Task):
    config: Config
    before: tuple[Tensor, ...] = ()
    """What a forward pass changes, as it was before the step."""

    # Building

    def open(self) -> dict[str, str]:
        config = self.config
        with distributed.together():
            self.corpus = Corpus.open(config.data.shards, config.data.exclude)
            checked = [check_shards(self.corpus, folder, "data.shards") for folder in config.data.shards]
            refuse_twice([sets for _, sets in checked], "data.shards")
            self.order = sample_order(self.corpus, config.data, config.seed)
            probing = config.probe.every_steps > 0 and distributed.rank() == 0
            self.probe_words = read_words(config.probe.data, config.probe.words) if probing else None
        for doubts, _ in checked if distributed.rank() == 0 else ():
            for doubt in doubts:
                log.warning(doubt)
        self.samples_per_epoch, self.validate_every = self.corpus.num_samples, config.probe.every_steps
        self.augmentation = Augmentation(config.augment, config.affine)
        self.center = Center(config.model.prototypes, distributed.device())
        return {"corpus": self.corpus.hash, f"corpus{TOLD}": self.corpus.told}

    def network(self) -> ccd.Student:
        return ccd.Student(self.config.model, self.config.train.activation_checkpointing)

    def start(self, network: nn.Module) -> None:
        if self.config.init is not None:
            start_from(self.config.init, self.config, network)

    def copy(self, network: nn.Module) -> ccd.Teacher:
        teacher, shared = ccd.Teacher(self.config.model), network.state_dict()
        teacher.load_state_dict({name: shared[name] for name in teacher.state_dict()})
        return teacher

    @property
    def teacher(self) -> Average[ccd.Teacher]:
        return self.average

    def batches(self, share: Share) -> Batches | Ahead:
        data = self.config.data
        batches = loader(
            self.corpus, self.order, share, workers=data.workers, mask_mode=data.mask_mode,
            max_damaged=data.max_damaged, stage=data.stage, stage_gb=data.stage_gb,
        )  # fmt: skip
        return ahead(batches, self.look, self.config)

    # Each step

    def rates(self) -> Rates:
        """Those of the step that comes next."""
        return rates(self.config, self.home.global_batch, self.progress.samples)

    def begin_step(self, logged: bool) -> None:
        self.logged, self.now = logged, self.rates()
        if self.now.prototypes_thaw:
            # the official code has no gradients of them until then, and so no state
            self.engine.forget_moments(ccd.PROTOTYPES)
        frozen = (ccd.PROTOTYPES,) if self.now.prototypes_frozen else ()
        self.engine.set_rates(self.now.lr, self.now.weight_decay, frozen)
        self.moving = [self.center.value, *self.engine.student.buffers()]  # what a forward pass changes
        if not self.before:
            self.before = tuple(torch.empty_like(value) for value in self.moving)
        torch._foreach_copy_(self.before, self.moving)

    def losses(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        settings, self.statistics = self.config.distillation, {}
        for number, batch in enumerate(batches, start=1):
            found = self.losses_of(batch)
            parts = torch.stack([found.distillation, found.segmentation, found.characters]).detach()
            yield found.distillation + settings.segmentation_weight * found.segmentation, parts
            if self.logged and number == self.home.accumulation:
                self.statistics = health.statistics(
                    found.targets, self.center.value, settings.teacher_temperature, found.distillation.detach(),
                    found.features, found.has_regions,
                )  # fmt: skip
            if not settings.sinkhorn_rounds:
                self.center.update(found.targets, self.now.center_momentum)
            self.seen = found.seen

    def look(self, host: Batch) -> Look:
        """A batch on the device, and its two views."""
        keys = draws.sample_keys(self.config.seed, host.epochs, host.sample_ids)
        device = distributed.device()
        batch = host.to(device)
        views = self.augmentation(batch.images_u8, host.native_size, keys)
        keys = keys.to(device, non_blocking=True)
        return Look(batch.images_u8, batch.pseudo_mask, keys, views.regular, views.irregular, views.theta)

    def losses_of(self, host: Batch) -> Losses:
        """The method: two views, student, regions, teacher, two losses."""
        config, engine, device = self.config.distillation, self.engine, distributed.device()
        look = Look(*made_of(host, self.look))
        regular, irregular, mask = look.regular.to(engine.dtype), look.irregular.to(engine.dtype), look.pseudo_mask
        student: ccd.StudentOutput = engine.forward(
            regular, irregular, look.theta, mask, look.keys,
            regions_from_student=self.now.regions_from_student, min_region_pixels=config.min_region_pixels,
        )  # fmt: skip
        targets = self.teacher.ready()(regular, irregular, student.regions)
        if config.sinkhorn_rounds:
            self.center.balance(targets, config.teacher_temperature, config.sinkhorn_rounds)
        # a fill: the device is not awaited
        characters = torch.full((), float(student.regions.characters()), device=device)
        distillation = distillation_loss(
            student.projections, targets, self.center.value,
            student_temperature=config.student_temperature, teacher_temperature=config.teacher_temperature,
            pairs_global=distributed.all_reduce_sum(characters.clone()),
        )  # fmt: skip
        masks = torch.cat([mask.bool(), warp_masks(mask, look.theta)])
        segmentation = segmentation_loss(student.segmentation_logits, masks)
        logits = student.segmentation_logits.detach()
        seen = Seen(look.images_u8, mask, regular, irregular, logits, *student.regions)
        has_regions = torch.zeros(len(logits) // 2, dtype=torch.bool, device=device)
        has_regions.index_fill_(0, student.regions.image, True)
        return Losses(distillation, segmentation, characters, targets, student.features, has_regions, seen)

    def end_step(self, applied: bool) -> None:
        if applied:
            self.teacher.update(self.now.momentum)
        else:
            torch._foreach_copy_(self.moving, self.before)

    def figures(self, sums: list[float]) -> dict[str, float]:
        distillation, segmentation = (total / self.home.micro_batches for total in sums[:2])
        figures = {
            "loss": distillation + self.config.distillation.segmentation_weight * segmentation,
            "loss_distillation": distillation,
            "loss_segmentation": segmentation,
            "lr": self.now.lr,
            "weight_decay": self.now.weight_decay,
            "momentum": self.now.momentum,
            "characters": sums[2] / self.home.global_batch,
            "regions_from_student": float(self.now.regions_from_student),
        }
        if not self.logged:
            return figures
        statistics = self.statistics | {"center_norm": self.center.value.norm()}
        return figures | dict(zip(statistics, torch.stack(list(statistics.values())).tolist(), strict=True))

    def operations(self, figures: dict[str, float]) -> float:
        return self.home.global_batch * budget.training_flops(self.config.model, figures["characters"])

    # Now and then

    def validate(self) -> dict[str, float]:
        """The probe's figures (rank 0)."""
        if self.probe_words is None:
            return {}
        score = probe(self.teacher.ready().vit, self.probe_words)
        return {"probe_linear": score.linear, "probe_knn": score.knn, "probe_chance": score.chance}

    def pictures(self) -> dict[str, np.ndarray]:
        return {"step": pictures.draw(self.seen), **gallery.draw(self.teacher.ready().vit, self.fixed_words)}

    @cached_property
    def fixed_words(self) -> gallery.FixedWords:
        """The run's first samples, whose features are drawn again and again."""
        batch = BatchReader(self.corpus, self.order, self.config.data.mask_mode).batch(0, gallery.WORDS, 0)
        return gallery.fixed_words(batch.images_u8, batch.pseudo_mask)

    @cached_property
    def guard(self) -> health.Guard:
        return health.Guard(self.config, self.home.global_batch)

    def alarms(self, figures: dict[str, float]) -> Iterator[Alarm]:
        for alarm in self.guard.look(figures):
            yield alarm
            if self.config.health.stop_on_collapse and not alarm.over:
                raise TrainingError(f"step {alarm.step}: {alarm.message}")

    # Each checkpoint

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {TEACHER: self.teacher.state_dict() | {CENTER: self.center.value.to("cpu", copy=True)}}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / TEACHER)
        self.center.value.copy_(tensors.pop(CENTER))
        self.teacher.load_state_dict(tensors)
