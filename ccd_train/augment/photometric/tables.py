"""Constants on the device, and tables to look values up in.

A constant is copied to its device once: a copy from the host would wait for all that the device has still to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

QUANTILES = 4096  # entries of a table of quantiles: 12 bits of a draw

Values = float | Sequence[float] | Sequence[Sequence[float]]


@cache
def constant(values: Values, device: torch.device) -> Tensor:
    """The same float32 tensor at every call, for tuples of numbers; not to be changed."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def normal_quantiles(device: torch.device) -> Tensor:
    """Of the standard normal distribution: float32 [1, 4096], from −3.7 to 3.7."""
    ranks = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    quantiles: Tensor = torch.special.ndtri(ranks)
    return quantiles.to(device, torch.float32)[None]


@cache
def laplace_quantiles(device: torch.device) -> Tensor:
    """Of the Laplace distribution of scale 1: float32 [1, 4096], −sign(v) ln(1 − |v|) of v in (−1, 1)."""
    sides = (2 * torch.arange(QUANTILES, dtype=torch.float64) + 1) / QUANTILES - 1
    return (-sides.sign() * torch.log1p(-sides.abs())).to(device, torch.float32)[None]


@cache
def waves(periods: int, size: int, scale: int, device: torch.device) -> Tensor:
    """Whole float32 [2 periods, size]: cosine and sine of 0, 1, … periods over `size` pixels, times `scale`."""
    angle = torch.arange(periods, dtype=torch.float64)[:, None] * torch.arange(size) * (2 * torch.pi / size)
    return (torch.stack([angle.cos(), angle.sin()], dim=1).flatten(0, 1) * scale).round().to(device, torch.float32)


@cache
def cosines(size: int, scale: int, device: torch.device) -> Tensor:
    """Whole float32 [size, size]: the matrix of the orthonormal discrete cosine transform, times `scale`."""
    place = torch.arange(size, dtype=torch.float64)
    matrix: Tensor = torch.cos(place[:, None] * (2 * place[None, :] + 1) * (torch.pi / (2 * size)))
    matrix = matrix * float(2 / size) ** 0.5
    matrix[0] *= 0.5**0.5
    return (matrix * scale).round().to(device, torch.float32)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replaces every value, cut to a whole number below N, by what its row's table says.

    Tables [R, N] for the R equal parts of images [B, C, H, W] in memory order: R = B for a table per image. A look-up
    takes a fifth of the time of computing a power, and gives the same bits everywhere.
    """
    index = images.to(torch.int32).view(len(tables), -1)
    if len(tables) > 1:
        index += torch.arange(0, tables.numel(), tables.shape[1], dtype=torch.int32, device=images.device)[:, None]
    return tables.to(images.dtype).reshape(-1).index_select(0, index.view(-1)).view_as(images)
