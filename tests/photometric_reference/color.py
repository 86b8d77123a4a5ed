"""References of the colour group."""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np

from photometric_reference.noise import Draw, Image

__all__ = [
    "add_hue_saturation",
    "brightness",
    "channel_shuffle",
    "grey_blend",
    "hue",
    "hue_far",
    "kmeans_colors",
    "multiply_brightness",
    "multiply_hue_saturation",
    "temperature",
    "uniform_colors",
]


def _to_hsv(image: Image) -> Image:
    """Hue in degrees, saturation and value in [0, 1]."""
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)


def _from_hsv(hsv: Image) -> Image:
    hsv[..., 0] %= 360
    hsv[..., 1] = np.clip(hsv[..., 1], 0, 1)
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def hue(image: Image, draw: Draw, shift: float) -> Image:
    hsv = _to_hsv(image)
    hsv[..., 0] += 2 * shift
    return _from_hsv(hsv)


def hue_far(image: Image, draw: Draw, shift: float) -> Image:
    return hue(image, draw, shift)


def add_hue_saturation(image: Image, draw: Draw, shift: float, saturation: float) -> Image:
    hsv = _to_hsv(image)
    hsv[..., 0] += 2 * shift
    hsv[..., 1] += saturation / 255
    return _from_hsv(hsv)


def multiply_hue_saturation(image: Image, draw: Draw, hue_factor: float, saturation_factor: float) -> Image:
    hsv = _to_hsv(image)
    hsv[..., 0] *= hue_factor
    hsv[..., 1] *= saturation_factor
    return _from_hsv(hsv)


def brightness(image: Image, draw: Draw, factor: float, shift: float, space: float, order: float) -> Image:
    def change(values: Image) -> Image:
        changed = (values + shift) * factor if order < 0.5 else values * factor + shift
        return np.clip(changed, 0, 255)

    if space < 1 / 3:
        hsv = _to_hsv(image)
        hsv[..., 2] = change(255 * hsv[..., 2]) / 255
        return _from_hsv(hsv)
    grey = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY)
    return image + (change(grey) - grey)[..., None]


def multiply_brightness(image: Image, draw: Draw, factor: float, space: float) -> Image:
    return brightness(image, draw, factor, 0.0, space, 0.0)


def grey_blend(image: Image, draw: Draw, alpha: float) -> Image:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, 1 - alpha, grey, alpha, 0)


def temperature(image: Image, draw: Draw, kelvin: float) -> Image:
    t = kelvin / 100
    red = 255.0 if t <= 66 else 329.698727446 * (t - 60) ** -0.1332047592
    green = 99.4708025861 * math.log(t) - 161.1195681661 if t <= 66 else 288.1221695283 * (t - 60) ** -0.0755148492
    blue = 255.0 if t >= 66 else 138.5177312231 * math.log(max(t - 10, 0.1)) - 305.0447927307
    return image * (np.clip([red, green, blue], 0, 255) / 255)


def uniform_colors(image: Image, draw: Draw, colors: float) -> Image:
    table = (np.arange(256) * int(colors) // 256 + 0.5) * 256 / colors
    return cv2.LUT(image, np.rint(table).astype(np.uint8))


def kmeans_colors(image: Image, draw: Draw, colors: float) -> Image:
    pixels = image.reshape(-1, 3).astype(np.float32)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 10, 1.0)
    cv2.setRNGSeed(1)
    labels = np.zeros((len(pixels), 1), np.int32)
    _, _, centers = cv2.kmeans(pixels, int(colors), labels, stop, 1, cv2.KMEANS_RANDOM_CENTERS)
    return centers[labels[:, 0]].reshape(image.shape)


def channel_shuffle(image: Image, draw: Draw, probability: float, chance: float, order: float) -> Image:
    return image[..., list(itertools.permutations(range(3)))[int(order * 6)]] if chance < probability else image
