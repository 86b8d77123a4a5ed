"""Pictures that a user names, of any size, through the network's window and back into files.

A mask is the network's share of text, enlarged to the picture and cut at one half. An enlarged picture is the bicubic
one at twice the size, and on it what the network has changed in its window: so nothing is lost of a picture that is
larger than the window.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from ccd_train.config.pixels import SEGMENT
from ccd_train.config.verbs import PaintOptions
from ccd_train.data.masks import UndecodableImage, decode_rgb
from ccd_train.data.pixels import by_route, fit, resize_bicubic
from ccd_train.errors import FINISHED, REFUSED, UserError
from ccd_train.files import write_json
from ccd_train.tasks.pixels.painting import Painter
from ccd_train.tasks.recognize.images import BATCH, find_images
from ccd_train.weights import pixels
from ccd_train.weights.pixels import TrainedPixels
from ccd_train.weights.writing import write_whole

WRITTEN = "written.json"


class Named(NamedTuple):
    """A picture, and the file that it becomes below the folder."""

    image: Path
    out: Path


class Painted(NamedTuple):
    """What came of a picture: a file, or why there is none."""

    image: Path
    out: Path | None
    size: tuple[int, int]
    """Width and height of the file."""
    reason: str


def open_task(options: PaintOptions, task: str) -> TrainedPixels:
    """The network of --weights. UserError if it learnt another task."""
    assert options.weights is not None
    trained = pixels.read(options.weights)
    if trained.task != task:
        raise UserError(f"{trained.origin}: learnt {trained.task}; give a network that learnt {task}")
    return trained


def paint_files(options: PaintOptions, trained: TrainedPixels) -> int:
    """Writes a PNG for each picture that is named, says so, and writes a list of all. Returns the exit code.

    UserError where it cannot be written.
    """
    assert options.out is not None
    remaining, done, painter = iter(find_named(options.images)), list[Painted](), Painter(trained)
    while batch := list(islice(remaining, BATCH)):
        for painted in _paint(batch, painter, trained, options.out):
            done.append(painted)
            if painted.out is None:
                print(f"{painted.image}: cannot be read ({painted.reason})", file=sys.stderr)
            else:
                print(painted.out, flush=True)
    listed = [
        {"image": str(one.image), "output": str(one.out), "width": one.size[0], "height": one.size[1]}
        if one.out is not None
        else {"image": str(one.image), "error": one.reason}
        for one in done
    ]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / WRITTEN, listed)
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error}); choose another --out") from None
    failed = sum(one.out is None for one in done)
    if failed:
        print(f"{failed} of {len(done)} pictures cannot be read", file=sys.stderr)
    return REFUSED if failed == len(done) else FINISHED


def find_named(names: tuple[str, ...]) -> list[Named]:
    """The pictures of files, folders, patterns and JSON lists; their files keep their place below a folder.

    UserError for a name that means nothing.
    """
    found: list[Named] = []
    taken: set[Path] = set()
    for name in names:
        for place in _meant(name):
            images, _ = find_images((place,))
            for image in images:
                below = (image.relative_to(place) if place.is_dir() else Path(image.name)).with_suffix("")
                out, number = below.with_name(f"{below.name}.png"), 2
                while out in taken:
                    out, number = below.with_name(f"{below.name}-{number}.png"), number + 1
                taken.add(out)
                found.append(Named(image, out))
    return found


def _meant(name: str) -> list[Path]:
    """The files and folders that a name means."""
    path = Path(name)
    if path.exists() and path.suffix == ".json":
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no JSON list of pictures ({error}); give a list of paths") from None
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise UserError(f"{path}: no JSON list of pictures; give a list of paths")
        return [path.parent / one for one in listed]
    if path.exists() or not glob.has_magic(name):
        return [path]
    found = sorted(map(Path, glob.glob(name, recursive=True)))
    if not found:
        raise UserError(f"{name}: no file is like this; give a picture, a folder, a pattern or a JSON list")
    return found


def _paint(batch: list[Named], painter: Painter, trained: TrainedPixels, folder: Path) -> Iterator[Painted]:
    pictures: list[np.ndarray | UndecodableImage] = [_decoded(named.image) for named in batch]
    windows = [_window(picture, trained) for picture in pictures if isinstance(picture, np.ndarray)]
    outputs = iter(zip(windows, painter.paint(np.stack(windows)), strict=True) if windows else ())
    for named, picture in zip(batch, pictures, strict=True):
        if not isinstance(picture, np.ndarray):
            yield Painted(named.image, None, (0, 0), str(picture))
            continue
        window, output = next(outputs)
        result = _mask(picture, output) if trained.task == SEGMENT else _enlarged(picture, window, output)
        stored = result if result.ndim == 2 else cv2.cvtColor(result, cv2.COLOR_RGB2BGR)
        write_whole(folder / named.out, cv2.imencode(".png", stored)[1].tobytes())
        yield Painted(named.image, folder / named.out, (result.shape[1], result.shape[0]), "")


def _decoded(path: Path) -> np.ndarray | UndecodableImage:
    try:
        return decode_rgb(path.read_bytes(), upright=True)
    except OSError as error:
        return UndecodableImage(error.strerror or str(error))
    except UndecodableImage as error:
        return error


def _window(picture: np.ndarray, trained: TrainedPixels) -> np.ndarray:
    """What the network sees, uint8 [32, 128, 3]."""
    if trained.task == SEGMENT:
        return fit(picture)
    return by_route(Image.fromarray(picture), trained.reading)  # type: ignore[arg-type]


def _mask(picture: np.ndarray, share: Tensor) -> np.ndarray:
    """uint8 [H, W], text 255."""
    height, width = picture.shape[:2]
    large = cv2.resize(share[0].numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(large > 0.5, 255, 0).astype(np.uint8)


def _enlarged(picture: np.ndarray, window: np.ndarray, output: Tensor) -> np.ndarray:
    """uint8 [2 H, 2 W, 3]."""
    size = (2 * picture.shape[1], 2 * picture.shape[0])
    change = output.permute(1, 2, 0).numpy() * 255 - window
    large = np.asarray(resize_bicubic(Image.fromarray(picture), size)).astype(np.float32)
    large += cv2.resize(change, size, interpolation=cv2.INTER_CUBIC)
    return np.rint(large).clip(0, 255).astype(np.uint8)
