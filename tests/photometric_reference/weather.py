"""References of the weather group."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

from photometric_reference.noise import Draw, Image, salt_grey

__all__ = ["clouds", "fog", "rain", "snow"]

ROWS, COLUMNS = 6, 24
WAVES = 4 * ROWS * COLUMNS


def smooth(image: Image, draws: Image, exponent: float) -> Image:
    """Noise in [0, 1] with a power law over its frequencies, [H, W, 1]."""
    height, width = image.shape[:2]
    v, u = np.arange(2 * ROWS) // 2, np.arange(2 * COLUMNS) // 2
    frequency = np.hypot(u, v[:, None])
    factors = (2 * draws.reshape(2 * ROWS, 2 * COLUMNS) - 1) * np.maximum(frequency, 1) ** exponent * (frequency > 0)
    noise = _waves(ROWS, height).T @ factors.astype(np.float32) @ _waves(COLUMNS, width)
    low, high = noise.min(), noise.max()
    return ((noise - low) / max(high - low, 1e-6))[..., None]


@lru_cache
def _waves(periods: int, size: int) -> Image:
    angle = np.arange(periods)[:, None] * np.arange(size) * (2 * np.pi / size)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).reshape(2 * periods, size).astype(np.float32)


def _layer(image: Image, opacity: Image, grey: float, texture: Image) -> Image:
    return (1 - opacity) * image + opacity * np.minimum(grey * (1 + (2 * texture - 1) / 5), 255)


def fog(image: Image, draw: Draw, grey: float, base: float, density: float, exponent: float, texture: float) -> Image:
    shape, grain = np.split(draw(2 * WAVES), 2)
    opacity = density * (base + 0.3 * smooth(image, shape, exponent))
    return _layer(image, np.minimum(opacity, 1), grey, smooth(image, grain, texture))


def clouds(
    image: Image,
    draw: Draw,
    grey: float,
    thin: float,
    thick: float,
    thin_exponent: float,
    thick_exponent: float,
    layers: float,
) -> Image:
    shape, shape_2, grain = np.split(draw(3 * WAVES), 3)
    texture = smooth(image, grain, thick_exponent)
    result = image
    if layers < 0.25 or layers >= 0.5:
        result = _layer(result, np.minimum(thin * smooth(image, shape, thin_exponent), 1), grey, texture)
    if layers >= 0.25:
        result = _layer(result, np.minimum(thick * smooth(image, shape_2, thick_exponent), 1), grey, texture)
    return result


def _specks(image: Image, draw: Draw, share: float, reach: int) -> Image:
    height, width = image.shape[:2]
    draws = draw((height + reach) * width).reshape(height + reach, width)
    return salt_grey(0.5 + 0.5 * draws / np.float32(max(share, 1e-6))) * (draws < share)


def _smeared(field: Image, length: int, slant: float, height: int) -> Image:
    """Each pixel is the mean of the `length` pixels above it; then the rows are moved sideways."""
    kernel = np.full((length, 1), 1 / length, np.float32)
    above = cv2.filter2D(field, -1, kernel, anchor=(0, length - 1), borderType=cv2.BORDER_CONSTANT)
    means = above[field.shape[0] - height - 1 : -1]
    moved = (np.arange(height) - height / 2) * math.tan(math.radians(slant))
    whole = np.floor(moved)
    share = (moved - whole)[:, None]
    rows, columns = np.mgrid[:height, : field.shape[1]]
    near = (columns + whole[:, None].astype(int)) % field.shape[1]
    far = (near + 1) % field.shape[1]
    return ((1 - share) * means[rows, near] + share * means[rows, far])[..., None].astype(np.float32)


def snow(
    image: Image,
    draw: Draw,
    density: float,
    size: float,
    uniformity: float,
    speed: float,
    slant: float,
    layers: float,
) -> Image:
    height, width = image.shape[:2]
    specks = _specks(image, draw, density * (1 - size) ** 2 * (int(layers * 3) + 1), 6)
    side = math.exp(-0.5 / (0.3 + size) ** 2)
    weights = np.array([side, 1, side], np.float32)
    flakes = 0.52 * (1 + size) * np.minimum(cv2.sepFilter2D(specks, -1, weights, weights), 1)
    flakes = _smeared(flakes, min(max(int(speed * width), 1), 6), slant, height)
    uneven = min(2 * (1 - uniformity), 1)
    flakes = 255 * (1 + 2.5 * uneven) * (uneven * flakes**2 + (1 - uneven) * flakes)
    return np.maximum(image + (0.1 + 20 * speed) * flakes, (1 + 20 * speed) * flakes)


def rain(image: Image, draw: Draw, density: float, speed: float, slant: float, layers: float) -> Image:
    height, width = image.shape[:2]
    specks = _specks(image, draw, density * (int(layers * 3) + 1), 38)
    streaks = np.minimum(1.3 * _smeared(specks, min(max(int(speed * width), 1), 38), slant, height), 1)
    return (1 - streaks) * image + 240 * streaks
