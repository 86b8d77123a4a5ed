"""Fog, clouds, snow and rain, after imgaug's, with sizes for crops 32 pixels high.

Fog and clouds are blended in with an opacity that varies smoothly: noise with a power law over its spatial frequencies.
Snow and rain are specks, smeared along the direction in which they fall.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.draws import spread
from ccd_train.photometric.blur import separable

ROWS, COLUMNS = 3, 8  # frequencies of the smooth noise: 0 … 2 periods per height, 0 … 7 per width
WAVES = ROWS * COLUMNS * 4  # draws that one smooth field takes: a strength and a phase for either slant
SNOW_REACH = 6  # longest smear of a snowflake
RAIN_REACH = 38  # longest smear of a drop: 0.3 of the width
RAIN_COLOR = 240.0


def smooth(images: Tensor, draws: Tensor, exponent: Tensor) -> Tensor:
    """Smooth noise [B, 1, H, W] over exactly [0, 1]: draws [B, WAVES] in [0, 1), exponent [B, 1, 1, 1] below 0.

    A sum of waves of v periods per height and u per width, slanted both ways, of strength r f^exponent, f² = u² + v².
    Summed for one row of the image per v first; then each v adds a cosine and a sine along the height.
    """
    height, width = images.shape[-2:]
    strength, phase = draws.view(-1, 2, 2, ROWS, COLUMNS).unbind(1)  # [B, 2 slants, v, u]
    v = torch.arange(ROWS, dtype=torch.float32, device=images.device)[:, None]
    u = torch.arange(COLUMNS, dtype=torch.float32, device=images.device)[None, :]
    frequency = (u.square() + v.square()).clamp(min=1).sqrt()
    present = ((u + v) > 0).to(images.dtype)  # there is no wave of frequency 0
    strength = strength * frequency.pow(exponent) * present
    x = torch.arange(width, dtype=torch.float32, device=images.device) * (2 * math.pi / width)
    y = torch.arange(height, dtype=torch.float32, device=images.device) * (2 * math.pi / height)
    phase = phase * (2 * math.pi)
    cosines = torch.zeros(len(images), ROWS, width, device=images.device)
    sines = torch.zeros_like(cosines)
    for slant, sign in enumerate((1, -1)):
        for column in range(COLUMNS):
            # r cos(ux + φ ± vy) = r cos(ux + φ) cos(vy) ∓ r sin(ux + φ) sin(vy)
            angle = phase[:, slant, :, column, None] + x * column
            amount = strength[:, slant, :, column, None]
            cosines.addcmul_(angle.cos(), amount)
            sines.addcmul_(angle.sin(), amount, value=-sign)
    field = torch.zeros(len(images), height, width, device=images.device)
    for row in range(ROWS):
        field.addcmul_((y * row).cos()[:, None], cosines[:, None, row])
        field.addcmul_((y * row).sin()[:, None], sines[:, None, row])
    low, high = field.amin(dim=(1, 2), keepdim=True), field.amax(dim=(1, 2), keepdim=True)
    return field.sub_(low).div_((high - low).clamp_(min=1e-6))[:, None]


def _layer(images: Tensor, opacity: Tensor, grey: Tensor, texture: Tensor) -> Tensor:
    """Blends in a layer of `grey` [B, 1, 1, 1], lighter and darker by a fifth where the texture is 1 and 0."""
    light = texture.mul(2).sub_(1).div_(5).add_(1).mul_(grey).clamp_(0, 255)
    return images.mul_(1 - opacity).addcmul_(light, opacity)


def fog(
    images: Tensor, seeds: Tensor, grey: Tensor, base: Tensor, density: Tensor, exponent: Tensor, texture: Tensor
) -> Tensor:
    """Opacity density · (base + 0.3 · noise)^0.9 everywhere."""
    shape, grain = spread(seeds, 2 * WAVES).chunk(2, dim=1)
    opacity = smooth(images, shape, exponent).mul_(0.3).add_(base).pow_(0.9).mul_(density).clamp_(0, 1)
    return _layer(images, opacity, grey, smooth(images, grain, texture))


def clouds(
    images: Tensor,
    seeds: Tensor,
    grey: Tensor,
    thin: Tensor,
    thick: Tensor,
    thin_exponent: Tensor,
    thick_exponent: Tensor,
    layers: Tensor,
) -> Tensor:
    """Broad thin clouds (layers < ¼), small thick ones (< ½) or both; the opacity is thin or thick · noise."""
    shape, shape_2, grain = spread(seeds, 3 * WAVES).chunk(3, dim=1)
    texture = smooth(images, grain, thick_exponent)
    has_thin = ((layers < 0.25) | (layers >= 0.5)).to(images.dtype)
    has_thick = (layers >= 0.25).to(images.dtype)
    broad = smooth(images, shape, thin_exponent).mul_(thin * has_thin).clamp_(0, 1)
    small = smooth(images, shape_2, thick_exponent).pow_(1.2).mul_(thick * has_thick).clamp_(0, 1)
    return _layer(_layer(images, broad, grey, texture), small, grey, texture)


def snow(
    images: Tensor,
    seeds: Tensor,
    density: Tensor,
    size: Tensor,
    uniformity: Tensor,
    speed: Tensor,
    slant: Tensor,
    layers: Tensor,
) -> Tensor:
    """Light flakes: specks of `density`, one to three times as many by `layers`, and wider with `size`.

    They are smeared over speed · width pixels; the less uniform, the more a few of them stand out.
    """
    width = images.shape[-1]
    specks = _specks(images, seeds, density * (1 - size).square() * _layers(layers), SNOW_REACH)
    radius = (0.3 + size).view(-1, 1)
    offsets = torch.arange(-1, 2, dtype=torch.float32, device=images.device)
    flakes = separable(specks, (offsets.square() / (-2 * radius.square())).exp()).clamp_(max=1)
    flakes = _smeared(flakes, (speed * width).floor().clamp(1, SNOW_REACH), slant, images.shape[2])
    uneven = 1 - uniformity
    flakes = flakes.pow_(1 + 2 * uneven).mul_((1 + 5 * uneven) * 255)
    return torch.maximum(images.add_(flakes * (0.1 + 20 * speed)), flakes * (1 + 20 * speed))


def rain(images: Tensor, seeds: Tensor, density: Tensor, speed: Tensor, slant: Tensor, layers: Tensor) -> Tensor:
    """Grey streaks: specks of `density`, one to three times as many by `layers`, smeared over speed · width pixels."""
    width = images.shape[-1]
    specks = _specks(images, seeds, density * _layers(layers), RAIN_REACH)
    length = (speed * width).floor().clamp(1, RAIN_REACH)
    streaks = _smeared(specks, length, slant, images.shape[2]).mul_(1.3).clamp_(max=1)
    return images.mul_(1 - streaks).add_(streaks.mul_(RAIN_COLOR))


def _layers(draw: Tensor) -> Tensor:
    """1, 2 or 3, evenly, from a draw in [0, 1)."""
    return (draw * 3).floor() + 1


def _specks(images: Tensor, seeds: Tensor, share: Tensor, reach: int) -> Tensor:
    """This share of the pixels of [B, 1, H + reach, W] between ½ and 1, mostly near 1 (Beta(½, ½)); the others 0."""
    height, width = images.shape[-2:]
    draws = spread(seeds, (height + reach) * width).view(-1, 1, height + reach, width)
    chosen = (draws < share).to(images.dtype)
    quantile = draws.div_(share.clamp(min=1e-6)).clamp_(max=1).mul_(0.5).add_(0.5)
    return quantile.mul_(math.pi / 2).sin_().square_().mul_(chosen)


def _smeared(field: Tensor, length: Tensor, slant: Tensor, height: int) -> Tensor:
    """Means over `length` pixels of a field [B, 1, H + reach, W], on lines `slant` degrees off the upright: [B, 1, H, W].

    The lines are upright first: differences of running sums. Then the rows are moved sideways, around the border.
    """
    field = field[:, 0]
    count, tall, width = field.shape
    rows = torch.arange(height, dtype=torch.float32, device=field.device)
    sums = F.pad(field.cumsum(1), (0, 0, 1, 0))  # [B, H + reach + 1, W]: of all rows above
    stops = (rows + (tall - height)).long()
    starts = (stops - length.view(-1, 1)).long()[:, :, None].expand(-1, -1, width)
    means = (sums.index_select(1, stops) - sums.gather(1, starts)).div_(length.view(-1, 1, 1))
    moved = (rows - height / 2) * torch.deg2rad(slant).tan().view(-1, 1)
    whole = moved.floor()
    share = (moved - whole)[:, :, None]
    columns = torch.arange(width, device=field.device)
    near = (columns + whole.long()[:, :, None]).remainder_(width)
    far = (near + 1).remainder_(width)
    return means.gather(2, near).mul_(1 - share).addcmul_(means.gather(2, far), share)[:, None]
