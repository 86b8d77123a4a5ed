"""LMDBs whose pictures have partners: TextZoom's pairs, and word crops with masks. What is in them, and what is wrong.

A partner that is missing, cannot be decoded, or is a mask of another size or with another code, is wrong. A poor
picture of another size than the good one, a grey one, a mask without text and a missing label are odd, but of use.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ccd_train.data.records import LmdbReader, PairedReader
from ccd_train.data.shards import MANIFEST
from ccd_train.data.trees import look_into
from data_tools.images import Refusal
from data_tools.kinds import Kind, kind_of
from data_tools.merge import summary

RECORD = "crops.json"  # of `ccd-data crops`, beside the LMDBs of its splits


@dataclass(frozen=True)
class Partners:
    """A record as it is seen: uint8 [H, W, 3] each, or codes uint8 [H, W]."""

    number: int
    picture: np.ndarray
    """The good picture of a pair, or the crop."""
    partner: np.ndarray
    """The poor picture, or the codes."""
    label: str


@dataclass
class Survey:
    """What was found in an LMDB."""

    path: Path
    kind: Kind
    records: int
    seen: int = 0
    labels: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    odd: Counter[str] = field(default_factory=Counter)
    """Records by kind."""
    lines: dict[str, list[str]] = field(default_factory=dict)
    """By kind, the key of each and the reason."""
    codes: Counter[int] = field(default_factory=Counter)
    """Pixels of all masks by their codes."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of the pictures that have a usable partner."""

    def note(self, kinds: Counter[str], kind: str, line: str) -> None:
        kinds[kind] += 1
        self.lines.setdefault(kind, []).append(line)

    @property
    def told(self) -> str:
        """A line on all of it."""
        text = f"{self.records:,} {self.kind}, {self.labels:,} labels"
        if self.sizes:
            (least_wide, least_high), (wide, high) = np.min(self.sizes, 0), np.max(self.sizes, 0)
            text += f", {least_wide} to {wide} pixels wide and {least_high} to {high} high"
        if self.codes:
            text += ", pixels by code: " + ", ".join(f"{code}: {count:,}" for code, count in sorted(self.codes.items()))
        for what, kinds in (("wrong", self.wrong), ("noted", self.odd)):
            first = "; ".join(self.lines[kind][0] for kind in kinds)
            text += f"; {what}: {summary(kinds)} (the first: {first})" if kinds else ""
        return text


def find_partners(folder: Path) -> dict[Path, Kind]:
    """The LMDBs of pairs or crops at or below a folder that holds no shards; says which hold words beside them."""
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return {}
    kinds = {path: kind_of(path) for path in look_into(folder).lmdbs}
    partners: dict[Path, Kind] = {path: kind for path, kind in kinds.items() if kind != "words"}
    if partners:
        for path in sorted(kinds.keys() - partners.keys()):
            print(f"{path}: words, which become shards first: not looked at")
    return partners


def open_partners(path: Path, kind: Kind) -> Survey:
    """A survey that has not begun. UserError if the LMDB is damaged."""
    with (PairedReader if kind == "pairs" else LmdbReader)(path) as reader:
        return Survey(path, kind, len(reader))


def walk_partners(survey: Survey, numbers: Iterable[int]) -> Iterator[Partners]:
    """Looks at some records; yields those that are whole, and adds what it finds to the survey."""
    with (PairedReader if survey.kind == "pairs" else LmdbReader)(survey.path) as reader:
        for number in numbers:
            survey.seen += 1
            label = reader.label_bytes(number)
            if label is None:
                survey.note(survey.odd, "no label", f"label-{number:09d}: missing")
            else:
                survey.labels += 1
            try:
                found = _pair(reader, number) if isinstance(reader, PairedReader) else _crop(reader, number)
            except Refusal as refusal:
                survey.note(survey.wrong, refusal.kind, str(refusal))
                continue
            picture, partner = found
            _look(survey, number, picture, partner)
            survey.sizes.append((picture.shape[1], picture.shape[0]))
            yield Partners(number, picture, partner, (label or b"").decode(errors="replace"))


def hash_record(digest: hashlib._Hash, image: bytes | None, mask: bytes | None, label: bytes | None) -> None:
    """Adds a crop to a hash over all crops of an LMDB."""
    for part in (image, mask, label):
        digest.update(b"-" if part is None else hashlib.sha256(part).digest())


def is_as_recorded(path: Path) -> bool | None:
    """Whether crops are those that `ccd-data crops` made; None if it has left no record beside them."""
    try:
        stored = json.loads((path.parent / RECORD).read_bytes())["splits"][path.name]["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    digest = hashlib.sha256()
    with LmdbReader(path) as reader:
        for number in range(1, len(reader) + 1):
            hash_record(digest, reader.image(number), reader.mask(number), reader.label_bytes(number))
    return bool(digest.hexdigest() == stored)


def _pair(reader: PairedReader, number: int) -> tuple[np.ndarray, np.ndarray]:
    return (
        _decoded(f"image_hr-{number:09d}", reader.image(number)),
        _decoded(f"image_lr-{number:09d}", reader.partner(number)),
    )


def _crop(reader: LmdbReader, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture and codes, of one size."""
    from ccd_train.data.masks import UndecodableImage  # OpenCV: verifying shards byte by byte needs none
    from ccd_train.data.pixels import decode_codes

    picture = _decoded(f"image-{number:09d}", reader.image(number))
    key, mask = f"mask-{number:09d}", reader.mask(number)
    if mask is None:
        raise Refusal("missing", f"{key}: missing")
    try:
        codes = decode_codes(mask)
    except UndecodableImage as error:
        raise Refusal("mask", f"{key}: {error}") from None
    if codes.shape != picture.shape[:2]:
        raise Refusal("mask size", f"{key}: {_size(codes)} pixels, its picture has {_size(picture)}")
    return picture, codes


def _decoded(key: str, data: bytes | None) -> np.ndarray:
    from ccd_train.data.masks import UndecodableImage, decode_rgb

    if data is None:
        raise Refusal("missing", f"{key}: missing")
    try:
        return decode_rgb(data)
    except UndecodableImage as error:
        raise Refusal("undecodable", f"{key}: {error}") from None


def _look(survey: Survey, number: int, picture: np.ndarray, partner: np.ndarray) -> None:
    """Notes what is odd about a record that is whole."""
    from ccd_train.data.pixels import WORD

    if survey.kind == "crops":
        values, counts = np.unique(partner, return_counts=True)
        survey.codes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if WORD not in values:
            survey.note(survey.odd, "no text", f"mask-{number:09d}: no pixel of code {WORD}")
        return
    key = f"image_lr-{number:09d}"
    if picture.shape != partner.shape:
        reason = f"{key}: {_size(partner)} pixels, its good picture has {_size(picture)}"
        survey.note(survey.odd, "another size", reason)
    named = {key: partner, f"image_hr-{number:09d}": picture}
    grey = [name for name, pixels in named.items() if (pixels == pixels[..., :1]).all()]
    if grey:
        survey.note(survey.odd, "grey", f"{' and '.join(grey)}: grey")


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}×{pixels.shape[0]}"
