"""Which operations a view may draw, how often and how strongly: the official pipelines as data.

A chain is a list of groups. A view that draws a group (`probability`) gets exactly one of its operations, by weight;
before that, with probability `identity`, it skips the chain altogether. The numbers are those of the official pipelines
(TongkunGuan/CCD, folder Dino/dataset: augmentation_pipelines.py for the severities, dataset_pretrain.py for
fine-tuning), which name imgaug's operations; where a pipeline leaves a range to imgaug, imgaug's default is written out
here. What differs, and why, is in docs/augmentations.md. The operations themselves, in ccd_train/augment/photometric,
know nothing of this table.

Units: grey levels 0–255 unless said; hues on OpenCV's circle of 180; sizes in pixels of the 32×128 crop.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace

from ccd_train.errors import UserError

Range = tuple[float, float]

# The official noise is added at a crop's own size; resizing then averages neighbours. Of crops 32 to 48 pixels high it
# leaves 0.7 of what changes independently from pixel to pixel; everything else comes through as it is.
RESIZED = 0.7

# Both ends equal: a constant. A `per_channel` below ½ draws the channels apart: (0, 1) does so in half of the images.
RANGES: dict[str, Range] = {
    # noise
    "add_elementwise.bound": (40 * RESIZED, 40 * RESIZED),
    "gaussian_noise.scale": (0, 51 * RESIZED),
    "laplace_noise.scale": (0, 51 * RESIZED),
    "poisson_noise.rate": (0, 40 * RESIZED),
    "multiply.spread": (0.5, 0.5),
    "multiply.per_channel": (0, 1),
    "multiply_elementwise.spread": (0.5 * RESIZED, 0.5 * RESIZED),
    "multiply_elementwise.per_channel": (0, 1),
    "dropout.share": (0, 0.1),
    "dropout.per_channel": (0, 1),
    "coarse_dropout.share": (0.02, 0.02),
    "coarse_dropout.size": (0.15, 0.15),
    "coarse_dropout.per_channel": (0, 1),
    "drop_channels.share": (0.5, 0.5),
    "impulse_noise.share": (0.1, 0.1),
    "salt_and_pepper.share": (0.1, 0.1),
    "salt.share": (0.1, 0.1),
    "pepper.share": (0.1, 0.1),
    "invert.probability": (0.15, 0.15),
    "solarize.probability": (0.5, 0.5),
    "solarize.threshold": (32, 128),
    "jpeg.compression": (70, 99),
    "emboss.alpha": (0, 1),
    "emboss.strength": (0.5, 1.5),
    "edge_detect.alpha": (0, 1),
    "directed_edge_detect.alpha": (0, 1),
    "directed_edge_detect.direction": (0, 1),
    # color
    "hue.shift": (0, 50),
    "hue_far.shift": (50, 100),
    "brightness.factor": (0.5, 1.5),
    "brightness.shift": (-30, 30),
    "multiply_brightness.factor": (0.5, 1.5),
    "multiply_hue_saturation.hue_factor": (0.5, 1.5),
    "multiply_hue_saturation.saturation_factor": (0.5, 1.5),
    "add_hue_saturation.shift": (-35.3, 35.3),  # ±50 on imgaug's circle of 255
    "add_hue_saturation.saturation": (-50, 50),
    "grey_blend.alpha": (0, 1),
    "kmeans_colors.colors": (2, 16),
    "uniform_colors.colors": (2, 16),
    "temperature.kelvin": (1100, 10000),
    "channel_shuffle.probability": (0.35, 0.35),
    # sharpness
    "sharpen.alpha": (0, 0.5),
    "sharpen.lightness": (0, 0.5),
    "gaussian_blur.sigma": (0.5, 1.5),
    "average_blur.size": (2, 6),
    "motion_blur.angle": (0, 1),
    "motion_blur.direction": (0, 1),
    "bilateral_blur.diameter": (3, 10),
    "bilateral_blur.sigma_color": (10, 250),
    "bilateral_blur.sigma_space": (10, 250),
    # contrast
    "gamma.exponent": (0.5, 2),
    "linear_contrast.factor": (0.5, 1),
    "sigmoid_contrast.gain": (3, 10),
    "sigmoid_contrast.cutoff": (0.4, 0.6),
    "log_contrast.gain": (0.6, 1.4),
    "clahe.limit": (0.1, 8),
    "clahe.tiles": (3, 8),
    "clahe_channels.limit": (0.1, 8),
    "clahe_channels.tiles": (3, 8),
    # weather
    "fog.grey": (220, 255),
    "fog.base": (0.7, 0.9),
    "fog.density": (0.4, 0.9),
    "fog.exponent": (-4, -2),
    "fog.texture": (-2, -1.5),
    "clouds.grey": (196, 255),
    "clouds.thin": (0.125, 0.625),
    "clouds.thick": (0.3, 1.1),
    "clouds.thin_exponent": (-2.5, -2),
    "clouds.thick_exponent": (-2, -1),
    "snow.density": (0.005, 0.075),
    "snow.size": (0.1, 0.4),
    "snow.uniformity": (0.4, 0.8),
    "snow.speed": (0.01, 0.05),
    "snow.slant": (-30, 30),
    "rain.density": (0.03, 0.14),
    "rain.speed": (0.1, 0.3),
    "rain.slant": (-15, 15),
}

# Drawn as whole numbers, both ends included
WHOLE = {
    "average_blur.size",
    "bilateral_blur.diameter",
    "clahe.tiles",
    "clahe_channels.tiles",
    "kmeans_colors.colors",
    "uniform_colors.colors",
}


# What a parameter may be, by its full name or by what it is called in every operation that has it
LIMITS: dict[str, Range] = {
    "alpha": (0, 1),
    "angle": (0, 1),
    "base": (0, 1),
    "bound": (0, 255),
    "colors": (2, 16),
    "compression": (0, 100),
    "cutoff": (0, 1),
    "density": (0, 1),
    "diameter": (1, 11),
    "direction": (0, 1),
    "exponent": (-8, 0),
    "factor": (0, 10),
    "gain": (0, 100),
    "grey": (0, 255),
    "hue_factor": (0, 10),
    "kelvin": (1000, 40000),
    "lightness": (0, 10),
    "limit": (0, 256),
    "per_channel": (0, 1),
    "probability": (0, 1),
    "rate": (0, 255),
    "saturation": (-255, 255),
    "saturation_factor": (0, 10),
    "scale": (0, 255),
    "share": (0, 1),
    "shift": (-255, 255),
    "sigma": (0.05, 10),
    "sigma_color": (1, 1000),
    "sigma_space": (0.1, 1000),
    "size": (0, 1),
    "slant": (-80, 80),
    "speed": (0, 1),
    "spread": (0, 1),
    "strength": (0, 10),
    "texture": (-8, 0),
    "thick": (0, 10),
    "thick_exponent": (-8, 0),
    "thin": (0, 10),
    "thin_exponent": (-8, 0),
    "threshold": (0, 256),
    "tiles": (1, 8),
    "uniformity": (0, 1),
    "average_blur.size": (1, 7),
    "coarse_dropout.size": (0.01, 1),
    "gamma.exponent": (0.05, 10),
}


@dataclass(frozen=True)
class Group:
    """One of `operations`, by weight, with `probability`."""

    name: str
    probability: float
    operations: dict[str, float]


@dataclass(frozen=True)
class Chain:
    """The groups in their order, the probability of none of them, and the ranges that differ from `RANGES`.

    `warp` is the probability of fine-tuning's last group: one of affine, piecewise affine, rotation.
    """

    groups: tuple[Group, ...]
    identity: float = 0.0
    warp: float = 0.0
    ranges: dict[str, Range] = field(default_factory=dict)

    def range(self, name: str) -> Range:
        """The range of a parameter, by "operation.parameter"."""
        return self.ranges.get(name, RANGES[name])


def evenly(*operations: str, share: float = 1.0) -> dict[str, float]:
    """Equal weights that add up to `share`."""
    return dict.fromkeys(operations, share / len(operations))


# Lists that several chains share. The official median draws a size of 3 … 7 and makes even ones odd: 3, 5, 5, 7, 7.
MEDIANS = {"median_blur_3": 0.2, "median_blur_5": 0.4, "median_blur_7": 0.4}
NOISE = (
    "add_elementwise", "gaussian_noise", "laplace_noise", "poisson_noise", "multiply", "multiply_elementwise",
    "dropout", "coarse_dropout", "drop_channels", "impulse_noise", "salt_and_pepper", "salt", "pepper", "solarize",
    "jpeg", "emboss", "edge_detect", "directed_edge_detect", "edge_enhance_more", "contour",
)  # fmt: skip
COLOR = (
    "hue", "brightness", "multiply_hue_saturation", "add_hue_saturation", "hue_far", "grey_blend", "kmeans_colors",
    "uniform_colors", "temperature",
)  # fmt: skip
CONTRAST = (
    "gamma", "linear_contrast", "sigmoid_contrast", "log_contrast", "equalize", "equalize_channels", "clahe",
    "clahe_channels",
)  # fmt: skip
WEATHER = ("fog", "clouds", "snow", "rain")
# of severities 1, 3 and 4, and part of 6
OLD_COLOR = (
    "channel_shuffle", "grey_blend", "kmeans_colors", "equalize", "dropout", "gamma", "multiply_brightness",
    "add_hue_saturation", "temperature",
)  # fmt: skip
OLD_NOISE = ("emboss", "gaussian_noise", "impulse_noise", "multiply_elementwise")
TOGETHER = (1.0, 1.0)  # per_channel: never


def sharpness(probability: float, *blurs: str) -> Group:
    """Sharpen, or one of the blurs and the median, half and half."""
    share = 0.5 / (len(blurs) + 1)
    medians = {name: weight * share for name, weight in MEDIANS.items()}
    return Group("sharpness", probability, {"sharpen": 0.5, **evenly(*blurs, share=share * len(blurs)), **medians})


def _old(invert: float) -> Chain:
    """Severities 1 and 3."""
    return Chain(
        groups=(
            Group("invert", 1.0, evenly("invert")),
            Group("color", 1.0, evenly(*OLD_COLOR)),
            sharpness(1.0, "gaussian_blur", "average_blur", "motion_blur"),
            Group("noise", 1.0, evenly(*OLD_NOISE)),
        ),
        ranges={
            "invert.probability": (invert, invert),
            "dropout.share": (0, 0.2),
            "multiply_elementwise.per_channel": TOGETHER,
        },
    )


def _finetune(invert: float, any_one: float, sharp: float, contrast: float, warp: float) -> Chain:
    """Fine-tuning's chain with the probabilities of its five groups."""
    return Chain(
        groups=(
            Group("invert", invert, evenly("invert")),
            Group("any", any_one, evenly("channel_shuffle", *NOISE, "multiply_brightness", *COLOR, *WEATHER)),
            sharpness(sharp, "gaussian_blur", "average_blur", "motion_blur"),
            Group("contrast", contrast, evenly(*CONTRAST)),
        ),
        warp=warp,
        ranges={"invert.probability": (0.1, 0.1)},
    )


CHAINS: dict[str, Chain] = {
    # what is photometric in ABINet's augmentation, nearest: its scales, rotations and perspectives have no θ of ours
    "severity_0": Chain(
        groups=(
            Group("noise", 0.25, evenly("gaussian_noise")),
            Group("sharpness", 0.25, evenly("motion_blur")),
            Group("color", 0.25, evenly("multiply_brightness", "linear_contrast", "multiply_hue_saturation", "hue")),
        ),
        ranges={
            "gaussian_noise.scale": (1 * RESIZED, 4.5 * RESIZED),
            "linear_contrast.factor": (0.5, 1.5),
            "multiply_hue_saturation.hue_factor": (1, 1),
            "hue.shift": (-18, 18),
        },
    ),
    "severity_1": _old(invert=0.5),
    # one to all of seven operations in any order; these three are drawn in 4/7 of the cases, the others move pixels
    "severity_2": Chain(
        groups=(
            Group("contrast", 4 / 7, evenly("linear_contrast")),
            Group("blur", 4 / 7, evenly("gaussian_blur")),
            Group("sharpness", 4 / 7, evenly("sharpen")),
        )
    ),
    "severity_3": _old(invert=0.1),
    "severity_4": Chain(
        identity=0.2,
        groups=(
            Group("invert", 0.3, evenly("invert")),
            Group("color", 0.6, evenly(*OLD_COLOR, "clahe", "linear_contrast")),
            sharpness(0.6, "gaussian_blur", "average_blur", "motion_blur"),
            Group("noise", 0.6, evenly(*OLD_NOISE, "coarse_dropout")),
        ),
        ranges={
            "invert.probability": (0.1, 0.1),
            "gaussian_noise.scale": (0, 25.5 * RESIZED),
            "impulse_noise.share": (0.05, 0.05),
            "multiply_elementwise.per_channel": TOGETHER,
            "coarse_dropout.size": (0.5, 0.5),
            "coarse_dropout.per_channel": TOGETHER,
        },
    ),
    "severity_5": Chain(
        identity=0.2,
        groups=(
            Group("noise", 1.0, evenly(*NOISE, "invert")),
            Group("color", 0.7, evenly(*COLOR)),
            sharpness(0.7, "gaussian_blur", "average_blur", "motion_blur", "bilateral_blur"),
            Group("contrast", 0.7, evenly(*CONTRAST)),
            Group("weather", 0.7, evenly(*WEATHER)),
        ),
    ),
    "severity_6": Chain(
        groups=(
            Group(
                "any",
                1.0,
                evenly(
                    *("hue", "brightness", "multiply_hue_saturation", "hue_far", "uniform_colors"),
                    *(*OLD_COLOR, "sharpen", "clahe", "linear_contrast"),
                ),
            ),
        ),
        ranges={"dropout.share": (0, 0.2)},
    ),
    "finetune_small": _finetune(invert=0.6, any_one=0.8, sharp=0.6, contrast=0.6, warp=0.6),
    "finetune_base": _finetune(invert=0.4, any_one=0.7, sharp=0.7, contrast=0.7, warp=0.5),
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
        least, most = LIMITS[key] if key in LIMITS else LIMITS[key.partition(".")[2]]
        if not least <= low <= high <= most:
            raise UserError(f"{where}: must lie between {least:g} and {most:g}")
        if key in WHOLE and not (low.is_integer() and high.is_integer()):
            raise UserError(f"{where}: must be whole numbers")
        return replace(chain, ranges={**chain.ranges, key: (low, high)})
    names = ["identity", "warp", *(group.name for group in chain.groups)]
    if key not in names:
        near = difflib.get_close_matches(key, [*names, *RANGES], n=1) or names
        raise UserError(f"{where}: unknown {key}; did you mean {near[0]}?")
    if not 0 <= low == high <= 1:
        raise UserError(f"{where}: a probability must be one number from 0 to 1")
    if key == "identity":
        return replace(chain, identity=low)
    if key == "warp":
        return replace(chain, warp=low)
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
