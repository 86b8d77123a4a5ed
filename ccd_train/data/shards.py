"""A folder of shards: plain webdataset tars, an offsets file for each, and one manifest.

    DIR/manifest.json         what is here: per shard its samples, bytes and hash; the sources; what was refused
    DIR/refused.jsonl         one line for each refused record
    DIR/NAME-000123.tar       members KEY.jpg or KEY.png, KEY.txt (the label), KEY.mask.png, as far as they exist
    DIR/NAME-000123.offsets   one row of 56 bytes for each sample: where its parts lie in the tar, and their CRC-32

Nothing here imports torch: the converter shares this module.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ccd_train.data import trees
from ccd_train.errors import UserError
from ccd_train.files import sync_folder

FORMAT = 1
MANIFEST = trees.SHARDS_FILE
REFUSED = "refused.jsonl"
PARTS = ("image", "label", "mask")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
LABEL_EXTENSION = "txt"
MASK_EXTENSION = "mask.png"

# Places are byte positions in the tar; a part that is absent has place 0 (where no data can lie: a header is there).
ROW = np.dtype(
    [("header", "<i8")]  # of the image's member, long-name headers before it included
    + [(part, "<i8") for part in PARTS]
    + [(f"{part}_size", "<u4") for part in PARTS]
    + [(f"{part}_crc", "<u4") for part in PARTS]
)
_COLUMNS = {part: (1 + i, 4 + i, 7 + i) for i, part in enumerate(PARTS)}  # place, size and CRC in a row

_OPEN_SHARDS = 128  # that a Corpus keeps open in each process, with two files each


class DamagedManifestError(UserError):
    """A manifest that is there but cannot be trusted."""


class DamagedSampleError(Exception):
    """A sample whose bytes on the disk are not those that were converted."""


@dataclass(frozen=True)
class Source:
    """Where records came from."""

    name: str
    """The LMDB's path, as far as it tells it from the other sources; or a tar that another tool wrote."""
    records: int
    fingerprint: str
    """Hash of the number of records and of some of them (see data/records.py); of a foreign tar, all of it."""


@dataclass(frozen=True)
class Shard:
    """One tar: the records `first` to `last` of a source, less those refused."""

    file: str
    source: str
    first: int
    last: int
    samples: int
    labels: int
    masks: int
    bytes: int
    sha256: str
    offsets_sha256: str

    @property
    def offsets_file(self) -> str:
        return offsets_name(self.file)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. Equal sources and settings give equal manifests, on every machine."""

    name: str
    settings: dict[str, Any]
    sources: list[Source]
    shards: list[Shard]
    refused: dict[str, int]
    """Number of refused records by kind."""
    sizes: dict[str, list[int]]
    """Image sizes: `edges` [E] in pixels, and counts `width` [E], `height` [E]; bin i is [edges[i], edges[i + 1])."""
    format: int = FORMAT
    samples: int = field(init=False)
    bytes: int = field(init=False)
    hash: str = field(init=False)
    """sha256 over file name, sha256 and samples of each shard: the identity of the corpus."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", sum(shard.samples for shard in self.shards))
        object.__setattr__(self, "bytes", sum(shard.bytes for shard in self.shards))
        object.__setattr__(self, "hash", _digest([[s.file, s.sha256, s.samples] for s in self.shards]))


def offsets_name(tar: str) -> str:
    """The name of the offsets file that belongs to a tar."""
    return tar.removesuffix(".tar") + ".offsets"


def split_name(member: str) -> tuple[str, str]:
    """(key, extension) of a tar member, divided as webdataset does: at the first dot after the last slash.

    >>> split_name("1.SVT/000000007.mask.png")
    ('1.SVT/000000007', 'mask.png')
    """
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member, re.DOTALL)
    return (match[1], match[2]) if match else (member, "")


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a whole file, or nothing: a power cut leaves the old one or the new one."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """A name beside `path`, of this process alone, that never counts as data."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes DIR/manifest.json, which declares the folder complete."""
    write_atomically(Path(folder) / MANIFEST, [json.dumps(asdict(manifest), indent=1).encode(), b"\n"])


def read_manifest(folder: str | Path) -> Manifest:
    """Reads DIR/manifest.json. UserError if there is none, DamagedManifestError if it does not agree with itself."""
    file = Path(folder) / MANIFEST
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if seen := trees.instead_of_shards(Path(folder)):
            raise UserError(f"{folder}: no {MANIFEST} here; {seen}") from None
        raise UserError(
            f"{folder}: no {MANIFEST} here; give a folder that `ccd-data convert` finished "
            "(or run `ccd-data merge` on slices, `ccd-data index` on tars from another tool)"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    try:
        stored = json.loads(text)
        if stored["format"] != FORMAT:
            raise UserError(f"{file}: format {stored['format']}, but this version reads {FORMAT}; convert again")
        derived = {name: stored.pop(name) for name in ("samples", "bytes", "hash")}
        stored["sources"] = [Source(**source) for source in stored["sources"]]
        stored["shards"] = [Shard(**shard) for shard in stored["shards"]]
        manifest = Manifest(**stored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedManifestError(f"{file}: not a manifest ({type(error).__name__}: {error}); convert again") from None
    if derived != {name: getattr(manifest, name) for name in derived}:
        raise DamagedManifestError(
            f"{file}: its totals or its hash do not fit its shards: it was changed; convert again"
        )
    if any(os.path.basename(shard.file) != shard.file for shard in manifest.shards):
        raise DamagedManifestError(f"{file}: names a file outside this folder; convert again")
    return manifest


def read_offsets(file: str | Path) -> np.ndarray:
    """The rows (dtype ROW) of an offsets file, mapped: only the rows that are looked at are read."""
    if os.path.getsize(file) == 0:
        return np.empty(0, ROW)
    return np.memmap(file, ROW, mode="r")


@dataclass(frozen=True)
class Exclusion:
    """A sample that the loader must not see. A list of them is a file with one JSON object a line."""

    corpus: str
    """The hash of the manifest of the sample's folder."""
    shard: str
    row: int
    key: str


def write_exclusions(file: str | Path, exclusions: Iterable[Exclusion]) -> None:
    """Writes a list of samples to leave out, for `Corpus.open(…, exclude=file)`."""
    write_atomically(Path(file), (json.dumps(asdict(entry)).encode() + b"\n" for entry in exclusions))


def read_exclusions(file: str | Path) -> list[Exclusion]:
    """Reads a list of samples to leave out. UserError if it is none."""
    try:
        return [Exclusion(**json.loads(line)) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a list of `ccd-data overlap`") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: no list of exclusions ({error}); give one of `ccd-data overlap`") from None


class Corpus:
    """The samples of one or more shard folders, one after another, read at any position without reading the rest.

    Its `sample_id`s count the samples that are not excluded: shard by shard, row by row. May be pickled and forked: no
    file is shared, each process opens its own.
    """

    def __init__(self, paths: list[Path], shards: list[Shard], kept: dict[int, np.ndarray], corpus_hash: str) -> None:
        self.paths = paths
        """The tar of each shard."""
        self.shards = shards
        self.hash = corpus_hash
        """Identifies the samples and their order; independent of where the folders are."""
        samples = [len(kept[i]) if i in kept else shard.samples for i, shard in enumerate(shards)]
        self.shard_samples = np.array(samples, np.int64)
        self.first_sample = np.cumsum(self.shard_samples) - self.shard_samples
        self.num_samples = int(self.shard_samples.sum())
        self._kept = kept  # shard → its rows that are not excluded, int64, where any is
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()  # shard → file of the tar, and its rows

    @classmethod
    def open(cls, folders: str | Path | Sequence[str | Path], exclude: str | Path | None = None) -> Corpus:
        """Reads the manifests and looks at every file's size. UserError if anything is missing, now, not at hour 30."""
        folders = [folders] if isinstance(folders, str | Path) else list(folders)
        if not folders:
            raise UserError("no shard folder given; name at least one that `ccd-data convert` wrote")
        manifests = [read_manifest(folder) for folder in folders]
        excluded = _rows_by_shard(manifests, exclude) if exclude is not None else {}
        paths: list[Path] = []
        shards: list[Shard] = []
        kept: dict[int, np.ndarray] = {}
        for folder, manifest in zip(folders, manifests, strict=True):
            _check_files(Path(folder), manifest)
            for shard in manifest.shards:
                leave_out = excluded.get((manifest.hash, shard.file), [])
                if leave_out:
                    kept[len(shards)] = np.delete(np.arange(shard.samples), leave_out)
                    if len(kept[len(shards)]) == 0:
                        del kept[len(shards)]
                        continue
                paths.append(Path(folder) / shard.file)
                shards.append(shard)
        if not shards and excluded:
            raise UserError(f"{exclude}: leaves out every sample of {', '.join(map(str, folders))}; give another list")
        if not shards:
            raise UserError(f"{', '.join(map(str, folders))}: no samples here; give shards with samples")
        left_out = sorted((corpus, shard, sorted(rows)) for (corpus, shard), rows in excluded.items())
        return cls(paths, shards, kept, _digest([[manifest.hash for manifest in manifests], left_out]))

    @property
    def told(self) -> str:
        """`mj (8,919,273), st (100)`: the folders and their samples, in their order."""
        samples: Counter[Path] = Counter()
        for path, count in zip(self.paths, self.shard_samples.tolist(), strict=True):
            samples[path.parent] += count
        return ", ".join(f"{folder.absolute().name} ({count:,})" for folder, count in samples.items())

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard, row) of a sample."""
        assert 0 <= sample_id < self.num_samples, sample_id
        shard = int(np.searchsorted(self.first_sample, sample_id, side="right")) - 1
        return shard, sample_id - int(self.first_sample[shard])

    def read(self, shard: int, row: int, parts: Sequence[str] = PARTS) -> tuple[bytes | None, ...]:
        """The bytes of a sample's parts, None for those that it has not.

        Raises DamagedSampleError if the bytes are not those that were converted (their CRC-32 differs).
        """
        tar, rows = self._opened(shard)
        stored = rows[self._stored_row(shard, row)].item()  # a plain tuple: ten times faster to look into
        found: list[bytes | None] = []
        for part in parts:
            place, size, crc = (stored[column] for column in _COLUMNS[part])
            if place == 0:
                found.append(None)
                continue
            content = os.pread(tar, size, place)
            if zlib.crc32(content) != crc or len(content) != size:
                where = f"{self.paths[shard]}, byte {place}"
                raise DamagedSampleError(f"{where}: the {part} of {self.key(shard, row)!r} is damaged")
            found.append(content)
        return tuple(found)

    def key(self, shard: int, row: int) -> str:
        """The sample's key: the name of its members up to the extension. "?" if its header is damaged."""
        tar, rows = self._opened(shard)
        stored = rows[self._stored_row(shard, row)]
        header = os.pread(tar, int(stored["image"]) - int(stored["header"]), int(stored["header"]))
        try:
            with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as archive:
                member = archive.next()
        except tarfile.TarError:
            return "?"
        return split_name(member.name)[0] if member else "?"

    def places(self, shard: int) -> np.ndarray:
        """The offsets of a shard, dtype ROW, excluded samples included."""
        return self._opened(shard)[1]

    def prefetch(self, shard: int) -> None:
        """Asks the system to read a shard into its cache, without waiting for it."""
        os.posix_fadvise(self._opened(shard)[0], 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes all files; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def _stored_row(self, shard: int, row: int) -> int:
        return int(self._kept[shard][row]) if shard in self._kept else row

    def _opened(self, shard: int) -> tuple[int, np.ndarray]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= _OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        rows = read_offsets(self.paths[shard].with_name(self.shards[shard].offsets_file))
        return self._open.setdefault(shard, (os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC), rows))


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_files(folder: Path, manifest: Manifest) -> None:
    """UserError that names shard files which are missing or have another size than the manifest says."""
    expected = {shard.file: shard.bytes for shard in manifest.shards}
    expected |= {shard.offsets_file: shard.samples * ROW.itemsize for shard in manifest.shards}
    found = (entry for entry in os.scandir(folder) if entry.name in expected and entry.is_file())  # no dead links
    there = {entry.name: entry.stat().st_size for entry in found}
    wrong = [
        f"{name} ({'missing' if name not in there else f'{there[name]} bytes instead of {size}'})"
        for name, size in expected.items()
        if there.get(name) != size
    ]
    if wrong:
        listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(f"{folder}: damaged shards: {listed}; start the same `ccd-data convert` again, it mends them")


def _rows_by_shard(manifests: list[Manifest], exclude: str | Path) -> dict[tuple[str, str], list[int]]:
    """(manifest hash, shard file) → rows to leave out. UserError if the list speaks of other shards."""
    samples = {(m.hash, shard.file): shard.samples for m in manifests for shard in m.shards}
    rows: dict[tuple[str, str], list[int]] = {}
    for entry in read_exclusions(exclude):
        place = (entry.corpus, entry.shard)
        if not 0 <= entry.row < samples.get(place, 0):
            raise UserError(f"{exclude}: names {entry.key} in {entry.shard}, which is not here; make the list again")
        rows.setdefault(place, []).append(entry.row)
    return rows
