"""Poor pictures made from good ones: pairs for super-resolution, in the layout of TextZoom.

A picture is a pure function of the good one and of (seed, index), so any process may make any of them.
"""

from __future__ import annotations

import cv2
import numpy as np

from ccd_train.data.masks import decode_rgb

ROWS = (9.0, 16.0)  # of the small picture at most: TextZoom's networks see 64 × 16
LEAST = 4  # pixels a side of the small picture
BLUR = (0.3, 0.8)  # standard deviation in its pixels, before it is made small
NOISE = (1.0, 6.0)  # standard deviation in grey levels
QUALITY = (60, 95)  # of the small picture's JPEG
STORED = 95  # JPEG quality of the enlarged one
_STREAM = 1  # of the draws: those of the word itself have (seed, index) alone


def degrade(good: np.ndarray, seed: int, index: int) -> np.ndarray:
    """The poor picture uint8 [H, W, 3] of a good one, both RGB: of the same size, as TextZoom stores it.

    Blur → at most half the size, by area → noise → JPEG → the old size, bicubic.
    """
    rng = np.random.default_rng((seed, index, _STREAM))
    height, width = good.shape[:2]
    scale = max(2.0, height / rng.uniform(*ROWS))
    small = (max(LEAST, round(width / scale)), max(LEAST, round(height / scale)))
    blurred = cv2.GaussianBlur(good, (0, 0), rng.uniform(*BLUR) * scale)
    shrunk = cv2.resize(blurred, small, interpolation=cv2.INTER_AREA).astype(np.float32)
    noisy = shrunk + rng.uniform(*NOISE) * rng.standard_normal(shrunk.shape, np.float32)
    pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    coded = cv2.imencode(
        ".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(*QUALITY, endpoint=True))]
    )[1]
    return np.asarray(cv2.resize(decode_rgb(coded.tobytes()), (width, height), interpolation=cv2.INTER_CUBIC))
