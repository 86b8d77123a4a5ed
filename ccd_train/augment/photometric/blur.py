"""Blurs. All but the median are sums of shifted images with weights per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.photometric.filters import correlate
from ccd_train.augment.photometric.tables import look_up

GAUSSIAN_RADIUS = 2  # 5 × 5: what imgaug takes for every sigma up to 1.8
AVERAGE_RADIUS = 3
MOTION_RADIUS = 2  # 5 × 5
BILATERAL_RADIUS = 5
DIFFERENCES = 3 * 256  # of two colours, summed over the channels
# Sorting networks with the fewest comparators for 3, 5 and 7 values (Knuth, The Art of Computer Programming 3, 5.3.4)
NETWORKS = {
    3: "01 12 01",
    5: "03 14 02 13 01 24 12 34 23",
    7: "06 23 45 02 14 36 01 25 34 12 46 23 45 12 34 56",
}


def separable(images: Tensor, weights: Tensor) -> Tensor:
    """Images [B, C, H, W] filtered along both axes with weights [B, k], k odd; mirrored at the border."""
    height, width = images.shape[-2:]
    side = weights.shape[1]
    padded = F.pad(images, (side // 2,) * 4, mode="reflect")
    taps = weights[:, :, None, None, None].unbind(1)
    down = padded[:, :, :height] * taps[0]
    for offset in range(1, side):
        down.addcmul_(padded[:, :, offset : offset + height], taps[offset])
    across = down[..., :width] * taps[0]
    for offset in range(1, side):
        across.addcmul_(down[..., offset : offset + width], taps[offset])
    return across


def gaussian_blur(images: Tensor, seeds: Tensor, sigma: Tensor) -> Tensor:
    """Of deviation `sigma`, cut at 5 × 5."""
    offsets = _offsets(images, GAUSSIAN_RADIUS)
    weights = (offsets.square() / (-2 * sigma.view(-1, 1).double().square())).exp()
    outer, inner = (weights / weights.cumsum(1)[:, -1:] * 256)[:, :2].split(1, dim=1)
    # in 256ths, as OpenCV rounds them for images of bytes: each takes on what the one before it lost
    outer, inner = outer.round(), (inner + outer - outer.round()).round()
    weights = torch.cat([outer, inner, 256 - 2 * (outer + inner), inner, outer], dim=1) / 256
    return separable(images, weights.to(images.dtype))


def average_blur(images: Tensor, seeds: Tensor, size: Tensor) -> Tensor:
    """The mean over size × size pixels; an even window reaches further up and left, as in OpenCV."""
    size = size.view(-1, 1)
    first = -(size / 2).floor()
    offsets = _offsets(images, AVERAGE_RADIUS)
    inside = (offsets >= first) & (offsets < first + size)
    return separable(images, (inside / size).to(images.dtype))


def motion_blur(images: Tensor, seeds: Tensor, angle: Tensor, direction: Tensor) -> Tensor:
    """The mean along a line of 5 pixels; angle 0 … 1 is a full turn.

    Along the line the weights go linearly from `direction` (0 … 1) to 1 − direction. The line is drawn upright and
    rotated by bilinear sampling.
    """
    turn, direction = angle.view(-1, 1, 1).double() * (2 * math.pi), direction.view(-1, 1, 1)
    offsets = _offsets(images, MOTION_RADIUS)
    row, column = offsets[:, None], offsets[None, :]
    along = row * turn.cos() + column * turn.sin()
    across = column * turn.cos() - row * turn.sin()
    ramp = direction + (1 - 2 * direction) * (along / (2 * MOTION_RADIUS) + 0.5).clamp(0, 1)
    kernels = ramp * (MOTION_RADIUS + 1 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(min=0)
    return correlate(images, (kernels / kernels.flatten(1).cumsum(1)[:, -1, None, None]).to(images.dtype))


def bilateral_blur(images: Tensor, seeds: Tensor, diameter: Tensor, sigma_color: Tensor, sigma_space: Tensor) -> Tensor:
    """Means over similar pixels (Tomasi and Manduchi 1998), along the rows and then along the columns.

    The separable form is an approximation (Pham and van Vliet 2005). A pixel weighs exp(−δ²/2σ²) by its distance and
    again by the sum of its channels' differences, as in OpenCV.
    """
    offsets, radius = _offsets(images, BILATERAL_RADIUS), (diameter.view(-1, 1) / 2).floor()
    # OpenCV's window is round: of its rows and columns those through the middle are the longest
    inside = radius.square() - offsets.square()
    length = (inside.clamp(min=0).sqrt().floor() * 2 + 1) * (inside >= 0) / (2 * radius + 1)
    space = length * (offsets.square() / (-2 * sigma_space.view(-1, 1).double().square())).exp()
    differences = torch.arange(DIFFERENCES, dtype=torch.float64, device=images.device)
    likeness = (differences.square() / (-2 * sigma_color.view(-1, 1).double().square())).exp()
    space, likeness = space.to(images.dtype), likeness.to(images.dtype)
    across = _bilateral_pass(images, space, likeness)
    return _bilateral_pass(across.transpose(2, 3).contiguous(), space, likeness).transpose(2, 3).contiguous()


def _bilateral_pass(images: Tensor, space: Tensor, likeness: Tensor) -> Tensor:
    """Along the last axis, with weights [B, k] by distance and [B, 768] by difference; whole levels."""
    radius, width = space.shape[1] // 2, images.shape[3]
    padded = F.pad(images, (radius, radius, 0, 0), mode="reflect")
    total, weights = images.clone(), torch.ones_like(images[:, :1])
    for offset in range(1, radius + 1):
        here, there = padded[..., :-offset], padded[..., offset:]
        red, green, blue = (here - there).abs_().split(1, dim=1)
        weight = look_up(red.add_(green).add_(blue), likeness).mul_(space[:, radius + offset, None, None, None])
        # a pair of pixels weighs the same from both ends
        for start, neighbour in ((radius, there), (radius - offset, here)):
            of_pixel = weight[..., start : start + width]
            total.addcmul_(neighbour[..., start : start + width], of_pixel)
            weights.add_(of_pixel)
    return total.div_(weights).round_()


def median_blur_3(images: Tensor, seeds: Tensor) -> Tensor:
    """Over 3 × 3 pixels."""
    return median(images, 3)


def median_blur_5(images: Tensor, seeds: Tensor) -> Tensor:
    """Over 5 × 5 pixels."""
    return median(images, 5)


def median_blur_7(images: Tensor, seeds: Tensor) -> Tensor:
    """Over 7 × 7 pixels."""
    return median(images, 7)


def median(images: Tensor, size: int) -> Tensor:
    """The median over size × size pixels in each channel, exactly; border pixels are repeated outwards.

    In bytes and without sorting everything: once the columns and then the rows of the windows are sorted, the pixel in
    row i and column j is at least as large as (i + 1)(j + 1) − 1 others and at most as large as (k − i)(k − j) − 1, so
    that most are known to lie above or below the median, equally many on both sides.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (size // 2,) * 4, mode="replicate").to(torch.uint8)
    if images.device.type != "cpu":  # one kernel instead of hundreds
        return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(dim=-1).values.to(images.dtype)
    columns = _sorted([padded[:, :, row : row + height] for row in range(size)])
    rows = [_sorted([line[..., at : at + width] for at in range(size)]) for line in columns]
    half = (size * size + 1) // 2
    values = [
        rows[i][j]
        for i in range(size)
        for j in range(size)
        if (i + 1) * (j + 1) <= half and (size - i) * (size - j) <= half
    ]
    # of any more than half of the remaining values, neither the least nor the greatest can be the median
    open_values, waiting = values[: len(values) // 2 + 2], values[len(values) // 2 + 2 :]
    while len(open_values) > 1:
        open_values = _without_extremes(open_values)
        if waiting:
            open_values.append(waiting.pop())
    return open_values[0].to(images.dtype)


def _sorted(values: list[Tensor]) -> list[Tensor]:
    """The values in rising order, pixel by pixel."""
    values = list(values)
    for comparator in NETWORKS[len(values)].split():
        _exchange(values, int(comparator[0]), int(comparator[1]))
    return values


def _without_extremes(values: list[Tensor]) -> list[Tensor]:
    """All but the least and the greatest, pixel by pixel."""
    values = list(values)
    last = len(values) - 1
    for low in range(len(values) // 2):
        _exchange(values, low, last - low)
    for low in range(1, (last + 2) // 2):  # the least is in the first half, the greatest in the second
        _exchange(values, 0, low)
    for high in range(last - 1, last // 2 - (last + 1) % 2, -1):
        _exchange(values, high, last)
    return values[1:-1]


def _exchange(values: list[Tensor], low: int, high: int) -> None:
    values[low], values[high] = torch.minimum(values[low], values[high]), torch.maximum(values[low], values[high])


def _offsets(images: Tensor, radius: int) -> Tensor:
    return torch.arange(-radius, radius + 1, dtype=torch.float64, device=images.device)
