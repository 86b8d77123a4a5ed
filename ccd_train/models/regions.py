"""Character regions: from masks to id maps, through θ, and tokens pooled over them. Batched, on the device.

Shapes: B images, H W pixels, h w patch grid, D width, K = 26 region slots.

A region is an 8-connected component of the text mask, of 30 pixels or more. The regions of an image are kept as one map
of ids [B, H, W] (0 background, 1…K from left to right), never as K masks. Nothing here waits for the device.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.geometry import WARPED, sampling_grid
from ccd_train.gpu.replay import Replayed

SLOTS = 26
MIN_PIXELS = 30  # the official smallest region
ROUNDS = 10  # a search for bad masks (combs, mazes, and climbing from them) found none that needs more than 7


def label_regions(masks: Tensor, min_pixels: int = MIN_PIXELS) -> Tensor:
    """Ids uint8 [B, H, W] of the regions in masks [B, H, W] (true or non-zero = text).

    A region is a component of at least min_pixels pixels. Regions are ordered by their mean column, ties by their first
    pixel in reading order; of more than K the leftmost K stay. (The official code takes the first K in reading order
    and then sorts those.)
    """
    return _labelling(min_pixels)(masks)


@cache
def _labelling(min_pixels: int) -> Replayed:
    return Replayed(lambda masks: _labelled(masks, min_pixels))


def _labelled(masks: Tensor, min_pixels: int) -> Tensor:
    batch, height, width = masks.shape
    pixels = height * width
    assert pixels <= 1 << 13, "the sort keys below are exact up to 8,192 pixels"
    masks = masks.bool()
    roots = components(masks).flatten(1)  # [B, HW]
    text = masks.flatten(1).long()
    column = torch.arange(width, device=masks.device).repeat(height).expand(batch, -1)
    size = torch.zeros_like(roots).scatter_add_(1, roots, text)
    column_sum = torch.zeros_like(roots).scatter_add_(1, roots, column * text)
    # The mean column as an exact integer key: two unequal means of n and m pixels (n + m ≤ 2^13) differ by at least
    # 1/nm ≥ 2^-24, so 2^24 steps a column tell them apart; below them the root, the first pixel in reading order.
    position = torch.arange(pixels, device=masks.device)
    key = (column_sum << 24) // size.clamp(min=1) * pixels + position
    absent = torch.iinfo(torch.int64).max
    key = torch.where(size >= min_pixels, key, absent)
    chosen, root = key.topk(min(SLOTS, pixels), dim=1, largest=False)
    slot = torch.arange(1, root.shape[1] + 1, device=masks.device) * (chosen != absent)
    slot_of_root = torch.zeros_like(roots).scatter_(1, root, slot)
    ids = slot_of_root.gather(1, roots) * text
    return ids.to(torch.uint8).view(batch, height, width)


def components(masks: Tensor, rounds: int = ROUNDS) -> Tensor:
    """For every text pixel of bool masks [B, H, W], the index of its component's first pixel: int64 [B, H, W].

    Background pixels hold their own index. 8-connected; hooking of roots with shortcuts, after FastSV (Zhang, Azad, Hu,
    "FastSV: a distributed-memory connected component algorithm with fast convergence", 2020). The number of rounds is
    fixed, because a device would have to be waited for to see that nothing moves any more; a CPU just looks.
    """
    batch, height, width = masks.shape
    pixels = height * width
    outside = (
        torch.full_like(masks, pixels, dtype=torch.long).masked_fill_(masks, 0).flatten(1)
    )  # added, loses every min
    parent = torch.arange(pixels, device=masks.device).expand(batch, -1).contiguous()
    for _ in range(rounds):
        before = parent
        grandparent = parent.gather(1, parent)
        nearest = _smallest_neighbour((grandparent + outside).view(batch, height, width), pixels).flatten(1)
        nearest = torch.where(outside > 0, grandparent, nearest)
        # the parent and the pixel itself are both hooked onto the smallest grandparent in the neighbourhood …
        hooked = parent.scatter_reduce(1, parent, nearest, "amin")
        parent = torch.minimum(hooked, nearest)
        # … and chains of parents are halved twice
        parent = parent.gather(1, parent)
        parent = parent.gather(1, parent)
        if parent.device.type == "cpu" and torch.equal(parent, before):
            break
    return parent.view(batch, height, width)


def _smallest_neighbour(values: Tensor, outside: int) -> Tensor:
    """The minimum over each 3×3 neighbourhood of [B, H, W]; `outside` stands beyond the border."""
    padded = F.pad(values, (1, 1, 1, 1), value=outside)
    rows = torch.minimum(torch.minimum(padded[:, :, :-2], padded[:, :, 1:-1]), padded[:, :, 2:])
    return torch.minimum(torch.minimum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def warp_regions(ids: Tensor, theta: Tensor) -> Tensor:
    """Ids [B, H, W] through θ [B, 2, 3]: each region's own mask sampled bilinearly, > 0.1, as ids uint8 [B, H, W].

    Exact although the regions share one map: the four pixels of a bilinear sample are neighbours of each other, and two
    different regions are nowhere 8-connected, so all text among the four belongs to one region. Its sample is that of
    the mask of all regions, and its id the largest of the four. Regions therefore never overlap in the output either.
    """
    height, width = ids.shape[-2:]
    grid = sampling_grid(theta.float(), height, width)
    known = (ids[:, None] > 0).float()
    covered = F.grid_sample(known, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0] > WARPED
    # The id of every 2×2 block, with a border of background: block (y, x) has its top left pixel at (y − 1, x − 1).
    blocks = F.max_pool2d(ids[:, None].float(), kernel_size=2, stride=1, padding=1).flatten(1)
    x, y = grid.unbind(-1)
    column = (((x + 1) * width - 1) / 2).floor().long().add(1).clamp(0, width)
    row = (((y + 1) * height - 1) / 2).floor().long().add(1).clamp(0, height)
    owner = blocks.gather(1, (row * (width + 1) + column).flatten(1)).view(ids.shape)
    return (owner * covered).to(torch.uint8)


def pool(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each region's tokens: features float32 [B, K, D], and which slots hold a region [B, K].

    tokens [B, h·w, D] on a grid of square patches over ids [B, H, W]. Weights are the official ones: the region's mask
    resized bilinearly to h×w and normalised. For an even patch that resize is the mean of its four middle pixels, so
    the weights come from those pixels' ids. A region that touches no middle pixel has no features and is not valid.
    """
    batch, height, width = ids.shape
    patch = round((height * width / tokens.shape[1]) ** 0.5)
    assert patch % 2 == 0 and (height // patch) * (width // patch) == tokens.shape[1], "patches must be even squares"
    blocks = ids.view(batch, height // patch, patch, width // patch, patch)
    first, after = patch // 2 - 1, patch // 2 + 1
    middle = blocks[:, :, first:after, :, first:after].permute(0, 1, 3, 2, 4).reshape(batch, -1, 4).long()
    weights = torch.zeros(batch, tokens.shape[1], SLOTS + 1, dtype=tokens.dtype, device=tokens.device)
    weights.scatter_add_(2, middle, torch.full_like(middle, 0.25, dtype=tokens.dtype))  # quarters: exact in bf16 too
    weights = weights[:, :, 1:].transpose(1, 2)
    total = weights.float().sum(dim=2)
    features = torch.bmm(weights, tokens).float() / total.clamp(min=0.25)[:, :, None]
    return features, total > 0
