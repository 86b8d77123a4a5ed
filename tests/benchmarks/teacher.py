"""What the teacher's average costs of a step: two ranks on this machine, its all-gather not overlapped by anything.

    python tests/benchmarks/teacher.py [vit_nano vit_tiny] [--batch 16] [--steps 8]

Steps and updates are timed alternately, so that both meet the same machine; medians. A run hides the all-gather behind
the next batch's views and the student's forward pass, so this is an upper bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks

from ccd_train import distributed
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.run import begin
from ccd_train.training.train import train_step
from data_tools import convert, synth


def alternate(config: Config, steps: int) -> tuple[float, float]:
    """Median seconds of a step and of an update with its all-gather."""
    run = begin(Pretraining(config))
    train_step(run, logged=False)
    whole, alone = [], []
    for _ in range(steps):
        distributed.barrier()
        began = time.perf_counter()
        train_step(run, logged=False)
        run.task.teacher.ready()
        whole.append(time.perf_counter() - began)
        distributed.barrier()
        began = time.perf_counter()
        run.task.teacher.update(1.0)
        run.task.teacher.ready()
        alone.append(time.perf_counter() - began)
    run.close()
    return statistics.median(whole), statistics.median(alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["vit_nano", "vit_tiny"])
    parser.add_argument("--batch", type=int, default=16, help="per rank")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        assert synth.main(["--out", str(folder / "lmdb"), "--num-samples", "400", "--fonts", "pillow"]) == 0
        assert convert.main(["--src", str(folder / "lmdb"), "--out", str(folder / "shards"), "--name", "words"]) == 0
        for name in arguments.recipes:
            config = read_recipe(name, Config)
            train = replace(config.train, micro_batch_size=arguments.batch, global_batch_size=None, threads=1)
            data = replace(config.data, shards=(folder / "shards",), workers=0)
            config = replace(config, run_dir=folder / name, train=train, data=data)
            step, update = run_ranks(2, alternate, config, arguments.steps)[0]
            share = f"{update / step:.1%}"
            print(
                f"{name}: a step {step * 1e3:.0f} ms, the teacher's update {update * 1e3:.1f} ms, {share}", flush=True
            )


if __name__ == "__main__":
    main()
