"""Which operations a view may draw, how often and how strongly: the official pipelines as data.

A chain is a list of groups. A view that draws a group (`probability`) gets exactly one of its operations, by weight;
before that, with probability `identity`, it skips the chain altogether. The numbers are those of the official pipelines
(TongkunGuan/CCD, folder Dino/dataset: augmentation_pipelines.py for the severities, dataset_pretrain.py for
fine-tuning), which name imgaug's operations; where a pipeline leaves a range to imgaug, imgaug's default is written out
here. What differs, and why, is in docs/augmentations.md. The operations themselves, in ccd_train/photometric, know
nothing of this table.

Units: grey levels 0–255 unless said; hues on OpenCV's circle of 180; sizes in pixels of the 32×128 crop.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace

from ccd_train.errors import UserError

Range = tuple[float, float]

# Both ends equal: a constant. A `per_channel` below ½ draws the channels apart: (0, 1) does so in half of the images.
RANGES: dict[str, Range] = {
    # noise
    "add_elementwise.bound": (40, 40),
    "gaussian_noise.scale": (0, 51),
    "multiply.factor": (0.5, 1.5),
    "multiply.per_channel": (0, 1),
    "invert.probability": (0.15, 0.15),
    "solarize.probability": (0.5, 0.5),
    "solarize.threshold": (32, 128),
    # contrast
    "gamma.exponent": (0.5, 2),
    "linear_contrast.factor": (0.5, 1),
}


@dataclass(frozen=True)
class Group:
    """One of `operations`, by weight, with `probability`."""

    name: str
    probability: float
    operations: dict[str, float]


@dataclass(frozen=True)
class Chain:
    """The groups in their order, the probability of none of them, and the ranges that differ from `RANGES`."""

    groups: tuple[Group, ...]
    identity: float = 0.0
    ranges: dict[str, Range] = field(default_factory=dict)

    def range(self, name: str) -> Range:
        """The range of a parameter, by "operation.parameter"."""
        return self.ranges.get(name, RANGES[name])


def evenly(*operations: str, share: float = 1.0) -> dict[str, float]:
    """Equal weights that add up to `share`."""
    return dict.fromkeys(operations, share / len(operations))


CHAINS: dict[str, Chain] = {
    "severity_5": Chain(
        identity=0.2,
        groups=(
            Group("noise", 1.0, evenly("add_elementwise", "gaussian_noise", "multiply", "invert", "solarize")),
            Group("contrast", 0.7, evenly("gamma", "linear_contrast")),
        ),
    ),
}


@dataclass(frozen=True)
class Augment:
    """What the views of a sample go through, apart from the affine."""

    chain: str = "severity_5"
    """The operations and their strengths: severity_0 … severity_6 of the official pipelines (5 in all recipes)."""
    overrides: tuple[str, ...] = ()
    """Changes to the chain: a group's probability (weather=0.3), a parameter's range (gaussian_noise.scale=0:30)."""

    def check(self) -> None:
        self.resolve()

    def resolve(self) -> Chain:
        """The chain with the overrides applied.

        Raises UserError for an unknown chain, group or range, a probability outside [0, 1], and an inverted range.
        """
        if self.chain not in CHAINS:
            raise UserError(f"augment.chain = {self.chain}: unknown; the chains are {', '.join(CHAINS)}")
        chain = CHAINS[self.chain]
        for override in self.overrides:
            chain = _override(chain, override)
        return chain


def _override(chain: Chain, override: str) -> Chain:
    where = f"augment.overrides: {override}"
    key, _, text = override.partition("=")
    low, high = _range(where, text)
    if key in RANGES:
        if low < 0 <= RANGES[key][0]:
            raise UserError(f"{where}: must not be negative")
        return replace(chain, ranges={**chain.ranges, key: (low, high)})
    names = ["identity", *(group.name for group in chain.groups)]
    if key not in names:
        near = difflib.get_close_matches(key, [*names, *RANGES], n=1) or names
        raise UserError(f"{where}: unknown {key}; did you mean {near[0]}?")
    if not 0 <= low == high <= 1:
        raise UserError(f"{where}: a probability must be one number from 0 to 1")
    if key == "identity":
        return replace(chain, identity=low)
    groups = (replace(group, probability=low) if group.name == key else group for group in chain.groups)
    return replace(chain, groups=tuple(groups))


def _range(where: str, text: str) -> Range:
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{where}: write NAME=VALUE or NAME=LOW:HIGH, as in weather=0.3 or gaussian_noise.scale=0:30")
    if numbers[0] > numbers[-1]:
        raise UserError(f"{where}: the range is inverted; the lower end comes first")
    return numbers[0], numbers[-1]
