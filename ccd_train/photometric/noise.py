"""Noise, and what else happens pixel by pixel at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccd_train.draws import field


def noise_field(images: Tensor, keys: Tensor, operation: str, channels: int = 1) -> Tensor:
    """float32 [B, channels, H, W] in [0, 1)."""
    height, width = images.shape[-2:]
    return field(keys, operation, channels * height * width).view(-1, channels, height, width)


def add_elementwise(images: Tensor, keys: Tensor, bound: Tensor) -> Tensor:
    """Adds a number drawn from ±bound to every pixel, the same to its channels."""
    return images.add_(noise_field(images, keys, "add_elementwise").mul_(2).sub_(1).mul_(bound))


def gaussian_noise(images: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """Box and Muller (1958): two uniforms make two normals; the left half of the image takes the cosines."""
    height, width = images.shape[-2:]
    first, second = field(keys, "gaussian_noise", height * width).view(-1, 1, height, width).chunk(2, dim=-1)
    radius = (1 - first).log_().mul_(-2).sqrt_()
    angle = second * (2 * math.pi)
    return images.add_(torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1) * scale)


def multiply(images: Tensor, keys: Tensor, factor: Tensor, per_channel: Tensor) -> Tensor:
    return images.mul_(factor)


def invert(images: Tensor, keys: Tensor, probability: Tensor, draw: Tensor) -> Tensor:
    return torch.where(draw < probability, 255 - images, images)


def solarize(images: Tensor, keys: Tensor, probability: Tensor, threshold: Tensor, draw: Tensor) -> Tensor:
    return torch.where((draw < probability) & (images >= threshold), 255 - images, images)
