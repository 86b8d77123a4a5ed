"""Fine-tuning: a backbone learns to read, from labelled words.

    ccd-train finetune --config recognizer_small --run_dir RUN --init PRETRAINED \\
        --data.train data_lmdb/training/ARD --data.valid data_lmdb/validation
    ccd-train finetune --config recognizer_small --print_config                                  every setting

PRETRAINED is a pretraining's run folder, its export or an official .pth; `scratch` starts from random weights. The same
command again goes on where the run stopped. RUN/export holds the weights that read the validation words best, for
`ccd-train read` and `evaluate`. `train` is the loop, `train_step` one step; the network is in `models/recognizer.py`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ccd_train import distributed, draws
from ccd_train.augment.views import normalize
from ccd_train.config.recognition import FineTuning
from ccd_train.data.batches import Batch
from ccd_train.data.loader import loader
from ccd_train.data.order import Order
from ccd_train.models import decoding
from ccd_train.models.recognizer import recognition_loss
from ccd_train.tasks.recognize.run import Tuning, begin
from ccd_train.tasks.recognize.scoring import RULES, same
from ccd_train.training.metrics import Metrics
from ccd_train.training.run import Pace, ended, guarded, prepare

READ_AT_ONCE = 256  # words of a validation, by each rank


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


def train_step(run: Tuning) -> Step:
    """One step on the next global batch: the mean over all its tokens, however it is cut into micro-batches."""
    config, engine, device, step = run.config, run.engine, distributed.device(), run.progress.step + 1
    lr = run.learning_rate()
    engine.set_rates(lr, config.optimizer.weight_decay)
    run.watch.at(step, "data")
    began = time.monotonic()
    batches = [next(run.batches) for _ in range(run.accumulation)]
    waited = time.monotonic() - began
    targets = [encode(run, batch) for batch in batches]
    tokens = sum(int((part[:, 1:] != run.charset.padding).sum()) for part in targets)
    tokens_global = distributed.all_reduce_sum(torch.full((), float(tokens), device=device))
    loss_sum = torch.zeros((), device=device)
    for number, (batch, target) in enumerate(zip(batches, targets, strict=True), start=1):
        run.watch.at(step, "forward")
        keys = draws.sample_keys(config.seed, batch.epochs, batch.sample_ids)
        images = run.augmentation(batch.images_u8.to(device, non_blocking=True), batch.native_size, keys)
        target = target.to(device, non_blocking=True)
        logits = engine.forward(images.to(engine.dtype), target, keys.to(device, non_blocking=True))
        # the engine takes the mean over ranks and micro-batches
        loss = recognition_loss(logits, target, tokens_global / run.accumulation)
        run.watch.at(step, "backward")
        engine.backward(loss, last=number == run.accumulation)
        loss_sum += loss.detach()
    run.watch.at(step, "update")
    norms = engine.gradient_norms()
    written = run.pending is not None and run.pending.written()
    known = torch.tensor([float(run.stop.wanted()), float(written), float(run.batches.damaged)])
    exceed = engine.exceed(norms, config.optimizer.clip_gradient or math.inf)
    sums = torch.cat([torch.stack([loss_sum, norms.square().sum(), exceed]), distributed.upload(known)])
    totals = distributed.all_reduce_sum(sums).tolist()  # waits for the device; the same on all ranks, as are decisions
    finite = all(map(math.isfinite, totals))
    if finite and totals[2]:
        engine.clip(norms, config.optimizer.clip_gradient)
    run.advance(engine.step(finite), torch.cat([batch.sample_ids for batch in batches]))
    return Step(figures_of(run, lr, totals), waited, totals[3] > 0, totals[4] == distributed.world_size())


def encode(run: Tuning, batch: Batch) -> torch.Tensor:
    """The labels of a batch as targets, int64 [B, T]."""
    length = run.config.recognizer.length
    return torch.tensor([run.charset.encode(label or "", length) for label in batch.labels])


def figures_of(run: Tuning, lr: float, totals: list[float]) -> dict[str, float]:
    """What metrics.jsonl holds of a step, from sums over micro-batches and ranks."""
    ranks, progress = distributed.world_size(), run.progress
    return {
        "step": progress.step,
        "samples": progress.position,
        "epoch": progress.position / run.words.num_samples,
        "loss": totals[0] / (run.accumulation * ranks),
        "lr": lr,
        "grad_norm": math.sqrt(totals[1] / ranks) if math.isfinite(totals[1]) else math.nan,
        "loss_scale": run.engine.loss_scale,
        "skipped_steps": progress.skipped_steps,
        "damaged_samples": int(totals[5]),
    }


@torch.no_grad()
def validate(run: Tuning) -> dict[str, float]:
    """Has the ranks share the validation words, read them, and keep the weights where they are the best so far."""
    words, device, ranks = run.valid.num_samples, distributed.device(), distributed.world_size()
    began = time.monotonic()
    run.copy.update(0.0)
    network = run.copy.ready()
    count = min(READ_AT_ONCE, -(-words // ranks))
    seen, unreadable, right = 0, 0, dict.fromkeys(RULES, 0)
    loss = torch.zeros(2, dtype=torch.float64, device=device)  # its sum over tokens, and their number
    with loader(
        run.valid, Order(run.valid.shard_samples, 0, run.config.data.window_shards), start_position=0,
        end_position=words, global_batch_size=count * ranks, micro_batch_size=count, rank=distributed.rank(),
        world_size=ranks, workers=run.config.data.workers, mask_mode=None, with_labels=True,
        max_damaged=1.0,  # they are words that are not read right
    ) as batches:  # fmt: skip
        for batch in batches:
            run.watch.at(run.progress.step, "validation")
            images = batch.images_u8.to(device, non_blocking=True).float()
            normalize(images)
            images, targets = images.to(run.engine.dtype), encode(run, batch).to(device)
            memory = network.encode(images)  # once: for what is read, and for the loss
            read = decoding.decode(network.decoder, memory).tokens.tolist()
            for row, (tokens, label, epoch) in enumerate(zip(read, batch.labels, batch.epochs.tolist(), strict=True)):
                if epoch == 0:  # the last batch goes on at the beginning
                    text, seen, replaced = run.charset.decode(tokens), seen + 1, row in batch.replaced
                    unreadable += replaced
                    for rule in RULES:  # a word whose image cannot be read is not read right
                        right[rule] += not replaced and same(text, label or "", rule)
            targets[batch.epochs.to(device) > 0, 1:] = run.charset.padding
            targets[list(batch.replaced), 1:] = run.charset.padding  # another word stands in its place
            number = (targets[:, 1:] != run.charset.padding).sum()
            loss += torch.stack([recognition_loss(network.decoder(memory, targets[:, :-1]), targets) * number, number])
    sums = torch.tensor([seen, unreadable, *right.values()], dtype=torch.float64, device=device)
    loss_sum, tokens_seen, total, lost, *counts = distributed.all_reduce_sum(torch.cat([loss, sums])).tolist()
    accuracy = {rule: count / total for rule, count in zip(RULES, counts, strict=True)}
    run.judge(accuracy[run.config.valid.rule])
    figures = {f"valid_{rule}": value for rule, value in accuracy.items()}
    run.stop.validation_seconds = max(run.stop.validation_seconds, time.monotonic() - began)
    mean, best = loss_sum / max(tokens_seen, 1), max(run.progress.best, accuracy[run.config.valid.rule])
    return {**figures, "valid_best": best, "valid_loss": mean, "valid_unreadable": lost}


def train(run: Tuning, metrics: Metrics | None) -> bool:
    """Steps until the end of the run (True), or until a rank was asked to stop (False)."""
    config, progress, pace = run.config, run.progress, Pace(run.global_batch)
    while not run.over:
        step = train_step(run)
        pace.count(step.waited)
        figures = step.figures
        due = progress.step % config.valid.every_steps == 0 or progress.step == run.last_step
        logged = due or progress.step % config.log.every_steps == 0
        if logged:
            figures |= pace.figures()
        if due:
            figures |= validate(run)
        if metrics is not None:
            metrics.advance()
            if logged:
                metrics.write(figures)
        if logged:
            pace.begin()
        run.keep(step.stop or run.over, step.written)
        if step.stop:
            break
    return run.over


def live(config: FineTuning) -> tuple[int, str]:
    """One life of a run, from its start or resume to its exit code and a line about it."""
    prepare(config)
    run = begin(config)
    with guarded(run) as metrics:
        code, message = ended(run, train(run, metrics))
    return code, message + remarks(run)


def remarks(run: Tuning) -> str:
    """What there is to say beside how a life ended."""
    progress, patience = run.progress, run.config.valid.patience
    text = f"; no better validation in {patience} (--valid.patience)" if 0 < patience <= progress.stale else ""
    if progress.best_step:
        text += f"; {progress.best:.2%} of the validation words right at best, after step {progress.best_step}"
    return text
