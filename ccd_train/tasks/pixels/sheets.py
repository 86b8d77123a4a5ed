"""Pictures beside each other: input, output, truth, a row for each sample."""

from __future__ import annotations

import cv2
import numpy as np

COLUMNS = ("input", "output", "truth")
SCALE, MARGIN, TITLE = 2, 4, 18  # screen pixels


def as_rgb(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of a picture [H, W, 3], or of a mask [H, W, 1] with 1 for text and 255 for ignored, grey."""
    if picture.shape[-1] == 3:
        return picture
    levels = np.zeros(256, np.uint8)
    levels[[1, 255]] = (255, 110)
    return np.repeat(levels[picture], 3, axis=-1)


def draw(rows: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """A sheet uint8 [·, ·, 3] RGB of rows of pictures or masks."""
    cells = [[_cell(as_rgb(picture)) for picture in row] for row in rows]
    body = np.concatenate([np.concatenate(row, axis=1) for row in cells])
    sheet = np.concatenate([np.full((TITLE, body.shape[1], 3), 255, np.uint8), body])
    for number, title in enumerate(COLUMNS):
        place = (MARGIN + number * cells[0][0].shape[1], TITLE - 5)
        cv2.putText(sheet, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return sheet


def _cell(picture: np.ndarray) -> np.ndarray:
    large = cv2.resize(picture, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_NEAREST)
    return np.pad(large, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)
