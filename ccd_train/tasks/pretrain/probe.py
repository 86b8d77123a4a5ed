"""What the features know about characters: a linear and a nearest-neighbour classifier on the frozen backbone.

    ccd-train probe --weights RUN --data LMDB

A word is usable if its pseudo-mask falls into as many regions as its label has letters: then the regions, from left to
right, are its letters. Their pooled features are classified; every fourth usable word is held out for the score, so
letters of one word are never on both sides. Nothing is drawn at random: the same weights and words give the same score.
An untrained network of the same sizes is scored beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.augment.views import normalize
from ccd_train.config.pretraining import HELD_OUT
from ccd_train.data.masks import UndecodableImage, decode_rgb, pseudo_mask, resize_image, resize_mask
from ccd_train.data.records import LmdbReader, find_lmdbs
from ccd_train.errors import UserError
from ccd_train.models.regions import label_regions, pool
from ccd_train.models.vit import VisionTransformer

NEIGHBOURS = 5
DECAY = 1e-2  # of the linear classifier's weights, on standardised features
STEPS = 60  # of L-BFGS; its score moves by less than 0.1 % after 40
BATCH = 64
# Letters whose two cases differ in nothing but size, which a resized crop does not show (EMNIST, Cohen et al. 2017).
SAME_IN_BOTH_CASES = "cijklmopsuvwxyz"
FOLD = str.maketrans(SAME_IN_BOTH_CASES, SAME_IN_BOTH_CASES.upper())


@dataclass(frozen=True)
class ProbeWords:
    """Usable words: as many regions as letters."""

    images_u8: Tensor
    """uint8 [N, 3, 32, 128], RGB."""
    ids: Tensor
    """uint8 [N, 32, 128]: regions."""
    labels: tuple[str, ...]
    """The letters of each, without spaces."""
    read: int
    """ProbeWords with a label that were looked at, usable or not."""


@dataclass(frozen=True)
class ProbeScore:
    linear: float
    """Accuracy of the linear classifier on the held-out words' letters."""
    knn: float
    """Accuracy of the 5 nearest neighbours by cosine."""
    chance: float
    """Share of the most frequent class among the held-out letters."""
    usable: float
    """Usable words of all that were looked at."""
    characters: int
    """Letters, in words held out or not."""
    classes: int


def read_words(folders: Sequence[Path], limit: int) -> ProbeWords:
    """The usable ones among the first `limit` labelled words that can be decoded. UserError where there are none."""
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    labels: list[str] = []
    for path in (lmdb for folder in folders for lmdb in find_lmdbs(folder)):
        with LmdbReader(path) as reader:
            for number in range(1, len(reader) + 1):
                label, data = "".join((reader.label(number) or "").split()), reader.image(number)
                if len(labels) == limit:
                    break
                if not label or data is None:
                    continue
                try:
                    image = decode_rgb(data)
                except UndecodableImage:
                    continue
                images.append(resize_image(image))
                masks.append(resize_mask(pseudo_mask(image)))
                labels.append(label)
    named = ", ".join(map(str, folders))
    if not labels:
        raise UserError(f"{named}: no labelled words; give an LMDB with label-%09d keys")
    ids = torch.cat([label_regions(part) for part in torch.from_numpy(np.stack(masks)).split(BATCH)])
    regions = ids.flatten(1).amax(dim=1).tolist()
    usable = [index for index, label in enumerate(labels) if regions[index] == len(label)]
    if len(usable) < 2 * HELD_OUT:
        raise UserError(
            f"{named}: {len(usable)} of {len(labels)} words have as many regions as letters, fewer than "
            f"{2 * HELD_OUT}; raise --words or give other words"
        )
    pixels = torch.from_numpy(np.stack([images[index] for index in usable])).permute(0, 3, 1, 2).contiguous()
    return ProbeWords(pixels, ids[usable], tuple(labels[index] for index in usable), len(labels))


def probe(vit: VisionTransformer, words: ProbeWords) -> ProbeScore:
    """Scores a backbone, which may be of any type and on any device; it is left in the mode that it was in."""
    features, classes, word = characters(vit, words)
    held_out = word % HELD_OUT == HELD_OUT - 1
    train, test = features[~held_out], features[held_out]
    known, wanted = classes[~held_out], classes[held_out]
    return ProbeScore(
        linear=_accuracy(_linear(train, known, test), wanted),
        knn=_accuracy(_nearest(train, known, test), wanted),
        chance=int(wanted.bincount().max()) / len(wanted),
        usable=len(words.labels) / words.read,
        characters=len(classes),
        classes=int(classes.max()) + 1,
    )


@torch.no_grad()
def characters(vit: VisionTransformer, words: ProbeWords) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features float32 [M, D], classes [M] and word numbers [M] of all letters and digits, on the CPU."""
    device, training = next(vit.parameters()).device, vit.training
    vit.eval()
    parts: list[Tensor] = []
    for images, ids in zip(words.images_u8.split(BATCH), words.ids.split(BATCH), strict=True):
        inputs = images.to(device).float()
        normalize(inputs)
        tokens, _ = vit(inputs)
        parts.append(pool(tokens, ids.to(device))[0].cpu())
    vit.train(training)
    features = torch.cat(parts)
    places = [
        (word, slot, letter.translate(FOLD))
        for word, label in enumerate(words.labels)
        for slot, letter in enumerate(label)
        if letter.isalnum()
    ]
    numbers = {letter: number for number, letter in enumerate(sorted({letter for _, _, letter in places}))}
    word, slot, classes = torch.tensor([(w, s, numbers[letter]) for w, s, letter in places]).unbind(dim=1)
    return features[word, slot], classes, word


def _linear(train: Tensor, known: Tensor, test: Tensor) -> Tensor:
    """Logistic regression on standardised features, to its optimum by L-BFGS: predicted classes [N]."""
    mean, deviation = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    weight = torch.zeros(int(known.max()) + 1, train.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), known) + DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return F.linear(test, weight, bias).argmax(dim=1)


def _nearest(train: Tensor, known: Tensor, test: Tensor) -> Tensor:
    """The class with most votes among the nearest by cosine; of equal ones, the class that is nearer in sum."""
    center = train.mean(dim=0)
    train, test = F.normalize(train - center, dim=1), F.normalize(test - center, dim=1)
    similarity, index = (test @ train.t()).topk(min(NEIGHBOURS, len(train)), dim=1)
    votes = torch.zeros(len(test), int(known.max()) + 1)
    votes.scatter_add_(1, known[index], 1 + 1e-3 * similarity)
    return votes.argmax(dim=1)


def _accuracy(predicted: Tensor, wanted: Tensor) -> float:
    return float((predicted == wanted).float().mean())
