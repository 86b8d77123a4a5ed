"""What pretraining teaches a small network: character probe and segmentation, as a curve over samples.

    python tests/benchmarks/it_learns.py --out FOLDER [--config vit_nano] [--samples 60000] [--minutes 45] [--seed 0]
        [--alphabet 0123456789] [--level]

Renders words, converts them, pretrains on them without their labels, and measures at several points, the untrained
network first: the linear and 5-nearest-neighbour accuracy of `ccd-train probe` on the teacher's features, and the IoU
of the student's segmentation with the true glyph masks beside that of the pseudo-mask which it was taught, on plain and
on textured backgrounds. FOLDER gets it_learns.json, .md and .png; the same command goes on where it was stopped, with
the points of the earlier life.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import corpus
import cv2
import numpy as np
import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.augment.views import normalize
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.data.masks import decode_mask, decode_rgb, pseudo_mask, resize_image, resize_mask
from ccd_train.data.records import LmdbReader
from ccd_train.tasks.pretrain.probe import ProbeWords, probe, read_words
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.run import Run, begin
from ccd_train.training.train import train_step

PROBE_SEED = 1_000_003  # of words that are not trained on
UNEVEN = 12.0  # grey levels by which a background deviates from its mean before it counts as textured
COLORS = {  # BGR
    "linear": (200, 90, 20),
    "knn": (30, 140, 30),
    "student_plain": (40, 40, 200),
    "student_textured": (0, 140, 255),
}
WIDTH, HEIGHT, MARGIN = 960, 420, 60


@dataclass(frozen=True)
class Masks:
    """ProbeWords as the network sees them, with three masks each."""

    images_u8: Tensor
    """uint8 [N, 3, 32, 128]."""
    truth: Tensor
    """bool [N, 32, 128]."""
    pseudo: Tensor
    """bool [N, 32, 128]."""
    textured: Tensor
    """bool [N]: the grey levels behind the glyphs are uneven."""


@dataclass(frozen=True)
class Point:
    samples: int
    minutes: float
    """Of training, measurements not counted."""
    linear: float
    knn: float
    student_plain: float
    """Mean IoU of the student's segmentation with the truth on plain backgrounds."""
    student_textured: float
    figures: dict[str, float]
    """Of metrics.jsonl, averaged since the point before."""


def read_masks(path: Path) -> Masks:
    images, truths, pseudos, textured = [], [], [], []
    with LmdbReader(path) as reader:
        for number in range(1, len(reader) + 1):
            image, truth = decode_rgb(reader.image(number) or b""), decode_mask(reader.mask(number) or b"")
            behind = cv2.dilate(truth, np.ones((5, 5), np.uint8)) == 0
            textured.append(bool(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[behind].std() > UNEVEN))
            images.append(resize_image(image))
            truths.append(resize_mask(truth))
            pseudos.append(resize_mask(pseudo_mask(image)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    true, found = (torch.from_numpy(np.stack(masks)).bool() for masks in (truths, pseudos))
    return Masks(pixels, true, found, torch.tensor(textured))


def overlaps(masks: Tensor, truth: Tensor, textured: Tensor) -> tuple[float, float]:
    """Mean IoU [N] on plain and on textured backgrounds."""
    iou = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)).clamp(min=1)
    return iou[~textured].mean().item(), iou[textured].mean().item()


@torch.no_grad()
def segment(run: Run[Pretraining], images_u8: Tensor) -> Tensor:
    """The student's text pixels, bool [N, 32, 128], of images without views."""
    student, parts = run.engine.student, []
    student.eval()
    for images in images_u8.split(64):
        inputs = images.to(distributed.device()).float()
        normalize(inputs)
        _, taps = student.vit(inputs.to(run.engine.dtype))  # type: ignore[operator]
        background, text = student.segmentation(taps).unbind(dim=1)  # type: ignore[operator]
        parts.append((text > background).cpu())
    student.train()
    return torch.cat(parts)


def measure(
    run: Run[Pretraining], words: ProbeWords, masks: Masks, minutes: float, figures: list[dict[str, float]]
) -> Point:
    score = probe(run.task.teacher.ready().vit, words)  # type: ignore[arg-type]
    plain, textured = overlaps(segment(run, masks.images_u8), masks.truth, masks.textured)
    names = ("loss_distillation", "loss_segmentation", "teacher_entropy", "prototypes_used", "grad_norm", "characters")
    means = {name: sum(one[name] for one in figures) / len(figures) for name in names if figures}
    return Point(run.progress.position, minutes, score.linear, score.knn, plain, textured, means)


def learn(
    run: Run[Pretraining], look: Callable[[float, list[dict[str, float]]], None], minutes: float, every: int
) -> None:
    """Trains until the end of the schedules or of the time, and looks after every so many samples."""
    clock, last = time.monotonic, run.progress.position
    spent, began, figures = 0.0, clock(), []
    while run.progress.step < run.last_step and spent + (clock() - began) / 60 < minutes:
        step = train_step(run, logged=run.progress.step % 10 == 0)
        if "teacher_entropy" in step.figures:
            figures.append(step.figures)
        if run.progress.position - last >= every or run.progress.step == run.last_step:
            spent += (clock() - began) / 60
            look(spent, figures)
            last, began, figures = run.progress.position, clock(), []
    run.save()


def draw(points: list[Point], pseudo: tuple[float, float], total: int) -> np.ndarray:
    """A chart, uint8 [H, W, 3] in BGR: accuracies and IoUs, 0 to 1, over samples; dashes: the pseudo-mask's own IoU."""
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    left, right, up, down = MARGIN, WIDTH - MARGIN // 2, MARGIN, HEIGHT - MARGIN

    def place(samples: float, value: float) -> tuple[int, int]:
        return round(left + samples / total * (right - left)), round(down - value * (down - up))

    for share in np.linspace(0, 1, 6):
        cv2.line(picture, place(0, share), place(total, share), (225, 225, 225), 1)
        _write(picture, f"{share:.1f}", (12, place(0, share)[1] + 4))
        _write(picture, f"{share * total:.0f}", (place(share * total, 0)[0] - 20, down + 22))
    _write(picture, "samples", (right - 60, down + 44))
    for value, name in zip(pseudo, ("student_plain", "student_textured"), strict=True):
        for dash in range(0, 100, 2):
            cv2.line(picture, place(dash * total / 100, value), place((dash + 1) * total / 100, value), COLORS[name], 1)
    for row, (name, color) in enumerate(COLORS.items()):
        line = [place(point.samples, getattr(point, name)) for point in points]
        cv2.polylines(picture, [np.array(line, np.int32)], False, color, 2, cv2.LINE_AA)
        _write(picture, f"{name} {getattr(points[-1], name):.3f}", (left + row * 215, up - 24), color)
    return picture


def _write(picture: np.ndarray, text: str, place: tuple[int, int], color: tuple[int, int, int] = (90, 90, 90)) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, 1, cv2.LINE_AA)


def table(points: list[Point], pseudo: tuple[float, float]) -> str:
    lines = [
        "| samples | minutes | linear | 5-NN | IoU plain | IoU textured | KL | teacher entropy | prototypes used |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        line = f"| {point.samples:,} | {point.minutes:.1f} | {point.linear:.1%} | {point.knn:.1%} "
        line += f"| {point.student_plain:.3f} | {point.student_textured:.3f} "
        if point.figures:
            entropy = point.figures["teacher_entropy"]
            line += f"| {point.figures['loss_distillation'] - entropy:.2f} | {entropy:.2f} "
            line += f"| {point.figures['prototypes_used']:.0f} |"
        else:
            line += "| | | |"
        lines.append(line)
    lines.append(f"| pseudo-mask | | | | {pseudo[0]:.3f} | {pseudo[1]:.3f} | | | |")
    return "\n".join(lines) + "\n"


def settings(options: argparse.Namespace) -> Config:
    config = read_recipe(options.config, Config)
    train = config.train if options.samples is None else replace(config.train, total_samples=options.samples)
    train = train if options.threads is None else replace(train, threads=options.threads)
    data = replace(config.data, shards=(options.out / "shards",))
    return replace(config, run_dir=options.out / "run", seed=options.seed, train=train, data=data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for words, run and results")
    parser.add_argument("--config", default="vit_nano", help="a recipe by name, or a YAML file")
    parser.add_argument("--samples", type=int, help="length of the schedules (default: the recipe's)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop training after so many")
    parser.add_argument("--points", type=int, default=10, help="measurements over the whole length")
    parser.add_argument("--words", type=int, default=20000, help="rendered words to train on")
    parser.add_argument("--alphabet", default="", help="random strings of these instead of words")
    parser.add_argument("--level", action="store_true", help="all words dark on light, by their pseudo-masks")
    parser.add_argument("--probe-words", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: the recipe's)")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    cv2.setNumThreads(1)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    kind = corpus.Kind(options.alphabet, level=options.level, fonts=corpus.dejavu())
    corpus.write_shards(out / "shards", corpus.write_words(out / "words", options.words, options.seed, kind))
    corpus.write_words(out / "probe", options.probe_words, PROBE_SEED + options.seed, kind)
    words, masks = read_words([out / "probe"], options.probe_words), read_masks(out / "probe")
    pseudo = overlaps(masks.pseudo, masks.truth, masks.textured)

    config = settings(options)
    config.check()
    distributed.initialize(config.distributed.timeout)
    run = begin(Pretraining(config))
    found = out / "it_learns.json"
    points = [Point(**point) for point in json.loads(found.read_text())["points"]] if found.exists() else []
    points = [point for point in points if point.samples < run.progress.position]
    earlier = points[-1].minutes if points else 0.0

    def look(minutes: float, figures: list[dict[str, float]]) -> None:
        points.append(measure(run, words, masks, earlier + minutes, figures))
        content = {
            "config": options.config, "seed": options.seed, "alphabet": options.alphabet, "words": options.words,
            "level": options.level,
            "usable_words": len(words.labels), "textured_words": int(masks.textured.sum()),
            "pseudo_plain": pseudo[0], "pseudo_textured": pseudo[1], "points": [asdict(point) for point in points],
        }  # fmt: skip
        found.write_text(json.dumps(content, indent=1))
        (out / "it_learns.md").write_text(table(points, pseudo))
        cv2.imwrite(str(out / "it_learns.png"), draw(points, pseudo, max(1, points[-1].samples)))
        print(table(points, pseudo).splitlines()[1 + len(points)], flush=True)

    look(0.0, [])
    learn(run, look, options.minutes - earlier, max(1, config.train.total_samples // options.points))
    run.close()
    distributed.finalize()


if __name__ == "__main__":
    main()
