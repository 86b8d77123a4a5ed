"""ccd-train probe: classifies characters with frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import torch

from ccd_train import distributed
from ccd_train.config.options import parse
from ccd_train.config.run import require
from ccd_train.models.ccd import Student, Teacher
from ccd_train.tasks.pretrain.probe import HELD_OUT, NEIGHBOURS, probe, read_words
from ccd_train.tasks.pretrain.weights import open_weights
from ccd_train.weights.tensors import load


@dataclass(frozen=True)
class ProbeOptions:
    """Classify characters with frozen features."""

    weights: Path | None = None
    """A run folder, a checkpoint folder, an export, or an official .pth."""
    data: tuple[Path, ...] = ()
    """LMDBs of labelled words, or folders with some below."""
    words: int = 2000
    """Labelled words to look at, the first ones of the data."""
    network: Literal["teacher", "student"] = "teacher"
    """Whose backbone: the teacher's, as for fine-tuning, or the student's."""
    heads: int | None = None
    """Attention heads of an official .pth whose width is not 64 per head."""

    def check(self) -> None:
        require(self.weights is not None, "weights", None, "name what to probe: --weights RUN")
        require(len(self.data) > 0, "data", "()", "name an LMDB of labelled words: --data LMDB")
        require(self.words >= HELD_OUT, "words", self.words, f"must be {HELD_OUT} or more")


def main(argv: list[str]) -> int:
    options = parse(ProbeOptions, argv, "ccd-train probe")
    options.check()
    assert options.weights is not None
    cv2.setNumThreads(1)
    found = open_weights(options.weights, options.heads)
    words = read_words(options.data, options.words)
    torch.manual_seed(0)
    network = Student(found.model) if options.network == "student" else Teacher(found.model)
    network.to(distributed.device())
    untrained = probe(network.vit, words)
    load(network, getattr(found, options.network), found.origin)
    score = probe(network.vit, words)
    print(f"{score.characters} letters of {score.classes} classes from {len(words.labels)} usable words", end=" ")
    print(f"({score.usable:.1%} of {words.read}); chance {score.chance:.1%}")
    for name, result in ((f"{options.network} of {found.origin}", score), ("the same network, untrained", untrained)):
        print(f"linear {result.linear:6.1%}   {NEIGHBOURS}-NN {result.knn:6.1%}   {name}")
    return 0
