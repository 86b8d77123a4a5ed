"""Is an operation at 32×128 as strong as at a crop's own size, resized afterwards, as the official code does it?

    python tests/benchmarks/strengths.py --lmdb DIR [--low 32] [--high 48]

For crops of a native height in that range: the mean change in grey levels, and how busy the picture is (the mean
difference of neighbouring pixels), ours over theirs. Both draw the same parameters; noise that is independent from
pixel to pixel has its official strength at the native size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from ccd_train.augment.photometric.chain import OPERATIONS, Table
from ccd_train.augment.severities import RANGES, RESIZED, Chain, Group
from ccd_train.data.masks import UndecodableImage, decode_rgb, resize_image
from ccd_train.data.records import LmdbReader
from ccd_train.draws import sample_keys

sys.path.insert(0, str(Path(__file__).parents[1]))
import photometric_reference as reference

PER_PIXEL = ("add_elementwise", "gaussian_noise", "laplace_noise", "poisson_noise", "multiply_elementwise")


def native(path: str, low: int, high: int, most: int = 200) -> list[np.ndarray]:
    """Crops uint8 [H, W, 3] of an LMDB, of a height in [low, high] and 40 pixels wide at least."""
    crops: list[np.ndarray] = []
    with LmdbReader(path) as records:
        for number in range(1, len(records) + 1):
            try:
                image = decode_rgb(records.image(number) or b"")
            except UndecodableImage:
                continue
            if low <= image.shape[0] <= high and image.shape[1] >= 40:
                crops.append(np.ascontiguousarray(image))
            if len(crops) == most:
                break
    return crops


def busyness(images: np.ndarray) -> float:
    return float(np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean())


def compare(name: str, crops: list[np.ndarray], small: np.ndarray) -> tuple[float, float, float, float]:
    """Change at 32×128, change at native size, busyness at 32×128, busyness at native size."""
    count = len(crops)
    keys = sample_keys(1, torch.zeros(count, dtype=torch.int64), torch.arange(count))
    drawn = []
    for scale in (1.0, 1 / RESIZED if name in PER_PIXEL else 1.0):
        ranges = {
            full: (low * scale, high * scale) for full, (low, high) in RANGES.items() if "per_channel" not in full
        }
        chain = Chain(groups=(Group("alone", 1.0, {name: 1.0}),), ranges=ranges)
        table = Table(chain, chain.groups[0])
        drawn.append(table.stage(keys, torch.zeros(count, dtype=torch.bool)))
    values = drawn[0].parameters[:, : table.counts[0], None, None, None].unbind(1)
    images = torch.from_numpy(small).permute(0, 3, 1, 2).contiguous().float()
    ours = OPERATIONS[name](images, drawn[0].seeds, *values).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    rows = drawn[1].parameters[:, : table.counts[0]].tolist()
    theirs = np.stack(
        [
            cv2.resize(reference.apply(name, crop, reference.hashed(seed), *row), (128, 32))
            for crop, seed, row in zip(crops, drawn[1].seeds.tolist(), rows, strict=True)
        ]
    ).astype(np.float32)
    before = small.astype(np.float32)
    return np.abs(ours - before).mean(), np.abs(theirs - before).mean(), busyness(ours), busyness(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lmdb", required=True, help="folder of an LMDB of word crops")
    parser.add_argument("--low", type=int, default=32, help="least native height")
    parser.add_argument("--high", type=int, default=48, help="greatest native height")
    options = parser.parse_args()
    crops = native(options.lmdb, options.low, options.high)
    small = np.stack([resize_image(crop) for crop in crops])
    heights, widths = zip(*(crop.shape[:2] for crop in crops), strict=True)
    print(f"{len(crops)} crops, {np.mean(heights):.0f} × {np.mean(widths):.0f} pixels on average")
    print(f"{'operation':26} {'change':>8} {'native':>8} {'ratio':>6} {'busyness ratio':>15}")
    for name in OPERATIONS:
        change, theirs, busy, busy_theirs = compare(name, crops, small)
        print(f"{name:26} {change:8.1f} {theirs:8.1f} {change / theirs:6.2f} {busy / busy_theirs:15.2f}")


if __name__ == "__main__":
    main()
