"""What a step saw, as a picture: crops, views, masks, the student's segmentation, and the characters that match."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from ccd_train.augment.views import MEAN, STD

ROWS = 8
SCALE = 2  # screen pixels per pixel
MARGIN = 4
TITLE = 18
GAP = 3  # pixels between the upper and the lower picture of a cell
SPACE = 14  # screen pixels between two such cells
COLUMNS = ("crop, pseudo-mask", "regular, irregular view", "student's segmentation", "matched characters")
GREY = np.array([110, 110, 110], np.uint8)  # a region that is no character


@dataclass(frozen=True)
class Seen:
    """Tensors of a micro-batch of B images: what `draw` needs of it, of its views and of the student's output."""

    images_u8: Tensor
    """uint8 [B, 3, H, W]."""
    pseudo_mask: Tensor
    """[B, H, W], text not zero."""
    regular: Tensor
    irregular: Tensor
    """[B, 3, H, W], normalised."""
    segmentation_logits: Tensor
    """[2B, 2, H, W], the regular views first."""
    region_ids: Tensor
    """uint8 [2B, H, W], the regular views first."""
    image: Tensor
    slot: Tensor
    """int64 [M]: the image and the region slot of each character that both views hold."""


def draw(seen: Seen) -> np.ndarray:
    """A sheet uint8 [·, ·, 3] RGB of the first images; a character has the same colour in both views."""
    batch = len(seen.images_u8)
    count = min(ROWS, batch)
    both = [*range(count), *range(batch, batch + count)]
    views = _pixels(torch.cat([seen.regular[:count], seen.irregular[:count]]))
    text = (seen.segmentation_logits[both, 1] > seen.segmentation_logits[both, 0]).cpu().numpy()
    matched = np.zeros((count, 256), bool)
    for image, slot in zip(seen.image.tolist(), seen.slot.tolist(), strict=True):
        if image < count:
            matched[image, slot + 1] = True
    crops = seen.images_u8[:count].permute(0, 2, 3, 1).cpu().numpy()
    masks = _grey(seen.pseudo_mask[:count].bool().cpu().numpy())
    segmented, ids = _grey(text), seen.region_ids[both].cpu().numpy()
    pairs = zip(*np.split(views, 2), *np.split(ids, 2), matched, strict=True)
    columns = [
        [_stacked(*pair) for pair in zip(crops, masks, strict=True)],
        [_stacked(*pair) for pair in zip(*np.split(views, 2), strict=True)],
        [_stacked(*pair) for pair in zip(*np.split(segmented, 2), strict=True)],
        [_joined(*parts) for parts in pairs],
    ]
    return np.concatenate([titled(title, cells, SPACE) for title, cells in zip(COLUMNS, columns, strict=True)], axis=1)


def _stacked(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Two pictures [H, W, 3], enlarged, one below the other."""
    gap = np.full((GAP, upper.shape[1], 3), 255, np.uint8)
    return cv2.resize(np.concatenate([upper, gap, lower]), None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_NEAREST)


def _joined(
    regular: np.ndarray, irregular: np.ndarray, here: np.ndarray, there: np.ndarray, matched: np.ndarray
) -> np.ndarray:
    """Both views [H, W, 3], dark, under their regions, with a line between the two places of a character."""
    painted = [
        np.where(ids[..., None] > 0, np.where(matched[ids][..., None], colours(ids), GREY), view // 2)
        for view, ids in ((regular, here), (irregular, there))
    ]
    cell = _stacked(painted[0], painted[1])
    below = np.array([0, len(here) + GAP])
    for region in np.flatnonzero(matched):
        ends = [np.argwhere(ids == region)[:, ::-1].mean(axis=0) for ids in (here, there)]
        start, end = (np.round((place + 0.5) * SCALE).astype(int).tolist() for place in (ends[0], ends[1] + below))
        color = colours(np.full((1, 1), region, np.uint8))[0, 0].tolist()
        cv2.line(cell, start, end, (0, 0, 0), 4, cv2.LINE_AA)
        cv2.line(cell, start, end, color, 2, cv2.LINE_AA)
    return cell


def colours(ids: np.ndarray) -> np.ndarray:
    """Region ids uint8 [N, H, W] as colours uint8 [N, H, W, 3]: neighbours far apart on the colour circle."""
    hue = (np.arange(256) * 67 % 180).astype(np.uint8)
    table = cv2.cvtColor(
        np.stack([hue, np.full_like(hue, 200), np.full_like(hue, 255)], axis=-1)[None], cv2.COLOR_HSV2RGB
    )
    table[0, 0] = 0
    return np.asarray(table[0][ids])


def _grey(masks: np.ndarray) -> np.ndarray:
    return np.repeat(masks.astype(np.uint8)[..., None] * 255, 3, axis=-1)


def _pixels(views: Tensor) -> np.ndarray:
    """Normalised views [N, 3, H, W] back to uint8 [N, H, W, 3]."""
    values = views.float().permute(0, 2, 3, 1).cpu().numpy() * np.array(STD) + np.array(MEAN)
    return np.asarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def titled(title: str, cells: list[np.ndarray], space: int = MARGIN) -> np.ndarray:
    """Pictures uint8 [H, W, 3] one below the other, with `space` below each and a title above."""
    framed = [cv2.copyMakeBorder(c, 0, space, MARGIN, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for c in cells]
    head = np.full((TITLE, framed[0].shape[1], 3), 255, np.uint8)
    cv2.putText(head, title, (MARGIN, TITLE - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([head, *framed])
