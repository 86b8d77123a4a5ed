"""Small sets of pictures with their truth: rendered words with masks, and poor copies of them, as LMDBs."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import lmdb
import numpy as np

from ccd_train.data.masks import decode_mask, decode_rgb
from ccd_train.data.records import LmdbWriter
from data_tools.words import render


def png(picture: np.ndarray) -> bytes:
    """Of grey levels, or of RGB."""
    stored = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".png", stored)[1])


def write_crops(folder: Path, count: int, seed: int = 5) -> Path:
    """Rendered words; in picture n the first n mod 7 columns are ignored, so that parts of a set differ in it."""
    with LmdbWriter(folder) as writer:
        for index in range(count):
            word = render(seed, index, fonts=())
            codes = decode_mask(word.mask) * np.uint8(100)
            codes[:, : index % 7] = 255
            writer.add(word.image, word.label, png(codes))
    return folder


def write_pairs(folder: Path, count: int, seed: int = 5) -> Path:
    """Rendered words, and the same blurred at half their size."""
    records: dict[bytes, bytes] = {b"num-samples": b"%d" % count}
    for number in range(1, count + 1):
        word = render(seed, number - 1, fonts=())
        good = decode_rgb(word.image)
        height, width = good.shape[:2]
        blurred = cv2.GaussianBlur(good, (0, 0), 1.2)
        poor = cv2.resize(blurred, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_AREA)
        records[b"image_hr-%09d" % number], records[b"image_lr-%09d" % number] = png(good), png(poor)
        records[b"label-%09d" % number] = word.label.encode()
    return write_records(folder, records)


def write_records(folder: Path, records: dict[bytes, bytes]) -> Path:
    """Adds records to an LMDB, or replaces some; an empty value takes one away."""
    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(os.fsencode(folder), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            if value:
                transaction.put(key, value)
            else:
                transaction.delete(key)
    return folder
