"""A run of two processes that is killed again and again, beside one that nobody touched.

    python tests/benchmarks/kills.py [--kills 25] [--seed 0]

SIGKILL meets both ranks and their launcher at random moments: in a step, while a checkpoint is written, while an old
one is removed. After every kill the newest checkpoint must be whole; in the end the losses of all steps must be those
of the undisturbed run, bit for bit, and nothing may be left behind but what checkpoint.py documents.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import yaml
from test_engine import SMALL
from test_resume import command, live, losses, metrics

from ccd_train.training import checkpoint
from data_tools import convert, synth

MOMENTS = ("step", "writing_*", "removing_*")
RUSH = {"checkpoint": {"every_steps": 2, "keep": 1}}  # saves and removals all the time


def corpus(folder: Path) -> SimpleNamespace:
    assert synth.main(["--out", str(folder / "lmdb"), "--num-samples", "240", "--seed", "7", "--fonts", "pillow"]) == 0
    shards = folder / "shards"
    options = ["--name", "words", "--workers", "1", "--samples-per-shard", "64"]
    assert convert.main(["--src", str(folder / "lmdb"), "--out", str(shards), *options]) == 0
    return SimpleNamespace(shards=shards)


def reached(run_dir: Path, moment: str, step: int, delay: float) -> Callable[[], bool]:
    """Whether the run is beyond `step`, and then in the moment that is meant, plus `delay` seconds."""

    def look() -> bool:
        lines = metrics(run_dir)
        if not lines or lines[-1]["step"] < step:
            return False
        limit = time.monotonic() + 5  # a moment that never comes ends in a step
        while moment != "step" and not list((run_dir / "checkpoints").glob(moment)) and time.monotonic() < limit:
            time.sleep(0.0005)
        time.sleep(delay)
        return True

    return look


def sound(run_dir: Path) -> str:
    """The name of the newest checkpoint, which must be whole, as must be the one that `latest` names."""
    folder = run_dir / "checkpoints"
    found = checkpoint.newest(run_dir)
    damaged = list(folder.glob("*.damaged"))
    assert not damaged, damaged
    if (folder / "latest").exists():
        named = folder / (folder / "latest").read_text().strip()
        assert (named / checkpoint.COMPLETE).exists(), f"latest names {named}"
    return found.name if found else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    met: dict[str, int] = dict.fromkeys(MOMENTS, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words, recipe = corpus(folder), folder / "recipe.yaml"
        steps = str(8 * arguments.kills)
        length = {"train": SMALL["train"] | {"total_samples": 4 * int(steps)}}
        recipe.write_text(yaml.safe_dump(SMALL | RUSH | length))
        calm, hunted = folder / "calm", folder / "hunted"
        assert live(calm, command(recipe, words.shards, calm, 2, "--max-steps", steps)) == 0
        life = command(recipe, words.shards, hunted, 2, "--max-steps", steps)
        for kill in range(arguments.kills):
            moment = MOMENTS[kill % len(MOMENTS)]
            known = metrics(hunted)
            step = int(known[-1]["step"] if known else 0) + draw.randint(1, 6)
            live(hunted, life, reached(hunted, moment, step, draw.uniform(0, 0.03)), signal.SIGKILL)
            met[moment] += 1
            left = sorted(path.name for path in (hunted / "checkpoints").iterdir())
            print(f"kill {kill + 1}: {moment}, left {left}, newest {sound(hunted)}", flush=True)
        assert live(hunted, life) == 0
        assert losses(hunted) == losses(calm), "other losses than the undisturbed run's"
        left = sorted(path.name for path in (hunted / "checkpoints").iterdir())
        assert left == ["latest", checkpoint.step_name(int(steps))], left
        print(f"{arguments.kills} kills ({met}): the losses of {steps} steps are equal bit for bit; left: {left}")


if __name__ == "__main__":
    main()
