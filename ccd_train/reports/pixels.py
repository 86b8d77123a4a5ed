"""Networks of the pixel tasks on test sets: scores by name, averages, and what makes them comparable."""

from __future__ import annotations

import hashlib
import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ccd_train.config.pixels import SEGMENT, SUPERRESOLVE, MaskedPictures, PairedPictures, PicturePairs
from ccd_train.config.verbs import EvaluateOptions
from ccd_train.data.pairs import Couples, Looked, PairLmdb, find_couples, look
from ccd_train.data.pixels import IGNORED
from ccd_train.errors import UserError
from ccd_train.models import scores
from ccd_train.reports.evaluation import unchanged
from ccd_train.tasks.pixels.painting import Painter
from ccd_train.weights import pixels
from ccd_train.weights.pixels import TrainedPixels

BICUBIC = Path("bicubic")
TEXTZOOM = {"easy": 1619, "medium": 1411, "hard": 1343}  # parts of the release, and their pairs


class Bad(NamedTuple):
    """A picture for the page. In their order the worse is the larger."""

    badness: float
    """− its score."""
    place: int
    """− its number: of equally bad ones the first comes first."""
    caption: str
    pictures: tuple[np.ndarray, ...]
    """Input, output, truth, difference: uint8 [32, 128, C]."""


@dataclass
class Outcome:
    """What came out on one set."""

    name: str
    pictures: int
    scores: dict[str, float | None]
    left_out: list[str]
    """A line for each picture that cannot be used; they do not count."""
    hash: str
    """sha256 over pictures, truths and labels in order, also of those left out."""
    values: dict[str, list[Any]]
    """The number in the set of each picture that counts, and its scores."""
    worst: list[Bad] = field(default_factory=list)


class Measure(ABC):
    """What of a task is scored."""

    headline: ClassVar[str]

    def __init__(self, reading: str) -> None:
        self.reading = reading

    @property
    @abstractmethod
    def settings(self) -> PairedPictures:
        """How the sets are read."""

    @abstractmethod
    def rows(self, source: Couples, batch: Sequence[Looked], output: Tensor) -> Tensor:
        """What the scores need of each picture of a batch, float64 [B, n]."""

    @abstractmethod
    def totals(self, rows: Tensor) -> dict[str, float | None]:
        """The set's scores by name, the headline first, of all rows in order."""

    @abstractmethod
    def values(self, rows: Tensor) -> dict[str, list[Any]]:
        """Each picture's scores by name."""

    @abstractmethod
    def badness(self, rows: Tensor) -> Tensor:
        """How bad each picture is: the higher the worse."""

    @abstractmethod
    def shown(self, one: Looked, output: Tensor) -> tuple[np.ndarray, ...]:
        """Input, output, truth and difference, uint8 [32, 128, C]."""

    @abstractmethod
    def notes(self) -> list[str]:
        """What one must know to compare the figures."""


class Masks(Measure):
    headline: ClassVar[str] = "fg_iou"

    @property
    def settings(self) -> MaskedPictures:
        return MaskedPictures(effects=self.reading)  # type: ignore[arg-type]

    def rows(self, source: Couples, batch: Sequence[Looked], output: Tensor) -> Tensor:
        truth = _stacked([one.sample.target for one in batch if one.sample])[:, 0]
        return scores.count(output[:, 0] > 0.5, truth == 1, truth == IGNORED)

    def totals(self, rows: Tensor) -> dict[str, float | None]:
        single = scores.f_of_images(rows)
        some = single[~single.isnan()]
        return {
            "fg_iou": scores.fg_iou(rows),
            "miou": scores.miou(rows),
            "f_score": scores.f_score(rows),
            "f_of_images": float(some.mean()) if len(some) else None,
            "empty_in_both": len(single) - len(some),
            "iou_of_images": float(scores.iou_of_images(rows).mean()),
        }

    def values(self, rows: Tensor) -> dict[str, list[Any]]:
        counts = {name: [int(value) for value in rows[:, index].tolist()] for index, name in enumerate(_COUNTS)}
        f_values, ious = scores.f_of_images(rows), scores.iou_of_images(rows)
        return {"iou_of_images": ious.tolist(), "f_of_images": _plain(f_values.tolist()), **counts}

    def badness(self, rows: Tensor) -> Tensor:
        return -scores.iou_of_images(rows)

    def shown(self, one: Looked, output: Tensor) -> tuple[np.ndarray, ...]:
        assert one.sample is not None
        found, truth = (output[0] > 0.5).numpy(), one.sample.target[..., 0]
        colours = np.zeros((*found.shape, 3), np.uint8)
        colours[(truth == 1) & found] = 255
        colours[(truth == 1) & ~found] = (80, 120, 255)
        colours[(truth == 0) & found] = (255, 80, 60)
        colours[truth == IGNORED] = 110
        return one.sample.image, found[..., None].astype(np.uint8), one.sample.target, colours

    def notes(self) -> list[str]:
        return [
            f"effects (code 200) count as {self.reading}; ignored pixels (255) are left out",
            "f_score is F of mean precision and mean recall, as TextSeg's authors have it; f_of_images is the mean of "
            "each picture's F, without the `empty_in_both`",
            "no list of word crops is public: figures on other crops, and on whole pictures, are not comparable",
        ]


class Enlargements(Measure):
    headline: ClassVar[str] = "psnr"

    @property
    def settings(self) -> PicturePairs:
        return PicturePairs(route=self.reading)  # type: ignore[arg-type]

    def rows(self, source: Couples, batch: Sequence[Looked], output: Tensor) -> Tensor:
        assert isinstance(source, PairLmdb)
        truth = _stacked([one.sample.target for one in batch if one.sample])
        given = _stacked([one.sample.image for one in batch if one.sample]).float() / 255
        gate = scores.bicubic(_stacked([source.small(one.number) for one in batch]).float() / 255)
        levels = truth.float() / 255
        columns = []
        for picture in (output, given):
            alike = scores.ssim(scores.seen(picture) / 255, levels)
            columns += [scores.psnr(picture, truth), alike.double(), scores.squared_errors(picture, truth)]
        columns += [scores.squared_errors(gate, truth), scores.ssim(gate, levels).double()]
        return torch.stack(columns, dim=1)

    def totals(self, rows: Tensor) -> dict[str, float | None]:
        psnr, ssim, _, route_psnr, route_ssim, _, _, gate_ssim = rows.mean(0).tolist()
        return {
            "psnr": psnr,
            "ssim": ssim,
            "gain": psnr - route_psnr,
            "psnr_of_batches": scores.psnr_of_batches(rows[:, 2]),
            "psnr_ssm": scores.psnr_ssm(rows[:, 2]),
            "route_psnr": route_psnr,
            "route_ssim": route_ssim,
            "gate_psnr_of_batches": scores.psnr_of_batches(rows[:, 6]),
            "gate_ssim": gate_ssim,
        }

    def values(self, rows: Tensor) -> dict[str, list[Any]]:
        named = {"psnr": 0, "ssim": 1, "route_psnr": 3, "route_ssim": 4}
        return {name: _plain(rows[:, column].tolist()) for name, column in named.items()}

    def badness(self, rows: Tensor) -> Tensor:
        return -rows[:, 0]

    def shown(self, one: Looked, output: Tensor) -> tuple[np.ndarray, ...]:
        assert one.sample is not None
        painted = scores.seen(output).permute(1, 2, 0).numpy().astype(np.uint8)
        difference = np.abs(painted.astype(int) - one.sample.target).astype(np.uint8)
        return one.sample.image, painted, one.sample.target, difference

    def notes(self) -> list[str]:
        return [
            f"route `{self.reading}`: "
            + {
                "stored": "the stored LR picture → 128×32 at once, as in FaltingsA/SSM",
                "x2": "the stored LR picture → 64×16 → 128×32, TextZoom's own problem",
            }[self.reading],
            "route_psnr, route_ssim: the input of that route as it is; gain is psnr − route_psnr",
            "gate: 64×16 enlarged by torch's bicubic with aligned corners, unclipped: TextZoom's baseline, published "
            "as 22.35 / 18.98 / 19.39 dB and .7884 / .6254 / .6592 for easy / medium / hard",
            f"published tables stand beside psnr_of_batches (TextZoom, CCD; batches of {scores.BATCH}) or psnr_ssm "
            "(SSM), not beside psnr: from the definition alone they differ by most of a dB",
        ]


MEASURES: dict[str, type[Measure]] = {SEGMENT: Masks, SUPERRESOLVE: Enlargements}
_COUNTS = ("true_positive", "false_positive", "false_negative", "true_negative")


def open_painter(options: EvaluateOptions) -> tuple[TrainedPixels | None, Painter, Measure, str]:
    """The network of --weights, or none for the word bicubic; what of it is scored; and the sha256 of its file."""
    assert options.weights is not None
    if options.weights == BICUBIC:
        return None, Painter(None), Enlargements(options.route), ""
    path = pixels.find(options.weights)
    trained, sha256 = unchanged(path, lambda: pixels.read(path))
    return trained, Painter(trained), MEASURES[trained.task](trained.reading), sha256


def find_parts(folder: Path, names: Sequence[str], measure: Measure) -> dict[str, Couples]:
    """The sets at or below a folder by name, TextZoom's first; `names` picks some. Raises UserError."""
    found: dict[str, Couples] = {}
    for source in find_couples([folder], measure.settings, "--data"):
        last = source.path.resolve().name
        below = last if source.path == folder else str(source.path.relative_to(folder))
        found[last if last in TEXTZOOM and last not in found else below] = source
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{folder}: no set {', '.join(missing)}; there are {', '.join(found)}")
    order = list(TEXTZOOM)
    chosen = sorted(names or found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: found[name] for name in chosen}


def score(painter: Painter, measure: Measure, name: str, source: Couples, options: EvaluateOptions) -> Outcome:
    """Scores a set. Raises UserError if nothing in it can be used."""
    sha256, left_out, rows = hashlib.sha256(), list[str](), list[Tensor]()
    numbers, worst = list[int](), list[Bad]()
    seen = iter(tqdm(look(source, range(1, len(source) + 1)), desc=name, unit=" pictures", leave=False, disable=None))
    while batch := list(islice(seen, options.batch_size)):
        for one in batch:
            sha256.update(one.digest)
        left_out += [one.reason for one in batch if one.sample is None]
        batch = [one for one in batch if one.sample is not None]
        if not batch:
            continue
        output = painter.paint(np.stack([one.sample.image for one in batch if one.sample]))
        rows.append(measure.rows(source, batch, output))
        numbers += [one.number for one in batch]
        for one, painted, bad in zip(batch, output, measure.badness(rows[-1]).tolist(), strict=True):
            if len(worst) < options.errors or (worst and (bad, -one.number) > worst[0][:2]):
                label = source.label(one.number) or ""
                _keep(worst, Bad(bad, -one.number, label, measure.shown(one, painted)), options.errors)
    if not rows:
        named = "; ".join(left_out[:4])
        raise UserError(f"{source.path}: none of its {len(source):,} pictures can be used ({named})")
    whole = torch.cat(rows)
    values = {"number": numbers, **measure.values(whole)}
    best_first = sorted(worst, key=lambda bad: bad[:2], reverse=True)
    return Outcome(name, len(whole), measure.totals(whole), left_out, sha256.hexdigest(), values, best_first)


def averages(outcomes: Sequence[Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """{group: {"weighted" | "plain": {score: value}}}, over TextZoom's parts if all are there, and over all sets."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    groups = {"TextZoom": list(TEXTZOOM)} if all(name in by_name for name in TEXTZOOM) else {}
    if len(outcomes) > 1 and sorted(by_name) != sorted(TEXTZOOM):
        groups["all"] = list(by_name)
    return {group: _averaged([by_name[name] for name in names]) for group, names in groups.items()}


def _averaged(members: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    total = sum(member.pictures for member in members)
    found: dict[str, dict[str, float]] = {"weighted": {}, "plain": {}}
    for name in members[0].scores:
        values = [member.scores[name] for member in members]
        there = [value for value in values if value is not None]
        if len(there) == len(values):
            weighted = sum(value * one.pictures for value, one in zip(there, members, strict=True)) / total
            found["weighted"][name], found["plain"][name] = weighted, sum(there) / len(there)
    return found


def warnings(outcomes: Sequence[Outcome]) -> list[str]:
    """What stands in the way of comparing the figures."""
    found = [
        f"{one.name} has {one.pictures:,} pairs here, not {TEXTZOOM[one.name]:,} as published: not comparable"
        for one in outcomes
        if one.pictures != TEXTZOOM.get(one.name, one.pictures)
    ]
    for one in outcomes:
        if one.left_out:
            named = "; ".join(one.left_out[:4]) + ("; …" if len(one.left_out) > 4 else "")
            found.append(f"{one.name}: {len(one.left_out)} pictures cannot be used and do not count: {named}")
        found += [f"{one.name}: {name} is undefined" for name, value in one.scores.items() if value is None]
    return found


def _keep(worst: list[Bad], entry: Bad, count: int) -> None:
    """Keeps the worst so many, of which `entry` is one; pictures are never compared, as places differ."""
    if len(worst) < count:
        heapq.heappush(worst, entry)
    else:
        heapq.heappushpop(worst, entry)


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, C] each → [B, C, H, W]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _plain(values: Iterator[float] | Sequence[float]) -> list[float | None]:
    """What JSON can hold: NaN and infinities are none."""
    return [value if math.isfinite(value) else None for value in values]
