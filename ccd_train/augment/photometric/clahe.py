"""Contrast-limited adaptive histogram equalisation (Zuiderveld 1994), as OpenCV computes it.

Each of tiles × tiles parts of a channel has an equalising table of its own, made from its clipped histogram; a pixel
takes the bilinear mean of the tables of the four nearest parts. The number of tiles differs per image: an image has
room for 8 × 8 tables and uses the first of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.photometric.contrast import LEVELS, replace_luma

MOST_TILES = 8
TABLES = MOST_TILES**2


def clahe(images: Tensor, seeds: Tensor, limit: Tensor, tiles: Tensor) -> Tensor:
    """Of the luma; the channels move with it."""
    return replace_luma(images, lambda grey: equalize_locally(grey, limit, tiles))


def clahe_channels(images: Tensor, seeds: Tensor, limit: Tensor, tiles: Tensor) -> Tensor:
    """Of each channel by itself."""
    return equalize_locally(images, limit, tiles)


def equalize_locally(planes: Tensor, limit: Tensor, tiles: Tensor) -> Tensor:
    """Planes [B, C, H, W] of whole levels, with a clip limit and a number of tiles [B, 1, 1, 1] (3 … 8) per image."""
    height, width = planes.shape[2:]
    tiles = tiles.view(-1, 1)
    # where a side is no multiple of the tiles, OpenCV mirrors both sides further, by tiles − side mod tiles
    exact = (height % tiles == 0) & (width % tiles == 0)
    tall = torch.where(exact, height / tiles, ((height + tiles) / tiles).floor())
    wide = torch.where(exact, width / tiles, ((width + tiles) / tiles).floor())
    tables = _tables(planes, limit, tiles, tall, wide)
    rows, row_share = _neighbours(height, tall, tiles)
    columns, column_share = _neighbours(width, wide, tiles)
    levels = planes.to(torch.int64).add_(_channel_starts(planes))
    result = torch.zeros_like(planes)
    for row, down in zip(rows, row_share, strict=True):
        for column, across in zip(columns, column_share, strict=True):
            tile = (row[:, :, None] * MOST_TILES + column[:, None, :]) * LEVELS
            values = tables.gather(1, (levels + tile[:, None]).flatten(1)).view_as(planes)
            result.addcmul_(values, (down[:, :, None] * across[:, None, :])[:, None])
    return result.mul_((255 / (tall * wide))[:, :, None, None])


def _tables(planes: Tensor, limit: Tensor, tiles: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
    """How many pixels of a tile are at most as light as a level, after clipping: [B, C · 64 · 256]."""
    count, channels = planes.shape[:2]
    padded = F.pad(planes, (0, MOST_TILES, 0, MOST_TILES), mode="reflect")
    rows = torch.arange(padded.shape[2], device=planes.device)
    columns = torch.arange(padded.shape[3], device=planes.device)
    tile = (rows / tall).long()[:, :, None] * MOST_TILES + (columns / wide).long()[:, None, :]
    outside = (rows >= tall * tiles)[:, :, None] | (columns >= wide * tiles)[:, None, :]
    nowhere = channels * TABLES * LEVELS
    index = padded.to(torch.int64).add_(_channel_starts(planes)).add_((tile * LEVELS)[:, None])
    index = index.masked_fill_(outside[:, None], nowhere).view(count, -1)
    counts = torch.zeros(count, nowhere + 1, device=planes.device)
    counts.scatter_add_(1, index, counts.new_ones(()).expand_as(index))
    tables = counts[:, :-1].unflatten(1, (channels, TABLES, LEVELS))
    area = (tall * wide)[:, :, None, None]
    tables.clamp_(max=(limit * area / LEVELS).floor().clamp(min=1)).cumsum_(dim=3)
    # what was clipped is dealt out evenly; what that leaves, one each, to levels at equal steps
    excess = area - tables[..., -1:]
    each = (excess / LEVELS).floor()
    rest = excess - each * LEVELS
    step = (LEVELS / rest.clamp(min=1)).floor()
    level = torch.arange(LEVELS, dtype=torch.float32, device=planes.device)
    tables.addcmul_(level + 1, each).add_((level / step).floor_().add_(1).minimum(rest))
    return counts[:, :-1]


def _channel_starts(planes: Tensor) -> Tensor:
    """int64 [C, 1, 1]: where each channel's tables begin."""
    return torch.arange(planes.shape[1], device=planes.device)[:, None, None] * (TABLES * LEVELS)


def _neighbours(size: int, extent: Tensor, tiles: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For every pixel of an axis the two tiles whose centres it lies between, [B, size] each, and their shares."""
    place = torch.arange(size, dtype=torch.float32, device=extent.device) / extent - 0.5
    before = place.floor()
    share = place - before
    nearest = (before.clamp(min=0).long(), torch.minimum(before + 1, tiles - 1).long())
    return nearest, (1 - share, share)
