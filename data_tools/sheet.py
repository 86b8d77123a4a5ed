"""Contact sheets: small pictures above one another, with a line of figures below, in rows."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ccd_train.data.masks import HEIGHT, WIDTH

SCALE = 1.5  # of the crops
COLUMNS = 8


def cell(tiles: Sequence[np.ndarray], text: str) -> np.ndarray:
    """uint8 [h, w, 3]: pictures uint8 [H, W, 3], each at the size of a crop, and a line in ASCII."""
    size = (int(WIDTH * SCALE), int(HEIGHT * SCALE))
    stacked = np.vstack([cv2.resize(tile, size, interpolation=cv2.INTER_NEAREST) for tile in tiles])
    line = np.full((16, size[0], 3), 255, np.uint8)
    cv2.putText(line, text, (2, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    return np.pad(np.vstack([stacked, line]), ((4, 4), (4, 4), (0, 0)), constant_values=255)


def arrange(cells: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [H, W, 3]: cells of one size in rows, the last one filled up with white."""
    blank = np.full_like(cells[0], 255)
    rows = [list(cells[start : start + COLUMNS]) for start in range(0, len(cells), COLUMNS)]
    rows[-1] += [blank] * (COLUMNS - len(rows[-1]) if len(rows) > 1 else 0)
    return np.vstack([np.hstack(row) for row in rows])


def encode(picture: np.ndarray) -> bytes:
    """A PNG of uint8 [H, W, 3], RGB."""
    return bytes(cv2.imencode(".png", picture[..., ::-1])[1])
