"""Does it learn: pretraining on rendered words, then reading with 1 % and 10 % of the labels, beside random weights.

In all the time that is left. The words are in their own colours; the four fine-tunings share the device and have the
same budget. Read is a test of other words; the figure is that of the last weights, not of the best validation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import Part, arguments, metrics, shards, train

BATCH = 256
START_SECONDS = 30  # of a program until its first step, and of its end
TUNING_SHARE = 0.4  # of the time
TUNED_PER_SECOND = 400  # images of one of four fine-tunings that share the device, where nothing was measured
FRACTIONS = (0.01, 0.1)


def measured_rate(part: Part, default: float) -> float:
    """Images per second with the loader, as `fast` found them."""
    path = part.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((row["images_per_second"] for row in rows if row["kind"] == "fed by the loader"), default)


def pretrain(part: Part, words: Path, samples: int) -> tuple[Path, subprocess.Popen[bytes]]:
    run_dir = part.out / "learn"
    name, batch = ("vit_nano", 8) if part.rehearse else ("vit_small", BATCH)
    steps = max(2, samples // batch)
    options = ["--config", name, "--data.shards", words, "--train.total_samples", steps * batch,
               "--train.micro_batch_size", batch, "--optimizer.warmup_samples", samples // 10,
               "--optimizer.freeze_last_layer_samples", samples // 50, "--log.pictures_every_steps", 0,
               "--distillation.student_regions_after", samples // 3, "--data.workers", 2 if part.rehearse else 8,
               "--checkpoint.every_steps", 1 << 30, "--probe.data", part.out / "words" / "test",
               "--probe.words", 64 if part.rehearse else 1000, "--probe.every_steps", max(1, steps // 3)]  # fmt: skip
    return run_dir / "pretraining", train("pretrain", run_dir / "pretraining", *options)


def tune(part: Part, words: Path, init: object, fraction: float, samples: int, run_dir: Path) -> Any:
    name, batch = ("recognizer_nano", 8) if part.rehearse else ("recognizer_small", 128)
    steps = max(2, samples // batch)
    options = ["--config", name, "--init", init, "--data.train", words, "--data.valid", part.out / "words" / "test",
               "--data.fraction", fraction, "--train.total_samples", steps * batch, "--train.global_batch_size", batch,
               "--train.micro_batch_size", batch, "--optimizer.warmup_samples", samples // 10,
               "--valid.every_steps", steps, "--data.workers", 1 if part.rehearse else 3]  # fmt: skip
    return train("finetune", run_dir, *options)


def main() -> int:
    part = arguments()
    words = shards(part, "many", max(30.0, part.left() / 4))
    time_left = part.left() - 2 * START_SECONDS
    rate = measured_rate(part, 2000.0)
    samples = 32 if part.rehearse else int(0.85 * rate * time_left * (1 - TUNING_SHARE))
    pretrained, run = pretrain(part, words, samples)
    code = run.wait(max(1.0, part.left()))
    lines = metrics(pretrained)
    for line in lines:
        if "probe_linear" in line:
            part.add("probe of the teacher", samples=line["samples"], loss=line["loss"], linear=line["probe_linear"],
                     knn=line["probe_knn"], chance=line["probe_chance"], characters=line["characters"])  # fmt: skip
    if code != 0:
        return code
    speeds = [line["samples_per_second"] for line in lines[2:]] or [0.0]
    waits = [line["data_wait"] for line in lines[2:]] or [0.0]
    part.add("pretraining", samples=lines[-1]["samples"], images_per_second=sorted(speeds)[len(speeds) // 2],
             data_wait=sorted(waits)[len(waits) // 2], loss=lines[-1]["loss"])  # fmt: skip
    tuned = 32 if part.rehearse else int(TUNED_PER_SECOND * max(20.0, part.left() - START_SECONDS))
    runs = {}
    for fraction in FRACTIONS if not part.rehearse else (0.5,):
        for name, init in (("scratch", "scratch"), ("pretrained", pretrained)):
            run_dir = part.out / "learn" / f"{name}_{fraction:g}"
            runs[name, fraction] = (run_dir, tune(part, words, init, fraction, tuned, run_dir))
    codes = []
    for (name, fraction), (run_dir, run) in runs.items():
        codes.append(run.wait(max(1.0, part.left() + 10)))
        last = next((line for line in reversed(metrics(run_dir)) if "valid_lower_alnum" in line), {})
        speed = [line["samples_per_second"] for line in metrics(run_dir)] or [0.0]
        part.add("reading", init=name, labels=fraction, samples=last.get("samples", 0), exit_code=codes[-1],
                 words_right=last.get("valid_lower_alnum", float("nan")), loss=last.get("valid_loss", float("nan")),
                 images_per_second=sorted(speed)[len(speed) // 2])  # fmt: skip
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
