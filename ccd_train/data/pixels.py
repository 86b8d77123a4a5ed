"""From the bytes of a picture and of its truth to arrays of the network's size.

Super-resolution prepares with Pillow, bicubic and without keeping the aspect ratio, as JasonBoy1/TextZoom and
FaltingsA/SSM do; segmentation bilinearly (by area where it shrinks), and its masks by the nearest pixel, so that codes
stay codes.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ccd_train.config.pixels import Effects, Route
from ccd_train.data.masks import HEIGHT, WIDTH, UndecodableImage, decode_rgb

Array = np.ndarray

GROUND, WORD, EFFECT, IGNORED = 0, 100, 200, 255  # codes of TextSeg's masks
MEANINGS: dict[Effects, int] = {"background": 0, "text": 1, "ignored": IGNORED}
SMALL = (WIDTH // 2, HEIGHT // 2)  # of TextZoom's problem
SIZE = (WIDTH, HEIGHT)
_FAILURES = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged content


def open_rgb(data: bytes) -> Image.Image:
    """The picture as Pillow sees it, in RGB. Raises UndecodableImage."""
    return _opened(data).convert("RGB")


def resize_bicubic(image: Image.Image, size: tuple[int, int] = SIZE) -> Image.Image:
    """Pillow's bicubic to (width, height), without keeping the aspect ratio."""
    return image.resize(size, Image.Resampling.BICUBIC)


def by_route(image: Image.Image, route: Route) -> Array:
    """The network's input uint8 [32, 128, 3] from a stored LR picture of any size."""
    return np.asarray(resize_bicubic(image if route == "stored" else resize_bicubic(image, SMALL)))


def fit(image: Array) -> Array:
    """uint8 [32, 128, 3] from uint8 [H, W, 3]: each side bilinear where it grows, by area where it shrinks."""
    height, width = image.shape[:2]
    smaller = (min(width, WIDTH), min(height, HEIGHT))
    if smaller != (width, height):
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(image, SIZE, interpolation=cv2.INTER_LINEAR))


def fit_mask(mask: Array) -> Array:
    """uint8 [32, 128] from uint8 [H, W], by the nearest pixel."""
    return np.asarray(cv2.resize(mask, SIZE, interpolation=cv2.INTER_NEAREST_EXACT))


def decode_codes(data: bytes) -> Array:
    """A mask of TextSeg's codes, uint8 [H, W]. Raises UndecodableImage for anything else, with what it is."""
    mask = _opened(data)
    if mask.mode != "L":
        raise UndecodableImage(f"a mask of {_kind(mask.mode)}, not of one grey channel")
    codes = np.asarray(mask)
    strange = sorted(set(np.unique(codes).tolist()) - {GROUND, WORD, EFFECT, IGNORED})
    if strange:
        raise UndecodableImage(
            f"code {', '.join(map(str, strange[:4]))} in the mask, which is none of 0, 100, 200, 255"
        )
    return codes


def decode_grey_mask(data: bytes) -> Array:
    """A mask of FaltingsA/SSM's folders as codes, uint8 [H, W]: text from half of white on, as JPEG makes it grey."""
    grey = np.asarray(_opened(data).convert("L"))
    return np.where(grey >= 128, WORD, GROUND).astype(np.uint8)


def labels_of(codes: Array, effects: Effects) -> Array:
    """What to learn of codes uint8: 0, 1 for text, 255 for ignored."""
    table = np.full(256, IGNORED, np.uint8)
    table[[GROUND, WORD, EFFECT]] = (0, 1, MEANINGS[effects])
    return np.asarray(table[codes])


def check_sizes(image: bytes, codes: Array) -> Array:
    """The picture uint8 [H, W, 3] that a mask lies on. Raises UndecodableImage if their sizes differ."""
    picture = decode_rgb(image)
    if picture.shape[:2] != codes.shape:
        sizes = (f"{shape[1]}×{shape[0]}" for shape in (codes.shape, picture.shape))
        raise UndecodableImage("a mask of {} pixels for a picture of {}".format(*sizes))
    return picture


def _opened(data: bytes) -> Image.Image:
    """The picture, decoded to its end. Raises UndecodableImage."""
    if not data:
        raise UndecodableImage("no bytes")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        raise UndecodableImage("not an image") from None
    except _FAILURES as error:
        raise UndecodableImage(str(error).splitlines()[0] if str(error) else "cut off") from None
    return image


def _kind(mode: str) -> str:
    known: dict[str, str] = {"P": "a palette", "RGB": "3 channels", "RGBA": "4 channels", "1": "single bits"}
    return known.get(mode, f"mode {mode}")
