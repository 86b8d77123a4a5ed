"""Labelled words for fine-tuning: out of LMDBs as they are, or out of shards; all of them, or a share.

A word without a label, or with an empty one, is left out; what else is odd about the labels is counted once, at the
start. Which words belong to a share is decided by a hash of where each word is stored: the record's number in an LMDB
of this content, the row in a shard of this content. So the share is the same on every machine, in whatever order
the folders are given, and a smaller share is part of a larger one.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ccd_train import distributed, draws
from ccd_train.data.charset import Charset, Tally, word_of
from ccd_train.data.guard import benchmark_at, check_benchmark, check_shards, refuse_twice
from ccd_train.data.records import LmdbReader, find_lmdbs, source_fingerprint
from ccd_train.data.shards import Corpus, DamagedSampleError
from ccd_train.data.trees import Tree, count_kinds, look_into
from ccd_train.errors import UserError

log = logging.getLogger(__name__)

RECORDS = 10_000  # of an LMDB that are shuffled and read together, as a shard is


class Records:
    """The records of an LMDB, cut into ranges that stand for shards. May be pickled and forked."""

    def __init__(self, path: Path) -> None:
        """UserError if there is no intact LMDB."""
        self.reader = LmdbReader(path)
        count = len(self.reader)
        self.shard_samples = np.array([min(RECORDS, count - first) for first in range(0, count, RECORDS)], np.int64)
        self.paths = [path] * len(self.shard_samples)
        self.hash = self.reader.fingerprint()
        """Of the number of records and of some of them."""

    def read(self, shard: int, row: int, parts: Sequence[str] = ("image", "label")) -> tuple[bytes | None, ...]:
        """The bytes of a record's parts, None for those that it has not. DamagedSampleError if it has no image."""
        number = shard * RECORDS + row + 1
        get = {"image": self.reader.image, "label": self.reader.label_bytes, "mask": self.reader.mask}
        found = tuple(get[part](number) for part in parts)
        if "image" in parts and found[parts.index("image")] is None:
            raise DamagedSampleError(f"{self.reader.path}: no image-{number:09d}")
        return found

    def key(self, shard: int, row: int) -> str:
        return f"{shard * RECORDS + row + 1:09d}"

    def prefetch(self, shard: int) -> None:
        """The system reads ahead in an LMDB by itself."""

    def close(self) -> None:
        self.reader.close()


Source = Corpus | Records


class Words:
    """Chosen samples of several sources, one after another: what the loader reads. May be pickled and forked."""

    def __init__(
        self,
        places: list[Place],
        rows: list[np.ndarray],
        identity: str,
        content: str,
        not_read: str,
        sources: frozenset[str] = frozenset(),
    ) -> None:
        """`rows` int64, ascending: of each place, those in use. Places without any are left out."""
        self.sources = sources
        """Hashes of what the words were taken from: others with one of them have the same words."""
        used = [index for index, chosen in enumerate(rows) if len(chosen)]
        self._places = [places[index] for index in used]
        self._rows = [rows[index] for index in used]
        self.paths = [place.source.paths[place.shard] for place in self._places]
        """The tar or the LMDB of each shard."""
        self.shard_samples = np.array([len(chosen) for chosen in self._rows], np.int64)
        self.num_samples = int(self.shard_samples.sum())
        self.hash = hashlib.sha256(f"{identity} {self.num_samples}".encode()).hexdigest()
        """Identifies the words and their order; independent of where the folders are."""
        self.content = content
        """Changes with any label of an LMDB, of which the hash sees some records only."""
        samples: Counter[Path] = Counter()
        for place, count in zip(self._places, self.shard_samples.tolist(), strict=True):
            samples[place.folder] += count
        self.told = ", ".join(f"{folder.absolute().name} ({count:,})" for folder, count in samples.items())
        """The folders and how many words each gives, in their order."""
        self.not_read = not_read
        """What lies in the folders and is neither LMDB nor shards, in words."""

    def read(self, shard: int, row: int, parts: Sequence[str] = ("image", "label")) -> tuple[bytes | None, ...]:
        """As in Corpus."""
        place = self._places[shard]
        return place.source.read(place.shard, int(self._rows[shard][row]), parts)

    def key(self, shard: int, row: int) -> str:
        place = self._places[shard]
        return place.source.key(place.shard, int(self._rows[shard][row]))

    def prefetch(self, shard: int) -> None:
        place = self._places[shard]
        place.source.prefetch(place.shard)

    def close(self) -> None:
        for place in self._places:
            place.source.close()


@dataclass(frozen=True)
class Place:
    """A shard, or a range of an LMDB, among all that were named."""

    source: Source
    shard: int

    @property
    def samples(self) -> int:
        return int(self.source.shard_samples[self.shard])

    @property
    def folder(self) -> Path:
        """The shards' folder, or the LMDB."""
        path = self.source.paths[self.shard]
        return path.parent if isinstance(self.source, Corpus) else path

    @property
    def has_labels(self) -> bool:
        """Whether any of its samples may have one."""
        if isinstance(self.source, Corpus):
            return self.source.shards[self.shard].labels > 0
        return self.source.reader.has("label")

    def share(self, seed: int, fraction: float) -> np.ndarray:
        """The rows that belong to a share of all samples, int64, ascending."""
        rows = np.arange(self.samples)
        if fraction == 1:
            return rows
        first = 0
        if isinstance(self.source, Corpus):
            content = self.source.shards[self.shard].sha256
        else:  # by number in the LMDB: how it is cut does not matter
            content, first = self.source.hash, self.shard * RECORDS
        return np.flatnonzero(chosen_by_key(content, rows + first, seed, "fraction", fraction))

    def label(self, row: int) -> bytes | None:
        """As it is stored."""
        (found,) = self.source.read(self.shard, row, ("label",))
        return found


def chosen_by_key(content: str, numbers: np.ndarray, seed: int, draw: str, share: float) -> np.ndarray:
    """Which of some int64 numbers belong to a share of a set of this hash: bool, by a draw of this name for each."""
    root = draws.mix(torch.tensor(seed), int(content[:16], 16))
    keys = draws.mix(root.expand(len(numbers)), torch.from_numpy(numbers))
    return np.asarray((draws.uniform(keys, draw) < share).numpy())


def open_words(
    folders: Sequence[Path],
    charset: Charset,
    length: int,
    *,
    option: str,
    seed: int = 0,
    fraction: float = 1.0,
    each_once: bool = False,
    leave_out_long: bool = False,
    rule: Callable[[str], str] | None = None,
) -> tuple[Words, Tally]:
    """The words of LMDBs, trees of LMDBs and shard folders that have a label, and what is odd about their labels.

    All ranks together: each looks at its part of the labels. `option` names the folders in messages; `rule` is what
    will be left of a label to be scored. UserError for folders without words or without labels, where all labels are
    longer than `length` tokens, for a benchmark, and with `each_once` for a set that two of the folders hold.
    """
    with distributed.together():
        not_read: list[Path] = []
        sources, given = _open_all(folders, option, not_read)
        if each_once:
            refuse_twice(given, option)
        places = [Place(source, shard) for source in sources for shard in range(len(source.shard_samples))]
        rows = [place.share(seed, fraction) for place in places]
        look = _Look(places, rows, (lambda label: charset.too_long(label, length)) if leave_out_long else None)
        mine = range(distributed.rank(), len(places), distributed.world_size())
        tally = charset.tally(look.labels(mine), length, rule)
        tally.trimmed = look.trimmed
    unlabelled: dict[int, np.ndarray] = {}
    digests: dict[int, str] = {}
    total = Tally()
    for other, left_out, hashed in distributed.gather_objects((tally, look.left_out, look.digests)):
        total.add(other)
        unlabelled |= left_out
        digests |= hashed
    named = f"--{option} {', '.join(map(str, folders))}"
    if total.cut and total.cut == total.labels - total.empty:
        raise UserError(
            f"{named}: every label has more than the {length - 2} characters that recognizer.length = {length} allows; "
            "raise it, --recognizer.length"
        )
    kept = [np.setdiff1d(chosen, unlabelled.get(index, ())) for index, chosen in enumerate(rows)]
    content = hashlib.sha256(" ".join(digests[index] for index in sorted(digests)).encode()).hexdigest()
    identity = " ".join(source.hash for source in sources)
    words = Words(places, kept, identity, content, count_kinds(not_read), frozenset().union(*given))
    if words.num_samples == 0:
        if not any(map(len, rows)):
            raise UserError(f"{named}: none of its words fall into data.fraction = {fraction}; raise it")
        raise UserError(f"{named}: no word here has a label; give LMDBs with label-%09d, or shards with labels")
    return words, total


class _Look:
    """Reads the labels of some places, and notes the rows that have none."""

    def __init__(
        self, places: list[Place], rows: list[np.ndarray], leave_out: Callable[[str], bool] | None = None
    ) -> None:
        self._places, self._rows, self._leave_out = places, rows, leave_out
        self.left_out: dict[int, np.ndarray] = {}
        """Place → its rows without a label, or with one that is to be left out."""
        self.trimmed = 0
        """Labels with blanks at their ends."""
        self.digests: dict[int, str] = {}
        """Place in an LMDB → a hash of its labels. Those of shards are in the hash of the shards."""

    def labels(self, indices: Sequence[int]) -> Iterator[str]:
        """Every label of these places, the empty ones and, as empty, the missing ones too."""
        for index in indices:
            place, without = self._places[index], []
            readable, digest = place.has_labels, hashlib.sha256()
            for row in self._rows[index].tolist():
                label = self._label(place, row) if readable else ""
                if not label or (self._leave_out and self._leave_out(label)):
                    without.append(row)
                digest.update(f"{label}\0".encode())
                yield label
            if isinstance(place.source, Records):
                self.digests[index] = digest.hexdigest()
            self.left_out[index] = np.array(without, np.int64)

    def _label(self, place: Place, row: int) -> str:
        try:
            stored = place.label(row) or b""
        except DamagedSampleError:  # as good as none
            return ""
        label = word_of(stored, errors="replace")
        self.trimmed += label != stored.decode(errors="replace")
        return label


def _open_all(folders: Sequence[Path], option: str, not_read: list[Path]) -> tuple[list[Source], list[dict[str, str]]]:
    """The sources; and of each folder its sets, as `refuse_twice` takes them. What else is there joins `not_read`."""
    opened: list[Source] = []
    doubts: list[str] = []
    given: list[dict[str, str]] = []
    for folder in folders:
        sets: dict[str, str] = {}
        tree = _look_into(folder, option)
        not_read += tree.others
        for path in tree.shards:
            corpus = Corpus.open(path)
            more, found = check_shards(corpus, path, option)
            opened.append(corpus)
            doubts += more
            sets |= found
        for path in tree.lmdbs:
            doubts += check_benchmark(f"--{option} {path}", benchmark_at(path))
            records = Records(path)
            opened.append(records)
            sets[source_fingerprint(records.reader, records.reader)[0]] = str(path)
        given.append(sets)
    if distributed.rank() == 0:
        for doubt in doubts:
            log.warning(doubt)
    return opened, given


def _look_into(folder: Path, option: str) -> Tree:
    """Every LMDB and every folder of shards at or below a folder, and what else is there."""
    if folder.is_dir() and not any(folder.iterdir()):
        raise UserError(f"--{option} {folder}: an empty folder; give LMDBs, or shards that `ccd-data convert` wrote")
    tree = look_into(folder)
    if not tree.lmdbs and not tree.shards:
        find_lmdbs(folder)  # says what is missing
    return tree
