"""The word images that a user names, as files or in folders, and what stands in each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ccd_train.data.masks import UndecodableImage
from ccd_train.data.trees import count_kinds, holds_image, is_hidden
from ccd_train.errors import UserError
from ccd_train.tasks.recognize.reading import Reader, Reading

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}  # whatever they hold
BATCH = 64


def find_images(paths: tuple[Path, ...]) -> tuple[list[Path], list[Path]]:
    """The images that are meant, those of a folder sorted, and the files in folders that are left out.

    Raises UserError for a missing path or a folder without images.
    """
    found: list[Path] = []
    left_out: list[Path] = []
    for path in paths:
        try:
            images, others = _inside(path)
        except OSError as error:  # the name is too long, or a folder above it is closed to us
            raise UserError(f"{path}: {error.strerror}; name an image or a folder that can be opened") from error
        found += images
        left_out += others
    return found, left_out


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


def _inside(path: Path) -> tuple[list[Path], list[Path]]:
    """The images that a path means, and the files that it does not."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path], []
    images: list[Path] = []
    others: list[Path] = []
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        image = not is_hidden(file, path) and (file.suffix.lower() in SUFFIXES or holds_image(file))
        (images if image else others).append(file)
    if not images:
        found = f"; what it holds is {count_kinds(others)}" if others else ""
        raise UserError(f"{path}: no image in or below this folder{found}")
    return images, others


def _bytes(path: Path) -> bytes | UndecodableImage:
    try:
        return path.read_bytes()
    except OSError as error:
        return UndecodableImage(error.strerror or str(error))
