"""Time of the views, beside its floors: both views and the regions of a batch, against cv2 image by image.

    OMP_NUM_THREADS=1 python tests/benchmarks/views.py [--batch 64] [--each]

On a CPU, in processor time of one thread. The comparison draws the same operations with the same probabilities and
ranges from a numpy generator, runs them with numpy, OpenCV and Pillow (tests/photometric_reference), warps with
cv2.warpAffine and finds regions with cv2.connectedComponentsWithStats.
On a CUDA device: milliseconds and kernels of a batch, to be held against a training step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ccd_train.augment.affine import Affine
from ccd_train.augment.geometry import sample_theta
from ccd_train.augment.photometric.chain import OPERATIONS, Operation, Table
from ccd_train.augment.severities import Augment, Chain, Group
from ccd_train.augment.views import MEAN, STD, Augmentation
from ccd_train.data.masks import decode_rgb, pseudo_mask, resize_image, resize_mask
from ccd_train.draws import sample_keys
from ccd_train.models.regions import label_regions, warp_regions
from data_tools.words import render

sys.path.insert(0, str(Path(__file__).parents[1]))
import photometric_reference as reference

OFFICIAL = 3.7  # ms a view of the official chain on one core
FLOOR_OFFICIAL, FLOOR_CV2 = 5.0, 0.5


def crops(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rendered words: uint8 [B, 32, 128, 3], masks uint8 [B, 32, 128], native sizes int64 [B, 2]."""
    images, masks, sizes = [], [], []
    for index in range(count):
        image = decode_rgb(render(0, index, ()).image)
        images.append(resize_image(image))
        masks.append(resize_mask(pseudo_mask(image, "otsu")))
        sizes.append(image.shape[:2])
    return np.stack(images), np.stack(masks), np.array(sizes)


def seconds(work: Callable[[], object], least: float = 2.0) -> float:
    """Processor time of one call."""
    work()
    calls, start = 0, time.process_time()
    while time.process_time() - start < least:
        work()
        calls += 1
    return (time.process_time() - start) / calls


class ImageByImage:
    """What a hand-written data set does in a worker."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.generator = np.random.default_rng(0)
        self.tables = {group.name: Table(chain, group) for group in chain.groups}

    def chained(self, image: np.ndarray) -> np.ndarray:
        if self.generator.random() < self.chain.identity:
            return image
        draw = reference.generated(self.generator)
        for group in self.chain.groups:
            if self.generator.random() < group.probability:
                table = self.tables[group.name]
                row = int(np.searchsorted(table.bounds.numpy()[:-1], self.generator.random(), side="right"))
                values = self.generator.random(table.counts[row]) * table.span[row].numpy()[: table.counts[row]]
                image = reference.apply(
                    table.operations[row], image, draw, *(values + table.low[row].numpy()[: len(values)])
                )
        return image

    def warp(self, image: np.ndarray, theta: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        pixels = np.array([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
        matrix = pixels @ np.vstack([theta, [0, 0, 1]]) @ np.linalg.inv(pixels)
        return cv2.warpAffine(image, matrix[:2], (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    def regions(self, mask: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, labels, stats, centers = cv2.connectedComponentsWithStats(mask, connectivity=8)
        kept = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= 30]
        order = sorted(kept, key=lambda i: centers[i, 0])[:26]
        table = np.zeros(count, np.uint8)
        table[order] = np.arange(1, len(order) + 1)
        ids = table[labels]
        warped = np.zeros_like(ids)
        for region in range(1, len(order) + 1):
            warped[self.warp((ids == region).astype(np.float32), theta) > 0.1] = region
        return ids, warped

    def __call__(self, images: np.ndarray, masks: np.ndarray, sizes: np.ndarray, affine: Affine) -> None:
        mean, scale = np.array(MEAN, np.float32), 1 / (255 * np.array(STD, np.float32))
        keys = torch.from_numpy(self.generator.integers(0, 2**62, len(images)))
        theta = sample_theta(keys, torch.from_numpy(sizes), affine).numpy()
        for image, mask, one in zip(images, masks, theta, strict=True):
            regular, irregular = self.chained(image), image
            if (one != np.eye(2, 3)).any():
                irregular = self.warp(self.chained(image), one)
            for view in (regular, irregular):
                np.ascontiguousarray(((view * scale) - mean / np.array(STD, np.float32)).transpose(2, 0, 1))
            self.regions(mask, one)


def on_cpu(batch: int) -> bool:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    settings, affine = Augment(), Affine()
    augmentation, by_image = Augmentation(settings, affine), ImageByImage(settings.resolve())
    images, masks, sizes = crops(batch)
    tensors = (
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(masks),
        torch.from_numpy(sizes),
    )
    epoch = torch.zeros(batch, dtype=torch.int64)

    def views() -> Tensor:
        epoch.add_(1)
        keys = sample_keys(0, epoch, torch.arange(batch))
        return augmentation(tensors[0], tensors[2], keys).theta

    def views_and_regions() -> None:
        warp_regions(label_regions(tensors[1]), views())

    # in turns, so that whatever else the machine does falls on both
    rounds = [(seconds(views), seconds(views_and_regions), seconds(lambda: by_image(images, masks, sizes, affine)))
              for _ in range(3)]  # fmt: skip
    ours, whole, theirs = (1000 * np.array(rounds).min(axis=0) / batch).tolist()
    official, ratio = OFFICIAL / (ours / 2), theirs / whole
    print(f"views: {ours / 2:.3f} ms a view, {official:.1f} × the official chain (floor {FLOOR_OFFICIAL})")
    print(f"views and regions: {whole:.3f} ms a sample")
    print(f"cv2 image by image: {theirs:.3f} ms a sample, {ratio:.2f} × the speed (floor {FLOOR_CV2})")
    return official >= FLOOR_OFFICIAL and ratio >= FLOOR_CV2


def each(batch: int) -> None:
    """Microseconds of every operation per image, four images at a time, and of its reference."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images = crops(batch)[0]
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()
    keys = sample_keys(0, torch.zeros(batch, dtype=torch.int64), torch.arange(batch))
    generator = reference.generated(np.random.default_rng(0))
    for name, operation in OPERATIONS.items():
        table = Table(Augment().resolve(), Group(name, 1.0, {name: 1.0}))
        stage = table.stage(keys, torch.zeros(batch, dtype=torch.bool))
        values = stage.parameters[:4, : table.counts[0], None, None, None].unbind(1)
        rows = stage.parameters[:, : table.counts[0]].tolist()
        ours = seconds(partial(_batched, operation, tensors[:4], stage.seeds[:4], values), 0.1) / 4
        theirs = seconds(partial(_one_by_one, name, images, generator, rows), 0.1) / batch
        print(f"{name:26s} {1e6 * ours:8.1f} µs, cv2 {1e6 * theirs:8.1f} µs")


def _batched(operation: Operation, images: Tensor, seeds: Tensor, values: tuple[Tensor, ...]) -> None:
    operation(images.clone(), seeds, *values)


def _one_by_one(name: str, images: np.ndarray, draw: reference.Draw, rows: list[list[float]]) -> None:
    for image, row in zip(images, rows, strict=True):
        reference.apply(name, image, draw, *row)


def on_gpu(batch: int) -> None:
    device = torch.device("cuda")
    images, _, sizes = crops(64)
    repeated = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().repeat(batch // 64, 1, 1, 1).to(device)
    native = torch.from_numpy(sizes).repeat(batch // 64, 1)
    augmentation = Augmentation(Augment(), Affine())
    keys = [sample_keys(0, torch.full((batch,), epoch), torch.arange(batch)) for epoch in range(60)]
    for one in keys[:10]:
        augmentation(repeated, native, one)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for one in keys[10:]:
        augmentation(repeated, native, one)
    stop.record()
    stop.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        augmentation(repeated, native, keys[0])
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profile.key_averages())
    print(f"views: {start.elapsed_time(stop) / 50:.2f} ms for {batch} samples, {kernels} kernels and copies")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=None, help="samples; 64 on a CPU, 256 on a GPU")
    parser.add_argument("--each", action="store_true", help="the time of every operation")
    options = parser.parse_args()
    if options.each:
        each(options.batch or 64)
        return 0
    if torch.cuda.is_available():
        on_gpu(options.batch or 256)
        return 0
    return 0 if on_cpu(options.batch or 64) else 1


if __name__ == "__main__":
    raise SystemExit(main())
