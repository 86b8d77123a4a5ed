"""What a run will take, before it runs: parameters, operations, memory, traffic, images per second, days.

    ccd-train estimate --config vit_small --gpus 8 --gpu h200
    ccd-train estimate --config vit_small --gpu h200 --train.micro_batch_size 256 --table     1 to 1,024 GPUs, Markdown

From formulas (budget.py), with the assumptions that docs/performance.md lists; no GPU is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ccd_train.config.deepspeed import read_deepspeed_file
from ccd_train.config.options import parse
from ccd_train.config.pretraining import Config
from ccd_train.config.run import require
from ccd_train.durations import duration
from ccd_train.models import budget
from ccd_train.models.budget import GPUS, Seconds

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
HEAD = ("GPUs", "global batch", "images/s", "per GPU", "of the peak", "the run", "loader cores per GPU", "bound by")


@dataclass(frozen=True)
class EstimateSettings(Config):
    """A pretraining run and the machines for it. The settings of the run are those of `ccd-train pretrain`."""

    gpus: int = 8
    """W: GPUs, one rank each."""
    gpu: Literal["h200", "h100", "a100", "3090"] = "h200"
    """Their kind."""
    gpus_per_node: int = 8
    """Within a node they talk by NVLink (3090: PCIe), between nodes through the network."""
    network_gbit: float = 200.0
    """Of the network, 10^9 bits per second and GPU, in one direction."""
    characters: float = 6.0
    """M: characters of an image that both views hold; `characters` in metrics.jsonl."""
    core_rate: float = 2000.0
    """Images that one CPU core reads, decodes and masks per second; tests/benchmarks/reading.py measures it."""
    table: bool = False
    """Only a Markdown table, for 1 to 1,024 GPUs."""

    def check(self) -> None:
        """Raises UserError for the first value that is impossible."""
        for name in ("gpus", "gpus_per_node"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be 1 or more")
        for name in ("network_gbit", "core_rate"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(0 <= self.characters <= 26, "characters", self.characters, "must lie in [0, 26]")
        for section in (self.model, self.train):
            section.check()


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
    _, content = read_deepspeed_file(settings.deepspeed or "zero1_bf16")
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
                f"{found.rate:,.0f}",
                f"{found.rate / gpus:,.0f}",
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
        ("images/s", f"{found.rate:,.0f}, {found.rate / found.gpus:,.0f} per GPU, {found.share:.0%} of its peak of "
                     f"{gpu.matrix_flops / 1e12:.0f} TFLOP/s"),
        ("the run", f"{settings.train.total_samples:,} samples in steps of {found.global_batch:,}: "
                    f"{duration(found.days * 86400)}, {found.days * 24 * found.gpus:,.0f} GPU hours"),
        ("loader", f"{found.cores:.1f} CPU cores per GPU; --data.workers {max(1, math.ceil(found.cores))}"),
        ("bound by", found.seconds.bottleneck + _advice(settings, found)),
    ]  # fmt: skip
    return "\n".join(f"{name:12}{text}" for name, text in lines)


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


def main(argv: list[str]) -> int:
    settings = parse(EstimateSettings, argv, "ccd-train estimate")
    settings.check()
    print(table(settings) if settings.table else describe(settings))
    return 0
