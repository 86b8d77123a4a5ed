"""The sets of word images that recognisers are compared on: their names everywhere, their sizes, how one is recognised.

A name alone is a suspicion: PARSeq's `val/SVT` is SVT's training split. It becomes certain by the number of records, by
the folder, or where there is no other set of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import NamedTuple


@dataclass(frozen=True)
class Benchmark:
    name: str
    """The folder's name in the official data layout."""
    sizes: tuple[int, ...]
    """Words, as published."""
    aliases: tuple[str, ...] = ()
    """What other projects call it; case and punctuation, a size at the end, `test` and `lmdb` do not matter."""
    splits: tuple[int, ...] | None = None
    """Words of training splits that go by the same name; None: there is no such split, so the name is certain."""
    common_word: bool = False
    """The name says nothing without the size or the folder."""


_IC03, _IC13, _IC15 = ((f"IC{year}", f"ICDAR{year}", f"ICDAR20{year}") for year in ("03", "13", "15"))
_SPLITS03, _SPLITS13, _SPLITS15 = (1156,), (848,), (4468,)
# IIIT5k to CUTE80, IC03 and the training splits: Baek et al. (ICCV 2019); COCO-Text: 9,896 in DiG (Yang et al., ACM MM
# 2022), 9,825 in PARSeq (Bautista and Atienza, ECCV 2022), as IC13_1095; CTW, Total-Text: DiG; HOST, WOST: Wang et al.
# (ICCV 2021); WordArt: Xie et al. (ECCV 2022); from `curve` on Union14M (Jiang et al., ICCV 2023). Of MPSC none was
# found. The names are those of CCD and of clovaai, ABINet, PARSeq, OpenOCR, MMOCR, Union14M, ASTER.
BENCHMARKS = (
    Benchmark("IIIT5k_3000", (3000,), ("IIIT5k", "IIIT", "IIIT5kWords"), splits=(2000,)),
    Benchmark("SVT", (647,), ("StreetViewText",), splits=(257,)),
    Benchmark("IC13_857", (857,), _IC13, _SPLITS13),
    Benchmark("IC13_1015", (1015,), _IC13, _SPLITS13),
    Benchmark("IC15_1811", (1811,), _IC15, _SPLITS15),
    Benchmark("IC15_2077", (2077,), _IC15, _SPLITS15),
    Benchmark("SVTP", (645,), ("SVTPerspective",)),
    Benchmark("CUTE80", (288,), ("CUTE", "CT80")),
    Benchmark("COCOText", (9896, 9825), ("COCO", "COCOv14"), splits=()),
    Benchmark("CTW", (1572,), ("CTW1500", "SCUTCTW1500"), splits=()),
    Benchmark("TotalText", (2201,), splits=()),
    Benchmark("HOST", (2416,), ("OSTheavy",)),
    Benchmark("WOST", (2416,), ("OSTweak",)),
    Benchmark("MPSC", (), splits=()),
    Benchmark("WordArt", (1511,), splits=()),
    Benchmark("IC03_860", (860,), _IC03, _SPLITS03),
    Benchmark("IC03_867", (867,), _IC03, _SPLITS03),
    Benchmark("IC13_1095", (1095,), _IC13, _SPLITS13),
    Benchmark("curve", (2426,), common_word=True),
    Benchmark("multi_oriented", (1369,), common_word=True),
    Benchmark("artistic", (900,), common_word=True),
    Benchmark("contextless", (779,), common_word=True),
    Benchmark("salient", (1585,), common_word=True),
    Benchmark("multi_words", (829,), common_word=True),
    Benchmark("general", (400_000,), common_word=True),
    Benchmark("incomplete", (1495,), common_word=True),
    Benchmark("incomplete_ori", (1495,), common_word=True),
)
PUBLISHED = {one.name: one.sizes for one in BENCHMARKS}
_LAYOUT = ("evaluation", "benchmark")  # folders of the official layout, one in the other
_BESIDE_THE_NAME = {"lmdb", "tar"}
_FOR_TESTS = {"test", "testing", "eval", "evaluation", "evaluations", "benchmark", "benchmarks"}
_UNION14M = {"u14m", "union14m", "union14mbenchmark", "union14mbenchmarks"}
_PLACES = _FOR_TESTS | _UNION14M | {"commonbenchmarks"}


class Recognised(NamedTuple):
    name: str
    certain: bool
    """Otherwise the name alone says so."""
    why: str


def candidates(name: str) -> list[Benchmark]:
    """The benchmarks that go by a folder's name, several where sizes share one."""
    words = [word for word in _words(name) if word not in _BESIDE_THE_NAME | _FOR_TESTS]
    found = [one for one in BENCHMARKS if "".join(words) in _names(one)]
    if not found and words and words[-1].isdigit():
        found = [one for one in BENCHMARKS if int(words[-1]) in one.sizes and "".join(words[:-1]) in _names(one)]
    return found


def recognise(path: PurePath, records: int, beside: Iterable[str] = ()) -> Recognised | None:
    """Which benchmark a set is, by its folder and its number of records; None: none that is known.

    `path` is absolute, or as far as the manifest of shards names it; `beside` are the names of its neighbours.
    """
    layout, path = in_layout(path), named_folder(path)
    found = sorted(candidates(path.name), key=lambda one: _distance(one, records))
    one = found[0] if found else None
    if one and records in one.sizes:
        return Recognised(one.name, True, f"{records:,} words, as published")
    if layout:
        return Recognised(one.name if one else path.name, True, f"in {'/'.join(_LAYOUT)}")
    if one is None:
        return None
    if records in (one.splits or ()):
        return Recognised(one.name, False, f"{records:,} words, as in its training split")
    certain = _certain(one, path, beside)
    if certain is None and one.common_word:
        return None
    return Recognised(one.name, certain is not None, certain or f"{records:,} words, not as published")


def in_layout(path: PurePath) -> bool:
    """Whether a set lies where the official data layout has its benchmarks."""
    parts = [part.lower() for part in path.parts]
    return _LAYOUT in pairwise(parts) if path.is_absolute() else _LAYOUT[1] in parts


def named_folder(path: PurePath) -> PurePath:
    """`SVT/test`, `SVT/lmdb`, `OST/heavy` bear the name of the folder above: as if they were called `SVT_test`."""
    whole = f"{path.parent.name}_{path.name}"
    return path.parent.with_name(whole) if not candidates(path.name) and candidates(whole) else path


def _certain(one: Benchmark, path: PurePath, beside: Iterable[str]) -> str | None:
    """Why the name is certain though the size is another one: a part of a benchmark is a benchmark, too."""
    words, place = set(_words(path.name)), "".join(_words(path.parent.name))
    if place in (_UNION14M if one.common_word else _PLACES):
        return f"in {path.parent.name}"
    if one.common_word:
        return None
    if words & {*map(str, one.sizes)}:
        return "its name bears the size"
    if words & _FOR_TESTS:
        return "its name says test"
    if one.splits is None:
        return "there is no training split of that name"
    tests_only = [name for name in sorted(beside) if any(other.splits is None for other in _uncommon(name))]
    return f"beside {tests_only[0]}" if tests_only else None


def _uncommon(name: str) -> list[Benchmark]:
    return [one for one in candidates(name) if not one.common_word]


def _distance(one: Benchmark, records: int) -> int:
    return min((abs(size - records) for size in one.sizes), default=0)


def _words(name: str) -> list[str]:
    """In small letters.

    >>> _words("IC13_857.lmdb"), _words("multi-oriented")
    (['ic13', '857', 'lmdb'], ['multi', 'oriented'])
    """
    return re.findall(r"[^\W_]+", name.lower())


def _names(one: Benchmark) -> set[str]:
    return {"".join(_words(name)) for name in (one.name, *one.aliases)}
