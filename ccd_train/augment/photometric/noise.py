"""Noise, and what else changes each pixel by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ccd_train.augment.photometric.tables import QUANTILES, laplace_quantiles, look_up, normal_quantiles
from ccd_train.draws import spread


def draw(images: Tensor, seeds: Tensor, channels: int = 1) -> Tensor:
    """float32 [B, channels, H, W] in [0, 1), one per pixel and channel."""
    height, width = images.shape[-2:]
    return spread(seeds, channels * height * width).view(-1, channels, height, width)


def draw_channels(images: Tensor, seeds: Tensor, per_channel: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in [0, 1): the channels apart where per_channel [B, 1, 1, 1] < ½, else all the same."""
    draws = draw(images, seeds, 3)
    apart = (per_channel < 0.5).to(draws.dtype)
    first = draws[:, :1].clone()
    return draws.sub_(first).mul_(apart).add_(first)


def normal(draws: Tensor) -> Tensor:
    """Standard normals from uniform draws, by a table of quantiles."""
    return look_up(draws.mul_(QUANTILES), normal_quantiles(draws.device))


def salt_grey(quantile: Tensor) -> Tensor:
    """Greys mostly near 0 and 1: q²(3 − 2q), within 0.01 of the quantile function sin²(πq/2) of Beta(½, ½)."""
    return (3 - 2 * quantile).mul_(quantile).mul_(quantile)


def add_elementwise(images: Tensor, seeds: Tensor, bound: Tensor) -> Tensor:
    """Adds a number from ±bound to every pixel, the same to its channels."""
    return images.add_(draw(images, seeds).mul_(2).sub_(1).mul_(bound))


def gaussian_noise(images: Tensor, seeds: Tensor, scale: Tensor) -> Tensor:
    """Adds normal noise of deviation `scale`, the same to a pixel's channels."""
    return images.add_(normal(draw(images, seeds)).mul_(scale))


def laplace_noise(images: Tensor, seeds: Tensor, scale: Tensor) -> Tensor:
    """Adds Laplace noise of mean deviation `scale`, the same to a pixel's channels."""
    draws = draw(images, seeds).mul_(QUANTILES)
    return images.add_(look_up(draws, laplace_quantiles(draws.device)).mul_(scale))


def poisson_noise(images: Tensor, seeds: Tensor, rate: Tensor) -> Tensor:
    """Adds a Poisson count with a random sign.

    The count is rounded from a normal z by the first terms of Cornish and Fisher's expansion (1938):
    rate + √rate z + (z² − 1)/6, not below 0. At rates above 2, mean and variance are those of Poisson within 4 %.
    """
    draws, sides = draw(images, seeds, 2).split(1, dim=1)
    z = normal(draws)
    count = (z * z).sub_(1).div_(6).add_(z * rate.sqrt()).add_(rate).round_().clamp_(min=0)
    return images.add_(count.mul_((sides - 0.5).sign_()))


def multiply(
    images: Tensor, seeds: Tensor, spread: Tensor, per_channel: Tensor, red: Tensor, green: Tensor, blue: Tensor
) -> Tensor:
    """A factor from 1 ± spread, one for all channels, or one each where per_channel < ½."""
    draws = torch.where(per_channel < 0.5, torch.cat([red, green, blue], dim=1), red)
    return images.mul_((2 * draws - 1) * spread + 1)


def multiply_elementwise(images: Tensor, seeds: Tensor, spread: Tensor, per_channel: Tensor) -> Tensor:
    """A factor from 1 ± spread for every pixel."""
    return images.mul_(draw_channels(images, seeds, per_channel).mul_(2).sub_(1).mul_(spread).add_(1))


def dropout(images: Tensor, seeds: Tensor, share: Tensor, per_channel: Tensor) -> Tensor:
    """Blackens this share of the pixels."""
    return images.mul_((draw_channels(images, seeds, per_channel) >= share).to(images.dtype))


def coarse_dropout(images: Tensor, seeds: Tensor, share: Tensor, size: Tensor, per_channel: Tensor) -> Tensor:
    """Blackens this share of the cells of a grid, which has size · H rows and size · W columns (3 at least)."""
    height, width = images.shape[-2:]
    rows, columns = (size * height).floor_().clamp_(3, height), (size * width).floor_().clamp_(3, width)
    row = (torch.arange(height, device=images.device).view(1, 1, -1, 1) * rows).div_(height).floor_()
    column = (torch.arange(width, device=images.device) * columns).div_(width).floor_()
    cells = (row * width + column).to(torch.int64).expand(-1, 3, -1, -1)
    draws = draw_channels(images, seeds, per_channel)
    return images.mul_((draws.flatten(2).gather(2, cells.flatten(2)).view_as(images) >= share).to(images.dtype))


def drop_channels(images: Tensor, seeds: Tensor, share: Tensor, red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """Blackens each channel with probability `share`, but keeps one at least: the one with the highest draw."""
    draws = torch.cat([red, green, blue], dim=1)
    kept = (draws >= share) | (draws == draws.amax(dim=1, keepdim=True))
    return images.mul_(kept.to(images.dtype))


def impulse_noise(images: Tensor, seeds: Tensor, share: Tensor) -> Tensor:
    """Salt and pepper in each channel by itself."""
    return _replace(images, draw(images, seeds, 3), share, 0.0, 1.0)


def salt_and_pepper(images: Tensor, seeds: Tensor, share: Tensor) -> Tensor:
    """Replaces this share of the pixels by greys that are mostly near black or white (distribution Beta(½, ½))."""
    return _replace(images, draw(images, seeds), share, 0.0, 1.0)


def salt(images: Tensor, seeds: Tensor, share: Tensor) -> Tensor:
    """The light half of salt and pepper."""
    return _replace(images, draw(images, seeds), share, 0.5, 1.0)


def pepper(images: Tensor, seeds: Tensor, share: Tensor) -> Tensor:
    """The dark half of salt and pepper."""
    return _replace(images, draw(images, seeds), share, 0.0, 0.5)


def _replace(images: Tensor, draws: Tensor, share: Tensor, low: float, high: float) -> Tensor:
    """Where a draw is below `share`, the same draw, rescaled to [low, high], picks the grey."""
    chosen = (draws < share).to(images.dtype)
    grey = salt_grey(draws.div_(share.clamp(min=1e-6)).mul_(high - low).add_(low)).mul_(255)
    return images.mul_(1 - chosen).add_(grey.mul_(chosen))


def invert(images: Tensor, seeds: Tensor, probability: Tensor, draw: Tensor) -> Tensor:
    """255 − v, or nothing."""
    chosen = (draw < probability).to(images.dtype)
    return images.mul_(1 - 2 * chosen).add_(255 * chosen)


def solarize(images: Tensor, seeds: Tensor, probability: Tensor, threshold: Tensor, draw: Tensor) -> Tensor:
    """255 − v where v ≥ threshold, or nothing."""
    threshold = torch.where(draw < probability, threshold, 256)
    bright = (images >= threshold).to(images.dtype)
    return images.addcmul_(bright, 255 - 2 * images)
