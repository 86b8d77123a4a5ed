"""JPEG as a baseline encoder and decoder would leave the image, without the lossless part in between.

Quantisation is what degrades, so entropy coding is left out. Chroma is halved along both axes, as encoders do by
default. The cosine transforms take whole coefficients: every product and sum is then a whole number below 2²⁴, which
float32 holds exactly, so that matrix products give the same bits in whatever order they add.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.photometric.color import luma
from ccd_train.augment.photometric.tables import constant, cosines

SCALE = 1024  # of the whole coefficients: 10 bits
RED, BLUE = 0.713, 0.564  # 0.5 / (1 − 0.299) and 0.5 / (1 − 0.114): Cr = RED (R − Y), Cb = BLUE (B − Y)

# Quantisation tables of ITU-T T.81, Annex K, for quality 50
LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


def jpeg(images: Tensor, seeds: Tensor, compression: Tensor) -> Tensor:
    """Compression 0 … 100, of which imgaug makes the quality 1 + 99 (1 − compression / 101), rounded."""
    quality = (1 + 99 * (1 - compression / 101)).round()
    # the scale of the tables that libjpeg takes for a quality, in percent
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    red, _, blue = images.split(1, dim=1)
    grey = luma(images)
    chroma = torch.cat([(red - grey).mul_(RED), (blue - grey).mul_(BLUE)], dim=1)
    halved = F.avg_pool2d(chroma, 2)
    grey = _quantized(grey.sub_(128).round_(), LUMA_STEPS, percent).add_(128).clamp_(0, 255)
    halved = _quantized(halved.round_(), CHROMA_STEPS, percent)
    return _to_rgb(grey, _doubled(_doubled(halved).transpose(2, 3)).transpose(2, 3))


def _to_rgb(grey: Tensor, chroma: Tensor) -> Tensor:
    red, blue = chroma.split(1, dim=1)
    red, blue = red / RED, blue / BLUE
    green = red * (-0.299 / 0.587) - blue * (0.114 / 0.587)
    return torch.cat([red, green, blue], dim=1).add_(grey)


def _quantized(planes: Tensor, steps: tuple[tuple[int, ...], ...], percent: Tensor) -> Tensor:
    """Planes [B, C, H, W] of whole numbers, each 8 × 8 block transformed, quantised and transformed back."""
    height, width = planes.shape[-2:]
    table = ((constant(steps, planes.device) * percent + 50) / 100).floor().clamp(1, 255)[:, :, None, :, None, :]
    forward = cosines(8, SCALE, planes.device)
    blocks = planes.reshape(*planes.shape[:2], height // 8, 8, width // 8, 8)
    # along the rows: whole numbers below 2⁷ · 2¹⁰ · 8; then along the columns, rounded in between to keep below 2²⁴
    along = (blocks @ forward.T).div_(SCALE / 4).round_()
    both = (forward @ along.flatten(4)).view_as(blocks).div_(SCALE * 4)
    levels = both.div_(table).round_().mul_(table).clamp_(-2048, 2047)
    along = (levels @ forward).div_(SCALE / 4).round_()
    return (forward.T @ along.flatten(4)).reshape(planes.shape).div_(SCALE * 4).round_()


def _doubled(planes: Tensor) -> Tensor:
    """Twice as wide: each new pixel is ¾ of the nearest old one and ¼ of the next, as libjpeg's fancy upsampling."""
    padded = F.pad(planes, (1, 1, 0, 0), mode="replicate")
    near = planes * 0.75
    return torch.stack([near + padded[..., :-2] * 0.25, near + padded[..., 2:] * 0.25], dim=-1).flatten(-2)
