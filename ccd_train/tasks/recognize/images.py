"""The word images that a user names, as files or in folders, and what stands in each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ccd_train.data.masks import UndecodableImage
from ccd_train.errors import UserError
from ccd_train.tasks.recognize.reading import Reader, Reading

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}  # of images in a folder
BATCH = 64


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


def _inside(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not inside:
        raise UserError(f"{path}: no image in or below this folder ({' '.join(sorted(SUFFIXES))})")
    return inside


def _bytes(path: Path) -> bytes | UndecodableImage:
    try:
        return path.read_bytes()
    except OSError as error:
        return UndecodableImage(error.strerror or str(error))
