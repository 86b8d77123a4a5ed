"""Pictures with their truth: a word crop and its mask, or a poor picture of a word and a good one.

    TextZoom     LMDB    image_lr-%09d  →  image_hr-%09d, label-%09d     of any size, the LR mostly enlarged to the HR's
    word crops   LMDB    image-%09d     →  mask-%09d, label-%09d         codes 0, 100, 200, 255 (`ccd-data crops`)
    SSM          folder  image/NAME.*   →  mask/NAME_mask.*              text from half of white on

Everything is decoded once when it is opened: what cannot be used is left out, counted and named. Which pictures are
held out, and which belong to a share, is decided by a hash of where each is stored, as for words.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ccd_train import distributed
from ccd_train.config.pixels import Effects, MaskedPictures, PairedPictures, PicturePairs, Route
from ccd_train.data.guard import refuse_twice
from ccd_train.data.masks import UndecodableImage
from ccd_train.data.pixels import (
    SMALL,
    by_route,
    check_sizes,
    decode_codes,
    decode_grey_mask,
    fit,
    fit_mask,
    labels_of,
    open_rgb,
    resize_bicubic,
)
from ccd_train.data.records import LmdbReader, PairedReader
from ccd_train.data.shards import DamagedSampleError
from ccd_train.data.trees import LMDB_FILE, walk
from ccd_train.data.words import RECORDS, chosen_by_key
from ccd_train.errors import UserError

log = logging.getLogger(__name__)

HELD_OUT = 0.1  # of the training pictures, where no others are named for validation
NAMED = 4  # pictures left out that a line names
_HELD_OUT_SEED = 0  # of no run: what is held out is the same for all seeds


class Fitted(NamedTuple):
    """A sample of the network's size."""

    image: np.ndarray
    """uint8 [32, 128, 3]."""
    target: np.ndarray
    """uint8 [32, 128, C]: a picture, or 0, 1 for text and 255 for ignored."""
    native_size: tuple[int, int]


class Couples(Protocol):
    """Numbered pictures with their truth, from 1. May be pickled and forked."""

    path: Path

    def __len__(self) -> int: ...
    def parts(self, number: int) -> tuple[bytes | None, bytes | None]:
        """The bytes of the picture and of its truth."""

    def label(self, number: int) -> str | None: ...
    def name(self, number: int, truth: bool) -> str:
        """The key or file of either."""

    def fingerprint(self) -> str: ...
    def prepare(self, image: bytes, truth: bytes) -> Fitted:
        """Raises UndecodableImage."""

    def close(self) -> None: ...


class CropLmdb:
    """Word crops with masks in an LMDB."""

    def __init__(self, path: Path, effects: Effects) -> None:
        self.path, self._effects, self._reader = path, effects, LmdbReader(path)
        len(self)
        if not self._reader.has("mask"):
            raise UserError(f"{path}: no masks (mask-%09d) beside its images; make word crops: ccd-data crops TextSeg")

    def __len__(self) -> int:
        return len(self._reader)

    def parts(self, number: int) -> tuple[bytes | None, bytes | None]:
        return self._reader.image(number), self._reader.mask(number)

    def label(self, number: int) -> str | None:
        return self._reader.label(number)

    def name(self, number: int, truth: bool) -> str:
        return f"{'mask' if truth else 'image'}-{number:09d}"

    def fingerprint(self) -> str:
        return self._reader.fingerprint()

    def prepare(self, image: bytes, truth: bytes) -> Fitted:
        return _masked(image, decode_codes(truth), self._effects)

    def close(self) -> None:
        self._reader.close()


class CropFolder:
    """Word crops with masks as files: `image/NAME.*` and `mask/NAME_mask.*` (FaltingsA/SSM)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        masks = {file.stem.removesuffix("_mask"): file for file in sorted((path / "mask").iterdir()) if file.is_file()}
        images = [file for file in sorted((path / "image").iterdir()) if file.is_file()]
        self._files = [(file, masks.get(file.stem)) for file in images]
        if not images:
            raise UserError(f"{path}: no picture in image/; give a folder with image/NAME.jpg and mask/NAME_mask.jpg")

    def __len__(self) -> int:
        return len(self._files)

    def parts(self, number: int) -> tuple[bytes | None, bytes | None]:
        image, mask = self._files[number - 1]
        return image.read_bytes(), None if mask is None else mask.read_bytes()

    def label(self, number: int) -> str | None:
        return None

    def name(self, number: int, truth: bool) -> str:
        image, mask = self._files[number - 1]
        return (mask.name if mask else f"{image.stem}_mask") if truth else image.name

    def fingerprint(self) -> str:
        listed = [(image.name, image.stat().st_size, mask and mask.stat().st_size) for image, mask in self._files]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def prepare(self, image: bytes, truth: bytes) -> Fitted:
        return _masked(image, decode_grey_mask(truth), "background")

    def close(self) -> None:
        """No file stays open."""


class PairLmdb:
    """TextZoom's pairs."""

    def __init__(self, path: Path, route: Route) -> None:
        self.path, self._route, self._reader = path, route, PairedReader(path)
        len(self)

    def __len__(self) -> int:
        return len(self._reader)

    def parts(self, number: int) -> tuple[bytes | None, bytes | None]:
        return self._reader.partner(number), self._reader.image(number)

    def label(self, number: int) -> str | None:
        return self._reader.label(number)

    def name(self, number: int, truth: bool) -> str:
        return f"image_{'hr' if truth else 'lr'}-{number:09d}"

    def fingerprint(self) -> str:
        return self._reader.fingerprint()

    def prepare(self, image: bytes, truth: bytes) -> Fitted:
        poor, good = open_rgb(image), np.asarray(resize_bicubic(open_rgb(truth)))
        return Fitted(by_route(poor, self._route), good, (poor.height, poor.width))

    def small(self, number: int) -> np.ndarray:
        """The poor picture of a usable pair as TextZoom's baseline takes it: uint8 [16, 64, 3]."""
        return np.asarray(resize_bicubic(open_rgb(self.parts(number)[0] or b""), SMALL))

    def close(self) -> None:
        self._reader.close()


class Looked(NamedTuple):
    """What stands at a number of a source."""

    number: int
    sample: Fitted | None
    reason: str
    """Why there is none, with its name."""
    digest: bytes
    """sha256 over the bytes of picture, truth and label."""


class Checked(NamedTuple):
    """What a look at all pictures of a source found."""

    usable: np.ndarray
    """int64: numbers, ascending."""
    left_out: list[str]
    """A line for each of the others: name and reason."""
    digests: list[bytes]
    """sha256 over the bytes of each picture, its truth and its label."""
    text: int
    """Pictures in which there is something to find: text, or any picture."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


class Pairs:
    """Chosen pictures of several sources, one after another: what the loader reads. May be pickled and forked."""

    def __init__(self, sources: Sequence[tuple[Couples, np.ndarray]], contents: Sequence[str]) -> None:
        """`sources`: each with the numbers in use, int64, ascending. `contents`: hashes of all that was looked at."""
        self._shards: list[tuple[Couples, np.ndarray]] = []
        for source, numbers in sources:
            borders = np.flatnonzero(np.diff((numbers - 1) // RECORDS)) + 1
            self._shards += [(source, part) for part in np.split(numbers, borders) if len(part)]
        self.paths = [source.path for source, _ in self._shards]
        self.shard_samples = np.array([len(numbers) for _, numbers in self._shards], np.int64)
        self.num_samples = int(self.shard_samples.sum())
        identity = hashlib.sha256()
        for source, numbers in sources:
            identity.update(source.fingerprint().encode() + numbers.tobytes())
        self.hash = identity.hexdigest()
        """Identifies the pictures and their order; independent of where the folders are."""
        self.content = hashlib.sha256(" ".join(contents).encode()).hexdigest()
        """Changes with any byte of the sources."""
        self.told = ", ".join(f"{source.path.absolute().name} ({len(numbers):,})" for source, numbers in sources)

    def read(self, shard: int, row: int, parts: Sequence[str] = ()) -> tuple[bytes | None, ...]:
        """The bytes of a picture and of its truth. DamagedSampleError if either is missing by now."""
        source, numbers = self._shards[shard]
        found = source.parts(int(numbers[row]))
        for part, truth in zip(found, (False, True), strict=True):
            if part is None:
                raise DamagedSampleError(f"{source.path}: no {source.name(int(numbers[row]), truth)}")
        return found

    def prepare(self, shard: int, image: bytes, truth: bytes) -> Fitted:
        return self._shards[shard][0].prepare(image, truth)

    def key(self, shard: int, row: int) -> str:
        source, numbers = self._shards[shard]
        return source.name(int(numbers[row]), False)

    def prefetch(self, shard: int) -> None:
        """The system reads ahead by itself."""

    def close(self) -> None:
        for source, _ in self._shards:
            source.close()


class Opened(NamedTuple):
    train: Pairs
    valid: Pairs
    left_out: dict[str, list[str]]
    """By option, the lines of those that cannot be used."""


def open_pairs(settings: PairedPictures, seed: int) -> Opened:
    """The training pictures, and those that choose the weights (all ranks together, each looks at its part).

    UserError where nothing can be used, or nothing is left for either.
    """
    with distributed.together():
        sources = find_couples(settings.train, settings, "--data.train")
        others = find_couples(settings.valid, settings, "--data.valid") if settings.valid else []
        refuse_twice([{source.fingerprint(): str(source.path)} for source in sources], "data.train")
        if {source.fingerprint() for source in sources} & {source.fingerprint() for source in others}:
            log.warning(
                "--data.valid: has pictures of --data.train; what was learnt by heart is not told from the rest"
            )
    looked = [_shared_check(source) for source in sources]
    left_out = {"train": refuse_empty(sources, looked, "--data.train")}
    trained, held = [], []
    for source, checked in zip(sources, looked, strict=True):
        key, numbers = source.fingerprint(), checked.usable
        out = np.zeros(len(numbers), bool)
        if not settings.valid:
            out = chosen_by_key(key, numbers, _HELD_OUT_SEED, "held_out", HELD_OUT)
        used = chosen_by_key(key, numbers, seed, "fraction", settings.fraction)
        trained.append((source, numbers[used & ~out]))
        held.append((source, numbers[out]))
    train = Pairs(trained, [one.sha256 for one in looked])
    if settings.valid:
        seen = [_shared_check(source) for source in others]
        left_out["valid"] = refuse_empty(others, seen, "--data.valid")
        held, looked = [(source, one.usable) for source, one in zip(others, seen, strict=True)], seen
    valid = Pairs(held, [one.sha256 for one in looked])
    if not train.num_samples:
        raise UserError(f"data.fraction = {settings.fraction}: no picture of --data.train falls into it; raise it")
    if not valid.num_samples:
        raise UserError("--data.train: too few pictures to hold out a tenth; name others with --data.valid")
    if not sum(one.text for one in looked):
        raise UserError("--data.valid: no pixel of text in any mask, so that nothing can be scored; name others")
    return Opened(train, valid, left_out)


def find_couples(folders: Sequence[Path], settings: PairedPictures, option: str) -> list[Couples]:
    """Every source at or below some folders. UserError where there is none, or one of another kind."""
    found: list[Couples] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: no such folder; give one that is there")
        here: list[Couples] = []
        for path, files in sorted(walk(folder)):
            if LMDB_FILE in files:
                here.append(_open_lmdb(path, settings))
            elif isinstance(settings, MaskedPictures) and (path / "image").is_dir() and (path / "mask").is_dir():
                here.append(CropFolder(path))
        if not here:
            wanted = "an LMDB" + (" or a folder with image/ and mask/" if isinstance(settings, MaskedPictures) else "")
            raise UserError(f"{option} {folder}: no {wanted.removeprefix('an ')} here or below; give one that has it")
        found += here
    return found


def check(source: Couples, numbers: Iterable[int]) -> Checked:
    """Looks at some pictures of a source, as training will."""
    usable: list[int] = []
    left_out: list[str] = []
    digests: list[bytes] = []
    text = 0
    for one in look(source, numbers):
        digests.append(one.digest)
        if one.sample is None:
            left_out.append(one.reason)
            continue
        usable.append(one.number)
        text += one.sample.target.shape[-1] > 1 or bool((one.sample.target == 1).any())
    return Checked(np.array(usable, np.int64), left_out, digests, text)


def look(source: Couples, numbers: Iterable[int]) -> Iterator[Looked]:
    """Decodes and prepares some pictures of a source, in order."""
    for number in numbers:
        try:
            image, truth = source.parts(number)
        except OSError as error:
            yield Looked(number, None, f"{source.name(number, False)}: {error.strerror}", b"")
            continue
        label = source.label(number)
        parts = (image, truth, None if label is None else label.encode())
        sized = [struct.pack("<q", -1 if part is None else len(part)) + (part or b"") for part in parts]
        digest = hashlib.sha256(b"".join(sized)).digest()
        if image is None or truth is None:
            yield Looked(number, None, f"{source.name(number, image is not None)}: missing", digest)
            continue
        try:
            yield Looked(number, source.prepare(image, truth), "", digest)
        except UndecodableImage as reason:
            yield Looked(number, None, f"{source.name(number, False)}: {reason}", digest)


def refuse_empty(sources: Sequence[Couples], looked: Sequence[Checked], option: str) -> list[str]:
    """Says what is left out of some sources; UserError where nothing is left. Returns the lines."""
    lines = [f"{source.path}: {line}" for source, one in zip(sources, looked, strict=True) for line in one.left_out]
    total = sum(map(len, sources))
    named = "; ".join(lines[:NAMED]) + (f"; and {len(lines) - NAMED:,} more" if len(lines) > NAMED else "")
    if len(lines) == total:
        raise UserError(f"{option}: none of the {total:,} pictures can be used ({named}); make the set anew")
    if lines and distributed.rank() == 0:
        log.warning("%s: %d of %d pictures left out: %s", option, len(lines), total, named)
    return lines


def _open_lmdb(path: Path, settings: PairedPictures) -> Couples:
    if isinstance(settings, MaskedPictures):
        return CropLmdb(path, settings.effects)
    assert isinstance(settings, PicturePairs)
    return PairLmdb(path, settings.route)


def _shared_check(source: Couples) -> Checked:
    """`check` by all ranks together, in ranges."""
    count, ranks = len(source), distributed.world_size()
    mine = np.array_split(np.arange(1, count + 1), ranks)[distributed.rank()]
    with distributed.together():
        found = check(source, mine.tolist())
    parts: list[Checked] = distributed.gather_objects(found)
    return Checked(
        np.concatenate([part.usable for part in parts]),
        [line for part in parts for line in part.left_out],
        [digest for part in parts for digest in part.digests],
        sum(part.text for part in parts),
    )


def _masked(image: bytes, codes: np.ndarray, effects: Effects) -> Fitted:
    picture = check_sizes(image, codes)
    return Fitted(fit(picture), fit_mask(labels_of(codes, effects))[..., None], codes.shape)  # type: ignore[arg-type]
