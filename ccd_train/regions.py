"""Character regions: from masks to id maps, through θ, and tokens pooled over them. Batched, on the device.

Shapes: B images, H W pixels, h w patch grid, D width, K = 26 region slots.

A region is an 8-connected component of the text mask, of 30 pixels or more. The regions of an image are kept as one map
of ids [B, H, W] (0 background, 1…K from left to right), never as K masks. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.geometry import WARPED, sampling_grid

SLOTS = 26
MIN_PIXELS = 30  # the official smallest region
ROUNDS = 8  # tests/test_regions.py hunts for a mask that needs more than 7


def label_regions(masks: Tensor, min_pixels: int = MIN_PIXELS) -> Tensor:
    """Ids uint8 [B, H, W] of the regions in masks [B, H, W] (true or non-zero = text).

    A region is a component of at least min_pixels pixels. Regions are ordered by their mean column, ties by their first
    pixel in reading order; of more than K the leftmost K stay. (The official code takes the first K in reading order
    and then sorts those.)
    """
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


def components(masks: Tensor) -> Tensor:
    """For every text pixel of bool masks [B, H, W], the index of its component's first pixel: int64 [B, H, W].

    Background pixels hold their own index. 8-connected; hooking of roots with shortcuts, after FastSV (Zhang, Azad, Hu,
    "FastSV: a distributed-memory connected component algorithm with fast convergence", 2020), a fixed number of rounds.
    """
    batch, height, width = masks.shape
    text = masks.flatten(1)
    parent = torch.arange(height * width, device=masks.device).expand(batch, -1).contiguous()
    far = float(height * width)  # indices stay below 2^24, so float32, which max-pooling wants, holds them exactly
    for _ in range(ROUNDS):
        grandparent = parent.gather(1, parent)
        reach = torch.where(text, grandparent, far).view(batch, 1, height, width).float()
        nearest = -F.max_pool2d(-reach, kernel_size=3, stride=1, padding=1).flatten(1)
        nearest = torch.where(text, nearest.long(), grandparent)
        # the parent and the pixel itself are both hooked onto the smallest grandparent in the neighbourhood …
        hooked = parent.scatter_reduce(1, parent, nearest, "amin")
        parent = torch.minimum(hooked, nearest)
        # … and chains of parents are halved twice
        parent = parent.gather(1, parent)
        parent = parent.gather(1, parent)
    return parent.view(batch, height, width)


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
    size = torch.tensor([width, height], device=ids.device)
    column, row = ((((grid + 1) * size - 1) / 2).floor().long() + 1).clamp(min=0).minimum(size).unbind(-1)
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
