"""Benchmarks to be read: the sets below a folder, their words, and the usual averages over them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ccd_train.data.benchmarks import PUBLISHED, Recognised, candidates, named_folder, recognise
from ccd_train.data.guard import benchmark_at
from ccd_train.data.records import LmdbReader, find_lmdbs
from ccd_train.errors import UserError

_REGULAR, _IRREGULAR = ("IIIT5k_3000", "SVT"), ("SVTP", "CUTE80")
_OFFICIAL = (*_REGULAR, "IC13_1015", "IC15_1811", *_IRREGULAR)
# "eleven" is that of the official test.py; with these sizes it gives the published averages 84.9, 78.2 and 63.7.
GROUPS: dict[str, tuple[str, ...]] = {
    "regular": (*_REGULAR, "IC13_1015"),
    "irregular": ("IC15_1811", *_IRREGULAR),
    "six": _OFFICIAL,
    "six, small IC13": (*_REGULAR, "IC13_857", "IC15_1811", *_IRREGULAR),
    "six, large IC15": (*_REGULAR, "IC13_1015", "IC15_2077", *_IRREGULAR),
    "occluded": ("HOST", "WOST"),
    "eleven": (*_OFFICIAL, "COCOText", "CTW", "TotalText", "HOST", "WOST"),
    "union14m": ("curve", "multi_oriented", "artistic", "contextless", "salient", "multi_words", "general"),
}
# The smaller size of a set is a selection of the words of the larger one.
SELECTIONS = {
    "IC13_857": "IC13_1015",
    "IC13_1015": "IC13_1095",
    "IC15_1811": "IC15_2077",
    "IC03_860": "IC03_867",
}


class Set(NamedTuple):
    name: str
    path: Path


class Word(NamedTuple):
    number: int
    """Of its record, from 1."""
    image: bytes
    """Empty where the record has none."""
    label: str


@dataclass
class BenchmarkWords:
    """The labelled words of a set, in order; afterwards what was seen on the way."""

    path: Path
    records: int = 0
    unlabelled: int = 0
    """Records without a label, which are left out."""
    trimmed: int = 0
    """Labels with blanks at their ends, which are no part of the word."""
    hash: str = ""
    """sha256 over the images and labels of all records: the same words give the same hash, however they are stored.
    What a record has not counts as another thing than what it has empty."""

    def __iter__(self) -> Iterator[Word]:
        sha256 = hashlib.sha256()
        with LmdbReader(self.path) as reader:
            self.records, self.unlabelled, self.trimmed = len(reader), 0, 0
            for number in range(1, self.records + 1):
                image, stored, label = reader.image(number), reader.label_bytes(number), reader.label(number)
                for part in (image, stored):
                    sha256.update(struct.pack("<q", -1 if part is None else len(part)) + (part or b""))
                if label is None:
                    self.unlabelled += 1
                else:
                    self.trimmed += label.encode() != stored
                    yield Word(number, image or b"", label)
        self.hash = sha256.hexdigest()


def find_sets(folder: Path, names: Sequence[str] = ()) -> list[Set]:
    """The sets below a folder, those of the data layout first; `names` picks some. Raises UserError.

    A set is an LMDB. A folder of a benchmark's name, in any project's spelling, is that benchmark, unless another one
    has the published size; others are named by their path.
    """
    claims: dict[str, list[tuple[Path, bool]]] = {}
    for path in find_lmdbs(folder):
        known = _known(path)
        below = path.resolve().name if path == folder else str(path.relative_to(folder))
        claims.setdefault(known.name if known else below, []).append((path, bool(known and known.certain)))
    found: dict[str, Path] = {}
    for name, claimants in claims.items():
        first, *others = sorted(claimants, key=lambda claim: not claim[1])
        if others and others[0][1] == first[1]:
            raise UserError(f"{first[0]} and {others[0][0]} are both {name}; give a folder with one of them")
        found[name] = first[0]
        found |= {str(path.relative_to(folder)): path for path, _ in others}
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{folder}: no set {', '.join(missing)}; there are {', '.join(found)}")
    order = list(PUBLISHED)
    chosen = sorted(names or found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return [Set(name, found[name]) for name in chosen]


def _known(path: Path) -> Recognised | None:
    if not candidates(named_folder(path.resolve()).name):  # wherever it lies, it is a set of its own
        return None
    try:
        return benchmark_at(path)
    except UserError:  # damaged: --sets may leave it out, and if not, it is refused next
        return recognise(path.resolve(), 0)


def refuse_unusable(sets: Sequence[Set]) -> None:
    """UserError for the first of the sets whose number of records or a label is wrong, or in which nothing has a label.

    Reads every label, which takes a moment, and no image.
    """
    for one in sets:
        with LmdbReader(one.path) as reader:
            labels = [reader.label(number) for number in range(1, len(reader) + 1)]
        if not any(label is not None for label in labels):
            raise UserError(f"{one.path}: no labels (label-%09d) to compare with; leave it out by --sets")


def not_averaged(names: Collection[str]) -> list[str]:
    """Why an average that one might look for is not printed: a line for each group of which a part is there.

    Of the variants of a group the one that lacks least speaks, and none where another one is printed.
    """
    lacking: dict[str, list[tuple[str, list[str]]]] = {}
    for group, sets in GROUPS.items():
        missing = [name for name in sets if name not in names]
        lacking.setdefault(group.partition(",")[0], []).append((group, missing))
    lines = []
    for variants in lacking.values():
        group, missing = min(variants, key=lambda variant: len(variant[1]))
        if missing and len(missing) < len(GROUPS[group]):
            lines.append(f"{group}: not printed, no {', '.join(missing)} here")
    return lines


def twice(names: Collection[str]) -> list[str]:
    """A warning for each two sets of which one is a part of the other: an average over both counts its words twice."""
    return [
        f"average all counts the words of {small} twice, which are among those of {large}; leave one out by --sets"
        for small, large in SELECTIONS.items()
        if small in names and large in names
    ]


def other_size(name: str, words: int) -> str | None:
    """A warning if a set has not as many words as published."""
    published = PUBLISHED.get(name, ())
    if not published or words in published:
        return None
    sizes = " or ".join(f"{size:,}" for size in published)
    return f"{name} has {words:,} words here, not {sizes} as published: its figures are not comparable"
