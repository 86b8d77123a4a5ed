"""Rendered words of the measurements: LMDBs with labels and true glyph masks, and shards of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ccd_train.data.masks import decode_rgb, pseudo_mask
from ccd_train.data.records import LmdbWriter
from ccd_train.data.shards import MANIFEST
from ccd_train.errors import UserError
from data_tools import convert
from data_tools.fonts import FOLDERS
from data_tools.words import render

DEJAVU = 22  # faces
INK, PAPER = 40, 220  # grey levels of text and background, where words are levelled


@dataclass(frozen=True)
class Kind:
    """What words are rendered."""

    alphabet: str = ""
    """Random strings of these characters; empty: words, strings and numbers as `ccd-data synth` has them."""
    length: tuple[int, int] = (3, 7)
    """Of the random strings."""
    level: bool = False
    """All dark on light, by their pseudo-masks."""
    fonts: tuple[str, ...] = ()
    """Files; empty: Pillow's own font."""


def dejavu() -> tuple[str, ...]:
    """The faces of DejaVu by file name: what is published was drawn with them, whatever else is installed."""
    found = [path for folder in FOLDERS for path in Path(folder).expanduser().rglob("DejaVu*.ttf")]
    faces = {path.name: str(path) for path in sorted(found)}
    if len(faces) != DEJAVU:
        raise UserError(
            f"{len(faces)} of {DEJAVU} faces of DejaVu in {', '.join(FOLDERS)}: install them (fonts-dejavu)"
        )
    return tuple(faces[name] for name in sorted(faces))


def levelled(data: bytes) -> bytes:
    """The same crop as grey levels, its pseudo-mask's text at INK and the rest at PAPER in the mean. Texture stays."""
    image = decode_rgb(data)
    grey, text = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), pseudo_mask(image) > 0
    if not text.any() or text.all():
        return data
    ink, paper = grey[text].mean(), grey[~text].mean()
    share = (grey - paper) / (ink - paper if abs(ink - paper) > 1 else 1)
    levels = np.clip(np.rint(PAPER + (INK - PAPER) * share), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def write_words(path: Path, count: int, seed: int, kind: Kind) -> Path:
    """An LMDB of rendered words, whole or not there; what is there already stays."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with LmdbWriter(unfinished) as writer:
            for index in range(count):
                word = render(seed, index, kind.fonts, kind.alphabet, kind.length)
                writer.add(levelled(word.image) if kind.level else word.image, word.label, word.mask)
        unfinished.rename(path)
    return path


def write_shards(path: Path, words: Path) -> Path:
    """Shards of an LMDB, with labels and masks; finished ones stay."""
    if not (path / MANIFEST).exists():
        code = convert.main(["--src", str(words), "--out", str(path), "--name", "words", "--workers", "1"])
        assert code == 0, "the words cannot be converted"
    return path
