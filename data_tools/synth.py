"""Renders words into an LMDB, as a first corpus and for tests.

ccd-data synth --out DIR --num-samples N                      to pretrain on; --labels, --masks for more
ccd-data synth --out DIR --num-samples N --layout crops       words with labels and masks as `ccd-data crops` has them
ccd-data synth --out DIR --num-samples N --layout pairs       words and what is left of them, in TextZoom's layout
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np

from ccd_train.data.masks import decode_mask, decode_rgb
from ccd_train.data.pixels import WORD
from ccd_train.data.records import LmdbWriter
from ccd_train.errors import FINISHED, UserError
from data_tools.degrade import STORED, degrade
from data_tools.fonts import PILLOW, Fonts, installed_fonts, named_fonts
from data_tools.pool import Report, available_cores, run_in_order
from data_tools.progress import Progress
from data_tools.words import Word, render

RECORD = "fonts.txt"
Layout = Literal["words", "crops", "pairs"]
CHUNK = 64  # words that a process renders at once


@dataclass(frozen=True)
class Job:
    """Words `first` … `first + count - 1`."""

    seed: int
    first: int
    count: int
    fonts: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Parts:
    """What the LMDB has beside the pictures of words."""

    layout: Layout
    labels: bool
    masks: bool


def main(argv: list[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ccd-data synth", description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the LMDB; must not exist, or be empty")
    parser.add_argument("--num-samples", type=int, required=True, help="words to render")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other words (default 0)")
    parser.add_argument("--labels", action="store_true", help="write the words as label-%%09d")
    parser.add_argument(
        "--masks", action="store_true", help="write the true glyph masks as mask-%%09d (PNG, 0 and 255)"
    )
    parser.add_argument(
        "--layout",
        choices=get_args(Layout),
        default="words",
        help="words for pretraining and recognition (the default), crops for text segmentation (masks of 0 and 100), "
        "pairs for super-resolution (image_hr-%%09d and image_lr-%%09d); the last two have labels",
    )
    parser.add_argument(
        "--fonts",
        nargs="+",
        metavar="FILE",
        help=f"draw with these fonts, in any order, or `{PILLOW}` for Pillow's own (default: this machine's)",
    )
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one a core)")
    options = parser.parse_args(argv)
    if options.num_samples < 1:
        raise UserError(f"--num-samples {options.num_samples}: render at least 1 word")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: seeds start at 0")
    if options.layout != "words" and (options.labels or options.masks):
        raise UserError(f"--layout {options.layout}: has the parts that it needs; leave out --labels and --masks")
    fonts = named_fonts(options.fonts) if options.fonts else installed_fonts()
    whole = options.layout == "crops"
    parts = Parts(options.layout, options.labels or whole, options.masks or whole)
    synthesize(options.out, options.num_samples, options.seed, fonts, parts, options.workers)
    return FINISHED


def synthesize(out: Path, num_samples: int, seed: int, fonts: Fonts, parts: Parts, workers: int) -> None:
    """Renders words 0 … num_samples-1 into the LMDB `out`, with `fonts.txt` beside them.

    An interrupted call leaves no `out` behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; name another one, or remove it")
    print(fonts.summary())
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with LmdbWriter(unfinished) as writer, Progress("synth", num_samples, "words") as progress:
            for word, poor in _words(num_samples, seed, fonts.files, parts.layout, workers, progress):
                if poor is not None:
                    writer.add_pair(word.image, poor, word.label)
                else:
                    writer.add(word.image, word.label if parts.labels else None, word.mask if parts.masks else None)
        (unfinished / RECORD).write_text(fonts.record(), encoding="utf-8")
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error}") from error
    print(f"{num_samples} words in {out}, their fonts in {out / RECORD}")


def _words(
    num_samples: int, seed: int, fonts: tuple[str, ...], layout: Layout, workers: int, progress: Progress
) -> Iterator[tuple[Word, bytes | None]]:
    """The words in order, and of pairs the poor pictures, rendered by `workers` processes."""
    starts = range(0, num_samples, CHUNK)
    jobs = [Job(seed, first, min(CHUNK, num_samples - first), fonts, layout) for first in starts]
    with closing(run_in_order(_render, jobs, workers, progress)) as results:
        for words in results:
            yield from words


def _render(job: Job, done: Report) -> list[tuple[Word, bytes | None]]:
    words: list[tuple[Word, bytes | None]] = []
    for index in range(job.first, job.first + job.count):
        word, poor = render(job.seed, index, job.fonts), None
        if job.layout == "crops":
            word = replace(word, mask=_coded(word.mask))
        if job.layout == "pairs":
            stored = degrade(decode_rgb(word.image), job.seed, index)
            poor = cv2.imencode(".jpg", stored[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, STORED])[1].tobytes()
        words.append((word, poor))
        done(1)
    return words


def _coded(mask: bytes) -> bytes:
    """Glyphs as 0 and 100 instead of 0 and 255."""
    return bytes(cv2.imencode(".png", decode_mask(mask) * np.uint8(WORD))[1])
