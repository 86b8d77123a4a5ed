"""Tars: a writer of ustar files that are the same byte for byte whoever writes them, and a reader of members' places.

Formats: POSIX.1-1988 ustar and the pax headers of POSIX.1-2001 ("pax", extended headers), and GNU tar's long names.
The writer makes headers without time, owner or extension, and fills in only number and size of a prepared one: three
times the speed of Python's tarfile, and the hash of a shard depends on its samples alone.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from zlib import crc32

from ccd_train.data.shards import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    MASK_EXTENSION,
    PARTS,
    offsets_name,
    split_name,
    temporary_path,
)
from ccd_train.files import sync_folder

BLOCK = 512
DIRECTORY_BYTES = 155  # ustar's prefix field
_CHUNK = 1 << 20  # bytes gathered before they are hashed and written
_ROW = struct.Struct("<qqqqIIIIII")  # data/shards.ROW
_ZEROS = bytes(BLOCK)


def directory_of(source: str) -> bytes:
    """The directory that stands for a source in the keys of its samples: its name, or a shortened one with a hash."""
    name = os.fsencode(source)
    if len(name) <= DIRECTORY_BYTES and min(name) >= 32:
        return name
    printable = bytes(byte if byte >= 32 else ord("_") for byte in name)
    end = printable[-100:].decode(errors="ignore").lstrip("/")
    return hashlib.sha256(name).hexdigest()[:16].encode() + b"~" + end.encode()


class ShardWriter:
    """Writes one tar and its offsets under temporary names; `finish` gives both their own.

    `directory` (≤ 155 bytes) and the record's number make the key of a sample: `directory/000000042`.
    """

    def __init__(self, path: Path, directory: bytes) -> None:
        self.path = path
        self.samples = 0
        self._directory = directory
        self._templates: dict[str, tuple[bytes, int]] = {}
        self._tar = HashedFile(path)
        self._offsets = HashedFile(path.with_name(offsets_name(path.name)))

    def add(self, number: int, extension: str, image: bytes, label: bytes | None, mask: bytes | None) -> None:
        """Appends a sample: KEY.jpg or KEY.png, then KEY.txt and KEY.mask.png where they are given."""
        digits = b"%09d" % number
        header = self._tar.bytes
        places = [self._member(digits, extension, image), 0, 0]
        sizes, crcs = [len(image), 0, 0], [crc32(image), 0, 0]
        for column, content, suffix in ((1, label, LABEL_EXTENSION), (2, mask, MASK_EXTENSION)):
            if content is not None:
                places[column] = self._member(digits, suffix, content)
                sizes[column], crcs[column] = len(content), crc32(content)
        self._offsets.write(_ROW.pack(header, *places, *sizes, *crcs))
        self.samples += 1

    def finish(self) -> tuple[int, str, str]:
        """Makes both files last and visible; returns the tar's size in bytes, its sha256, and that of the offsets."""
        self._tar.write(bytes(2 * BLOCK))
        for file in (self._tar, self._offsets):
            file.commit()
        sync_folder(self.path.parent)
        return self._tar.bytes, self._tar.sha256(), self._offsets.sha256()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tar, self._offsets):
            file.close()

    def _member(self, digits: bytes, extension: str, content: bytes) -> int:
        """Writes one member; returns where its content begins."""
        if extension not in self._templates:
            self._templates[extension] = _template(self._directory, extension)
        template, checksum = self._templates[extension]
        size = b"%011o" % len(content)
        checksum += sum(digits) + sum(size)
        place = self._tar.bytes + BLOCK
        self._tar.write(
            b"%b%b%b%b%06o\0 %b" % (digits, template[9:124], size, template[135:148], checksum, template[156:]),
            content,
            _ZEROS[: -len(content) % BLOCK],
        )
        return place


def _template(directory: bytes, extension: str) -> tuple[bytes, int]:
    """A ustar header without number, size and checksum, and the sum of its bytes, blanks in the checksum's place."""
    header = bytearray(BLOCK)
    name = b"\0" * 9 + b"." + extension.encode()
    header[0 : len(name)] = name
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"  # owner and group
    header[136:148] = b"00000000000\0"  # time
    header[148:156] = b" " * 8
    header[156:157] = b"0"  # a regular file
    header[257:265] = b"ustar\x0000"
    header[345 : 345 + len(directory)] = directory
    return bytes(header), sum(header)


class HashedFile:
    """A new file that is hashed while it is written, and has its name only when it is complete."""

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._path = path
        self._temporary: Path | None = temporary_path(path)
        self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115 - closed by commit or close
        self._hash = hashlib.sha256()
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def write(self, *contents: bytes) -> None:
        self._pending.extend(contents)
        size = sum(map(len, contents))
        self.bytes += size
        self._pending_bytes += size
        if self._pending_bytes >= _CHUNK:
            self._flush()

    def commit(self) -> None:
        assert self._temporary is not None
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        self._temporary = None

    def close(self) -> None:
        """Removes what was not committed."""
        self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _flush(self) -> None:
        content = memoryview(b"".join(self._pending))
        self._hash.update(content)
        while content:  # a raw file may write less than it was given
            content = content[self._file.write(content) :]
        self._pending.clear()
        self._pending_bytes = 0


class BadTar(Exception):  # noqa: N818
    """A tar whose structure is broken; `place` is the byte where."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(f"{reason} at byte {place}")
        self.place = place


@dataclass(frozen=True)
class TarSample:
    """Members with one key, next to each other."""

    key: str
    place: int
    """Where the first of them begins."""
    members: dict[str, Member]
    """By part ("image", "label", "mask")."""
    left_out: list[str]
    """What its other members are, as `kind` says it."""
    repeated: bool
    """Whether a part is there more than once."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar, or a link, which has no content."""

    name: str
    header: int
    """Where its first header block lies, headers that carry a long name included."""
    place: int
    """Where its content begins."""
    size: int
    link: bool

    @property
    def kind(self) -> str:
        """What to count it as: `.json`, `.jpg (a link)`."""
        extension = split_name(self.name)[1].lower()
        return (f".{extension}" if extension else "without a key") + (" (a link)" if self.link else "")


def read_members(tar: BinaryIO) -> Iterator[Member]:
    """The files and links of an uncompressed tar, in order, without reading their contents. Raises BadTar.

    What follows an end mark is read too: tars may have been joined (`cat a.tar b.tar`).
    """
    end = os.fstat(tar.fileno()).st_size
    position, first = 0, -1
    extensions: dict[str, str] = {}
    while True:
        header = os.pread(tar.fileno(), BLOCK, position)
        if len(header) < BLOCK:
            raise BadTar(position, "the tar is cut short (no end mark)")
        if header == _ZEROS:
            position = _after_zeros(tar.fileno(), position)
            if position >= end:
                return
            continue
        kind, size = header[156:157], _checked_size(header, position)
        regular, link = kind in (b"0", b"\0", b"7"), kind in (b"1", b"2")
        if link:  # whatever size it gives is that of what it points to
            size = 0
        if regular and "size" in extensions:
            size = _number(extensions["size"].encode(), 10, position)
        content = position + BLOCK
        following = content + (size + BLOCK - 1) // BLOCK * BLOCK
        if following > end:
            raise BadTar(position, f"a member of {size} bytes goes beyond the end")
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in extensions):
            raise BadTar(position, "a sparse file")
        first = position if first < 0 else first
        if kind in (b"x", b"L", b"K"):
            extensions |= _extension(kind, os.pread(tar.fileno(), min(size, _CHUNK), content), position)
        else:
            if regular or link:
                yield Member(extensions.get("path", _name(header)), first, content, size, link)
            extensions, first = {}, -1
        position = following


def read_samples(tar: BinaryIO, keyless: Counter[str] | None = None) -> Iterator[TarSample]:
    """The samples of a tar, divided as webdataset does; members without a key are counted. Raises BadTar."""
    for key, group in itertools.groupby(read_members(tar), key=_key):
        if key is None:
            if keyless is not None:
                keyless.update(member.kind for member in group)
            continue
        members: dict[str, Member] = {}
        left_out: list[str] = []
        repeated, place = False, -1
        for member in group:
            place = member.header if place < 0 else place
            part = part_of(split_name(member.name)[1].lower())
            if part is None or member.link:
                left_out.append(member.kind)
            else:
                repeated |= part in members
                members.setdefault(part, member)
        yield TarSample(key, place, members, left_out, repeated)


def _key(member: Member) -> str | None:
    key, extension = split_name(member.name)
    return key if extension else None


def make_row(image: Member, parts: dict[str, tuple[int, bytes]]) -> bytes:
    """A row of an offsets file, from the places and contents of a sample's parts."""
    columns = [parts.get(part, (0, b"")) for part in PARTS]
    sizes, crcs = [len(content) for _, content in columns], [crc32(content) for _, content in columns]
    return _ROW.pack(image.header, *(place for place, _ in columns), *sizes, *crcs)


def part_of(extension: str) -> str | None:
    """Which part of a sample a member is."""
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return {LABEL_EXTENSION: "label", MASK_EXTENSION: "mask"}.get(extension)


def _after_zeros(file: int, position: int) -> int:
    """The first block from `position` on that holds more than zeros; the end of the file if none does."""
    while chunk := os.pread(file, _CHUNK, position):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return position + zeros // BLOCK * BLOCK
        position += len(chunk)
    return position


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return os.fsdecode(prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name)


def _checked_size(header: bytes, position: int) -> int:
    """The size that a header gives, once its checksum is right."""
    if _number(header[148:156], 8, position) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise BadTar(position, "a header with a wrong checksum")
    if header[124] == 0x80:  # GNU's way for 8 GB and more
        return int.from_bytes(header[125:136], "big")
    return _number(header[124:136], 8, position)


def _number(digits: bytes, base: int, position: int) -> int:
    digits = digits.strip(b" \0") or b"0"
    if not digits.isdigit() or (base == 8 and max(digits) > ord("7")):
        raise BadTar(position, "a header with a field that is no number")
    return int(digits, base)


def _extension(kind: bytes, content: bytes, position: int) -> dict[str, str]:
    """What a header before a header says of the member that follows: pax records "LENGTH KEY=VALUE\\n", or a name."""
    if kind == b"L":
        return {"path": os.fsdecode(content.split(b"\0", 1)[0])}
    records: dict[str, str] = {}
    while kind == b"x" and content.strip(b"\0"):
        digits = content.partition(b" ")[0]
        length = _number(digits, 10, position)
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or not len(digits) + 1 < length <= len(content):
            raise BadTar(position, "a broken pax header")
        records[os.fsdecode(key)] = os.fsdecode(value)
        content = content[length:]
    return records
