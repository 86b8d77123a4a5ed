"""Every setting of the two pixel tasks: text segmentation and super-resolution of text images.

Network, schedule and optimiser are those of FaltingsA/SSM (pretrain/main_pixel.py, engine_pixel.py), the only public
fine-tuning code of both tasks, in samples: 100 epochs of batches of 96, of which the first 10 or 5 are the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ccd_train.config.pretraining import Model
from ccd_train.config.run import AdamW, RunConfig, Train, Valid, require

Effects = Literal["background", "text", "ignored"]
Route = Literal["stored", "x2"]
SEGMENT, SUPERRESOLVE = "segment", "superresolve"


@dataclass(frozen=True)
class PairedPictures:
    train: tuple[Path, ...] = ()
    """Pictures with their truth: LMDBs or folders with some anywhere below; several are read as one. For segmentation
    word crops with masks (or image/ beside mask/, SSM's form), for super-resolution TextZoom's pairs."""
    valid: tuple[Path, ...] = ()
    """Pictures that choose the best weights, likewise; none: a tenth of data.train, by a hash of where each is stored,
    which is then not trained on."""
    fraction: float = 1.0
    """Share of the training pictures in use; the same on every machine for a seed, and less are a part of more."""
    workers: int = 4
    """Processes per rank that read and decode; 0 does it in the training process."""
    window_shards: int = 16
    """Ranges of 10,000 records that are shuffled together."""
    max_damaged: float = 0.001
    """Share of unreadable samples (each is replaced by the next of its shard) above which a run ends as failed."""

    def check(self) -> None:
        require(len(self.train) > 0, "data.train", "()", "name pictures with their truth: --data.train DIR")
        require(0 < self.fraction <= 1, "data.fraction", self.fraction, "must lie in (0, 1]")
        require(self.workers >= 0, "data.workers", self.workers, "must be 0 or more")
        require(self.window_shards >= 1, "data.window_shards", self.window_shards, "must be 1 or more")
        require(0 <= self.max_damaged <= 1, "data.max_damaged", self.max_damaged, "must lie in [0, 1]")


@dataclass(frozen=True)
class MaskedPictures(PairedPictures):
    effects: Effects = "background"
    """What shadows and glows of words (code 200) count as; TextSeg's authors train and score with background."""


@dataclass(frozen=True)
class PicturePairs(PairedPictures):
    route: Route = "stored"
    """How the network's input is made: the stored LR picture → 128×32 at once (SSM; more detail than 64×16 holds), or
    → 64×16 → 128×32 (TextZoom's own problem)."""


@dataclass(frozen=True)
class PixelHead:
    """What stands behind the backbone: transformer blocks, a norm, and one linear layer from a token to its patch."""

    layers: int = 3
    """Blocks of the decoder."""
    heads: int = 2
    """Attention heads of each; must divide model.width."""

    def check(self) -> None:
        for name in ("layers", "heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be 1 or more")


@dataclass(frozen=True)
class MaskHead(PixelHead):
    loss: Literal["bce", "mse"] = "bce"
    """Cross-entropy of logits, or squared error of the mask as SSM has it; both a mean over what is not ignored."""
    channels: ClassVar[int] = 1

    @property
    def residual(self) -> bool:
        return False


@dataclass(frozen=True)
class PictureHead(PixelHead):
    residual: bool = True
    """Add what the network says to its input, from 0 at the start; off: the network says the picture (SSM)."""
    channels: ClassVar[int] = 3


@dataclass(frozen=True)
class PixelTuning(RunConfig):
    """What both pixel tasks are told."""

    task: ClassVar[str]
    """Which recipes are its own."""
    section: ClassVar[str]
    """The name of the section with the head."""
    init: Path | None = None
    """Where the backbone comes from: a pretraining's run folder, its export or an official .pth, or the word scratch;
    a run that goes on ignores it."""
    student: bool = False
    """Take the student's backbone of a pretraining, as SSM does; off: the teacher's."""
    data: PairedPictures = field(default_factory=PairedPictures)
    model: Model = field(default_factory=lambda: Model(drop_path=0.0))
    optimizer: AdamW = field(
        default_factory=lambda: AdamW(lr=1e-4, final_lr=0.0, warmup_samples=100_000, betas=(0.9, 0.95))
    )
    train: Train = field(
        default_factory=lambda: Train(total_samples=1_000_000, micro_batch_size=96, global_batch_size=96)
    )
    valid: Valid = field(default_factory=Valid)

    def check(self) -> None:
        remedy = "name weights, --init EXPORT_OR_RUN_OR_PTH, or --init scratch"
        require(self.init is not None, "init", self.init, remedy)
        super().check()
        heads, width = self.head.heads, self.model.width
        require(width % heads == 0, f"{self.section}.heads", heads, f"must divide model.width = {width}")
        fits = width % 4 == 0
        require(fits, "model.width", width, "must be a multiple of 4 for the decoder's table of positions")

    @property
    def head(self) -> MaskHead | PictureHead:
        found = getattr(self, self.section)
        assert isinstance(found, MaskHead | PictureHead)
        return found


@dataclass(frozen=True)
class Segmenting(PixelTuning):
    """A fine-tuning run: which pixels are text."""

    task: ClassVar[str] = SEGMENT
    section: ClassVar[str] = "segmenter"
    score: ClassVar[str] = "fg_iou {:.4f}"
    data: MaskedPictures = field(default_factory=MaskedPictures)
    segmenter: MaskHead = field(default_factory=MaskHead)


@dataclass(frozen=True)
class Upscaling(PixelTuning):
    """A fine-tuning run: a poor picture of a word made better."""

    task: ClassVar[str] = SUPERRESOLVE
    section: ClassVar[str] = "upscaler"
    score: ClassVar[str] = "psnr {:.2f} dB"
    data: PicturePairs = field(default_factory=PicturePairs)
    upscaler: PictureHead = field(default_factory=PictureHead)
    optimizer: AdamW = field(
        default_factory=lambda: AdamW(lr=1e-4, final_lr=0.0, warmup_samples=86_835, betas=(0.9, 0.95))
    )
    train: Train = field(
        default_factory=lambda: Train(total_samples=1_736_700, micro_batch_size=96, global_batch_size=96)
    )
