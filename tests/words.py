"""A small untrained recogniser as an export, and what it reads: tests take its own words for labels."""

from __future__ import annotations

from pathlib import Path

import torch

from ccd_train.config import pretraining as config
from ccd_train.config import recognition as finetuning
from ccd_train.data.charset import read_charset
from ccd_train.data.records import LmdbReader
from ccd_train.models.recognizer import Recognizer
from ccd_train.tasks.recognize.reading import Reader, Reading
from ccd_train.weights import recognizer as recognizers
from ccd_train.weights.recognizer import Trained

MODEL = config.Model(width=16, depth=1, heads=2)
SIZES = finetuning.ReadingHead(layers=1, width=16, heads=2, hidden=8, encoder_hidden=8, length=4, place_codes=True)


def small(charset: str = "62", seed: int = 3) -> Trained:
    """Four letters or digits a word."""
    characters = read_charset(charset)
    torch.manual_seed(seed)
    network = Recognizer(MODEL, SIZES, characters.classes)
    with torch.no_grad():
        network.decoder.classifier.bias[characters.unknown :] -= 9.0  # neither unknown nor short
    return Trained(MODEL, SIZES, characters, network.state_dict(), {"step": 1}, "memory")


def write(folder: Path, trained: Trained | None = None) -> Path:
    """An export."""
    recognizers.write(folder / recognizers.FILE, trained or small())
    return folder


def images(lmdb: Path, count: int) -> list[bytes]:
    with LmdbReader(lmdb) as reader:
        return [reader.image(number) or b"" for number in range(1, count + 1)]


def texts(trained: Trained, contents: list[bytes]) -> list[str]:
    """What the recogniser reads in images that can be read."""
    readings = [reading for reading in Reader(trained).read(contents) if isinstance(reading, Reading)]
    assert len(readings) == len(contents)
    return [reading.text for reading in readings]
