"""What the settings of all runs have in common: frozen dataclasses, one per concern.

Reading a recipe, a user's file and the command line into these classes is the work of `options.py`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from ccd_train.errors import UserError

# A run keeps its identity when these change between its lives; files count by their content, not by their path.
CHANGEABLE = {"run_dir", "init", "deepspeed", "max_steps", "max_minutes", "data.shards", "data.workers"}
CHANGEABLE |= {"data.exclude", "data.max_damaged", "data.stage", "data.stage_gb"}
CHANGEABLE |= {
    "train.micro_batch_size",
    "train.threads",
    "train.activation_checkpointing",
    "valid.every_steps",
    "valid.patience",
}
CHANGEABLE |= {"data.train", "data.valid", "data.charset"}
CHANGEABLE_SECTIONS = ("log.", "health.", "probe.", "checkpoint.", "resume.", "distributed.")


@runtime_checkable
class Section(Protocol):
    """A group of settings that can say what is wrong with it."""

    def check(self) -> None:
        """Raises UserError for the first value that is impossible."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Refuses a setting with its name, its value, and what would be accepted."""
    if not condition:
        raise UserError(f"{name} = {value}: {remedy}")


@dataclass(frozen=True)
class Train:
    total_samples: int = 96_000_000
    """Length of the schedules: about 3 epochs over MJ + ST + OCR-CC. --max-steps stops a run, never shortens this."""
    micro_batch_size: int = 64
    """Samples per rank and forward pass."""
    global_batch_size: int | None = None
    """Samples per step over all ranks; None: micro_batch_size × ranks, fixed at the run's first start."""
    threads: int | None = None
    """CPU threads per rank; None: this machine's cores divided among its ranks."""
    activation_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the backbone, batch norms and the loss with torch.compile."""
    deterministic: bool = False
    """Bit-for-bit repeatable kernels on GPUs, at some cost. (CPUs repeat anyway.)"""
    max_bad_steps: int = 10
    """So many steps in a row with a non-finite loss or gradient end the run as failed."""

    def check(self) -> None:
        require(self.total_samples >= 1, "train.total_samples", self.total_samples, "must be 1 or more")
        require(self.micro_batch_size >= 1, "train.micro_batch_size", self.micro_batch_size, "must be 1 or more")
        batch = self.global_batch_size
        require(batch is None or batch >= 1, "train.global_batch_size", batch, "must be 1 or more, or None")
        require(self.threads is None or self.threads >= 1, "train.threads", self.threads, "must be 1 or more, or None")
        require(self.max_bad_steps >= 1, "train.max_bad_steps", self.max_bad_steps, "must be 1 or more")


@dataclass(frozen=True)
class AdamW:
    lr: float = 5e-4
    """Peak learning rate, whatever the batch (official: at 288)."""
    final_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_samples: int = 2_780_000
    """Samples over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.05
    """None on biases and one-dimensional parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    clip_gradient: float = 0.0
    """Largest L2 norm of each single parameter tensor's gradient; 0: no clipping (official)."""

    def check(self) -> None:
        for name in ("lr", "final_lr", "warmup_samples", "weight_decay", "clip_gradient"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")
        require(self.final_lr <= self.lr, "optimizer.final_lr", self.final_lr, f"must not exceed lr = {self.lr}")
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "must lie in [0, 1)")


@dataclass(frozen=True)
class Valid:
    every_steps: int = 1000
    """Steps between two validations; one more is made at the end."""
    patience: int = 0
    """End the run after so many validations in a row without a better accuracy; 0: never."""

    def check(self) -> None:
        require(self.every_steps >= 1, "valid.every_steps", self.every_steps, "must be 1 or more")
        require(self.patience >= 0, "valid.patience", self.patience, "must be 0 or more")


@dataclass(frozen=True)
class Log:
    every_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    pictures_every_steps: int = 1000
    """Steps between two pictures of views, masks, regions and features; 0: none."""
    profile_steps: tuple[int, ...] = ()
    """First and last step of which rank 0 writes a trace, and on GPUs a memory snapshot, to RUN/profile; (): none."""
    wandb: str | None = None
    """Also log to this project of Weights & Biases; its package must be installed."""
    verbose: bool = field(default=False, metadata={"alias": "-v"})
    """Let libraries say what they want to say; also -v."""

    def pictures_due(self, step: int) -> bool:
        """Whether pictures follow this step; the first step shows that all is well."""
        return self.pictures_every_steps > 0 and (step == 1 or step % self.pictures_every_steps == 0)

    def check(self) -> None:
        require(self.every_steps >= 1, "log.every_steps", self.every_steps, "must be 1 or more")
        require(self.pictures_every_steps >= 0, "log.pictures_every_steps", self.pictures_every_steps, "must be ≥ 0")
        steps = self.profile_steps
        pair = not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1])
        require(pair, "log.profile_steps", steps, "give the first and the last step: --log.profile_steps 100 105")
        there = self.wandb is None or importlib.util.find_spec("wandb") is not None
        require(there, "log.wandb", self.wandb, "the package is not installed: pip install wandb, or drop the option")


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 2000
    """Steps between two checkpoints; one more is written at the end and on a signal."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this; 0: none."""

    def check(self) -> None:
        require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "must be 1 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be 1 or more")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "must not be negative")


@dataclass(frozen=True)
class Resume:
    mode: Literal["auto", "must", "never"] = "auto"
    """auto: go on where the run folder stands, or start; must: refuse to start from nothing; never: refuse to go on."""
    allow_change: bool = False
    """Go on although the recipe, the seed, the batch or the corpus is another; the differences are logged."""

    def check(self) -> None:
        """Every value of its type is possible."""


@dataclass(frozen=True)
class Distributed:
    timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""

    def check(self) -> None:
        require(self.timeout > 0, "distributed.timeout", self.timeout, "must be positive")


@dataclass(frozen=True)
class RunConfig:
    """What every run is told, whatever it trains."""

    score: ClassVar[str] = ""
    """How a best validation is written, such as "psnr {:.2f} dB"; "": as the share of words that are read right."""
    run_dir: Path | None = None
    """Folder of the run; the same folder again goes on where it stopped."""
    init: Path | None = None
    """Weights that a new run starts from."""
    seed: int = 0
    """Seed of the order of samples, the views, stochastic depth and the initial weights."""
    deepspeed: str | None = None
    """A file of ds_configs/ by name, or a path; None: zero1_bf16 on GPUs, zero1_fp32 on CPUs."""
    max_steps: int | None = None
    """Stop after this step, counted from the run's beginning; the schedules stay as they are."""
    max_minutes: float | None = None
    """Save and end as unfinished (exit code 75) before so many minutes of this life are over."""
    train: Train = field(default_factory=Train)
    optimizer: AdamW = field(default_factory=AdamW)
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    resume: Resume = field(default_factory=Resume)
    distributed: Distributed = field(default_factory=Distributed)

    def check(self) -> None:
        """Raises UserError for the first value that is impossible, before any other work."""
        require(self.run_dir is not None, "run_dir", self.run_dir, "name the folder of the run: --run_dir DIR")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2^63)")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "must be 1 or more")
        positive = self.max_minutes is None or self.max_minutes > 0
        require(positive, "max_minutes", self.max_minutes, "must be positive")
        for section in fields(self):
            value = getattr(self, section.name)
            if isinstance(value, Section):
                value.check()


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run: its settings as flat names, less those that may change between its lives."""
    flat = flatten(settings)
    return {name: flat[name] for name in flat if name not in CHANGEABLE and not name.startswith(CHANGEABLE_SECTIONS)}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 1}} → {"train.seed": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def refuse_other(
    section: str,
    path: Path,
    theirs: dict[str, Any],
    mine: dict[str, Any],
    remedy: str,
    except_for: tuple[str, ...] = (),
) -> None:
    """UserError that names the settings of a section in which the weights of --init and this run differ."""
    differences = [
        f"{section}.{name}: {theirs[name]} → {mine[name]}"
        for name in mine
        if theirs[name] != mine[name] and name not in except_for
    ]
    if differences:
        raise UserError(f"--init {path}: another network ({', '.join(differences)}); {remedy}")
