"""From a position to a batch: reads the samples there, decodes, resizes and masks them.

A sample that cannot be used is replaced by the next row of its shard (after the last one, the first), again and again
until one can be used: a rule without a state, so that every rank and every later life repeats it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ccd_train.data.charset import word_of
from ccd_train.data.masks import (
    HEIGHT,
    WIDTH,
    MaskMode,
    UndecodableImage,
    decode_mask,
    decode_rgb,
    pseudo_mask,
    resize_image,
    resize_mask,
)
from ccd_train.data.order import Mixture, Order
from ccd_train.data.pairs import Pairs
from ccd_train.data.shards import Corpus, DamagedSampleError
from ccd_train.data.words import Words
from ccd_train.errors import TrainingError

NO_MASK = np.zeros((HEIGHT, WIDTH), np.uint8)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank."""

    images_u8: Tensor
    """uint8 [B, 3, 32, 128], RGB."""
    pseudo_mask: Tensor
    """uint8 [B, 32, 128], text = 1."""
    native_size: Tensor
    """int64 [B, 2], height and width of each crop before it was resized."""
    sample_ids: Tensor
    """int64 [B]; a replaced sample keeps its own."""
    epochs: Tensor
    """int64 [B], how often the sample's corpus has been seen as a whole before."""
    position: int
    """Samples that all ranks together have consumed when the step of this micro-batch is done."""
    replaced: tuple[int, ...] = ()
    """Rows that hold another sample than their own, which could not be used."""
    damaged: tuple[str, ...] = ()
    """One line for each sample that could not be used and was replaced: shard, key, reason."""
    labels: tuple[str | None, ...] = ()
    """The labels, if the loader was asked for them."""
    targets_u8: Tensor | None = None
    """The truth of pictures, uint8 [B, C, 32, 128]: a picture, or 0, 1 for text and 255 for ignored."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device; from pinned memory the copy does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's DataLoader calls this by its name."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images_u8=function(self.images_u8),
            pseudo_mask=function(self.pseudo_mask),
            native_size=function(self.native_size),
            sample_ids=function(self.sample_ids),
            epochs=function(self.epochs),
            targets_u8=None if self.targets_u8 is None else function(self.targets_u8),
        )


class Sample(NamedTuple):
    """One sample, ready for a batch."""

    image: np.ndarray
    """uint8 [32, 128, 3], RGB."""
    mask: np.ndarray
    """uint8 0/1 [32, 128]."""
    native_size: tuple[int, int]
    label: str | None
    target: np.ndarray | None = None
    """uint8 [32, 128, C], of pictures with their truth."""


@dataclass(frozen=True)
class BatchReader:
    """Makes batches of a corpus, of labelled words or of pairs; may be copied into worker processes."""

    corpus: Corpus | Words | Pairs
    order: Order | Mixture
    mask_mode: MaskMode | None
    """None: no masks are wanted; those of the batches are empty."""
    with_labels: bool = False
    patience: tuple[float, ...] = (0.5, 2.0, 8.0)
    """Seconds to wait before a file that could not be read is tried again: a shared file system may stumble."""

    def batch(self, first: int, count: int, position: int) -> Batch:
        """The samples at positions `first` … `first + count - 1`, as the batch after whose step `position` is reached.

        TrainingError if a file cannot be read any more, or if a whole shard holds nothing that can be used.
        """
        samples = self.order.at(first, count)
        images = np.empty((count, 3, HEIGHT, WIDTH), np.uint8)
        masks = np.empty((count, HEIGHT, WIDTH), np.uint8)
        sizes = np.empty((count, 2), np.int64)
        labels: list[str | None] = [None] * count
        targets: list[np.ndarray | None] = [None] * count
        damaged: list[str] = []
        replaced: list[int] = []
        for i in np.lexsort((samples.rows, samples.shards)).tolist():  # by place on the disk
            known = len(damaged)
            sample = self._usable_sample(int(samples.shards[i]), int(samples.rows[i]), damaged)
            if len(damaged) > known:
                replaced.append(i)
            cv2.split(sample.image, list(images[i]))  # writes the three planes there
            masks[i], sizes[i], labels[i], targets[i] = sample.mask, sample.native_size, sample.label, sample.target
        return Batch(
            images_u8=torch.from_numpy(images),
            pseudo_mask=torch.from_numpy(masks),
            native_size=torch.from_numpy(sizes),
            sample_ids=torch.from_numpy(samples.sample_ids),
            epochs=torch.from_numpy(samples.epochs),
            position=position,
            replaced=tuple(replaced),
            damaged=tuple(damaged),
            labels=tuple(labels) if self.with_labels else (),
            targets_u8=_stacked(targets),
        )

    def _usable_sample(self, shard: int, row: int, damaged: list[str]) -> Sample:
        """The sample, or the first one after it in the shard that can be used; the others are added to `damaged`."""
        rows = int(self.corpus.shard_samples[shard])
        for step in range(rows):
            candidate = (row + step) % rows
            try:
                return self._sample(shard, candidate)
            except (DamagedSampleError, UndecodableImage) as reason:
                key = self.corpus.key(shard, candidate)
                damaged.append(f"{self.corpus.paths[shard].name} {key}: {reason}")
        raise TrainingError(f"{self.corpus.paths[shard]}: none of its {rows} samples can be used; make it anew")

    def _sample(self, shard: int, row: int) -> Sample:
        if isinstance(self.corpus, Pairs):
            poor, truth = self._read(shard, row, [])
            pair = self.corpus.prepare(shard, poor or b"", truth or b"")
            return Sample(pair.image, NO_MASK, pair.native_size, None, pair.target)
        parts = ["image", *(["mask"] if self.mask_mode == "stored" else []), *(["label"] if self.with_labels else [])]
        found = dict(zip(parts, self._read(shard, row, parts), strict=True))
        image = decode_rgb(found["image"] or b"")
        label = found.get("label")
        text = None if label is None else word_of(label, errors="replace")
        return Sample(resize_image(image), self._mask(image, found.get("mask")), image.shape[:2], text)

    def _mask(self, image: np.ndarray, stored: bytes | None) -> np.ndarray:
        if self.mask_mode is None:
            return NO_MASK
        return resize_mask(pseudo_mask(image, self.mask_mode) if stored is None else decode_mask(stored))

    def _read(self, shard: int, row: int, parts: list[str]) -> tuple[bytes | None, ...]:
        """The bytes of some parts of a sample."""
        for pause in self.patience:
            try:
                return self.corpus.read(shard, row, parts)
            except OSError as error:
                _log.warning("%s: %s; reading again in %s s", self.corpus.paths[shard], error.strerror, pause)
            self.corpus.close()
            time.sleep(pause)
        try:
            return self.corpus.read(shard, row, parts)
        except OSError as error:
            path = self.corpus.paths[shard]
            raise TrainingError(f"{path}: cannot be read ({error.strerror}); check the file system") from error


def _stacked(targets: list[np.ndarray | None]) -> Tensor | None:
    """Targets uint8 [H, W, C] as [B, C, H, W]; None where samples have none."""
    there = [np.moveaxis(target, -1, 0) for target in targets if target is not None]
    return torch.from_numpy(np.stack(there)) if there else None
