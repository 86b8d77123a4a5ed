"""References of the filters and blurs."""

from __future__ import annotations

import math

import cv2
import numpy as np
import PIL.Image
import PIL.ImageFilter

from photometric_reference.noise import Draw, Image

__all__ = [
    "average_blur",
    "bilateral_blur",
    "contour",
    "directed_edge_detect",
    "edge_detect",
    "edge_enhance_more",
    "emboss",
    "gaussian_blur",
    "median_blur_3",
    "median_blur_5",
    "median_blur_7",
    "motion_blur",
    "sharpen",
]


def _matrix(rows: list[list[float]]) -> Image:
    return np.array(rows, np.float32)


IDENTITY = _matrix([[0, 0, 0], [0, 1, 0], [0, 0, 0]])


def _filtered(image: Image, alpha: float, kernel: Image) -> Image:
    return cv2.filter2D(image, -1, ((1 - alpha) * IDENTITY + alpha * kernel).astype(np.float32))


def emboss(image: Image, draw: Draw, alpha: float, strength: float) -> Image:
    s = strength
    return _filtered(image, alpha, _matrix([[-1 - s, -s, 0], [-s, 1, s], [0, s, 1 + s]]))


def edge_detect(image: Image, draw: Draw, alpha: float) -> Image:
    return _filtered(image, alpha, _matrix([[0, 1, 0], [1, -4, 1], [0, 1, 0]]))


def directed_edge_detect(image: Image, draw: Draw, alpha: float, direction: float) -> Image:
    toward = np.array([math.sin(2 * math.pi * direction), -math.cos(2 * math.pi * direction)])
    kernel = np.zeros((3, 3), np.float32)
    for y in (-1, 0, 1):
        for x in (-1, 0, 1):
            if (x, y) != (0, 0):
                cosine = np.dot(toward, (x, y)) / math.hypot(x, y)
                kernel[y + 1, x + 1] = (1 - math.acos(np.clip(cosine, -1, 1)) / math.pi) ** 4
    kernel /= -kernel.sum()
    kernel[1, 1] = 1
    return _filtered(image, alpha, kernel)


def edge_enhance_more(image: Image, draw: Draw) -> Image:
    return np.asarray(PIL.Image.fromarray(image).filter(PIL.ImageFilter.EDGE_ENHANCE_MORE))


def contour(image: Image, draw: Draw) -> Image:
    return np.asarray(PIL.Image.fromarray(image).filter(PIL.ImageFilter.CONTOUR))


def sharpen(image: Image, draw: Draw, alpha: float, lightness: float) -> Image:
    return _filtered(image, alpha, _matrix([[-1, -1, -1], [-1, 8 + lightness, -1], [-1, -1, -1]]))


def gaussian_blur(image: Image, draw: Draw, sigma: float) -> Image:
    return cv2.GaussianBlur(image, (5, 5), sigma)


def average_blur(image: Image, draw: Draw, size: float) -> Image:
    return cv2.blur(image, (int(size), int(size)))


def median_blur_3(image: Image, draw: Draw) -> Image:
    return cv2.medianBlur(image, 3)


def median_blur_5(image: Image, draw: Draw) -> Image:
    return cv2.medianBlur(image, 5)


def median_blur_7(image: Image, draw: Draw) -> Image:
    return cv2.medianBlur(image, 7)


def motion_blur(image: Image, draw: Draw, angle: float, direction: float) -> Image:
    line = np.zeros((9, 9), np.float32)  # with a margin that the rotated line cannot leave
    line[2:7, 4] = np.linspace(direction, 1 - direction, 5)
    turn = cv2.getRotationMatrix2D((4, 4), math.degrees(2 * math.pi * angle), 1)
    kernel = cv2.warpAffine(line, turn, (9, 9), flags=cv2.INTER_LINEAR)[2:7, 2:7]
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def bilateral_blur(image: Image, draw: Draw, diameter: float, sigma_color: float, sigma_space: float) -> Image:
    return cv2.bilateralFilter(image, int(diameter), sigma_color, sigma_space)
