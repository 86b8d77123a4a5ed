"""The settings of the verbs that train nothing: they are parsed, and refused, before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ccd_train.augment.affine import Affine
from ccd_train.augment.severities import Augment
from ccd_train.config.pixels import Route
from ccd_train.config.pretraining import HELD_OUT, Config, Data
from ccd_train.config.run import require
from ccd_train.errors import UserError

FORMATS_OF = {  # the formats of an export that are written into a file of this suffix
    ".onnx": ("onnx",),
    ".pt": ("torchscript", "weights"),
    ".pth": ("weights",),
    ".safetensors": ("weights", "backbone"),
}


@dataclass(frozen=True)
class EstimateSettings(Config):
    """A pretraining run and the machines for it. The settings of the run are those of `ccd-train pretrain`."""

    gpus: int = 8
    """W: GPUs of all nodes, one rank each."""
    gpu: Literal["b200", "h200", "h100", "a100", "l40s", "a10", "v100", "t4", "4090", "3090"] = "h200"
    """Their kind. V100 and T4 have no bf16: their figures are those of an fp16 file."""
    gpus_per_node: int = 8
    """Within a node they talk by NVLink or, where there is none, PCIe; between nodes through the network."""
    network_gbit: float = 200.0
    """Of the network, 10^9 bits per second and GPU, in one direction."""
    characters: float = 6.0
    """M: characters of an image that both views hold; `characters` in metrics.jsonl."""
    core_rate: float = 2000.0
    """Images that one CPU core reads, decodes and masks per second; tests/benchmarks/reading.py measures it."""
    table: bool = False
    """Only a Markdown table, for 1 to 1,024 GPUs."""

    def check(self) -> None:
        """Raises UserError for the first value that is impossible."""
        for name in ("gpus", "gpus_per_node"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be 1 or more")
        for name in ("network_gbit", "core_rate"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(0 <= self.characters <= 26, "characters", self.characters, "must lie in [0, 26]")
        for section in (self.model, self.train):
            section.check()


@dataclass(frozen=True)
class Examined(Config):
    """A pretraining run, and the machines on which it is about to run."""

    nodes: bool = False
    """Show what was found on every node, not only on this one and on those where a run would fail."""


@dataclass(frozen=True)
class ViewsSettings:
    """A sheet of views."""

    out: Path | None = None
    """The PNG to write."""
    each: bool = False
    """Show every operation by itself, at three strengths."""
    samples: int = 12
    """Rows of the sheet."""
    position: int = 0
    """The first sample, counted as a run of this seed counts them."""
    seed: int = 0
    """Seed of the order of samples and of the draws."""
    scale: int = 2
    """Screen pixels per pixel."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    affine: Affine = field(default_factory=Affine)

    def check(self) -> None:
        """Raises UserError for the first value that is impossible."""
        require(self.out is not None, "out", self.out, "name the picture to write: --out sheet.png")
        require(self.samples >= 1, "samples", self.samples, "must be 1 or more")
        require(self.position >= 0, "position", self.position, "must not be negative")
        require(1 <= self.scale <= 8, "scale", self.scale, "must lie between 1 and 8")
        for section in (self.data, self.augment, self.affine):
            section.check()


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


@dataclass(frozen=True)
class RecognizerSource:
    """Which recogniser reads."""

    weights: Path | None = None
    """A fine-tuning run, an export of one, or an official .pth."""
    charset: str | None = None
    """The characters of an official .pth that is none of the named charsets: 36, 62, DICT90 or a text file
    (one character a line, or all on a single line)."""
    heads: int | None = None
    """Attention heads of an official .pth whose backbone is not 64 wide per head."""
    decoder_heads: int | None = None
    """Attention heads of an official .pth whose decoder is not 64 wide per head."""

    def check(self) -> None:
        require(self.weights is not None, "weights", None, "name the recogniser: --weights RUN_OR_EXPORT")
        for name in ("heads", "decoder_heads"):
            given = getattr(self, name)
            require(given is None or given >= 1, name, given, "must be 1 or more")


@dataclass(frozen=True)
class ReadOptions(RecognizerSource):
    """Read the words in images."""

    images: tuple[Path, ...] = field(default=(), metadata={"positional": True})
    """Images, or folders with images in and below them."""
    json: bool = False
    """Print JSON lines, with the confidence of every character."""

    def check(self) -> None:
        super().check()
        if not self.images:
            raise UserError("name an image or a folder of images: ccd-train read --weights RUN IMAGE")


@dataclass(frozen=True)
class PaintOptions:
    """Take pictures of words, of any size, through a network that says pixels."""

    images: tuple[str, ...] = field(default=(), metadata={"positional": True})
    """Pictures, folders with pictures in and below them, patterns, or JSON lists of paths."""
    weights: Path | None = None
    """A fine-tuning run of this task, or an export of one."""
    out: Path | None = None
    """Folder for the PNGs and for written.json, the list of them."""

    def check(self) -> None:
        require(self.weights is not None, "weights", None, "name the network: --weights RUN_OR_EXPORT")
        require(self.out is not None, "out", None, "name the folder to write to: --out DIR")
        require(len(self.images) > 0, "images", "()", "name a picture or a folder of pictures")


@dataclass(frozen=True)
class EvaluateOptions(RecognizerSource):
    """Word accuracy on benchmarks; of a network of a pixel task, scores of masks or pictures."""

    source: Path | None = field(default=None, metadata={"positional": True})
    """What to evaluate; --weights is another way to say it. The word bicubic: super-resolution's input as it is."""
    data: Path | None = None
    """A folder with LMDBs of labelled words, of pictures and masks, or of TextZoom's pairs, in and below it."""
    sets: tuple[str, ...] = ()
    """The names of the sets to read; none: all."""
    rule: Literal["lower_alnum", "case", "all"] = "lower_alnum"
    """What is compared: the official rule, letters and digits with their case, or every character."""
    out: Path | None = None
    """Folder for table.md, table.json and errors.html; None: `evaluation`, in the run folder where there is one."""
    batch_size: int = 256
    """Images that are read at once."""
    errors: int = 100
    """Worst errors of each set on the page."""
    route: Route = "stored"
    """For the word bicubic: how the input is made (a network's own route is in its weights)."""

    def check(self) -> None:
        super().check()
        require(self.data is not None, "data", None, "name a folder with LMDBs of labelled words: --data DIR")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be 1 or more")
        require(self.errors >= 0, "errors", self.errors, "must be 0 or more")

    def folder(self) -> Path:
        assert self.weights is not None
        run = self.weights if (self.weights / "checkpoints").is_dir() else Path()
        return self.out or run / "evaluation"


@dataclass(frozen=True)
class Export(RecognizerSource):
    """Write weights for others."""

    source: Path | None = field(default=None, metadata={"positional": True})
    """What to export; --weights is another way to say it."""
    weights: Path | None = None
    """A run folder (the newest complete checkpoint, or a fine-tuning's best), a checkpoint folder, an export, or an
    official .pth; of a pretraining or of a recogniser."""
    step: int | None = None
    """The complete checkpoint of this step, of a pretraining's run folder; None: the newest."""
    out: Path | None = None
    """Where to: a folder, or a file where one file is written (.pth: the official layout); None: `export` in the run
    folder."""
    format: Literal["weights", "backbone", "onnx", "torchscript"] = "weights"
    """All the weights in our own form, the ViT alone, or a recogniser from pixels to tokens."""
    lossy: bool = False
    """Write the official layout although something of the network has no place in it."""

    def check(self) -> None:
        super().check()
        assert self.weights is not None
        there = self.weights.exists()
        require(there, "weights", self.weights, "no such file or folder; name a run, a checkpoint, an export or a .pth")
        if self.out is None and (self.format != "weights" or not (self.weights / "checkpoints").is_dir()):
            what = f"--format {self.format}" if self.format != "weights" else f"--weights {self.weights} is no run: it"
            raise UserError(f"{what} needs a place: say where to write with --out")
        suffix = self.out.suffix if self.out is not None else ""
        fitting = FORMATS_OF.get(suffix, (self.format,))
        if self.format not in fitting:
            raise UserError(
                f"{self.out}: a {suffix} file is for --format {' or '.join(fitting)}, not for --format {self.format}; "
                "give that one, or another --out"
            )
