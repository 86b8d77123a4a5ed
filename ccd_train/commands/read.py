"""Reads the words in images.

    ccd-train read --weights RUN word.png other.jpg       path, text and confidence, a line each
    ccd-train read --weights RUN FOLDER --json            every image in and below a folder, as JSON lines

An image is one word, as detectors crop them. Images that cannot be read are named on the error output and counted; the
exit code is 2 if none could be read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ccd_train.config.options import parse
from ccd_train.data.masks import UndecodableImage
from ccd_train.errors import FINISHED, REFUSED, UserError
from ccd_train.tasks.recognize.reading import Reader, Reading, RecognizerSource

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}  # of images in a folder
BATCH = 64


@dataclass(frozen=True)
class ReadOptions(RecognizerSource):
    """Read the words in images."""

    images: tuple[Path, ...] = field(default=(), metadata={"positional": True})
    """Images, or folders with images in and below them."""
    json: bool = False
    """Print JSON lines, with the confidence of every character."""

    def check(self) -> None:
        super().check()
        if not self.images:
            raise UserError("name an image or a folder of images: ccd-train read --weights RUN IMAGE")


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """The images that are meant, those of a folder sorted. Raises UserError for a missing path or an empty folder."""
    found: list[Path] = []
    for path in paths:
        try:
            found += _inside(path)
        except OSError as error:  # the name is too long, or a folder above it is closed to us
            raise UserError(f"{path}: {error.strerror}; name an image or a folder that can be opened") from error
    return found


def readings(reader: Reader, paths: list[Path]) -> Iterator[tuple[Path, Reading | str]]:
    """What stands in each image, or why it cannot be read."""
    remaining = iter(paths)
    while batch := list(islice(remaining, BATCH)):
        contents = [_bytes(path) for path in batch]
        images = [content for content in contents if isinstance(content, bytes)]
        found = iter(reader.read(images, upright=True))
        for path, content in zip(batch, contents, strict=True):
            reading = next(found) if isinstance(content, bytes) else content
            assert not isinstance(reading, bytes)
            yield path, reading if isinstance(reading, Reading) else str(reading)


def main(argv: list[str]) -> int:
    options = parse(ReadOptions, argv, "ccd-train read")
    options.check()
    paths = find_images(options.images)
    unreadable = 0
    for path, reading in readings(Reader(options.open()), paths):
        if isinstance(reading, str):
            unreadable += 1
            print(f"{_name(path)}: cannot be read ({reading})", file=sys.stderr)
        if options.json:
            print(json.dumps(_record(path, reading), ensure_ascii=False))
        elif isinstance(reading, Reading):
            print(f"{_name(path)}\t{reading.text}\t{reading.confidence:.3f}")
    if unreadable:
        print(f"{unreadable} of {len(paths)} images cannot be read", file=sys.stderr)
    return REFUSED if unreadable == len(paths) else FINISHED


def _inside(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not inside:
        raise UserError(f"{path}: no image in or below this folder ({' '.join(sorted(SUFFIXES))})")
    return inside


def _name(path: Path) -> str:
    """The path as it can be printed: bytes in it that are not UTF-8 as \\udcXX."""
    return str(path).encode(errors="backslashreplace").decode()


def _bytes(path: Path) -> bytes | UndecodableImage:
    try:
        return path.read_bytes()
    except OSError as error:
        return UndecodableImage(error.strerror or str(error))


def _record(path: Path, reading: Reading | str) -> dict[str, object]:
    if isinstance(reading, str):
        return {"image": _name(path), "error": reading}
    return {
        "image": _name(path),
        "text": reading.text,
        "confidence": round(reading.confidence, 6),
        "characters": [round(confidence, 6) for confidence in reading.characters],
    }
