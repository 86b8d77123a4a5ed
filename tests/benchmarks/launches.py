"""How many kernels a step would launch on a GPU, and where the host would wait for it: counted without one.

    python tests/benchmarks/launches.py [--config vit_small] [--batch 64] [--json]

Two views, student, regions, teacher, losses, backward pass, centre and figures of health, eagerly. A CUDA graph counts
as one launch and a copy into each of its inputs. DeepSpeed's update is not in it: on an H200 it took 59 launches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pretended_step import pretended_step

from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Share, loader, sample_order
from ccd_train.data.shards import Corpus
from data_tools import convert, synth

SHOWN = 25  # places


def words(count: int) -> Batch:
    """Rendered ones."""
    with tempfile.TemporaryDirectory() as folder:
        lmdb, shards = f"{folder}/lmdb", f"{folder}/shards"
        synth.main(["--out", lmdb, "--num-samples", str(count), "--fonts", "pillow"])
        convert.main(["--src", lmdb, "--out", shards, "--name", "words", "--workers", "1"])
        corpus = Corpus.open(shards)
        order = sample_order(corpus, Config().data, 0)
        with loader(corpus, order, Share(0, count, count, count, 0, 1), workers=0) as batches:
            return next(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="vit_small", help="recipe")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--json", action="store_true", help="the totals as the last line")
    options = parser.parse_args()
    device, _, _ = pretended_step(read_recipe(options.config, Config), words(options.batch))
    phases, places = Counter[str](), Counter[tuple[str, str]]()
    for (phase, place, _), count in device.launches.items():
        phases[phase] += count
        places[phase, place.partition(":")[0]] += count
    print(f"{options.config}, {options.batch} images: {device.launches.total():,} launches")
    for phase, count in phases.most_common():
        print(f"{count:7,}  {phase}")
    for (phase, place), count in places.most_common(SHOWN):
        print(f"{count:7,}  {phase:16} {place}")
    for (phase, place), count in device.waits.items():
        print(f"{count:7,}  wait in {phase}: {place}")
    if options.json:
        print(json.dumps({"launches": device.launches.total(), "waits": device.waits.total(), "by_phase": phases}))


if __name__ == "__main__":
    main()
