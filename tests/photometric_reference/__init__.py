"""Every operation once more, for one image, with numpy, OpenCV and Pillow: what the batched ones are measured against.

A reference has the form `reference(image, draw, *parameters) -> image`:
    image       uint8 [H, W, 3] in RGB, of any size
    draw        gives n numbers in [0, 1), float32 [n]; the first numbers are the same however many are asked for
    parameters  numbers, those of the batched operation
    result      float or uint8 [H, W, 3]; rounding and clamping to 0–255 is the caller's
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from photometric_reference import color, contrast, noise, sharpness, weather
from photometric_reference.noise import Draw, Image

Reference = Callable[..., Image]

REFERENCES: dict[str, Reference] = {
    name: function
    for module in (noise, color, sharpness, contrast, weather)
    for name, function in vars(module).items()
    if name in module.__all__
}


def apply(name: str, image: NDArray[np.uint8], draw: Draw, *parameters: float) -> NDArray[np.uint8]:
    """The reference called `name`, rounded and clamped."""
    result = REFERENCES[name](image, draw, *parameters)
    if result.dtype != np.uint8:
        result = np.clip(np.rint(result), 0, 255)
    return np.asarray(result, np.uint8)


def hashed(seed: int) -> Draw:
    """The draws of `draws.spread` from one seed, in numpy."""
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)

    def draw(count: int) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            x = (np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + low) ^ high
            for by, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                x = (x ^ (x >> np.uint32(by))) * np.uint32(factor)
        return (x >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)

    return draw


def generated(generator: np.random.Generator) -> Draw:
    """Draws from a numpy generator: what a program would use that need not repeat itself."""
    return lambda count: generator.random(count, dtype=np.float32)
