"""Rates of reading shards back, beside webdataset and beside decoding alone; and how fast a large corpus is entered.

    python tests/benchmarks/reading.py [--real LMDB] [--samples 40000] [--rounds 5]

Raw reading: images and labels of rendered words (JPEG, filled up to 5.5 KB, the mean of photographed crops) in batches
of 64 from a warm page cache. webdataset shuffles shards and a buffer of 1,000 samples. Ours computes the global order,
reads at random within windows of 16 shards, and checks the CRC-32 of every part.

Worker side: batches as the trainer gets them, from shards made of `--real` (else of rendered words), against
cv2.imdecode, cv2.threshold with Otsu at full size, and two cv2.resize, on the same bytes in memory. One thread each.

All pairs are timed in turn, and the median of their ratios counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import webdataset
from torch.utils.data import DataLoader, Dataset

from ccd_train.data.batches import BatchReader
from ccd_train.data.loader import Share, loader
from ccd_train.data.order import Order
from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.data.shards import Corpus, Manifest, read_manifest, write_manifest
from data_tools import convert
from data_tools.words import render

BATCH = 64
WINDOW = 16
MEAN_BYTES = 5500
DISTINCT = 1000


class RawBatches(Dataset[list[tuple[bytes | None, ...]]]):
    """Images and labels of the batch at a position, read in the order of their places."""

    def __init__(self, corpus: Corpus, order: Order) -> None:
        self.corpus, self.order = corpus, order

    def __getitem__(self, index: int) -> list[tuple[bytes | None, ...]]:
        samples = self.order.at(index * BATCH, BATCH)
        found: list[tuple[bytes | None, ...]] = [()] * BATCH
        for i in np.lexsort((samples.rows, samples.shards)).tolist():
            found[i] = self.corpus.read(int(samples.shards[i]), int(samples.rows[i]), ("image", "label"))
        return found


def render_lmdb(path: Path, samples: int) -> None:
    words = [render(1, index, ()) for index in range(DISTINCT)]
    fill = MEAN_BYTES - sum(len(word.image) for word in words) // DISTINCT - 4
    comment = b"\xff\xfe" + (fill + 2).to_bytes(2, "big") + os.urandom(fill)  # a JPEG segment after the start marker
    with LmdbWriter(path) as writer:
        for number in range(samples):
            word = words[number % DISTINCT]
            writer.add(word.image[:2] + comment + word.image[2:], word.label)


def shard(source: Path, out: Path, samples_per_shard: int) -> Corpus:
    options = ["--src", str(source), "--out", str(out), "--name", "words", "--workers", "1"]
    assert convert.main([*options, "--samples-per-shard", str(samples_per_shard)]) == 0
    return Corpus.open(out)


def rate(batches: Iterable[object], count: int) -> float:
    """Samples per second over some batches, counted from the first one's arrival."""
    iterator = iter(batches)
    next(iterator)
    start = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return count * BATCH / (time.perf_counter() - start)


def ours(corpus: Corpus, workers: int) -> Iterator[object]:
    dataset = RawBatches(corpus, Order(corpus.shard_samples, 0, WINDOW))
    sampler = range(10**6)
    return iter(DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers))


def theirs(corpus: Corpus, workers: int) -> Iterator[object]:
    urls = list(map(str, corpus.paths))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, resampled=True, empty_check=False, nodesplitter=None)
    stream = dataset.shuffle(1000).to_tuple("jpg", "txt").batched(BATCH, collation_fn=None)
    return iter(DataLoader(stream, batch_size=None, num_workers=workers))


def compare(name: str, bar: float, pairs: list[tuple[float, float]]) -> bool:
    """Prints the medians of two rates that were measured in turn, and of their ratio. Whether the bar is reached."""
    ratio = statistics.median(mine / other for mine, other in pairs)
    rates = [statistics.median(values) for values in zip(*pairs, strict=True)]
    print(f"{name:42} {rates[0]:9,.0f} against {rates[1]:9,.0f} /s  ratio {ratio:5.2f}  (bar {bar})", flush=True)
    return ratio >= bar


def compare_raw(corpus: Corpus, rounds: int) -> list[bool]:
    batches = min(500, corpus.num_samples // BATCH)
    reached = []
    for workers, bar in ((0, 4.0), (2, 1.4)):
        pairs = [(rate(ours(corpus, workers), batches), rate(theirs(corpus, workers), batches)) for _ in range(rounds)]
        reached.append(compare(f"raw, {workers} workers / webdataset", bar, pairs))
    return reached


def compare_worker(source: Path, folder: Path, rounds: int) -> bool:
    corpus = shard(source, folder / "worker", 500)
    with LmdbReader(source) as lmdb:
        images = [np.frombuffer(lmdb.image(number) or b"", np.uint8) for number in range(1, len(lmdb) + 1)]
    reader = BatchReader(corpus, Order(corpus.shard_samples, 0, WINDOW), "otsu")
    cv2.setNumThreads(1)

    def floor(number: int) -> None:
        for data in images[number * BATCH : (number + 1) * BATCH]:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            mask = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
            cv2.resize(image, (128, 32))
            cv2.resize(mask, (128, 32))

    def worker(number: int) -> None:
        reader.batch(number * BATCH, BATCH, 0)

    pairs = []
    for _ in range(rounds):
        seconds = dict.fromkeys((worker, floor), 0.0)
        for number in range(len(images) // BATCH):  # batch by batch in turn: other work comes in waves
            for way in seconds:
                start = time.perf_counter()
                way(number)
                seconds[way] += time.perf_counter() - start
        samples = len(images) // BATCH * BATCH
        pairs.append((samples / seconds[worker], samples / seconds[floor]))
    return compare("worker side / decode, Otsu, resize alone", 0.7, pairs)


def multiply(folder: Path, corpus: Corpus, shards: int) -> None:
    """A corpus of so many shards of 10,000 samples, all of them names of one file."""
    [one] = read_manifest(corpus.paths[0].parent).shards
    names = [f"many-{number:06d}.tar" for number in range(shards)]
    folder.mkdir()
    for name in names:
        os.link(corpus.paths[0], folder / name)
        os.link(corpus.paths[0].with_suffix(".offsets"), folder / Path(name).with_suffix(".offsets"))
    copies = [dataclasses.replace(one, file=name) for name in names]
    write_manifest(folder, Manifest("many", {}, [], copies, {}, {}))


def time_entry(folder: Path, source: Path, rounds: int) -> list[bool]:
    """Opening 2,000 shards of 10,000 samples, and the first batch at 90 % of an epoch: read, decoded, masked."""
    multiply(folder / "many", shard(source, folder / "one", 10_000), 2000)
    opening, raw, whole = [], [], []
    for number in range(rounds):
        start = time.perf_counter()
        corpus = Corpus.open(folder / "many")
        opening.append(time.perf_counter() - start)
        position = int(0.9 * corpus.num_samples) // BATCH * BATCH + number * BATCH
        start = time.perf_counter()
        RawBatches(corpus, Order(corpus.shard_samples, number, WINDOW))[position // BATCH]
        raw.append(time.perf_counter() - start)
        corpus.close()
        share = Share(position, position + 10**6, BATCH, BATCH, 0, 1)
        start = time.perf_counter()
        order = Order(corpus.shard_samples, number + rounds, WINDOW)
        with loader(corpus, order, share, workers=0) as batches:
            next(batches)
        whole.append(time.perf_counter() - start)
    print(f"opening 2,000 shards × 10,000 samples: {statistics.median(opening) * 1e3:.0f} ms (bar 1,000)")
    print(f"first batch after a resume at 90 %: {statistics.median(raw) * 1e3:.0f} ms (bar 50)")
    print(f"    the same with decoding and masks: {statistics.median(whole) * 1e3:.0f} ms (bar 50)")
    return [statistics.median(opening) < 1.0, statistics.median(raw) < 0.05, statistics.median(whole) < 0.05]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_000, help="for raw reading")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real", type=Path, help="LMDB of real words for the worker side (default: rendered words)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for source, samples in ((folder / "many-words", options.samples), (folder / "words", 10_000)):
            render_lmdb(source, samples)
        reached = compare_raw(shard(folder / "many-words", folder / "raw", 2500), options.rounds)
        reached.append(compare_worker(options.real or folder / "words", folder, options.rounds))
        reached += time_entry(folder, folder / "words", options.rounds)
    print(f"{sum(reached)} of {len(reached)} bars reached")
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
