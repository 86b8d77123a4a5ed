"""References of the contrast group."""

from __future__ import annotations

import cv2
import numpy as np

from photometric_reference.noise import Draw, Image

__all__ = [
    "clahe",
    "clahe_channels",
    "equalize",
    "equalize_channels",
    "gamma",
    "linear_contrast",
    "log_contrast",
    "sigmoid_contrast",
]

SHARES = np.arange(256, dtype=np.float32) / 255


def _curve(image: Image, shares: Image) -> Image:
    return cv2.LUT(image, np.clip(np.rint(255 * shares), 0, 255).astype(np.uint8))


def gamma(image: Image, draw: Draw, exponent: float) -> Image:
    return _curve(image, SHARES**exponent)


def linear_contrast(image: Image, draw: Draw, factor: float) -> Image:
    return _curve(image, (127 + factor * (255 * SHARES - 127)) / 255)


def sigmoid_contrast(image: Image, draw: Draw, gain: float, cutoff: float) -> Image:
    return _curve(image, 1 / (1 + np.exp(gain * (cutoff - SHARES))))


def log_contrast(image: Image, draw: Draw, gain: float) -> Image:
    return _curve(image, gain * np.log2(1 + SHARES))


def _with_luma(image: Image, grey: Image, changed: Image) -> Image:
    return image + (changed.astype(np.int16) - grey)[..., None]


def equalize(image: Image, draw: Draw) -> Image:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return _with_luma(image, grey, cv2.equalizeHist(grey))


def equalize_channels(image: Image, draw: Draw) -> Image:
    return cv2.merge([cv2.equalizeHist(channel) for channel in cv2.split(image)])


def clahe(image: Image, draw: Draw, limit: float, tiles: float) -> Image:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return _with_luma(image, grey, cv2.createCLAHE(limit, (int(tiles), int(tiles))).apply(grey))


def clahe_channels(image: Image, draw: Draw, limit: float, tiles: float) -> Image:
    equalizer = cv2.createCLAHE(limit, (int(tiles), int(tiles)))
    return cv2.merge([equalizer.apply(channel) for channel in cv2.split(image)])
