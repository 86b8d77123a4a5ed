"""From the bytes of word crops to their text: what `read` and `evaluate` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch

from ccd_train import distributed
from ccd_train.augment.views import normalize
from ccd_train.config.verbs import RecognizerSource
from ccd_train.data.charset import read_charset
from ccd_train.data.masks import UndecodableImage, decode_rgb, resize_image
from ccd_train.models import decoding
from ccd_train.tasks.recognize.scoring import Fold, written
from ccd_train.weights import recognizer
from ccd_train.weights.recognizer import Trained


class Reading(NamedTuple):
    """What was read in one image."""

    text: str
    confidence: float
    """The probability of the whole word: of all its characters and of its end."""
    characters: list[float]
    """The probability of each character of the text, given those before it."""


def open_recognizer(source: RecognizerSource) -> Trained:
    """The recogniser of checked settings. UserError where there is none or it does not fit."""
    assert source.weights is not None, "check comes first"
    charset = None if source.charset is None else read_charset(source.charset)
    return recognizer.read(source.weights, charset, source.heads, source.decoder_heads)


class Reader:
    """A recogniser on this process's device, fed with the bytes of images."""

    def __init__(self, trained: Trained) -> None:
        cv2.setNumThreads(1)
        self.charset, self._length = trained.charset, trained.sizes.length
        self._device = distributed.device()
        self._network = trained.network().to(self._device)

    def read(self, images: Sequence[bytes], upright: bool = False) -> list[Reading | UndecodableImage]:
        """What stands in each image; for one that cannot be read, why not. All go through the network as one batch.

        `upright` turns them as their EXIF says, which records of an LMDB are not.
        """
        crops = [_crop(data, upright) for data in images]
        readings = iter(self._read([crop for crop in crops if isinstance(crop, np.ndarray)]))
        return [next(readings) if isinstance(crop, np.ndarray) else crop for crop in crops]

    def can_write(self, label: str, rule: Fold) -> bool:
        """Whether a label could be read at all, as the rule compares it: by its length and by its characters."""
        compared = rule(label)
        return len(compared) <= self._length and written(rule, self.charset.characters).issuperset(compared)

    def _read(self, crops: Sequence[np.ndarray]) -> list[Reading]:
        """Crops uint8 [32, 128, 3]."""
        if not crops:
            return []
        inputs = torch.from_numpy(np.stack(crops)).to(self._device).permute(0, 3, 1, 2).float()
        normalize(inputs)
        words = decoding.read(self._network, inputs)
        readings = []
        for tokens, confidences in zip(words.tokens.tolist(), words.confidences.tolist(), strict=True):
            text = self.charset.decode(tokens)
            readings.append(Reading(text, math.prod(confidences), confidences[: len(text)]))
        return readings


def _crop(data: bytes, upright: bool) -> np.ndarray | UndecodableImage:
    try:
        return resize_image(decode_rgb(data, upright))
    except UndecodableImage as error:
        return error
