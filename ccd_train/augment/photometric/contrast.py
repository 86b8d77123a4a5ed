"""Contrast: curves that every grey level goes through, and the equalisation of histograms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ccd_train.augment.photometric.color import grey_levels
from ccd_train.augment.photometric.tables import look_up

LEVELS = 256


def histogram(images: Tensor, rows: int) -> Tensor:
    """Counts of the whole grey levels: float32 [rows, 256], rows dividing the images' [B, C, H, W]."""
    index = images.to(torch.int64).view(rows, -1)
    ones = torch.ones((), device=images.device).expand_as(index)
    return torch.zeros(rows, LEVELS, device=images.device).scatter_add_(1, index, ones)


def gamma(images: Tensor, seeds: Tensor, exponent: Tensor) -> Tensor:
    """255 (v / 255)^exponent."""
    return look_up(images, _shares(images).pow(exponent.view(-1, 1)) * 255)


def linear_contrast(images: Tensor, seeds: Tensor, factor: Tensor) -> Tensor:
    """127 + factor (v − 127)."""
    return images.sub_(127).mul_(factor).add_(127)


def sigmoid_contrast(images: Tensor, seeds: Tensor, gain: Tensor, cutoff: Tensor) -> Tensor:
    """255 / (1 + exp(gain (cutoff − v / 255)))."""
    return look_up(images, torch.sigmoid((_shares(images) - cutoff.view(-1, 1)) * gain.view(-1, 1)) * 255)


def log_contrast(images: Tensor, seeds: Tensor, gain: Tensor) -> Tensor:
    """255 gain log₂(1 + v / 255)."""
    return look_up(images, (1 + _shares(images)).log2() * gain.view(-1, 1) * 255)


def equalize(images: Tensor, seeds: Tensor) -> Tensor:
    """Equalises the histogram of the luma and moves the channels with it."""
    return replace_luma(images, lambda grey: look_up(grey, equalizing(histogram(grey, len(grey)))))


def equalize_channels(images: Tensor, seeds: Tensor) -> Tensor:
    """Equalises the histogram of each channel by itself."""
    return look_up(images, equalizing(histogram(images, 3 * len(images))))


def replace_luma(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Adds to the channels what `change` does to the grey levels [B, 1, H, W]."""
    grey = grey_levels(images)
    return images.add_(change(grey).sub_(grey))


def equalizing(counts: Tensor) -> Tensor:
    """The tables [R, 256] that equalise histograms [R, 256], as OpenCV: the darkest level in use becomes 0."""
    total = counts.cumsum(1)
    darkest = torch.where(total > 0, total, counts.sum(1, keepdim=True)).amin(dim=1, keepdim=True)
    rest = total[:, -1:] - darkest
    tables = (total - darkest).clamp_(min=0) * (255 / rest.clamp(min=1))
    return torch.where(rest > 0, tables, torch.arange(LEVELS, dtype=torch.float32, device=counts.device))


def _shares(images: Tensor) -> Tensor:
    """float64 [1, 256]: every grey level as a share of 255."""
    return torch.arange(LEVELS, dtype=torch.float64, device=images.device)[None] / 255
