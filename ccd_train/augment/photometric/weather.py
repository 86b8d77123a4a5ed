"""Fog, clouds, snow and rain, after imgaug's, with sizes for crops 32 pixels high.

Fog and clouds are blended in with an opacity that varies smoothly: noise with a power law over its spatial frequencies.
Snow and rain are specks, smeared along the direction in which they fall.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.photometric.blur import separable
from ccd_train.augment.photometric.noise import salt_grey
from ccd_train.augment.photometric.tables import waves
from ccd_train.draws import spread

ROWS, COLUMNS = 6, 24  # frequencies of the smooth noise: 0 … 5 periods per height, 0 … 23 per width
WAVES = 2 * ROWS * 2 * COLUMNS  # draws that one field of smooth noise takes: one per wave
SCALE = 1024  # of the whole numbers that smooth noise is summed in
SOFTNESS = 0.52  # of the middle of a flake that is as small as a pixel
SNOW_REACH = 6  # longest smear of a snowflake
RAIN_REACH = 38  # longest smear of a drop: 0.3 of the width
RAIN_COLOR = 240.0


def smooth(images: Tensor, draws: Tensor, exponents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fields of smooth noise [B, 1, H, W] over exactly [0, 1], one for each of the exponents [B, 1, 1, 1] below 0.

    draws: [B, fields · WAVES] in [0, 1). A field is a sum of products of a cosine or sine of v periods per height and
    one of u periods per width, of strength r f^exponent, r from ±1, f² = u² + v². Strengths and waves are whole
    multiples of 1/1024: sums stay below 2²⁴, and matrix products in any order give the same bits.
    """
    height, width = images.shape[-2:]
    v = torch.arange(2 * ROWS, device=images.device) // 2
    u = torch.arange(2 * COLUMNS, device=images.device) // 2
    frequency = (u.square() + v.square()[:, None]).double().sqrt()
    power = torch.stack(exponents, dim=1).view(-1, len(exponents), 1, 1).double()
    strength = frequency.clamp(min=1).pow(power) * (frequency > 0)  # there is no wave of frequency 0
    factors = draws.view(-1, len(exponents), 2 * ROWS, 2 * COLUMNS) * 2 - 1
    factors = (factors * strength * SCALE).round().to(images.dtype)
    along = (factors @ waves(COLUMNS, width, SCALE, images.device)).div_(SCALE).round_()
    fields = waves(ROWS, height, SCALE, images.device).T @ along
    low, high = fields.amin(dim=(2, 3), keepdim=True), fields.amax(dim=(2, 3), keepdim=True)
    fields = fields.sub_(low).div_((high - low).clamp_(min=1))
    return tuple(fields[:, number : number + 1] for number in range(len(exponents)))


def _layer(images: Tensor, opacity: Tensor, grey: Tensor, texture: Tensor) -> Tensor:
    """Blends in a layer of `grey` [B, 1, 1, 1], lighter and darker by a fifth where the texture is 1 and 0."""
    light = (texture * 0.4).add_(0.8).mul_(grey).clamp_(0, 255)
    return images.mul_(1 - opacity).addcmul_(light, opacity)


def fog(
    images: Tensor, seeds: Tensor, grey: Tensor, base: Tensor, density: Tensor, exponent: Tensor, texture: Tensor
) -> Tensor:
    """Opacity density · (base + 0.3 · noise) everywhere."""
    noise, grain = smooth(images, spread(seeds, 2 * WAVES), (exponent, texture))
    return _layer(images, (noise * 0.3).add_(base).mul_(density).clamp_(0, 1), grey, grain)


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
    exponents = (thin_exponent, thick_exponent, thick_exponent)
    broad, small, grain = smooth(images, spread(seeds, 3 * WAVES), exponents)
    thin = thin * ((layers < 0.25) | (layers >= 0.5)).to(images.dtype)
    thick = thick * (layers >= 0.25).to(images.dtype)
    images = _layer(images, (broad * thin).clamp_(0, 1), grey, grain)
    return _layer(images, (small * thick).clamp_(0, 1), grey, grain)


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

    They are smeared over speed · width pixels. The less uniform, the more does v² of a flake's light v count, and the
    more a few stand out.
    """
    width = images.shape[-1]
    specks = _specks(images, seeds, density * (1 - size).square() * _layers(layers), SNOW_REACH)
    side = (-0.5 / (0.3 + size).view(-1, 1).double().square()).exp()
    weights = torch.cat([side, torch.ones_like(side), side], dim=1).to(images.dtype)
    flakes = separable(specks, weights).clamp_(max=1).mul_(SOFTNESS * (1 + size))
    flakes = _smeared(flakes, (speed * width).floor().clamp(1, SNOW_REACH), slant, images.shape[2])
    uneven = (2 * (1 - uniformity)).clamp(max=1)
    flakes = flakes.square().mul_(uneven).addcmul_(flakes, 1 - uneven).mul_((1 + 2.5 * uneven) * 255)
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
    """This share of the pixels of [B, 1, H + reach, W] between ½ and 1, mostly near 1; the others 0."""
    height, width = images.shape[-2:]
    draws = spread(seeds, (height + reach) * width).view(-1, 1, height + reach, width)
    chosen = (draws < share).to(images.dtype)
    return salt_grey(draws.div_(share.clamp(min=1e-6)).mul_(0.5).add_(0.5)).mul_(chosen)


def _smeared(field: Tensor, length: Tensor, slant: Tensor, height: int) -> Tensor:
    """Means over `length` pixels of a field [B, 1, H + reach, W], on lines `slant` degrees off upright: [B, 1, H, W].

    The lines are upright first: differences of running sums. Then the rows are moved sideways, around the border.
    """
    field = field[:, 0]
    tall, width = field.shape[1:]
    rows = torch.arange(height, dtype=torch.float32, device=field.device)
    sums = F.pad(field.cumsum(1), (0, 0, 1, 0))  # [B, H + reach + 1, W]: of all rows above
    stops = (rows + (tall - height)).long()
    starts = (stops - length.view(-1, 1)).long()[:, :, None].expand(-1, -1, width)
    means = (sums.index_select(1, stops) - sums.gather(1, starts)).div_(length.view(-1, 1, 1))
    moved = (rows - height / 2) * torch.deg2rad(slant.double()).tan().to(rows.dtype).view(-1, 1)
    whole = moved.floor()
    share = (moved - whole)[:, :, None]
    columns = torch.arange(width, device=field.device)
    near = (columns + whole.long()[:, :, None]).remainder_(width)
    far = (near + 1).remainder_(width)
    return means.gather(2, near).mul_(1 - share).addcmul_(means.gather(2, far), share)[:, None]
