"""From the bytes of a word crop to its pixels and its pseudo-mask: which pixels are text, without any label.

The pseudo-mask is 2-means on the grey levels, found exactly by Otsu's threshold (Otsu 1979: the threshold of least
variance within the two classes), and then the border decides which of the two is the background (Guan et al., ICCV
2023, and their `mask_create/generate_mask.py`). Both happen at the crop's own size, before it is resized.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

HEIGHT, WIDTH = 32, 128  # of every image that the networks see

MaskMode = Literal["otsu", "kmeans", "stored"]
Array = np.ndarray

# The orientation in EXIF is left alone, as readers of this field's LMDBs do: stored masks lie on the stored pixels.
DECODE_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# TIFF in both byte orders, GIF and JPEG 2000: where their transparency is noted has no fixed place.
MAYBE_TRANSPARENT = (b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ")
KMEANS_RUNS = 20  # scipy's default, which the official code uses
KMEANS_STOP = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-3)

# What OpenCV logs about damaged images does not say which; UndecodableImage reaches those who can name them.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UndecodableImage(Exception):  # noqa: N818
    """The bytes are no image that OpenCV can read to its end."""


def decode_rgb(data: bytes, upright: bool = False) -> Array:
    """The crop as uint8 [H, W, 3], RGB. Grey, palette, 16-bit and CMYK are converted, transparency is filled.

    `upright` turns it as its EXIF says, unless it is transparent. Raises UndecodableImage.
    """
    if _may_be_transparent(data):
        image = _decode(data, cv2.IMREAD_UNCHANGED)
        if image.ndim == 3 and image.shape[2] == 4 and image.dtype in (np.uint8, np.uint16):  # TIFF may hold floats
            return _fill_transparency(image)
    return _decode(data, cv2.IMREAD_COLOR_RGB if upright else DECODE_RGB)


def decode_grey(data: bytes) -> Array:
    """The image as uint8 [H, W]. Raises UndecodableImage."""
    return _decode(data, cv2.IMREAD_GRAYSCALE)


def decode_mask(data: bytes) -> Array:
    """A stored mask as uint8 0/1 [H, W]; tools of this field write text as 1 or as 255. Raises UndecodableImage."""
    mask = decode_grey(data)
    return (mask > (127 if mask.max() > 1 else 0)).astype(np.uint8)


def pseudo_mask(image: Array, mode: MaskMode = "otsu") -> Array:
    """Text = 1 in uint8 [H, W], from an RGB crop uint8 [H, W, 3]. An image of one grey level has no text."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    bright = _kmeans(grey) if mode == "kmeans" else _otsu(grey)
    return 1 - bright if background_is_bright(bright) else bright


def background_is_bright(bright: Array) -> bool:
    """Polarity: whether the class marked 1 in uint8 0/1 [H, W] fills more than half of at least 3 border lines.

    With exactly 2 of 4 the official code leaves it to the random numbering of its clusters; here the majority of all
    border pixels decides, and bright wins a tie, as paper is more common than blackboard.
    """
    lines = (bright[0], bright[-1], bright[:, 0], bright[:, -1])
    counts = [line.tobytes().count(1) for line in lines]  # on lines this short five times as fast as NumPy
    dominated: int = sum(2 * count > line.size for count, line in zip(counts, lines, strict=True))
    if dominated != 2:
        return dominated > 2
    corners = int(bright[0, 0]) + int(bright[0, -1]) + int(bright[-1, 0]) + int(bright[-1, -1])
    return bool(2 * (sum(counts) - corners) >= sum(line.size for line in lines) - 4)


def resize_image(image: Array) -> Array:
    """uint8 [32, 128, …] from uint8 [H, W, …]; bilinear and without keeping the aspect ratio, as the official code."""
    return np.asarray(cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR))


def resize_mask(mask: Array) -> Array:
    """uint8 0/1 [32, 128] from uint8 0/1 [H, W]: bilinear, then ≥ 0.5."""
    return (resize_image(mask * np.uint8(255)) >= 128).astype(np.uint8)


def _decode(data: bytes, flags: int) -> Array:
    if not data:
        raise UndecodableImage("no bytes")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # sizes beyond OpenCV's limits
        reason = "too many pixels" if "CV_IO_MAX_IMAGE" in error.err else str(error.err)
        raise UndecodableImage(reason) from error
    if image is None:
        raise UndecodableImage("not an image, or cut off")
    return np.asarray(image)


def _may_be_transparent(data: bytes) -> bool:
    """Whether the header says alpha or a transparent colour, or is of a kind where only decoding tells.

    PNG 11.2–11.3; WebP: RFC 9649, 2.7 (VP8X) and 3.4 (VP8L).
    """
    if data[:2] == JPEG or len(data) < 33:
        return False
    if data[:8] == PNG:
        colour_type = data[25]
        return colour_type in (4, 6) or b"tRNS" in data[33 : max(33, data.find(b"IDAT"))]
    if data[8:12] == b"WEBP":
        flags = {b"VP8X": data[20], b"VP8L": data[24]}.get(data[12:16], 0)
        return bool(flags & 0x10)
    return data.startswith(MAYBE_TRANSPARENT)


def _fill_transparency(image: Array) -> Array:
    """Lays uint8 or uint16 BGRA over white or black, whichever is farther from what can be seen."""
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    alpha = image[..., 3:].astype(np.float32) / 255
    seen = image[..., 2::-1].astype(np.float32) * alpha
    paper = 255.0 if seen.sum() <= 127.5 * 3 * alpha.sum() else 0.0
    return np.rint(seen + paper * (1 - alpha)).astype(np.uint8)


def _otsu(grey: Array) -> Array:
    """The brighter of the two classes as uint8 0/1 [H, W]."""
    return np.asarray(cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1])


def _kmeans(grey: Array) -> Array:
    """The brighter of two clusters as uint8 0/1 [H, W]: Lloyd's iterations, the best of several random starts."""
    if grey.min() == grey.max():
        return np.zeros_like(grey)
    cv2.setRNGSeed(0)  # a mask is a function of the image alone
    levels = grey.reshape(-1, 1).astype(np.float32)
    unset = np.empty((0, 1), np.int32)
    _, cluster, centers = cv2.kmeans(levels, 2, unset, KMEANS_STOP, KMEANS_RUNS, cv2.KMEANS_RANDOM_CENTERS)
    return np.asarray(np.reshape(cluster, grey.shape) == np.argmax(centers), np.uint8)
