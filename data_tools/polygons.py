"""Polygons around words: what is read of them, the boxes about them, and a word turned upright.

Coordinates are continuous: pixel (column c, row r) covers [c, c + 1) × [r, r + 1), so a box is a slice of the picture.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from data_tools.images import Refusal

CORNERS = 4


class Box(NamedTuple):
    """Columns left … right - 1 and rows top … bottom - 1."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def clipped(self, width: int, height: int) -> Box:
        """What of it lies in a picture of that size; of no width or no height where nothing does."""
        left, right = (min(max(x, 0), width) for x in (self.left, self.right))
        top, bottom = (min(max(y, 0), height) for y in (self.top, self.bottom))
        return Box(left, top, right, bottom)

    def of(self, picture: np.ndarray) -> np.ndarray:
        return picture[self.top : self.bottom, self.left : self.right]


def read_polygon(flat: object) -> np.ndarray:
    """float64 [N, 2], x and y of each corner, from `[x1, y1, x2, y2, …]`. Raises Refusal unless it has an area."""
    try:
        corners = np.array(flat, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise Refusal("polygon", f"no list of x and y: {str(flat)[:60]}") from None
    if len(corners) < 3 or not np.isfinite(corners).all() or np.abs(corners).max() > 1e6:
        raise Refusal("polygon", f"no polygon: {str(flat)[:60]}")
    if cv2.contourArea(cv2.convexHull(corners.astype(np.float32))) == 0:
        raise Refusal("no area", f"a polygon without area: {str(flat)[:60]}")
    return corners


def box_about(polygon: np.ndarray) -> Box:
    """The smallest axis-aligned box of whole pixels."""
    left, top = np.floor(polygon.min(0)).astype(int)
    right, bottom = np.ceil(polygon.max(0)).astype(int)
    return Box(int(left), int(top), int(right), int(bottom))


def rectangle_about(polygon: np.ndarray) -> np.ndarray:
    """The smallest rotated rectangle, float64 [4, 2]: its corners as one reads, clockwise from the top left.

    A polygon of four corners says which that is. One of more says only how it lies: the top is the side that runs to
    the right and is turned by 45° at most.
    """
    corners = cv2.boxPoints(cv2.minAreaRect(polygon.astype(np.float32))).astype(np.float64)  # clockwise
    turns = [np.roll(corners, -turn, axis=0) for turn in range(CORNERS)]
    if len(polygon) == CORNERS:
        return min(turns, key=lambda turned: float(np.abs(turned - _clockwise(polygon)).sum()))
    return max(turns, key=lambda turned: float(turned[1, 0] - turned[0, 0]) - abs(float(turned[1, 1] - turned[0, 1])))


def size_of(rectangle: np.ndarray) -> tuple[int, int]:
    """Width and height in whole pixels."""
    top_left, top_right, _, bottom_left = rectangle
    return round(float(np.hypot(*(top_right - top_left)))), round(float(np.hypot(*(bottom_left - top_left))))


def turn_upright(picture: np.ndarray, codes: np.ndarray, rectangle: np.ndarray, outside: int) -> tuple[np.ndarray, ...]:
    """Picture uint8 [h, w, 3] (bilinear) and codes uint8 [h, w] (the nearest pixel) within a rotated rectangle.

    Beyond the picture its border goes on, and the codes are `outside`.
    """
    width, height = size_of(rectangle)
    there = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    half = np.float32(0.5)  # OpenCV counts from the middle of the first pixel
    matrix = cv2.getPerspectiveTransform(rectangle.astype(np.float32) - half, there - half)
    size = (width, height)
    turned = cv2.warpPerspective(picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.warpPerspective(
        codes, matrix, size, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=outside
    )
    return np.asarray(turned), np.asarray(mask)


def _clockwise(polygon: np.ndarray) -> np.ndarray:
    """The corners from the same one on, the other way round if they run anticlockwise: words are never mirrored."""
    x, y = polygon.T
    area = float(x @ np.roll(y, -1) - y @ np.roll(x, -1))
    return polygon if area >= 0 else np.roll(polygon[::-1], 1, axis=0)
