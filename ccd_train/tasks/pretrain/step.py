"""Pretraining: the page to read first.

    ccd-train pretrain --config vit_nano --run_dir RUN --data.shards SHARDS                       one process
    torchrun --nproc_per_node 8 -m ccd_train pretrain --config vit_small --run_dir RUN --data.shards SHARDS
    ccd-train pretrain --config vit_small --print_config                                          every setting

The same command again goes on where the run stopped, at the exact sample, on any number of ranks. `train` is the loop,
`train_step` one step, `losses_of` the method in it; what student and teacher compute is in `models/ccd.py`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ccd_train import distributed, draws
from ccd_train.augment.geometry import warp_masks
from ccd_train.config.pretraining import Config
from ccd_train.data.batches import Batch, Reader
from ccd_train.data.loader import sample_order
from ccd_train.errors import TrainingError
from ccd_train.models.ccd import PROTOTYPES, StudentOutput
from ccd_train.models.losses import distillation_loss, segmentation_loss
from ccd_train.tasks.pretrain import gallery, health, pictures
from ccd_train.tasks.pretrain.pictures import Seen
from ccd_train.tasks.pretrain.probe import Words, probe, read_words
from ccd_train.tasks.pretrain.rates import Rates
from ccd_train.tasks.pretrain.run import Run, begin
from ccd_train.training.metrics import Alarm, Metrics
from ccd_train.training.run import Pace, ended, guarded, prepare


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


@dataclass(frozen=True)
class Step:
    """What is known of a step when it is done."""

    figures: dict[str, float]
    """Of metrics.jsonl."""
    waited: float
    """Seconds in which this rank waited for data."""
    stop: bool
    """Some rank was asked to stop; the same on all ranks."""
    written: bool
    """All ranks have written their part of the checkpoint under way; the same on all ranks."""
    seen: Seen


def losses_of(run: Run, host: Batch, now: Rates) -> Losses:
    """The method: two views, student, regions, teacher, two losses."""
    config, engine, device = run.config.distillation, run.engine, distributed.device()
    batch = host.to(device)
    keys = draws.sample_keys(run.config.seed, host.epochs, host.sample_ids)
    views = run.augmentation(batch.images_u8, host.native_size, keys)
    regular, irregular = views.regular.to(engine.dtype), views.irregular.to(engine.dtype)
    student: StudentOutput = engine.forward(
        regular, irregular, views.theta, batch.pseudo_mask, keys.to(device, non_blocking=True),
        regions_from_student=now.regions_from_student, min_region_pixels=config.min_region_pixels,
    )  # fmt: skip
    targets = run.teacher.ready()(regular, irregular, student.regions)
    if config.sinkhorn_rounds:
        run.center.balance(targets, config.teacher_temperature, config.sinkhorn_rounds)
    characters = torch.full((), float(student.regions.characters()), device=device)  # a fill: the device is not awaited
    distillation = distillation_loss(
        student.projections, targets, run.center.value,
        student_temperature=config.student_temperature, teacher_temperature=config.teacher_temperature,
        pairs_global=distributed.all_reduce_sum(characters.clone()),
    )  # fmt: skip
    masks = torch.cat([batch.pseudo_mask.bool(), warp_masks(batch.pseudo_mask, views.theta)])
    segmentation = segmentation_loss(student.segmentation_logits, masks)
    logits = student.segmentation_logits.detach()
    seen = Seen(batch.images_u8, batch.pseudo_mask, regular, irregular, logits, *student.regions)
    has_regions = torch.zeros(len(logits) // 2, dtype=torch.bool, device=device)
    has_regions.index_fill_(0, student.regions.image, True)
    return Losses(distillation, segmentation, characters, targets, student.features, has_regions, seen)


def train_step(run: Run, logged: bool) -> Step:
    """One step on the next global batch, with a few figures more where it is `logged`."""
    config, engine, center, step = run.config, run.engine, run.center, run.progress.step + 1
    now, waited, sample_ids, statistics = run.rates(), 0.0, [], {}
    if now.prototypes_thaw:
        engine.forget_moments(PROTOTYPES)  # the official code has no gradients of them until then, and so no state
    engine.set_rates(now.lr, now.weight_decay, frozen=(PROTOTYPES,) if now.prototypes_frozen else ())
    moving = [center.value, *engine.student.buffers()]  # what a forward pass changes: a skipped step gives it back
    before = [value.clone() for value in moving]
    losses_seen = torch.zeros(3, device=distributed.device())
    for micro_step in range(run.accumulation):
        began = time.monotonic()
        run.watch.at(step, "data")
        batch = next(run.batches)
        waited += time.monotonic() - began
        sample_ids.append(batch.sample_ids)
        run.watch.at(step, "forward")
        losses = losses_of(run, batch, now)
        run.watch.at(step, "backward")
        last = micro_step == run.accumulation - 1
        engine.backward(losses.distillation + config.distillation.segmentation_weight * losses.segmentation, last)
        if logged and last:
            statistics = health.statistics(
                losses.targets, center.value, config.distillation.teacher_temperature, losses.distillation.detach(),
                losses.features, losses.has_regions,
            )  # fmt: skip
        if not config.distillation.sinkhorn_rounds:
            center.update(losses.targets, now.center_momentum)
        losses_seen += torch.stack([losses.distillation.detach(), losses.segmentation.detach(), losses.characters])
    run.watch.at(step, "update")
    norms = engine.gradient_norms()
    exceed = engine.exceed(norms, config.optimizer.clip_gradient or math.inf)
    written = run.pending is not None and run.pending.written()
    known = torch.tensor([float(run.stop.wanted()), float(written), float(run.batches.damaged)])
    sums = torch.cat([losses_seen, torch.stack([norms.square().sum(), exceed]), distributed.upload(known)])
    totals = distributed.all_reduce_sum(sums).tolist()  # waits for the device; the same on all ranks, as are decisions
    finite = all(map(math.isfinite, totals))
    if finite and totals[4]:
        engine.clip(norms, config.optimizer.clip_gradient)
    applied = engine.step(finite)
    if applied:
        run.teacher.update(now.momentum)
    else:
        torch._foreach_copy_(moving, before)
    if logged:
        statistics["center_norm"] = center.value.norm()
    run.advance(applied, torch.cat(sample_ids))
    values = torch.stack(list(statistics.values())).tolist() if logged else []
    figures = figures_of(run, now, totals) | dict(zip(statistics, values, strict=True))
    return Step(figures, waited, totals[5] > 0, totals[6] == distributed.world_size(), losses.seen)


def figures_of(run: Run, now: Rates, totals: list[float]) -> dict[str, float]:
    """What metrics.jsonl holds of a step, from sums over micro-batches and ranks."""
    ranks, progress = distributed.world_size(), run.progress
    distillation, segmentation = (total / (run.accumulation * ranks) for total in totals[:2])
    return {
        "step": progress.step,
        "samples": progress.position,
        "epoch": progress.position / run.corpus.num_samples,
        "loss": distillation + run.config.distillation.segmentation_weight * segmentation,
        "loss_distillation": distillation,
        "loss_segmentation": segmentation,
        "lr": now.lr,
        "weight_decay": now.weight_decay,
        "momentum": now.momentum,
        "grad_norm": math.sqrt(totals[3] / ranks) if math.isfinite(totals[3]) else math.nan,
        "characters": totals[2] / run.global_batch,
        "loss_scale": run.engine.loss_scale,
        "skipped_steps": progress.skipped_steps,
        "damaged_samples": int(totals[7]),
        "regions_from_student": float(now.regions_from_student),
    }


def train(run: Run, metrics: Metrics | None) -> bool:
    """Steps until the end of the run (True), or until a rank was asked to stop (False)."""
    config, progress = run.config, run.progress
    pace = Pace(run.global_batch)
    words = read_words(config.probe.data, config.probe.words) if metrics and config.probe.every_steps else None
    guard = health.Guard(config, run.global_batch)
    shown = fixed_words(run) if metrics and config.log.pictures_every_steps else None
    while progress.step < run.last_step:
        coming = progress.step + 1
        logged = coming % config.log.every_steps == 0 or coming == run.last_step
        step = train_step(run, logged)
        pace.count(step.waited)
        if metrics is not None:
            metrics.advance()
            if logged:
                metrics.write(step.figures | pace.figures() | probed(run, words))
            if shown and (coming == 1 or coming % config.log.pictures_every_steps == 0):
                sheets = {"step": pictures.draw(step.seen), **gallery.draw(run.teacher.ready().vit, shown)}
                for name, sheet in sheets.items():
                    metrics.picture(name, sheet, coming)
        if logged:
            sound(guard.look(step.figures), config.health.stop_on_collapse, metrics)
            pace.begin()
        run.keep(step.stop, step.written)
        if step.stop:
            break
    return progress.step >= run.last_step


def fixed_words(run: Run) -> gallery.Words:
    """The run's first samples, whose features are drawn again and again."""
    config = run.config
    reader = Reader(run.corpus, sample_order(run.corpus, config.data, config.seed), config.data.mask_mode)
    batch = reader.batch(0, gallery.WORDS, 0)
    return gallery.words(batch.images_u8, batch.pseudo_mask)


def sound(alarms: list[Alarm], stop: bool, metrics: Metrics | None) -> None:
    """Tells of alarms, which are the same on all ranks; ends the run where it is to `stop` on one."""
    for alarm in alarms:
        if metrics is not None:
            metrics.alarm(alarm)
        if stop and not alarm.over:
            raise TrainingError(f"step {alarm.step}: {alarm.message}")


def probed(run: Run, words: Words | None) -> dict[str, float]:
    """The probe's figures, in the steps in which it is due."""
    if words is None or run.progress.step % run.config.probe.every_steps:
        return {}
    score = probe(run.teacher.ready().vit, words)
    return {"probe_linear": score.linear, "probe_knn": score.knn, "probe_chance": score.chance}


def live(config: Config) -> tuple[int, str]:
    """One life of a run, from its start or resume to its exit code and a line about it."""
    prepare(config)
    run = begin(config)
    with guarded(run) as metrics:
        return ended(run, train(run, metrics))
