"""The settings of a pretraining run. The defaults are the constants of the paper and of its official implementation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ccd_train.augment.affine import Affine
from ccd_train.augment.severities import Augment
from ccd_train.config.run import AdamW, RunConfig, require

HELD_OUT = 4  # every so many usable words of a probe one is held out


@dataclass(frozen=True)
class Data:
    shards: tuple[Path, ...] = ()
    """Shard folders made by `ccd-data convert`; several are read as one corpus."""
    weights: tuple[float, ...] | None = None
    """The share of the samples that each folder gives, to 0.01 %; None: every sample once an epoch."""
    exclude: Path | None = None
    """List of samples to leave out, as `ccd-data overlap` writes it."""
    workers: int = 4
    """Processes per rank that read, decode and mask; 0 does it in the training process."""
    window_shards: int = 16
    """Shards that are open and shuffled together."""
    mask_mode: Literal["otsu", "kmeans", "stored"] = "otsu"
    """Pseudo-masks: Otsu's threshold (the exact 2-means), k-means as in the official code, or those in the shards."""
    max_damaged: float = 0.001
    """Share of unreadable samples (each is replaced by the next of its shard) above which a run ends as failed."""
    stage: Path | None = None
    """Folder on the node's own disk to which shards are copied before they are read; None: they are read in place."""
    stage_gb: float = 100.0
    """Space for the copies, in 10^9 bytes per node."""

    def check(self) -> None:
        require(len(self.shards) > 0, "data.shards", "()", "name at least one shard folder: --data.shards DIR")
        self._check_weights()
        require(0 <= self.max_damaged <= 1, "data.max_damaged", self.max_damaged, "must lie in [0, 1]")
        require(self.stage_gb > 0, "data.stage_gb", self.stage_gb, "must be positive")
        require(self.workers >= 0, "data.workers", self.workers, "must be 0 or more")
        require(self.window_shards >= 1, "data.window_shards", self.window_shards, "must be 1 or more")

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        remedy = f"give one for each of the {len(self.shards)} folders of data.shards"
        require(len(self.weights) == len(self.shards), "data.weights", self.weights, remedy)
        require(len(set(self.shards)) == len(self.shards), "data.shards", self.shards, "name each weighted folder once")
        least = min(self.weights) / sum(self.weights) if min(self.weights) > 0 else 0
        require(least >= 1e-4, "data.weights", self.weights, "each must be positive, and at least 0.01 % of their sum")


@dataclass(frozen=True)
class Model:
    width: int = 384
    """D: channels of every patch token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 6
    """Attention heads; must divide the width."""
    drop_path: float = 0.1
    """Stochastic depth of the student's last block; rises linearly from 0 at the first."""
    taps: tuple[int, int, int] = (2, 4, 6)
    """Blocks, counted from 1, whose outputs feed the segmentation head."""
    segmentation_width: int = 128
    """Channels of the segmentation head."""
    head_hidden: int = 2048
    """Width of the projection head's two hidden layers."""
    head_bottleneck: int = 256
    """Width of the L2-normalised layer before the prototypes."""
    prototypes: int = 65536
    """P: outputs of the projection head."""
    freeze_gain: bool = False
    """Keep the gain of the weight-normalised last layer at 1 (official: base only)."""
    initial_std: float = 0.02
    """Standard deviation of the initial weights of linear layers (official: 0.02 at every width)."""
    contrast_std: float | None = None
    """Initial patch filters of this deviation without a mean: contrasts instead of levels; None: torch's own."""

    def check(self) -> None:
        for name in ("width", "depth", "heads", "head_hidden", "head_bottleneck", "prototypes"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be 1 or more")
        require(self.segmentation_width >= 2, "model.segmentation_width", self.segmentation_width, "must be 2 or more")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width = {self.width}")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "must lie in [0, 1)")
        require(self.initial_std > 0, "model.initial_std", self.initial_std, "must be positive")
        contrast = self.contrast_std
        require(contrast is None or contrast > 0, "model.contrast_std", contrast, "must be positive, or None")
        ordered = 1 <= self.taps[0] < self.taps[1] < self.taps[2] <= self.depth
        require(ordered, "model.taps", self.taps, f"must rise and lie in 1..model.depth = {self.depth}")


@dataclass(frozen=True)
class Distillation:
    student_temperature: float = 0.1
    """Divides the student's logits."""
    teacher_temperature: float = 0.04
    """Divides the teacher's centred logits."""
    center_momentum: float = 0.9
    """EMA of the centre per step, at a global batch of 256."""
    scale_center_momentum: bool = True
    """Raise the centre's momentum to the power batch / 256, so that it forgets per sample, not per step."""
    sinkhorn_rounds: int = 0
    """Rounds of Sinkhorn-Knopp that set the centre so that a batch shares out all prototypes; 0: a running mean."""
    teacher_momentum: float = 0.9995
    """First EMA momentum of the teacher, at a global batch of 256; a cosine takes it to 1."""
    scale_teacher_momentum: bool = True
    """Raise the teacher's momentum to the power batch / 256."""
    segmentation_weight: float = 1.0
    """Weight of the segmentation loss."""
    student_regions_after: int = 30_000_000
    """Samples after which the character regions come from the student's segmentation, not from the pseudo-mask."""
    min_region_pixels: int = 30
    """Smaller connected components are not characters."""

    def check(self) -> None:
        for name in ("student_temperature", "teacher_temperature"):
            require(getattr(self, name) > 0, f"distillation.{name}", getattr(self, name), "must be positive")
        for name in ("center_momentum", "teacher_momentum"):
            require(0 <= getattr(self, name) <= 1, f"distillation.{name}", getattr(self, name), "must lie in [0, 1]")
        for name in ("segmentation_weight", "student_regions_after", "sinkhorn_rounds"):
            require(getattr(self, name) >= 0, f"distillation.{name}", getattr(self, name), "must not be negative")
        require(self.min_region_pixels >= 1, "distillation.min_region_pixels", self.min_region_pixels, "must be ≥ 1")


@dataclass(frozen=True)
class ScaledAdamW(AdamW):
    lr: float = 5e-4
    """Peak learning rate at a global batch of 256."""
    linear_lr_up_to: int | None = 1024
    """The peak grows linearly with the global batch up to here, by the square root beyond; None: always linearly."""
    warmup_samples: int = 10_000_000
    """Samples over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.04
    """First weight decay; a cosine takes it to final_weight_decay. None on biases and one-dimensional parameters."""
    final_weight_decay: float = 0.4
    """Weight decay at the end of the run."""
    clip_gradient: float = 3.0
    """Largest L2 norm of each single parameter tensor's gradient (DINO's rule); 0: no clipping."""
    freeze_last_layer_samples: int = 1_000_000
    """Samples during which the prototypes do not move."""

    def check(self) -> None:
        super().check()
        require(
            self.final_weight_decay >= 0,
            "optimizer.final_weight_decay",
            self.final_weight_decay,
            "must not be negative",
        )
        require(
            self.linear_lr_up_to is None or self.linear_lr_up_to >= 1,
            "optimizer.linear_lr_up_to",
            self.linear_lr_up_to,
            "must be a batch size, or None",
        )
        frozen = self.freeze_last_layer_samples
        require(frozen >= 0, "optimizer.freeze_last_layer_samples", frozen, "must not be negative")


@dataclass(frozen=True)
class Health:
    stop_on_collapse: bool = False
    """End the run as failed when an alarm is raised; otherwise it goes on."""
    patience_steps: int = 100
    """Steps for which a state of collapse must last before an alarm is raised."""
    after_samples: int | None = None
    """Samples before which nothing is judged; None: until the warm-up is over, or the prototypes move."""
    uniform_nats: float = 0.15
    """Uniform collapse: the teacher's entropy and the loss are closer to ln P than this."""
    constant_prototypes: float = 4.0
    """Constant collapse: fewer prototypes are in use than this, and each target is sharp."""

    def check(self) -> None:
        require(self.patience_steps >= 0, "health.patience_steps", self.patience_steps, "must be 0 or more")
        after = self.after_samples
        require(after is None or after >= 0, "health.after_samples", after, "must be 0 or more, or None")
        require(self.uniform_nats > 0, "health.uniform_nats", self.uniform_nats, "must be positive")
        few = self.constant_prototypes
        require(few > 1, "health.constant_prototypes", few, "must be more than 1")


@dataclass(frozen=True)
class Probe:
    every_steps: int = 0
    """Steps between two probes of the teacher's features on labelled words, logged as probe_*; 0: none."""
    data: tuple[Path, ...] = ()
    """LMDBs of labelled words for the probe."""
    words: int = 2000
    """Labelled words that the probe looks at."""

    def check(self) -> None:
        require(self.every_steps >= 0, "probe.every_steps", self.every_steps, "must be 0 or more")
        named = self.every_steps == 0 or len(self.data) > 0
        require(named, "probe.data", "()", "probe.every_steps needs labelled words: --probe.data LMDB")
        require(self.words >= HELD_OUT, "probe.words", self.words, f"must be {HELD_OUT} or more")


@dataclass(frozen=True)
class Config(RunConfig):
    """A pretraining run."""

    task: ClassVar[str] = "pretrain"
    """Which recipes are its own."""
    init: Path | None = None
    """Weights to start from: a run folder, an export or an official .pth; a run that goes on ignores it."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    affine: Affine = field(default_factory=Affine)
    model: Model = field(default_factory=Model)
    distillation: Distillation = field(default_factory=Distillation)
    optimizer: ScaledAdamW = field(default_factory=ScaledAdamW)
    health: Health = field(default_factory=Health)
    probe: Probe = field(default_factory=Probe)
