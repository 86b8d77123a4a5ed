"""A training step without data, views and optimiser, part by part, against what the device multiplies matrices at.

    python tests/benchmarks/step.py [--recipe vit_small] [--batch 16] [--dtype bfloat16] [--threads 1]

Operations are counted by torch (multiply and add are two); the floor is a large matrix product in the same type, timed
in the same run. "of the floor" is the share of that rate which a part reaches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ccd_train.augment.affine import Affine
from ccd_train.augment.geometry import sample_theta, warp_masks
from ccd_train.config.options import read_recipe, recipes
from ccd_train.config.pretraining import Config
from ccd_train.models.ccd import Student, StudentOutput, Teacher
from ccd_train.models.losses import Center, distillation_loss, segmentation_loss

REPEAT = 5


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(timed(lambda: a @ a, device)[0] for _ in range(5))


class Step:
    """The parts of a step, in order; each takes what the one before it left."""

    def __init__(self, config: Config, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.settings = config.distillation
        self.student = Student(config.model).to(device, dtype).train()
        self.teacher = Teacher(config.model).to(device, dtype)
        self.center = Center(config.model.prototypes, device)
        self.views = torch.randn(2, batch, 3, 32, 128, device=device, dtype=dtype)
        self.masks = torch.zeros(batch, 32, 128, device=device)
        for number in range(6):  # six characters, as an average word has
            self.masks[:, 6:26, 6 + 20 * number : 18 + 20 * number] = 1
        self.keys = torch.arange(batch, device=device)
        native = torch.tensor([[48, 160]], device=device).expand(batch, -1)
        self.theta = sample_theta(self.keys, native, Affine())
        self.output: StudentOutput
        self.targets: Tensor
        self.loss: Tensor

    def forward(self) -> None:
        self.output = self.student(*self.views, self.theta, self.masks, self.keys)

    def teach(self) -> None:
        self.targets = self.teacher(*self.views, self.output.regions)

    def losses(self) -> None:
        pairs = self.targets.new_full((1,), self.output.regions.characters())
        distillation = distillation_loss(
            self.output.projections,
            self.targets,
            self.center.value,
            student_temperature=self.settings.student_temperature,
            teacher_temperature=self.settings.teacher_temperature,
            pairs_global=pairs,
        )
        masks = torch.cat([self.masks.bool(), warp_masks(self.masks, self.theta)])
        self.loss = distillation + segmentation_loss(self.output.segmentation_logits, masks)
        self.center.update(self.targets, self.settings.center_momentum)

    def backward(self) -> None:
        self.loss.backward()
        self.student.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vit_nano", choices=recipes(Config))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    step = Step(read_recipe(options.recipe, Config), options.batch, device, dtype)
    parts = {"student": step.forward, "teacher": step.teach, "losses": step.losses, "backward": step.backward}
    operations: dict[str, int] = {}
    for name, part in parts.items():
        with FlopCounterMode(display=False) as counter:
            part()
        operations[name] = counter.get_total_flops()
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(REPEAT):
        for name, part in parts.items():
            times[name].append(timed(part, device)[0])
    rate = matrix_rate(device, dtype)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["together"], operations["together"] = sum(medians.values()), sum(operations.values())
    for name, seconds in medians.items():
        share = operations[name] / seconds / rate
        per_image = seconds / options.batch * 1e3
        print(f"{name:9} {per_image:9.3f} ms an image {operations[name] / options.batch / 1e9:8.2f} GFLOP {share:6.1%}")
    print(f"of the floor: {rate / 1e12:.3g} TFLOP/s, {options.recipe}, batch {options.batch}, {dtype} on {device.type}")
    print(f"{options.batch / medians['together']:,.1f} images/s")


if __name__ == "__main__":
    main()
