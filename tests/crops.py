"""Small LMDBs of word crops for the tests of shards: noise, but real JPEGs and PNGs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from ccd_train.data.records import LmdbWriter

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


def crop(seed: int, extension: str = ".jpg", width: int = 0, height: int = 0) -> bytes:
    """An encoded image that depends on the seed alone, by default of a size that does too."""
    rng = np.random.default_rng(seed)
    shape = (height or int(rng.integers(8, 40)), width or int(rng.integers(8, 120)), 3)
    return bytes(cv2.imencode(extension, rng.integers(0, 256, shape, np.uint8))[1])


def mask(seed: int) -> bytes:
    """A PNG with values 0 and 255."""
    rng = np.random.default_rng(seed)
    return bytes(cv2.imencode(".png", rng.integers(0, 2, (16, 40), np.uint8) * 255)[1])


def write_words(path: Path, count: int, seed: int = 0, masks: bool = False) -> Path:
    """An LMDB of `count` crops, every third a PNG, each fourth without a label."""
    with LmdbWriter(path) as writer:
        for number in range(1, count + 1):
            image = crop(seed * 100_000 + number, ".png" if number % 3 == 0 else ".jpg")
            label = f"wörd{number}" if number % 4 else None
            writer.add(image, label, mask(number) if masks else None)
    return path


def change(path: Path, entries: dict[str, bytes | None]) -> None:
    """Overwrites records of an LMDB (None: deletes the key)."""
    with lmdb.open(str(path), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            if value is None:
                transaction.delete(key.encode())
            else:
                transaction.put(key.encode(), value)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too: what "byte for byte the same" compares."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of that size. Skips the test where mounting one is not allowed."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
