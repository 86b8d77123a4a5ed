"""How long a checkpoint blocks a step, and how long its writing goes on behind the next ones.

    python tests/benchmarks/saves.py [vit_nano vit_tiny vit_small] [--folder FOLDER]

One process on the CPU, fp32, stage 1, every moment of the optimiser there. The blocked time is that of the snapshot;
what is fsynced and hashed behind the steps takes the rest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from ccd_train import distributed
from ccd_train.config.options import read_recipe, to_dict
from ccd_train.config.pretraining import Config
from ccd_train.models import ccd
from ccd_train.models.losses import Center
from ccd_train.tasks.pretrain.weights import CENTER, TEACHER
from ccd_train.training import checkpoint
from ccd_train.training.average import Average
from ccd_train.training.engine import Engine

ROUNDS = 3


def beside(teacher: Average[ccd.Teacher], center: Center) -> dict[str, torch.Tensor]:
    """What a pretraining keeps beside the engine's files."""
    return teacher.state_dict() | {CENTER: center.value.to("cpu", copy=True)}


def measure(name: str, folder: Path) -> str:
    config = read_recipe(name, Config)
    config = replace(config, train=replace(config.train, micro_batch_size=2))
    torch.manual_seed(0)
    student = ccd.Student(config.model)
    engine = Engine(student, config, accumulation=1)
    teacher = Average(engine, ccd.Teacher(config.model))
    center = Center(config.model.prototypes, distributed.device())
    engine.set_rates(1e-4, 0.04, frozen=())
    images, theta = torch.randn(2, 3, 32, 128), torch.eye(2, 3).expand(2, 2, 3)
    mask = torch.zeros(2, 32, 128, dtype=torch.bool)
    mask[:, 4:28, 20:40] = True
    student_output = engine.forward(images, images, theta, mask, torch.arange(2))
    engine.backward(student_output.projections.mean() + student_output.segmentation_logits.mean(), last=True)
    engine.step(finite=True)  # now the optimiser has its moments
    state = {"step": 0, "world_size": 1, "deepspeed": engine.description, "settings": to_dict(config)}
    blocked, behind, size = [], [], 0
    for step in range(1, ROUNDS + 1):
        began = time.perf_counter()
        save = checkpoint.Save(
            folder / name, engine, lambda: {TEACHER: beside(teacher, center)}, state | {"step": step}
        )
        blocked.append(time.perf_counter() - began)
        problem = save.finish()
        assert problem is None, problem
        behind.append(time.perf_counter() - began - blocked[-1])
        written = folder / name / "checkpoints" / checkpoint.step_name(step)
        size = sum(path.stat().st_size for path in written.iterdir())
        checkpoint.thin(folder / name, keep=1, keep_every=0)
    times = f"blocks {min(blocked):.2f} to {max(blocked):.2f} s, then {min(behind):.2f} to {max(behind):.2f} s behind"
    return f"{name}: {size / 1e6:.0f} MB, {times}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["vit_nano", "vit_tiny", "vit_small"])
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    distributed.initialize(600)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.recipes:
            print(measure(name, Path(folder)), flush=True)
    distributed.finalize()


if __name__ == "__main__":
    main()
