"""What a run will take, before it runs: the formulas of `models/budget.py`, put into words and tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ccd_train.config.deepspeed import read_deepspeed_file
from ccd_train.config.verbs import EstimateSettings
from ccd_train.durations import duration
from ccd_train.models import budget
from ccd_train.models.budget import GPUS, Seconds

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
HEAD = ("GPUs", "global batch", "images/s", "per GPU", "of the peak", "the run", "loader cores per GPU", "bound by")


@dataclass(frozen=True)
class Estimate:
    """Of a run on W GPUs."""

    gpus: int
    global_batch: int
    seconds: Seconds
    """Of a step."""
    share: float
    """Of the matrix units' peak."""
    days: float
    cores: float
    """Per GPU, so that the loader is not what the run waits for."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.global_batch / self.seconds.step


def estimate(settings: EstimateSettings, gpus: int) -> Estimate:
    """Of a run with these settings on so many GPUs."""
    train, gpu = settings.train, GPUS[settings.gpu]
    accumulation = 1
    if train.global_batch_size is not None:
        accumulation = max(1, math.ceil(train.global_batch_size / (train.micro_batch_size * gpus)))
    seconds = budget.step_seconds(
        settings.model,
        gpu,
        batch=train.micro_batch_size,
        accumulation=accumulation,
        characters=settings.characters,
        stage=_stage(settings),
        ranks=gpus,
        ranks_per_node=settings.gpus_per_node,
        network=settings.network_gbit * 1e9 / 8,
        checkpointing=train.activation_checkpointing,
    )
    batch = train.micro_batch_size * accumulation * gpus
    rate = batch / seconds.step
    flops = budget.training_flops(settings.model, settings.characters)
    return Estimate(
        gpus=gpus,
        global_batch=batch,
        seconds=seconds,
        share=flops * rate / gpus / gpu.matrix_flops,
        days=train.total_samples / rate / 86400,
        cores=rate / gpus / settings.core_rate,
    )


def _stage(settings: EstimateSettings) -> int:
    """The ZeRO stage of the DeepSpeed file; that of the default on GPUs where none is named."""
    _, content = read_deepspeed_file(settings.deepspeed, gpus=True)
    return int(content.get("zero_optimization", {}).get("stage", 0))


def table(settings: EstimateSettings) -> str:
    """Markdown, a row for each number of GPUs."""
    rows = [HEAD, ("---:",) * (len(HEAD) - 1) + ("---",)]
    for gpus in SIZES:
        found = estimate(settings, gpus)
        rows.append(
            (
                f"{gpus:,}",
                f"{found.global_batch:,}",
                two_digits(found.rate),
                two_digits(found.rate / gpus),
                f"{found.share:.0%}",
                duration(found.days * 86400),
                f"{found.cores:.1f}",
                found.seconds.bottleneck,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe(settings: EstimateSettings) -> str:
    """Everything about one number of GPUs, a line each."""
    model, gpu, found = settings.model, GPUS[settings.gpu], estimate(settings, settings.gpus)
    parts = budget.parameters(model)
    flops = budget.training_flops(model, settings.characters)
    sent = budget.traffic(model, _stage(settings), settings.gpus, "bf16")
    seconds = found.seconds
    lines = [
        ("parameters", f"{sum(parts.values()):,}: " + ", ".join(f"{name} {count:,}" for name, count in parts.items())),
        ("operations", f"{flops / 1e9:.1f} GFLOP an image: forward of a view {budget.vit_flops(model) / 1e9:.2f} "
                       f"(backbone), {budget.segmentation_flops(model) / 1e9:.2f} (segmentation), "
                       f"{budget.projection_flops(model) / 1e6:.0f} MFLOP a character"),
        *_memory(settings),
        ("traffic", f"{(sent.reduced + sent.gathered + sent.teacher) / 1e6:,.0f} MB sent by a GPU in a step: "
                    f"gradients {sent.reduced / 1e6:,.0f}, weights {sent.gathered / 1e6:,.0f}, teacher "
                    f"{sent.teacher / 1e6:,.0f}"),
        ("a step", f"{seconds.step * 1e3:.1f} ms: matrix units {seconds.matrix * 1e3:.1f}, memory "
                   f"{seconds.memory * 1e3:.1f}, beside them launches {seconds.launches * 1e3:.1f}; network, as far as "
                   f"nothing hides it, {seconds.network * 1e3:.1f}"),
        ("images/s", f"{two_digits(found.rate)}, {two_digits(found.rate / found.gpus)} per GPU, {found.share:.0%} of "
                     f"its peak of {gpu.matrix_flops / 1e12:.0f} TFLOP/s"),
        ("the run", f"{settings.train.total_samples:,} samples in steps of {found.global_batch:,}: "
                    f"about {duration(found.days * 86400)}, {two_digits(found.days * 24 * found.gpus)} GPU hours"),
        ("loader", f"{found.cores:.1f} CPU cores per GPU; {_workers(settings, found)}"),
        ("bound by", found.seconds.bottleneck + _advice(settings, found)),
        ("a model", "fitted to one H200, which it meets within a quarter; not measured on other or on several GPUs"),
    ]  # fmt: skip
    return "\n".join(f"{name:12}{text}" for name, text in lines)


def two_digits(value: float) -> str:
    """25,446 as 25,000, 0.234 as 0.23: no more of it is known."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _workers(settings: EstimateSettings, found: Estimate) -> str:
    workers, needed = settings.data.workers, math.ceil(found.cores)
    return f"--data.workers {workers} is enough" if needed <= workers else f"it needs --data.workers {needed}"


def _memory(settings: EstimateSettings) -> list[tuple[str, str]]:
    """Per ZeRO stage and GPU, with the largest micro-batch that fits."""
    model, gpu, batch = settings.model, GPUS[settings.gpu], settings.train.micro_batch_size
    image = budget.activation_bytes(model, settings.characters, "bf16")
    if settings.train.activation_checkpointing:
        image["blocks"] /= budget.BLOCK_TENSORS  # only a block's input stays; one block at a time is whole
    lines = [("memory", f"{sum(image.values()) / 1e6:.0f} MB an image for the backward pass, {batch} at a time")]
    for stage in (0, 1, 2, 3):
        precision: budget.Precision = "bf16" if stage else "fp32"
        states = budget.state_bytes(model, stage, settings.gpus, precision)
        fixed = sum(states.values()) + budget.fixed_bytes(model)
        used, fits = fixed + batch * sum(image.values()), (gpu.memory * 0.9 - fixed) / sum(image.values())
        text = f"{used / 1e9:.1f} GB of {gpu.memory / 1e9:.0f}, {sum(states.values()) / 1e9:.2f} of them states; "
        what = "weights fp32 (zero0_autocast_bf16)" if stage == 0 else "weights bf16"
        lines.append((f"  ZeRO {stage}", f"{text}up to {max(0, math.floor(fits)):,} images fit; {what}"))
    return lines


def _advice(settings: EstimateSettings, found: Estimate) -> str:
    batch = settings.train.micro_batch_size
    if found.seconds.bottleneck == "launches":
        busy = (found.seconds.matrix + found.seconds.memory) / found.seconds.launches
        return f": the host cannot keep the GPU busy; from --train.micro_batch_size {math.ceil(batch / busy)} on it can"
    if found.seconds.bottleneck == "network":
        return f": a larger --train.micro_batch_size than {batch} sends the same for more images"
    return ""
