"""What a step saw, as a picture: crops, views, masks, the student's segmentation, and the characters that match."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from ccd_train.augment import MEAN, STD

ROWS = 8
SCALE = 2  # screen pixels per pixel
MARGIN = 4
TITLE = 18
COLUMNS = ("crop", "pseudo-mask", "regular view", "irregular view", "segmentation", "characters", "characters, warped")
GREY = np.array([70, 70, 70], np.uint8)  # text that belongs to no character


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


def draw(seen: Seen) -> np.ndarray:
    """A sheet uint8 [·, ·, 3] RGB of the first images; a character has the same colour in both views."""
    count = min(ROWS, len(seen.images_u8))
    batch = len(seen.images_u8)
    text = (seen.segmentation_logits[:count, 1] > seen.segmentation_logits[:count, 0]).cpu().numpy()
    columns = [
        seen.images_u8[:count].permute(0, 2, 3, 1).cpu().numpy(),
        _grey(seen.pseudo_mask[:count].bool().cpu().numpy()),
        _pixels(seen.regular[:count]),
        _pixels(seen.irregular[:count]),
        _grey(text),
        colours(seen.region_ids[:count].cpu().numpy()),
        colours(seen.region_ids[batch : batch + count].cpu().numpy()),
    ]
    return np.concatenate([_column(title, images) for title, images in zip(COLUMNS, columns, strict=True)], axis=1)


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


def _column(title: str, images: np.ndarray) -> np.ndarray:
    _, height, width, _ = images.shape
    size = (width * SCALE, height * SCALE)
    cells = [cv2.resize(image, size, interpolation=cv2.INTER_NEAREST) for image in images]
    framed = [cv2.copyMakeBorder(c, MARGIN, 0, MARGIN, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for c in cells]
    head = np.full((TITLE, framed[0].shape[1], 3), 255, np.uint8)
    cv2.putText(head, title, (MARGIN, TITLE - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([head, *framed])
