"""Which training crops are in an evaluation set, or nearly are?

    ccd-data overlap DIR … --against DIR …

    overlap.jsonl   one line for each such crop and set: its shard, row and key, what it equals, and how nearly
    exclude.jsonl   the same crops, as `--data.exclude` of the training reads them
    overlap.png     pairs that are alike but not equal, the least alike first: look before you trust the distance

A crop overlaps if its bytes are those of an evaluation image, or if their perceptual hashes differ in at most
`--distance` of 128 bits (docs/data.md tells what that catches, and what not).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from ccd_train.data.masks import decode_rgb, resize_image
from ccd_train.data.records import LmdbReader
from ccd_train.data.shards import (
    Corpus,
    DamagedSampleError,
    Exclusion,
    read_manifest,
    write_exclusions,
)
from ccd_train.data.trees import count_kinds, holds_image, look_into
from ccd_train.errors import FINISHED, UserError
from data_tools.likeness import BITS, Index, digest, perceptual_hash
from data_tools.pool import Report, available_cores, run_jobs
from data_tools.progress import Progress

DISTANCE = 12  # bits: see docs/data.md
CHUNK = 256  # crops compared at once
SHOWN, COLUMNS = 60, 4  # pairs on the picture


@dataclass(frozen=True)
class Match:
    """A training crop that an evaluation set holds. A crop that two sets hold gives two matches."""

    shard: int
    row: int
    key: str
    image: int
    """Number of the evaluation image, over all sets."""
    bits: int | None
    """In how many bits the hashes differ; None: the bytes are equal."""


@dataclass(frozen=True)
class Job:
    """A shard to compare."""

    folders: tuple[Path, ...]
    shard: int
    indexes: tuple[Path, ...]
    """Of every evaluation set."""
    distance: int


def main(argv: list[str]) -> int:
    options = _parse(argv)
    out: Path = options.out or options.folders[0]
    corpus = Corpus.open(options.folders)
    with tempfile.TemporaryDirectory() as scratch:
        indexes, names, compared = index_sets(options.against)
        files = tuple(Path(scratch) / f"{number}.npz" for number in range(len(indexes)))
        for index, file in zip(indexes, files, strict=True):
            index.save(file)
        jobs = [Job(tuple(options.folders), shard, files, options.distance) for shard in range(len(corpus.shards))]
        matches, unreadable = find_matches(jobs, corpus.num_samples, options.workers)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_lists(out, options.folders, corpus, matches, names)
        write_picture(out / "overlap.png", corpus, matches, options.against)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder with --out") from None
    print_findings(corpus, matches, compared)
    if unreadable:
        print(f"{unreadable:,} crops could not be read; ccd-data verify tells more")
    if matches:
        print(f"leave these crops out of the training with --data.exclude {out / 'exclude.jsonl'}")
    return FINISHED


def _parse(argv: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ccd-data overlap", description=__doc__, formatter_class=form)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of shards to train on")
    against = "an evaluation set: a folder with LMDBs, shards and image files in and below it; may be repeated"
    parser.add_argument("--against", type=Path, nargs="+", action="extend", required=True, metavar="SET", help=against)
    parser.add_argument("--out", type=Path, help="where to write (default: the first DIR)")
    parser.add_argument("--distance", type=int, default=DISTANCE, help=f"bits of {BITS} (default {DISTANCE})")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one a core)")
    options = parser.parse_args(argv)
    if not 0 <= options.distance < BITS // 2:
        raise UserError(f"--distance {options.distance}: must lie between 0 and {BITS // 2 - 1}")
    return options


@dataclass
class Compared:
    """What an evaluation set turned out to hold."""

    path: Path
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of images in LMDBs, in shards, and in files of their own."""
    bytes_only: int = 0
    """Images without a hash: they cannot be decoded, or are flat."""
    left_out: list[Path] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.kinds.total()


def evaluation_images(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(kind, name, bytes) of every image of an evaluation set, in a fixed order: of its LMDBs, shards and files."""
    tree = look_into(path)
    for folder in tree.lmdbs:
        with LmdbReader(folder) as reader:
            for number in range(1, len(reader) + 1):
                yield "in LMDBs", f"{folder}: image-{number:09d}", reader.image(number) or b""
    for folder in tree.shards:
        corpus = Corpus.open(folder)
        for sample in range(corpus.num_samples):
            shard, row = corpus.locate(sample)
            yield "in shards", f"{folder}: {corpus.key(shard, row)}", corpus.read(shard, row, ("image",))[0] or b""
    for file in tree.others:
        if holds_image(file):
            yield "in files", str(file), file.read_bytes()


def index_sets(sets: Sequence[Path]) -> tuple[list[Index], list[str], list[Compared]]:
    """The index of each set; the name of each image, over all sets; and what each set holds.

    UserError if one holds nothing.
    """
    names: list[str] = []
    indexes, compared = [], []
    for path in sets:
        if not path.is_dir():
            raise UserError(f"--against {path}: no such folder")
        seen, first = Compared(path), len(names)
        digests: list[bytes] = []
        hashes: dict[int, np.ndarray] = {}
        try:
            for kind, name, data in evaluation_images(path):
                hashed = perceptual_hash(data)
                if hashed is not None:
                    hashes[len(names)] = hashed
                seen.bytes_only += hashed is None
                seen.kinds[kind] += 1
                digests.append(digest(data))
                names.append(name)
            seen.left_out = [file for file in look_into(path).others if not holds_image(file)]
        except OSError as error:
            raise UserError(f"--against {path}: {error.filename} cannot be read ({error.strerror})") from None
        if not seen.images:
            found = f"; what it holds is {count_kinds(seen.left_out)}" if seen.left_out else ""
            raise UserError(f"--against {path}: no LMDB, shards or pictures here or below{found}")
        compared.append(seen)
        indexes.append(Index.build(digests, hashes, first))
    return indexes, names, compared


def find_matches(jobs: list[Job], crops: int, workers: int) -> tuple[list[Match], int]:
    """All matches in the order of the corpus, and how many of its crops could not be read."""
    matches: list[Match] = []
    unreadable = 0
    with (
        Progress("overlap", crops, "crops") as progress,
        closing(run_jobs(compare, jobs, workers, progress)) as results,
    ):
        for found, failed in results:
            matches += found
            unreadable += failed
    return sorted(matches, key=lambda match: (match.shard, match.row, match.image)), unreadable


def compare(job: Job, done: Report) -> tuple[list[Match], int]:
    """The matches of one shard, and how many of its crops could not be read."""
    cv2.setNumThreads(1)
    corpus, indexes = _corpus(job.folders), _indexes(job.indexes)
    matches: list[Match] = []
    unreadable = 0
    samples = int(corpus.shard_samples[job.shard])
    for start in range(0, samples, CHUNK):
        crops: dict[int, bytes] = {}
        for row in range(start, min(start + CHUNK, samples)):
            try:
                crops[row] = corpus.read(job.shard, row, ("image",))[0] or b""
            except DamagedSampleError:
                unreadable += 1
        digests = {row: digest(data) for row, data in crops.items()}
        hashed = {row: perceptual_hash(data) for row, data in crops.items()}
        for index in indexes:
            equal = {row: index.numbers[found] for row, found in digests.items() if found in index.numbers}
            others = {row: bits for row, bits in hashed.items() if bits is not None and row not in equal}
            near, differing = index.nearest(np.array(list(others.values()), np.uint64).reshape(-1, 2))
            found = [(row, image, None) for row, image in equal.items()] + [
                (row, image, bits)
                for row, image, bits in zip(others, near.tolist(), differing.tolist(), strict=True)
                if bits <= job.distance
            ]
            matches += [Match(job.shard, row, corpus.key(job.shard, row), image, bits) for row, image, bits in found]
        done(min(CHUNK, samples - start))
    return matches, unreadable


@lru_cache(maxsize=1)
def _corpus(folders: tuple[Path, ...]) -> Corpus:
    return Corpus.open(folders)


@lru_cache(maxsize=1)
def _indexes(files: tuple[Path, ...]) -> list[Index]:
    return [Index.load(file) for file in files]


def write_lists(
    out: Path, folders: Sequence[Path], corpus: Corpus, matches: Sequence[Match], names: Sequence[str]
) -> None:
    """Writes overlap.jsonl and exclude.jsonl."""
    hashes = {folder: read_manifest(folder).hash for folder in folders}
    lines, exclusions = [], []
    for match in matches:
        path = corpus.paths[match.shard]
        how = "equal bytes" if match.bits is None else f"{match.bits} of {BITS} bits differ"
        place = {"folder": str(path.parent), "shard": path.name, "row": match.row, "key": match.key}
        lines.append(json.dumps(place | {"evaluation": names[match.image], "how": how}, ensure_ascii=False) + "\n")
        exclusions.append(Exclusion(hashes[path.parent], path.name, match.row, match.key))
    (out / "overlap.jsonl").write_text("".join(lines), encoding="utf-8")
    write_exclusions(out / "exclude.jsonl", list(dict.fromkeys(exclusions)))


def write_picture(file: Path, corpus: Corpus, matches: Sequence[Match], sets: Sequence[Path]) -> None:
    """Pairs that are alike but not equal: the training crop, below it the evaluation image, and the bits between."""
    near = sorted((match for match in matches if match.bits), key=lambda match: -(match.bits or 0))[:SHOWN]
    file.unlink(missing_ok=True)
    if not near:
        return
    wanted = {match.image for match in near}
    everything = (image for path in sets for image in evaluation_images(path))
    known = {number: data for number, (_, _, data) in enumerate(everything) if number in wanted}
    cells = [
        _pair(corpus.read(match.shard, match.row, ("image",))[0] or b"", known[match.image], match) for match in near
    ]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % COLUMNS)
    rows = [np.hstack(cells[start : start + COLUMNS]) for start in range(0, len(cells), COLUMNS)]
    file.write_bytes(cv2.imencode(".png", np.vstack(rows)[..., ::-1])[1].tobytes())


def _pair(crop: bytes, evaluation: bytes, match: Match) -> np.ndarray:
    tiles = [np.repeat(np.repeat(resize_image(decode_rgb(data)), 2, axis=0), 2, axis=1) for data in (crop, evaluation)]
    line = np.full((16, tiles[0].shape[1], 3), 255, np.uint8)
    text = f"{match.bits} bits  {match.key}".encode("ascii", "replace").decode()
    cv2.putText(line, text, (2, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.pad(np.vstack([*tiles, line]), ((4, 4), (4, 4), (0, 0)), constant_values=255)


def print_findings(corpus: Corpus, matches: Sequence[Match], compared: Sequence[Compared]) -> None:
    """A line for each evaluation set, and what else is to be known of it."""
    first = 0
    for seen in compared:
        inside = [match for match in matches if first <= match.image < first + seen.images]
        equal = sum(match.bits is None for match in inside)
        images = len({match.image for match in inside})
        print(
            f"{seen.path}: {images:,} of {seen.images:,} images are in the training data; "
            f"{equal:,} crops are equal, {len(inside) - equal:,} alike, of {corpus.num_samples:,}"
        )
        if len(seen.kinds) > 1:
            print(f"{seen.path}: looked at {', '.join(f'{count:,} {kind}' for kind, count in seen.kinds.items())}")
        if seen.bytes_only:
            print(f"{seen.path}: {seen.bytes_only:,} cannot be decoded or show nothing: compared by their bytes alone")
        if seen.left_out:
            print(f"{seen.path}: left out, as they are no pictures: {count_kinds(seen.left_out)}")
        first += seen.images
