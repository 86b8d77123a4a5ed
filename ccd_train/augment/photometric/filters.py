"""Filters of a few pixels: sums of shifted images, in a fixed order, with a kernel per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.photometric.tables import constant

IDENTITY = ((0, 0, 0), (0, 1, 0), (0, 0, 0))
LAPLACIAN = ((0, 1, 0), (1, -4, 1), (0, 1, 0))
NEIGHBOURS = ((-1, -1, -1), (-1, 0, -1), (-1, -1, -1))


def correlate(images: Tensor, kernels: Tensor, border: str = "reflect") -> Tensor:
    """Images [B, C, H, W] filtered with kernels [B, k, k], k odd; beyond the border as F.pad says."""
    height, width = images.shape[-2:]
    side = kernels.shape[-1]
    padded = F.pad(images, (side // 2,) * 4, mode=border)
    weights = kernels[:, :, :, None, None, None].unbind(1)
    result = torch.zeros_like(images)
    for row, of_row in enumerate(weights):
        for column, weight in enumerate(of_row.unbind(1)):
            result.addcmul_(padded[:, :, row : row + height, column : column + width], weight)
    return result


def blend_kernels(alpha: Tensor, kernels: Tensor) -> Tensor:
    """(1 − alpha) identity + alpha kernel: alpha [B, 1, 1, 1], kernels [B or 1, 3, 3] → [B, 3, 3]."""
    alpha = alpha.view(-1, 1, 1)
    return (1 - alpha) * constant(IDENTITY, alpha.device) + alpha * kernels


def emboss(images: Tensor, seeds: Tensor, alpha: Tensor, strength: Tensor) -> Tensor:
    """A light from one corner: the kernel of the official chain, for a strength s.

    −1−s  −s   0
     −s    1   s
      0    s  1+s
    """
    slope = strength.view(-1, 1, 1) * constant(((-1, -1, 0), (-1, 0, 1), (0, 1, 1)), alpha.device)
    diagonal = constant(((-1, 0, 0), (0, 1, 0), (0, 0, 1)), alpha.device)
    return correlate(images, blend_kernels(alpha, slope + diagonal))


def edge_detect(images: Tensor, seeds: Tensor, alpha: Tensor) -> Tensor:
    """Blends towards the Laplacian."""
    return correlate(images, blend_kernels(alpha, constant(LAPLACIAN, alpha.device)))


def directed_edge_detect(images: Tensor, seeds: Tensor, alpha: Tensor, direction: Tensor) -> Tensor:
    """Blends towards the difference from the neighbours in one direction (0 … 1: a full turn, clockwise from the top).

    A neighbour that lies d of a half turn away from the direction weighs (1 − d)⁴; the weights add up to −1.
    """
    offset = torch.arange(-1, 2, dtype=torch.float64, device=images.device)
    bearing = torch.atan2(offset[None, :], -offset[:, None])  # of the neighbours, clockwise from the top
    turn = (bearing - direction.view(-1, 1, 1) * (2 * math.pi)).abs() / math.pi  # in half turns
    turn = torch.minimum(turn.remainder(2), 2 - turn.remainder(2))
    weights = (1 - turn).pow(4) * constant(NEIGHBOURS, images.device)
    kernels = constant(IDENTITY, images.device) - weights / weights.flatten(1).cumsum(1)[:, -1, None, None]
    return correlate(images, blend_kernels(alpha, kernels.to(images.dtype)))


def edge_enhance_more(images: Tensor, seeds: Tensor) -> Tensor:
    """Pillow's EDGE_ENHANCE_MORE; Pillow leaves the border as it is."""
    return _pillow(images, 9.0, 0.0)


def contour(images: Tensor, seeds: Tensor) -> Tensor:
    """Pillow's CONTOUR: dark edges on white; Pillow leaves the border as it is."""
    return _pillow(images, 8.0, 255.0)


def _pillow(images: Tensor, center: float, offset: float) -> Tensor:
    """center · pixel − its eight neighbours + offset, inside the border."""
    columns = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    around = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    images[..., 1:-1, 1:-1].mul_(center + 1).sub_(around).add_(offset)
    return images


def sharpen(images: Tensor, seeds: Tensor, alpha: Tensor, lightness: Tensor) -> Tensor:
    """Blends towards (8 + lightness) · pixel − its eight neighbours."""
    kernels = constant(NEIGHBOURS, alpha.device) + (8 + lightness.view(-1, 1, 1)) * constant(IDENTITY, alpha.device)
    return correlate(images, blend_kernels(alpha, kernels))
