"""The sets of word images that recognisers are compared on: their names, published sizes and the usual averages."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ccd_train.data.records import LmdbReader, find_lmdbs
from ccd_train.errors import UserError

# Words in each set as published, under the folder names of the official data layout. IIIT5k to CUTE80: Baek et al.
# (ICCV 2019); COCO-Text: 9,896 in DiG (Yang et al., ACM MM 2022), 9,825 in PARSeq (Bautista and Atienza, ECCV 2022);
# CTW, Total-Text: DiG; HOST, WOST: Wang et al. (ICCV 2021); WordArt: Xie et al. (ECCV 2022). Of MPSC none was found.
PUBLISHED: dict[str, tuple[int, ...]] = {
    "IIIT5k_3000": (3000,),
    "SVT": (647,),
    "IC13_857": (857,),
    "IC13_1015": (1015,),
    "IC15_1811": (1811,),
    "IC15_2077": (2077,),
    "SVTP": (645,),
    "CUTE80": (288,),
    "COCOText": (9896, 9825),
    "CTW": (1572,),
    "TotalText": (2201,),
    "HOST": (2416,),
    "WOST": (2416,),
    "MPSC": (),
    "WordArt": (1511,),
}
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
}
# The smaller size of a set is a selection of the words of the larger one.
SELECTIONS = {"IC13_857": "IC13_1015", "IC15_1811": "IC15_2077"}


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
    hash: str = ""
    """sha256 over the images and labels of all records: the same words give the same hash, however they are stored.
    What a record has not counts as another thing than what it has empty."""

    def __iter__(self) -> Iterator[Word]:
        sha256 = hashlib.sha256()
        with LmdbReader(self.path) as reader:
            self.records, self.unlabelled = len(reader), 0
            for number in range(1, self.records + 1):
                image, label = reader.image(number), reader.label(number)
                for part in (image, None if label is None else label.encode()):
                    sha256.update(struct.pack("<q", -1 if part is None else len(part)) + (part or b""))
                if label is None:
                    self.unlabelled += 1
                else:
                    yield Word(number, image or b"", label)
        self.hash = sha256.hexdigest()


def find_sets(folder: Path, names: Sequence[str] = ()) -> list[Set]:
    """The sets below a folder, those of the data layout first; `names` picks some. Raises UserError.

    A set is an LMDB. A folder of a benchmark's name is that benchmark; others are named by their path.
    """
    known = {name.lower(): name for name in PUBLISHED}
    found: dict[str, Path] = {}
    for path in find_lmdbs(folder):
        name = known.get(path.resolve().name.lower(), str(path.relative_to(folder)))
        name = path.resolve().name if name == "." else name
        if name in found:
            raise UserError(f"{found[name]} and {path} are both {name}; give a folder with one of them")
        found[name] = path
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{folder}: no set {', '.join(missing)}; there are {', '.join(found)}")
    order = list(PUBLISHED)
    chosen = sorted(names or found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return [Set(name, found[name]) for name in chosen]


def refuse_unusable(sets: Sequence[Set]) -> None:
    """UserError for the first of the sets whose number of records or a label is wrong, or in which nothing has a label.

    Reads every label, which takes a moment, and no image.
    """
    for one in sets:
        with LmdbReader(one.path) as reader:
            labels = [reader.label(number) for number in range(1, len(reader) + 1)]
        if not any(label is not None for label in labels):
            raise UserError(f"{one.path}: no labels (label-%09d) to compare with; leave it out by --sets")


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
