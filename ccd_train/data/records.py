"""LMDBs of word images: the reader that the converter, fine-tuning and evaluation share, and a writer.

The layout is the field's own: `image-%09d` (an encoded image), `label-%09d` (UTF-8 text) and `mask-%09d` (an encoded
mask), counted from 1, and `num-samples`, the number of records in decimal digits.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path
from types import TracebackType
from weakref import WeakValueDictionary

import lmdb
import numpy as np

from ccd_train.data import trees
from ccd_train.data.charset import word_of
from ccd_train.data.signatures import HEAD, is_image, is_lfs_pointer
from ccd_train.errors import UserError

FILE = trees.LMDB_FILE
COUNT = b"num-samples"
_FIRST_MAP = 1 << 26  # bytes; doubled whenever it is full
_BATCH = 1000  # records in one write transaction
PROBES = 64  # records, evenly spread, that a fingerprint covers

# LMDB forbids one process to open an environment twice: all readers of a folder share one, until the last is closed.
_open_environments: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()


def find_lmdbs(root: str | Path) -> list[Path]:
    """Every LMDB at or below `root`, sorted by path. Follows symbolic links. UserError if there is none."""
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root}: no such folder; give the folder of an LMDB, or one with LMDBs somewhere below it")
    found = [folder for folder, files in trees.walk(root) if FILE in files]
    if not found:
        raise UserError(f"{root}: no LMDB here or below (no file {FILE}); give a folder that holds one")
    return sorted(found)


class LmdbReader:
    """Records of one LMDB folder, by their number from 1. Opened at the first use, read-only and without lock files.

    It may be pickled (it opens again) and used after a fork. Every method raises UserError if the folder holds no
    intact LMDB. Reads ahead: a cold sequential pass is ten times faster so (measured: 340 against 40 MB/s).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._transaction: lmdb.Transaction | None = None
        self._count: int | None = None

    def __len__(self) -> int:
        """The number of records. UserError if `num-samples` is missing or disagrees with the image keys."""
        if self._count is None:
            self._count = self._checked_count()
        return self._count

    def image(self, number: int) -> bytes | None:
        """The encoded image of a record, or None if its key is missing."""
        return self._value(b"image-%09d" % number)

    def mask(self, number: int) -> bytes | None:
        """The encoded mask of a record, or None if there is none."""
        return self._value(b"mask-%09d" % number)

    def label(self, number: int) -> str | None:
        """The word of a record (see `word_of`), or None if there is none. UserError if it is not UTF-8."""
        value = self.label_bytes(number)
        try:
            return None if value is None else word_of(value)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: label-{number:09d} is not UTF-8 ({error}); write it as UTF-8") from None

    def label_bytes(self, number: int) -> bytes | None:
        """The text of a record as it is stored, or None if there is none."""
        return self._value(b"label-%09d" % number)

    def has(self, kind: str) -> bool:
        """Whether there is any record of this kind ("image", "label" or "mask")."""
        return self._last_number(kind) is not None

    def check_numbers(self, kind: str, count: int) -> None:
        """UserError unless the labels or masks are numbered as `count` images are: else each may be its neighbour's."""
        if self._value(f"{kind}-{0:09d}".encode()) is not None:
            raise UserError(
                f"{self.path}: its {kind}s count from 0 and its images from 1: each image would get the {kind} of its "
                f"neighbour; write it again with {kind}s from {kind}-000000001 on"
            )
        last = self._last_number(kind)
        if last is not None and last > count:
            raise UserError(
                f"{self.path}: its {kind}s go on to number {last}, but its last image is number {count}: they may "
                "belong to other images; write it again with the same numbers for both"
            )

    def version(self) -> tuple[int, int]:
        """Number of keys, and of the last committed transaction: they differ after any write to the LMDB."""
        environment = self._environment()
        return int(environment.stat()["entries"]), int(environment.info()["last_txnid"])

    def fingerprint(self) -> str:
        """A hash that tells this LMDB from others: of the number of records, and of some of them."""
        count = len(self)
        digest = hashlib.sha256(b"%d records" % count)
        for number in map(int, np.unique(np.linspace(1, count, PROBES).astype(int))):
            for part in (self.image(number), self.label_bytes(number)):
                digest.update(b"-" if part is None else hashlib.sha256(part).digest())
        return digest.hexdigest()

    def close(self) -> None:
        """Releases the file and the memory that maps it; the next use opens it again."""
        if self._transaction is not None:
            self._transaction.abort()
        self._transaction = None

    def __enter__(self) -> LmdbReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_transaction": None, "_count": self._count}

    def _value(self, key: bytes) -> bytes | None:
        if self._transaction is None:
            self._transaction = self._environment().begin()
        try:
            value = self._transaction.get(key)
        except lmdb.Error as error:
            raise self._damage(key, error) from None
        assert not isinstance(value, memoryview)  # that is for transactions that lend their buffers
        return value

    def _damage(self, key: bytes, error: lmdb.Error) -> UserError:
        return UserError(f"{self.path}: damaged at {key.decode()} ({error}); copy the LMDB again")

    def _environment(self) -> lmdb.Environment:
        name = os.path.realpath(self.path)
        environment = _open_environments.get(name)
        if environment is None:
            environment = _open_environments[name] = _open_checked(self.path)
        return environment

    def _last_number(self, kind: str) -> int | None:
        """The highest number among the keys of a kind; None if there are no such keys."""
        if self._transaction is None:
            self._transaction = self._environment().begin()
        prefix, after = kind.encode() + b"-", kind.encode() + b"."  # "." follows "-": behind all keys of this kind
        try:
            with self._transaction.cursor() as cursor:
                key = bytes(cursor.key()) if (cursor.prev() if cursor.set_range(after) else cursor.last()) else b""
        except lmdb.Error as error:
            raise self._damage(after, error) from None
        if not key.startswith(prefix):
            return None
        digits = key[len(prefix) :]
        if not (len(digits) == 9 and digits.isdigit()):
            raise UserError(f"{self.path}: key {key!r} is not of the form {kind}-%09d; write the LMDB with such keys")
        return int(digits)

    def _checked_count(self) -> int:
        stored, highest = self._value(COUNT), self._last_number("image")
        if highest is None:
            raise UserError(f"{self.path}: {self._instead_of_images()}")
        if self._value(b"image-%09d" % 0) is not None:
            raise UserError(f"{self.path}: its keys count from 0; write it again with keys from image-000000001 on")
        if stored is None:
            if (other := self._value(b"nSamples")) is not None:
                raise UserError(
                    f"{self.path}: no num-samples key (records up to {highest} are there), but nSamples, which says "
                    f"{_text(other)!r}; store it as num-samples"
                )
            raise UserError(
                f"{self.path}: no num-samples key (records up to {highest} are there): it is still being written, or "
                "its writing was broken off; wait for its writer or write it again"
            )
        if not (stored.isdigit() and int(stored) == highest):
            raise UserError(
                f"{self.path}: num-samples says {stored.decode(errors='replace')!r} but the last image is number "
                f"{highest}: it is incomplete or still being written; copy it again, or store {highest} as num-samples"
            )
        for kind in ("label", "mask"):
            self.check_numbers(kind, highest)
        last = self._last_number("label")
        if last is not None and is_image((self._value(b"label-%09d" % last) or b"")[:HEAD]):
            raise UserError(f"{self.path}: label-{last:09d} holds a picture; write it again, with images as image-%09d")
        return highest

    def _instead_of_images(self) -> str:
        """What an LMDB holds that is none of word images, and what to do with it."""
        if self.has("mask"):
            return "these are masks (mask-%09d) without images; name it, or the folder it is in, as --mask-src"
        if self.has("image_hr") or self.has("image_lr"):
            return (
                "these are TextZoom's pairs (image_hr-%09d, image_lr-%09d), not words: an upscaler's recipe learns "
                "from them, and `ccd-data convert --images` takes their pictures for pretraining"
            )
        if self.has("label"):
            return "this LMDB holds labels but no images; give one with images"
        with self._environment().begin() as transaction, transaction.cursor() as cursor:
            keys = [key for key in itertools.islice(cursor.iternext(values=False), 4) if key != COUNT][:3]
        named = f"its first keys are {', '.join(map(repr, map(_text, keys)))}" if keys else "it is empty"
        return f"this LMDB holds no image-%09d keys ({named}): another program's; write one with image-%09d keys"


class PairedReader(LmdbReader):
    """Pairs in TextZoom's layout: `image_hr-%09d`, which is the `image` here, its poor `partner`, and labels."""

    def image(self, number: int) -> bytes | None:
        return self._value(b"image_hr-%09d" % number)

    def partner(self, number: int) -> bytes | None:
        """The encoded poor picture of a record, or None if its key is missing."""
        return self._value(b"image_lr-%09d" % number)

    def _checked_count(self) -> int:
        stored, highest = self._value(COUNT), max(self._last_number(kind) or 0 for kind in ("image_hr", "image_lr"))
        if self._last_number("image_hr") is None:
            raise UserError(f"{self.path}: {self._instead_of_pairs()}")
        if stored is None or not stored.isdigit() or int(stored) < highest:
            said = "is missing" if stored is None else f"says {_text(stored)!r}"
            raise UserError(
                f"{self.path}: num-samples {said}, but there are pairs up to number {highest}: it is incomplete or "
                "still being written; copy it again"
            )
        return int(stored)

    def _instead_of_pairs(self) -> str:
        """What an LMDB holds that is none of pairs, and what to do with it."""
        wanted = "give pairs in TextZoom's layout, image_hr-%09d with image_lr-%09d"
        if self.has("image_lr"):
            return f"poor pictures (image_lr-%09d) without the good ones (image_hr-%09d); {wanted}"
        if self.has("image"):
            return f"word images (image-%09d) without partners; {wanted}"
        with self._environment().begin() as transaction, transaction.cursor() as cursor:
            keys = [key for key in itertools.islice(cursor.iternext(values=False), 4) if key != COUNT][:3]
        return f"no image_hr-%09d keys (its first are {', '.join(map(repr, map(_text, keys))) or 'none'}); {wanted}"


def source_fingerprint(images: LmdbReader, masks: LmdbReader) -> tuple[str, list[list[int]]]:
    """The hash by which shards remember the LMDB that they were made of; and the sizes of the parts that it covers.

    It is over the number of records and of keys, and some records. `masks` may be the same LMDB.
    """
    count = len(images)
    digest, sizes = hashlib.sha256(b"%d records, %d keys" % (count, images.version()[0])), []
    for number in map(int, np.unique(np.linspace(1, count, PROBES).astype(int))):
        parts = (images.image(number), images.label_bytes(number), masks.mask(number))
        for part in parts:
            digest.update(b"-" if part is None else hashlib.sha256(part).digest())
        sizes.append([len(part) for part in parts if part is not None])
    return digest.hexdigest(), sizes


def _open_checked(path: Path) -> lmdb.Environment:
    """Opens an LMDB for reading, once it is sure that no page lies beyond the end of the file (which would kill us)."""
    file = path / FILE
    if not file.is_file():
        raise UserError(f"{path}: no LMDB here (no file {FILE}); give the folder of an LMDB")
    try:
        with open(file, "rb") as opened:
            head = opened.read(HEAD)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    if not head:
        raise UserError(f"{file}: 0 bytes: it was not written or copied to its end; copy it again")
    if is_lfs_pointer(head):
        raise UserError(f"{file}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    try:
        environment = lmdb.open(os.fsencode(path), readonly=True, lock=False, readahead=True, max_dbs=0)
    except lmdb.Error as error:
        raise UserError(f"{file}: cannot be opened as an LMDB ({error}); copy it again") from None
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    there = file.stat().st_size
    if there < needed:
        environment.close()
        raise UserError(f"{file}: cut short ({there} bytes, {needed} needed); copy it again")
    return environment


def _text(value: bytes) -> str:
    return value[:40].decode(errors="replace")


class LmdbWriter:
    """Writes a new LMDB of words. `num-samples` is written at a good end only: a broken-off LMDB shows as such."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if (self.path / FILE).exists():
            raise UserError(f"{self.path}: an LMDB is here already; choose another folder or delete it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._environment = lmdb.open(os.fsencode(self.path), map_size=_FIRST_MAP)
        except (OSError, lmdb.Error) as error:
            raise UserError(f"{self.path}: cannot be written ({error}); choose another folder") from None
        self._pending: list[tuple[bytes, bytes]] = []
        self.count = 0

    def add(self, image: bytes, label: str | None = None, mask: bytes | None = None) -> None:
        """Appends a record; its number is `count` afterwards."""
        self._add({"image": image, "label": None if label is None else label.encode(), "mask": mask})

    def add_pair(self, good: bytes, poor: bytes, label: str) -> None:
        """Appends a pair in TextZoom's layout."""
        self._add({"image_hr": good, "image_lr": poor, "label": label.encode()})

    def __enter__(self) -> LmdbWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._pending.append((COUNT, b"%d" % self.count))
                self._flush()
        finally:
            self._environment.close()

    def _add(self, parts: dict[str, bytes | None]) -> None:
        self.count += 1
        self._pending += [
            (f"{kind}-{self.count:09d}".encode(), part) for kind, part in parts.items() if part is not None
        ]
        if self.count % _BATCH == 0:
            self._flush()

    def _flush(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value)
                break
            except lmdb.MapFullError:  # the transaction was undone as a whole
                self._environment.set_mapsize(self._environment.info()["map_size"] * 2)
            except lmdb.Error as error:  # a full disk is an input/output error to LMDB
                raise UserError(
                    f"{self.path}: cannot be written ({error}); make room or mend the disk, then start again"
                ) from None
        self._pending.clear()
