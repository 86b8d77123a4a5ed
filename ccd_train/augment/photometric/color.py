"""Colours: hue, saturation, brightness, temperature, and fewer of them.

Hues are counted in sextants of the circle, [0, 6), inside this file; parameters in OpenCV's units, 180 to the circle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccd_train.augment.photometric.tables import constant

LUMA = (9798.0, 19235.0, 3735.0)  # of 2¹⁵: ITU-R BT.601's 0.299, 0.587, 0.114, as OpenCV rounds them
SEXTANT = 30.0  # hue units of a sextant
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
KMEANS_ROUNDS = 5
KMEANS_STRIDE = 2  # of rows and columns, for the rounds; all pixels are assigned in the end


def luma(images: Tensor) -> Tensor:
    """Grey level [B, 1, H, W]. Of whole levels it is exact, on every device."""
    red, green, blue = images.unbind(1)
    grey = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).mul_(2.0**-15)
    return grey[:, None]


def grey_levels(images: Tensor) -> Tensor:
    """The luma as OpenCV rounds it."""
    return luma(images).add_(0.5).floor_()


def to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in sextants, saturation × value / 255 (the spread of the channels), and value: [B, 1, H, W] each."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    spread = value - images.amin(dim=1, keepdim=True)
    from_red = (red == value).to(images.dtype)
    from_green = (green == value).to(images.dtype).mul_(1 - from_red)
    from_blue = 1 - from_red - from_green
    hue = (green - blue).mul_(from_red).addcmul_(blue - red, from_green).addcmul_(red - green, from_blue)
    # levels are whole: a spread below 1 is 0, and then so is the dividend
    hue.div_(spread.clamp(min=1)).add_(from_green, alpha=2).add_(from_blue, alpha=4)
    return hue, spread, value


def from_hsv(hue: Tensor, spread: Tensor, value: Tensor) -> Tensor:
    """The inverse of `to_hsv`: a channel is value − spread · clamp(min(k, 4 − k), 0, 1), k = hue + 5, 3, 1 mod 6."""
    offset = (hue + constant((5, 3, 1), hue.device).view(1, 3, 1, 1)).remainder_(6)
    return value - torch.minimum(offset, 4 - offset).clamp_(0, 1).mul_(spread)


def hue(images: Tensor, seeds: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift`."""
    angle, spread, value = to_hsv(images)
    return from_hsv(angle.add_(shift / SEXTANT), spread, value)


def hue_far(images: Tensor, seeds: Tensor, shift: Tensor) -> Tensor:
    """The same, by more: an operation of its own in the official chain."""
    return hue(images, seeds, shift)


def add_hue_saturation(images: Tensor, seeds: Tensor, shift: Tensor, saturation: Tensor) -> Tensor:
    """Turns the hue by `shift` and adds to the saturation (0–255)."""
    angle, spread, value = to_hsv(images)
    most = value / 255
    return from_hsv(
        angle.add_(shift / SEXTANT), torch.minimum((spread + most * saturation).clamp_(min=0), value), value
    )


def multiply_hue_saturation(images: Tensor, seeds: Tensor, hue_factor: Tensor, saturation_factor: Tensor) -> Tensor:
    """Multiplies the hue, counted from red, and the saturation."""
    angle, spread, value = to_hsv(images)
    angle = angle.remainder_(6).mul_(hue_factor)
    return from_hsv(angle, torch.minimum(spread.mul_(saturation_factor), value), value)


def brightness(images: Tensor, seeds: Tensor, factor: Tensor, shift: Tensor, space: Tensor, order: Tensor) -> Tensor:
    """Brightness · factor + shift, or (brightness + shift) · factor where order < ½.

    Brightness is the value of HSV where space < ⅓, else the luma: the official chain picks one of six colour spaces,
    two of which (HSV, HLS) scale the channels and four (YCrCb, YUV, Lab, Luv) move them together.
    """
    shift = shift * torch.where(order < 0.5, factor, torch.ones_like(factor))
    value, grey = images.amax(dim=1, keepdim=True), luma(images)
    brighter = (value * factor).add_(shift).clamp_(0, 255)
    black = (value == 0).to(images.dtype)
    by_value = images * (brighter / value.clamp(min=1)) + brighter * black
    by_luma = images.add_((grey * factor).add_(shift).clamp_(0, 255).sub_(grey))
    scales = (space < 1 / 3).to(images.dtype)
    return by_value.mul_(scales).addcmul_(by_luma, 1 - scales)


def multiply_brightness(images: Tensor, seeds: Tensor, factor: Tensor, space: Tensor) -> Tensor:
    """Brightness · factor: an operation of its own in the official chains."""
    nothing = torch.zeros_like(factor)
    return brightness(images, seeds, factor, nothing, space, nothing)


def grey_blend(images: Tensor, seeds: Tensor, alpha: Tensor) -> Tensor:
    """(1 − alpha) · image + alpha · grey."""
    return (luma(images) * alpha).addcmul(images, 1 - alpha)


def temperature(images: Tensor, seeds: Tensor, kelvin: Tensor) -> Tensor:
    """Multiplies the channels by the colour of a black body, by Helland's fit (2012) to Charity's table."""
    hundreds = kelvin.double() / 100
    warm, cold = hundreds.clamp(max=66), hundreds.clamp(min=66.001) - 60
    red = 329.698727446 * cold.pow(-0.1332047592)  # above 255 up to 6600 K
    green = torch.where(
        hundreds <= 66, 99.4708025861 * warm.log() - 161.1195681661, 288.1221695283 * cold.pow(-0.0755148492)
    )
    blue = 138.5177312231 * (warm - 10).clamp(min=0.1).log() - 305.0447927307 + 3 * (hundreds >= 66)
    return images.mul_(torch.cat([red, green, blue], dim=1).clamp_(0, 255).div_(255).to(images.dtype))


def uniform_colors(images: Tensor, seeds: Tensor, colors: Tensor) -> Tensor:
    """Levels in `colors` equal bins per channel, each replaced by its bin's centre."""
    return images.mul_(colors / 256).floor_().add_(0.5).mul_(256 / colors)


def channel_shuffle(images: Tensor, seeds: Tensor, probability: Tensor, draw: Tensor, order: Tensor) -> Tensor:
    """One of the six orders of the channels, or nothing."""
    chosen = torch.where(draw < probability, (order * len(ORDERS)).long(), 0).flatten()
    channels = constant(ORDERS, images.device).index_select(0, chosen).long()
    return images.gather(1, channels[:, :, None, None].expand_as(images))


def kmeans_colors(images: Tensor, seeds: Tensor, colors: Tensor) -> Tensor:
    """Each pixel in the nearest of `colors` (2 … 16) centres of k-means in RGB.

    Lloyd's rounds (1982) start from the colours at equal ranks of luma. Centres are rounded to whole levels: distances
    and sums are then whole numbers below 2²⁴, exact in float32, and matrix products in any order give the same bits.
    """
    sample = images[:, :, ::KMEANS_STRIDE, ::KMEANS_STRIDE].flatten(2)  # [B, 3, P]
    slots = torch.arange(16, device=images.device)
    used = (slots < colors.flatten(1)).to(images.dtype)[:, :, None]  # [B, 16, 1]
    count = sample.shape[2]
    ranked = luma(sample[..., None]).flatten(1).argsort(dim=1, stable=True)
    ranks = ((slots + 0.5) / colors.flatten(1) * count).clamp(max=count - 1).long()
    starts = ranked.gather(1, ranks)[:, None].expand(-1, 3, -1)
    centers = sample.gather(2, starts).transpose(1, 2)  # [B, 16, 3]
    for _ in range(KMEANS_ROUNDS):
        nearest = _nearest(sample, centers, used)
        sums, counts = nearest @ sample.transpose(1, 2), nearest.sum(dim=2, keepdim=True)
        centers = torch.where(counts > 0, (sums / counts.clamp(min=1)).round_(), centers)
    return (centers.transpose(1, 2) @ _nearest(images.flatten(2), centers, used)).view_as(images)


def _nearest(pixels: Tensor, centers: Tensor, used: Tensor) -> Tensor:
    """1 where a centre [B, 16, 3] in use [B, 16, 1] is nearest to a pixel [B, 3, P], the first if equal: [B, 16, P]."""
    slots = torch.arange(16, device=pixels.device)[:, None]
    # Squared distance, less the pixel's own square, in sixteenths: the slot decides between equals. What is not in use
    # is further away than anything can be.
    away = centers.square().sum(dim=2, keepdim=True) * 16 + slots + (1 - used) * 2.0**24
    distances = torch.baddbmm(away, centers, pixels, alpha=-32)
    return (distances == distances.amin(dim=1, keepdim=True)).to(pixels.dtype)
