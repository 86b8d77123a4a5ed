"""What an LMDB of pictures holds: words, word crops with the codes of text segmentation, or TextZoom's pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from ccd_train.data.records import PROBES, LmdbReader, PairedReader
from ccd_train.errors import UserError

Kind = Literal["words", "crops", "pairs"]
_RELATED = ("image_HR", "image_LR")  # keys of other files of TextZoom's authors


class PoorReader(PairedReader):
    """The poor pictures of pairs, as if they were words."""

    def image(self, number: int) -> bytes | None:
        return self.partner(number)


def kind_of(path: Path) -> Kind:
    """UserError if it is damaged, or one of the files that resemble TextZoom's pairs."""
    with LmdbReader(path) as reader:
        if reader.has("image_hr") or reader.has("image_lr"):
            return "pairs"
        for kind in _RELATED:
            if reader.has(kind):
                raise UserError(
                    f"{path}: holds {kind}-%09d keys: related to TextZoom, but not its pairs; give the LMDBs with "
                    "image_hr-%09d and image_lr-%09d"
                )
        return "crops" if reader.has("image") and has_codes(reader, len(reader)) else "words"


def has_codes(reader: LmdbReader, count: int) -> bool:
    """Whether some masks have values that mean a word or its effects (100, 200) in text segmentation.

    Masks for pretraining have 0 and 1, or 0 and 255.
    """
    if not reader.has("mask"):
        return False
    from ccd_train.data.masks import UndecodableImage, decode_grey
    from ccd_train.data.pixels import EFFECT, WORD

    for number in map(int, np.unique(np.linspace(1, count, PROBES).astype(int))):
        try:
            values = decode_grey(reader.mask(number) or b"")
        except UndecodableImage:
            continue
        if np.isin(values, (WORD, EFFECT)).any():
            return True
    return False
