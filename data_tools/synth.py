"""`ccd-data synth`: renders words into an LMDB, as a first corpus and for tests."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ccd_train.data.records import LmdbWriter
from ccd_train.errors import FINISHED, UserError
from data_tools.fonts import PILLOW, Fonts, installed_fonts, named_fonts
from data_tools.pool import Report, available_cores, run_in_order
from data_tools.progress import Progress
from data_tools.words import Word, render

RECORD = "fonts.txt"
CHUNK = 64  # words that a process renders at once


@dataclass(frozen=True)
class Job:
    """Words `first` … `first + count - 1`."""

    seed: int
    first: int
    count: int
    fonts: tuple[str, ...]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ccd-data synth", description="Renders words into an LMDB.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the LMDB; must not exist, or be empty")
    parser.add_argument("--num-samples", type=int, required=True, help="words to render")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other words (default 0)")
    parser.add_argument("--labels", action="store_true", help="write the words as label-%%09d")
    parser.add_argument(
        "--masks", action="store_true", help="write the true glyph masks as mask-%%09d (PNG, 0 and 255)"
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
    fonts = named_fonts(options.fonts) if options.fonts else installed_fonts()
    synthesize(options.out, options.num_samples, options.seed, fonts, options.labels, options.masks, options.workers)
    return FINISHED


def synthesize(out: Path, num_samples: int, seed: int, fonts: Fonts, labels: bool, masks: bool, workers: int) -> None:
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
            for word in _words(num_samples, seed, fonts.files, workers, progress):
                writer.add(word.image, word.label if labels else None, word.mask if masks else None)
        (unfinished / RECORD).write_text(fonts.record(), encoding="utf-8")
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error}") from error
    print(f"{num_samples} words in {out}, their fonts in {out / RECORD}")


def _words(num_samples: int, seed: int, fonts: tuple[str, ...], workers: int, progress: Progress) -> Iterator[Word]:
    """The words in order, rendered by `workers` processes."""
    jobs = [Job(seed, first, min(CHUNK, num_samples - first), fonts) for first in range(0, num_samples, CHUNK)]
    with closing(run_in_order(_render, jobs, workers, progress)) as results:
        for words in results:
            yield from words


def _render(job: Job, done: Report) -> list[Word]:
    words = []
    for index in range(job.first, job.first + job.count):
        words.append(render(job.seed, index, job.fonts))
        done(1)
    return words
