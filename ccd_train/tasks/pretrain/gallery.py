"""What the teacher makes of a fixed set of words, as pictures: the same words at every step, to watch it learn.

Shapes: N words, H W pixels (32×128), h w patch grid (8×32), D width, M characters.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.views import normalize
from ccd_train.models.regions import label_regions, pool
from ccd_train.models.vit import GRID, VisionTransformer
from ccd_train.tasks.pretrain.pictures import MARGIN, SCALE, titled

WORDS = 48  # whose characters are each other's neighbours
ROWS = 8  # words, and queries, that are shown
NEIGHBOURS = 8
CELL = 48  # screen pixels of a character
BRIGHTEST = 2.0  # deviations from the mean that reach the end of the colour scale


@dataclass(frozen=True)
class FixedWords:
    images_u8: Tensor
    """uint8 [N, 3, H, W], RGB."""
    ids: Tensor
    """uint8 [N, H, W]: regions."""


def fixed_words(images_u8: Tensor, pseudo_mask: Tensor) -> FixedWords:
    """Of images [N, 3, H, W] and their masks [N, H, W]."""
    return FixedWords(images_u8, label_regions(pseudo_mask))


@torch.no_grad()
def draw(vit: VisionTransformer, shown: FixedWords) -> dict[str, np.ndarray]:
    """Two sheets uint8 [·, ·, 3] RGB by name: patch tokens, and each character's nearest neighbours."""
    device, training = next(vit.parameters()).device, vit.training
    vit.eval()
    inputs = shown.images_u8.to(device).float()
    normalize(inputs)
    tokens = vit(inputs)[0].float()
    vit.train(training)
    features, valid = pool(tokens, shown.ids.to(device))
    crops = shown.images_u8.permute(0, 2, 3, 1).numpy()
    return {
        "patches": _patches(crops[:ROWS], components(tokens).cpu().numpy()[:ROWS]),
        "neighbours": _neighbours(crops, shown.ids.numpy(), features.cpu(), valid.cpu()),
    }


def components(tokens: Tensor) -> Tensor:
    """The three principal components of all patch tokens [N, h·w, D] as colours uint8 [N, h, w, 3].

    Each is signed so that its largest weight is positive: colours do not flip from one picture to the next.
    """
    flat = tokens.flatten(0, 1)
    centered = flat - flat.mean(dim=0)
    _, axes = torch.linalg.eigh(centered.t() @ centered / len(flat))
    axes = axes[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    values = centered @ axes
    values = values / values.std(dim=0).clamp(min=1e-6) / BRIGHTEST
    colors: Tensor = ((values + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).view(len(tokens), *GRID, 3)
    return colors


def nearest(features: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every character's nearest ones in other words, by the cosine of centred features [N, K, D]; valid bool [N, K].

    Returns the characters' (word, slot) int64 [M, 2], and of each the neighbours' indices among them and their cosines
    [M, count].
    """
    places = valid.nonzero()
    known = features[valid]
    unit = F.normalize(known - known.mean(dim=0), dim=1)
    cosines = unit @ unit.t()
    same_word = places[:, None, 0] == places[None, :, 0]
    best, index = cosines.masked_fill(same_word, -2.0).topk(min(count, len(places)), dim=1)
    return places, index, best


def _patches(crops: np.ndarray, colors: np.ndarray) -> np.ndarray:
    size = (crops.shape[2] * SCALE, crops.shape[1] * SCALE)
    columns = [("word", crops), ("principal components of its patch tokens", colors)]
    cells = {name: [cv2.resize(c, size, interpolation=cv2.INTER_NEAREST) for c in images] for name, images in columns}
    return np.concatenate([titled(name, images) for name, images in cells.items()], axis=1)


def _neighbours(crops: np.ndarray, ids: np.ndarray, features: Tensor, valid: Tensor) -> np.ndarray:
    """Rows of a character and its nearest ones, the rows evenly spaced over all characters."""
    places, index, cosines = nearest(features, valid, NEIGHBOURS)
    if len(places) <= NEIGHBOURS:
        return np.full((CELL, CELL, 3), 255, np.uint8)
    queries = np.linspace(0, len(places) - 1, ROWS).round().astype(int)
    shown = [[query, *index[query].tolist()] for query in queries]
    columns = []
    for column in range(NEIGHBOURS + 1):
        cells = []
        for row in shown:
            word, slot = places[row[column]].tolist()
            cell = _character(crops[word], ids[word] == slot + 1)
            if column:
                cosine = cosines[row[0], column - 1].item()
                cv2.putText(cell, f"{cosine:.2f}", (2, CELL - 3), cv2.FONT_HERSHEY_SIMPLEX, 0.3, (255, 255, 0), 1)
            cells.append(cell)
        columns.append(titled("query" if column == 0 else str(column), cells))
        if column == 0:
            columns.append(np.full((len(columns[0]), 2 * MARGIN, 3), 255, np.uint8))
    return np.concatenate(columns, axis=1)


def _character(crop: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The part of a crop [H, W, 3] around a region [H, W], as a square picture."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    left, right = max(columns[0] - 2, 0), columns[-1] + 3
    top, bottom = max(rows[0] - 2, 0), rows[-1] + 3
    return cv2.resize(crop[top:bottom, left:right], (CELL, CELL), interpolation=cv2.INTER_LINEAR)
