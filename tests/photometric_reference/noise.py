"""References of the noise group, without the filters."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "add_elementwise",
    "coarse_dropout",
    "drop_channels",
    "dropout",
    "gaussian_noise",
    "impulse_noise",
    "invert",
    "jpeg",
    "laplace_noise",
    "multiply",
    "multiply_elementwise",
    "pepper",
    "poisson_noise",
    "salt",
    "salt_and_pepper",
    "solarize",
]

Image: TypeAlias = Any  # an array; the stubs of numpy and OpenCV do not agree on which
Draw = Callable[[int], NDArray[np.float32]]


def planes(image: Image, draw: Draw, count: int) -> Image:
    """[H, W, count] draws; in memory the planes lie one after the other."""
    height, width = image.shape[:2]
    return draw(count * height * width).reshape(count, height, width).transpose(1, 2, 0)


def mixed(image: Image, draw: Draw, per_channel: float) -> Image:
    """[H, W, 3] or [H, W, 1] draws, by per_channel."""
    return planes(image, draw, 3 if per_channel < 0.5 else 1)


RANKS = (np.arange(4096) + 0.5) / 4096
NORMAL = np.array([NormalDist().inv_cdf(rank) for rank in RANKS], np.float32)
LAPLACE = np.where(RANKS < 0.5, np.log(2 * RANKS), -np.log(2 * (1 - RANKS))).astype(np.float32)


def quantile(table: Image, draws: Image) -> Image:
    return table[(draws * len(table)).astype(np.uint16)]


def salt_grey(quantile: Image) -> Image:
    return quantile * quantile * (3 - 2 * quantile)


def add_elementwise(image: Image, draw: Draw, bound: float) -> Image:
    return image + bound * (2 * planes(image, draw, 1) - 1)


def gaussian_noise(image: Image, draw: Draw, scale: float) -> Image:
    return image + scale * quantile(NORMAL, planes(image, draw, 1))


def laplace_noise(image: Image, draw: Draw, scale: float) -> Image:
    return image + scale * quantile(LAPLACE, planes(image, draw, 1))


def poisson_noise(image: Image, draw: Draw, rate: float) -> Image:
    draws = planes(image, draw, 2)
    z = quantile(NORMAL, draws[..., :1])
    count = np.maximum(np.rint(rate + np.sqrt(rate) * z + (z * z - 1) / 6), 0)
    return image + count * np.sign(draws[..., 1:] - 0.5)


def multiply(
    image: Image, draw: Draw, spread: float, per_channel: float, red: float, green: float, blue: float
) -> Image:
    draws = np.array([red, green, blue] if per_channel < 0.5 else [red] * 3, np.float32)
    return image * (1 + spread * (2 * draws - 1))


def multiply_elementwise(image: Image, draw: Draw, spread: float, per_channel: float) -> Image:
    return image * (1 + spread * (2 * mixed(image, draw, per_channel) - 1))


def dropout(image: Image, draw: Draw, share: float, per_channel: float) -> Image:
    return image * (mixed(image, draw, per_channel) >= share).view(np.uint8)


def coarse_dropout(image: Image, draw: Draw, share: float, size: float, per_channel: float) -> Image:
    height, width = image.shape[:2]
    rows, columns = max(int(size * height), 3), max(int(size * width), 3)
    kept = (mixed(image, draw, per_channel) >= share)[:rows, :columns].astype(np.uint8)
    grown = cv2.resize(kept, (width, height), interpolation=cv2.INTER_NEAREST)
    return image * grown.reshape(height, width, -1)


def drop_channels(image: Image, draw: Draw, share: float, red: float, green: float, blue: float) -> Image:
    draws = np.array([red, green, blue])
    return image * ((draws >= share) | (draws == draws.max())).view(np.uint8)


def _replaced(image: Image, draws: Image, share: float, low: float, high: float) -> Image:
    grey = salt_grey(low + (high - low) * draws / np.float32(max(share, 1e-6)))
    return np.where(draws < share, 255 * grey, image)


def impulse_noise(image: Image, draw: Draw, share: float) -> Image:
    return _replaced(image, planes(image, draw, 3), share, 0, 1)


def salt_and_pepper(image: Image, draw: Draw, share: float) -> Image:
    return _replaced(image, planes(image, draw, 1), share, 0, 1)


def salt(image: Image, draw: Draw, share: float) -> Image:
    return _replaced(image, planes(image, draw, 1), share, 0.5, 1)


def pepper(image: Image, draw: Draw, share: float) -> Image:
    return _replaced(image, planes(image, draw, 1), share, 0, 0.5)


def invert(image: Image, draw: Draw, probability: float, chance: float) -> Image:
    return 255 - image if chance < probability else image


def solarize(image: Image, draw: Draw, probability: float, threshold: float, chance: float) -> Image:
    return np.where(image >= threshold, 255 - image, image) if chance < probability else image


def jpeg(image: Image, draw: Draw, compression: float) -> Image:
    quality = round(1 + 99 * (1 - compression / 101))
    _, code = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(code, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[..., ::-1]
