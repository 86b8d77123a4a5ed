"""Every setting of a fine-tuning run: frozen dataclasses, beside those of config.py that it shares.

The defaults are the official constants for the backbone of 384 channels on ARD (TongkunGuan/CCD,
Dino/configs/CCD_vision_model_ARD.yaml): 35 epochs of 2.78 M words, the first of them for the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ccd_train.augment.severities import Augment
from ccd_train.config.pretraining import Model
from ccd_train.config.run import RunConfig, Train, Valid, require

SCRATCH = Path("scratch")


@dataclass(frozen=True)
class LabelledWords:
    train: tuple[Path, ...] = ()
    """Labelled words: LMDBs, folders with LMDBs anywhere below, or shard folders; several are read as one."""
    valid: tuple[Path, ...] = ()
    """Labelled words that choose the best weights, likewise; a benchmark is refused."""
    charset: str = "DICT90"
    """36, 62, DICT90, or a text file with one character a line."""
    too_long: Literal["cut", "leave_out"] = "cut"
    """Training words with more characters than recognizer.length has room for: learn their beginning (official), or
    nothing from them."""
    fraction: float = 1.0
    """Share of the training words in use; the same words on every machine for a seed, and less are a part of more."""
    workers: int = 4
    """Processes per rank that read and decode; 0 does it in the training process."""
    window_shards: int = 16
    """Shards, or ranges of 10,000 records, that are shuffled together."""
    max_damaged: float = 0.001
    """Share of unreadable samples (each is replaced by the next of its shard) above which a run ends as failed."""

    def check(self) -> None:
        require(len(self.train) > 0, "data.train", "()", "name LMDBs or shards of labelled words: --data.train DIR")
        require(len(self.valid) > 0, "data.valid", "()", "name labelled words for validation: --data.valid DIR")
        require(0 < self.fraction <= 1, "data.fraction", self.fraction, "must lie in (0, 1]")
        require(self.workers >= 0, "data.workers", self.workers, "must be 0 or more")
        require(self.window_shards >= 1, "data.window_shards", self.window_shards, "must be 1 or more")
        require(0 <= self.max_damaged <= 1, "data.max_damaged", self.max_damaged, "must lie in [0, 1]")


@dataclass(frozen=True)
class ReadingHead:
    """What fine-tuning puts behind the backbone: an MLP and an autoregressive transformer decoder."""

    layers: int = 6
    """Layers of the decoder."""
    width: int = 512
    """Channels of every token in the decoder."""
    heads: int = 8
    """Attention heads of the decoder; must divide its width."""
    hidden: int = 256
    """Width of the hidden layer in the decoder's MLPs."""
    encoder_hidden: int = 512
    """Width of the hidden layer in the MLP between backbone and decoder."""
    dropout: float = 0.1
    """In the MLP and the decoder, while training."""
    length: int = 25
    """Tokens of a word, its beginning and end among them: for longer labels see data.too_long."""
    place_codes: bool = False
    """Add fixed sines of row and column to the image's tokens: the decoder finds its way sooner (official: no)."""

    def check(self) -> None:
        for name in ("layers", "heads", "hidden", "encoder_hidden"):
            require(getattr(self, name) >= 1, f"recognizer.{name}", getattr(self, name), "must be 1 or more")
        fits = self.width >= 2 and self.width % self.heads == 0
        require(fits, "recognizer.width", self.width, f"must be a multiple of recognizer.heads = {self.heads}")
        fits = self.width % 4 == 0 or not self.place_codes
        require(fits, "recognizer.width", self.width, "must be a multiple of 4 for recognizer.place_codes")
        require(0 <= self.dropout < 1, "recognizer.dropout", self.dropout, "must lie in [0, 1)")
        require(self.length >= 3, "recognizer.length", self.length, "must be 3 or more")


@dataclass(frozen=True)
class Accuracy(Valid):
    rule: Literal["lower_alnum", "case", "all"] = "lower_alnum"
    """What of a word must be right: the official rule, letters and digits with their case, or every character."""


@dataclass(frozen=True)
class FineTuning(RunConfig):
    """A fine-tuning run."""

    task: ClassVar[str] = "recognize"
    """Which recipes are its own."""
    init: Path | None = None
    """Where the backbone comes from: a pretraining's run folder, its export or an official .pth (the teacher's), a
    recogniser of the same charset (all of it), or the word scratch; a run that goes on ignores it."""
    data: LabelledWords = field(default_factory=LabelledWords)
    augment: Augment = field(default_factory=lambda: Augment(chain="finetune_small"))
    model: Model = field(default_factory=Model)
    recognizer: ReadingHead = field(default_factory=ReadingHead)
    train: Train = field(
        default_factory=lambda: Train(total_samples=97_300_000, micro_batch_size=36, global_batch_size=288)
    )
    valid: Accuracy = field(default_factory=Accuracy)

    def check(self) -> None:
        """Raises UserError for the first value that is impossible, before any other work."""
        remedy = "name weights, --init EXPORT_OR_RUN_OR_PTH, or --init scratch"
        require(self.init is not None, "init", self.init, remedy)
        super().check()
