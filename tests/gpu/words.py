"""Renders the words of the GPU test: words.py FOLDER COUNT. A few for `right` and `fast`, then many to learn on.

FOLDER/few and FOLDER/many are shards, FOLDER/valid and FOLDER/test are LMDBs; each appears when it is whole.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data_tools import convert, synth


def lmdb(folder: Path, name: str, count: int, seed: int, workers: int) -> Path:
    path = folder / f"{name}.unfinished"
    arguments = ["--out", str(path), "--num-samples", str(count), "--seed", str(seed), "--labels", "--fonts", "pillow"]
    assert synth.main([*arguments, "--workers", str(workers)]) == 0
    return path.rename(folder / name)


def shards(folder: Path, name: str, count: int, seed: int, workers: int) -> None:
    source, path = lmdb(folder, f"{name}_lmdb", count, seed, workers), folder / f"{name}.unfinished"
    size = ["--samples-per-shard", str(max(100, count // 32))]
    arguments = ["--src", str(source), "--out", str(path), "--name", "words", "--workers", str(workers), *size]
    assert convert.main(arguments) == 0
    path.rename(folder / name)


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    workers = max(1, len(os.sched_getaffinity(0)) - 4)
    folder.mkdir(parents=True, exist_ok=True)
    shards(folder, "few", min(count, 4000), 1, workers)
    lmdb(folder, "valid", max(64, count // 200), 2, workers)
    lmdb(folder, "test", max(64, count // 60), 3, workers)
    shards(folder, "many", count, 4, workers)


if __name__ == "__main__":
    main()
