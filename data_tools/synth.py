"""`ccd-data synth`: renders words into an LMDB, as a first corpus and for tests."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

from ccd_train.data.records import LmdbWriter
from ccd_train.data.synthetic import Word, find_fonts, render
from ccd_train.errors import FINISHED, UserError

CHUNK = 32  # words that a process renders between two messages


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ccd-data synth", description="Renders words into an LMDB.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the LMDB; must not exist, or be empty")
    parser.add_argument("--num-samples", type=int, required=True, help="words to render")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other words (default 0)")
    parser.add_argument("--labels", action="store_true", help="write the words as label-%%09d")
    parser.add_argument(
        "--masks", action="store_true", help="write the true glyph masks as mask-%%09d (PNG, 0 and 255)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args(argv)
    if options.num_samples < 1:
        raise UserError(f"--num-samples {options.num_samples}: render at least 1 word")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: seeds start at 0")
    synthesize(options.out, options.num_samples, options.seed, options.labels, options.masks, options.workers)
    return FINISHED


def synthesize(out: Path, num_samples: int, seed: int, labels: bool, masks: bool, workers: int) -> None:
    """Renders words 0 … num_samples-1 into the LMDB `out`. An interrupted call leaves no `out` behind."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; name another one, or remove it")
    fonts = find_fonts()
    print(f"rendering with {len(fonts)} fonts of this system" if fonts else "no fonts found: using Pillow's own")
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with (
            LmdbWriter(unfinished) as writer,
            tqdm(total=num_samples, unit=" words", desc="synth", disable=None) as progress,
        ):
            for word in _words(num_samples, seed, fonts, workers):
                writer.add(word.image, word.label if labels else None, word.mask if masks else None)
                progress.update()
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error}") from error
    print(f"{num_samples} words in {out}")


def _words(num_samples: int, seed: int, fonts: Sequence[str], workers: int) -> Iterator[Word]:
    """The words in order, rendered by `workers` processes."""
    job = partial(_render, seed=seed, fonts=tuple(fonts))
    if workers < 2:
        yield from map(job, range(num_samples))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
        yield from pool.map(job, range(num_samples), chunksize=CHUNK)


def _render(index: int, seed: int, fonts: tuple[str, ...]) -> Word:
    return render(seed, index, fonts)
