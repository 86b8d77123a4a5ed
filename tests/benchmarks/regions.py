"""Regions on a device against a loop over OpenCV's connected components: images per second of each, and the ratio.

    python tests/benchmarks/regions.py [--batch 64] [--repeat 20] [--threads 1]

The masks are rendered words and, harder, noise near the percolation threshold. The two are timed alternately; shown are
medians. OpenCV's side stops at the labels and statistics: the sorting, the warp and the pooling are ours alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from ccd_train.augment.affine import Affine
from ccd_train.augment.geometry import sample_theta
from ccd_train.models.regions import label_regions, pool, warp_regions


def words(count: int) -> np.ndarray:
    random, masks = np.random.default_rng(0), np.zeros((count, 32, 128), np.uint8)
    for mask in masks:
        text = "".join(random.choice(list("ABEFGHKMRSWXabdefghkmnrstw0123456789"), int(random.integers(3, 11))))
        font, scale = int(random.integers(0, 8)), random.uniform(0.5, 1.1)
        cv2.putText(mask, text, (4, 24), font, scale, 1, int(random.integers(1, 4)))
    return masks


def noise(count: int) -> np.ndarray:
    return (np.random.default_rng(1).random((count, 32, 128)) < 0.407).astype(np.uint8)


def timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = options.batch
    keys = torch.arange(batch, device=device)
    theta = sample_theta(keys, torch.tensor([[48, 160]], device=device).expand(batch, -1), Affine())
    tokens = torch.randn(batch, 256, 384, device=device)
    for name, masks in (("words", words(batch)), ("noise", noise(batch))):
        on_device = torch.from_numpy(masks).to(device)
        ids = label_regions(on_device)

        def opencv(masks: np.ndarray = masks) -> list[object]:
            return [cv2.connectedComponentsWithStats(mask, connectivity=8) for mask in masks]

        def ours(on_device: Tensor = on_device) -> Tensor:
            return label_regions(on_device)

        def warp(ids: Tensor = ids) -> Tensor:
            return warp_regions(ids, theta)

        def pooled(ids: Tensor = ids) -> tuple[Tensor, Tensor]:
            return pool(tokens, ids)

        times: dict[str, list[float]] = {"OpenCV loop": [], "label": [], "warp": [], "pool, D=384": []}
        for _ in range(options.repeat):
            for seconds, work in zip(times.values(), (opencv, ours, warp, pooled), strict=True):
                seconds.append(timed(work, device))
        floor = statistics.median(times["OpenCV loop"])
        for part, seconds in times.items():
            median = statistics.median(seconds)
            print(f"{name}  {part:12} {batch / median:10,.0f} images/s   {median / floor:6.2f} × OpenCV's time")
    print(f"on {device.type}, batch {batch}, {options.threads} threads")


if __name__ == "__main__":
    main()
