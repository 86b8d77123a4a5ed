"""What the pictures of a run cost: drawing and writing all of them, against the steps between two of them.

    python tests/benchmarks/pictures.py [--config vit_small] [--micro_batch_size 64] [--rate 3500] [--json]

`share` is of the time of --log.pictures_every_steps at its default. The steps are this machine's own (forward and
backward of the student, forward of the teacher), or those of a GPU that takes --rate images a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.config.run import Log
from ccd_train.draws import sample_keys
from ccd_train.models.ccd import Student, Teacher
from ccd_train.tasks.pretrain import gallery, pictures
from ccd_train.training.metrics import Metrics

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="vit_nano")
    parser.add_argument("--micro_batch_size", type=int)
    parser.add_argument("--rate", type=float, help="images a second; left out: this machine's")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    config = read_recipe(arguments.config, Config)
    batch = arguments.micro_batch_size or config.train.micro_batch_size
    torch.manual_seed(0)
    student, teacher = Student(config.model), Teacher(config.model)
    masks = torch.zeros(batch, 32, 128, dtype=torch.uint8)
    for left in range(4, 120, 20):
        masks[:, 6:26, left : left + 12] = 1
    views = torch.rand(2, batch, 3, 32, 128)
    theta = torch.eye(2, 3).expand(batch, -1, -1)
    keys = sample_keys(0, torch.zeros(batch, dtype=torch.int64), torch.arange(batch))

    def step() -> pictures.Seen:
        output = student(views[0], views[1], theta, masks, keys)
        targets = teacher(views[0], views[1], output.regions)
        (output.projections.square().mean() + output.segmentation_logits.square().mean() + 0 * targets.sum()).backward()
        crops = (views[0] * 255).to(torch.uint8)
        return pictures.Seen(crops, masks, *views, output.segmentation_logits.detach(), *output.regions)

    seen = step()
    step_seconds = batch / arguments.rate if arguments.rate else timed(step)
    noise = torch.randint(0, 256, (gallery.WORDS, 3, 32, 128), dtype=torch.uint8)
    shown = gallery.fixed_words(noise, masks[:1].expand(gallery.WORDS, -1, -1))
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(Path(folder), 0, 1)

        def draw() -> None:
            for name, sheet in {"step": pictures.draw(seen), **gallery.draw(teacher.vit, shown)}.items():
                metrics.picture(name, sheet, 1)

        seconds = timed(draw)
        metrics.close()
    every = Log().pictures_every_steps
    share = seconds / (seconds + every * step_seconds)
    if arguments.json:
        print(json.dumps({"seconds": seconds, "step_seconds": step_seconds, "share": share}))
    else:
        print(f"pictures {seconds:.3f} s, {every} steps {every * step_seconds:.1f} s: {share:.2%}")


def timed(function: object) -> float:
    """The least time of a few calls."""
    times = []
    for _ in range(REPEATS):
        began = time.monotonic()
        function()  # type: ignore[operator]
        times.append(time.monotonic() - began)
    return min(times)


if __name__ == "__main__":
    main()
