"""Pictures with text masks, and the words in them: TextSeg's release, and the folders of crops of FaltingsA/SSM.

TextSeg (SHI-Labs/Rethinking-Text-Segmentation, 223f7ff):
    image/ID.jpg   semantic_label/ID_maskfg.png   annotation/ID_anno.json (or bpoly_label/)   split.json
    a mask has 0 for background, 100 for words, 200 for their effects (shadows, glow), 255 for what is to be ignored;
    an annotation is {"0": {"text": …, "bbox": [x1, y1, x2, y2, …], "char": {…}}, …}
FaltingsA/SSM (9ce7646, pretrain/datasets.py):
    image_slice/train_all/{train,val} and image_slice/test, each image/NAME.jpg and mask/NAME_mask.jpg, text from half
    of white on

What cannot be used is left out and named; a word that is odd but of use is named, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np

from ccd_train.data.masks import UndecodableImage, decode_rgb
from ccd_train.data.pixels import IGNORED, WORD, decode_codes, decode_grey_mask
from ccd_train.data.trees import count_kinds, look_into
from ccd_train.errors import UserError
from data_tools.images import Refusal, read_header
from data_tools.polygons import Box, box_about, read_polygon, rectangle_about, size_of, turn_upright

Shape = Literal["box", "upright"]
LEAST_SIDE = 4  # pixels of a crop
LARGEST_SIDE = (1 << 15) - 1  # that OpenCV turns
JPEG_QUALITY = 95
MAX_PIXELS = 1 << 27  # of a picture: a small file may unfold to fill the memory
SPLIT = "split.json"
_MASKS, _WORDS = ("semantic_label", "semantic_label_v1"), ("annotation", "bpoly_label")
_IMAGES = (".jpg", ".jpeg", ".png")
_SLICES = {"train": "train_all/train", "val": "train_all/val", "test": "test"}


@dataclass(frozen=True)
class Crop:
    """A word: encoded picture, PNG of codes of the same size, and its text where it is known."""

    image: bytes
    mask: bytes
    label: str | None


@dataclass(frozen=True)
class Finding:
    """Something odd about a picture or a word."""

    split: str
    picture: str
    word: str
    """Its key in the annotation; "" for the whole picture."""
    kind: str
    reason: str
    kept: bool


@dataclass
class Cut:
    """What became of a picture."""

    split: str
    picture: str
    words: int = 0
    crops: list[Crop] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    """Pixels of each code in the crops."""

    def leave_out(self, word: str, kind: str, reason: str) -> None:
        self.findings.append(Finding(self.split, self.picture, word, kind, reason, kept=False))

    def add(self, word: str, crop: Crop, codes: np.ndarray, notes: Mapping[str, str], keep_empty: bool) -> None:
        """Takes a crop with its codes, unless it is too small or has no text; `notes`: what else is odd, by kind."""
        height, width = codes.shape
        empty = {}
        if min(width, height) < LEAST_SIDE:
            empty["too small"] = f"{width}×{height} pixels"
        if not (codes == WORD).any():
            empty["no text"] = f"no pixel of code {WORD} in its mask"
        if empty and not keep_empty:
            self.leave_out(word, *next(iter(empty.items())))
            return
        for kind, reason in {**notes, **empty}.items():
            self.findings.append(Finding(self.split, self.picture, word, kind, reason, kept=True))
        values, counts = np.unique(codes, return_counts=True)
        self.codes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.crops.append(crop)


class Pictures(Protocol):
    """Named pictures in splits. May be pickled."""

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def told(self) -> str:
        """A line on what is read."""

    def facts(self) -> dict[str, str]:
        """What tells this from other pictures."""

    def cut(self, split: str, picture: str, shape: Shape, keep_empty: bool) -> Cut: ...


@dataclass(frozen=True)
class TextSeg:
    """TextSeg's release."""

    root: Path
    masks: str
    words: str
    """The folders of masks and annotations."""
    splits: Mapping[str, tuple[str, ...]]

    @property
    def told(self) -> str:
        older = " (that of the first paper's figures)" if self.masks == _MASKS[1] else ""
        return f"{self.root}: TextSeg's release; masks of {self.masks}{older}, words of {self.words}"

    def facts(self) -> dict[str, str]:
        digest = hashlib.sha256((self.root / SPLIT).read_bytes())
        for picture in sorted({picture for pictures in self.splits.values() for picture in pictures}):
            sizes = [_size(path) for path in (self._image_file(picture), self._mask_file(picture))]
            digest.update(f"{picture} {sizes}".encode())
            with suppress(Refusal):  # a missing one
                digest.update(_read(self._words_file(picture), self.root))
        return {"layout": "TextSeg", "masks": self.masks, "fingerprint": digest.hexdigest()}

    def cut(self, split: str, picture: str, shape: Shape, keep_empty: bool) -> Cut:
        """The words of a picture."""
        cut = Cut(split, picture)
        try:
            image_file, mask_file = self._image_file(picture), self._mask_file(picture)
            image = _open_picture(image_file, self.root)
            codes = _open_mask(mask_file, self.root, image, decode_codes)
            words = self._read_words(picture)
        except Refusal as refusal:
            cut.leave_out("", refusal.kind, str(refusal))
            return cut
        for key, word in words.items():
            cut.words += 1
            notes: dict[str, str] = {}
            try:
                crop, mask = _cut_word(word, image, codes, shape, notes)
            except Refusal as refusal:
                cut.leave_out(key, refusal.kind, str(refusal))
                continue
            for name, what in (("text", "label"), ("char", "characters")):
                if not word.get(name):
                    notes[f"no {what}"] = f"no {name!r} in its annotation"
            extension = ".png" if image_file.suffix.lower() == ".png" else ".jpg"
            label = str(word["text"]) if word.get("text") else None
            cut.add(key, Crop(_encode(crop, extension), _encode(mask, ".png"), label), mask, notes, keep_empty)
        return cut

    def _image_file(self, picture: str) -> Path:
        files = [self.root / "image" / f"{picture}{suffix}" for suffix in _IMAGES]
        return next((file for file in files if file.is_file()), files[0])

    def _mask_file(self, picture: str) -> Path:
        return self.root / self.masks / f"{picture}_maskfg.png"

    def _words_file(self, picture: str) -> Path:
        return self.root / self.words / f"{picture}_anno.json"

    def _read_words(self, picture: str) -> dict[str, dict[str, Any]]:
        file = self._words_file(picture)
        try:
            words = json.loads(_read(file, self.root))
        except ValueError as error:
            raise Refusal("annotation", f"{file.relative_to(self.root)}: no JSON ({error})") from None
        if not isinstance(words, dict) or not all(isinstance(word, dict) for word in words.values()):
            raise Refusal("annotation", f"{file.relative_to(self.root)}: not an object of words")
        return words


@dataclass(frozen=True)
class Slices:
    """The folders of word crops of FaltingsA/SSM."""

    root: Path
    splits: Mapping[str, tuple[str, ...]]

    @property
    def told(self) -> str:
        return f"{self.root}: word crops in the folders of FaltingsA/SSM; text is what is at least half white"

    def facts(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for split, pictures in sorted(self.splits.items()):
            for picture in pictures:
                digest.update(f"{split} {picture} {[_size(file) for file in self._files(split, picture)]}".encode())
        return {"layout": "SSM", "fingerprint": digest.hexdigest()}

    def cut(self, split: str, picture: str, shape: Shape, keep_empty: bool) -> Cut:
        """The one word of a crop, whose picture stays as it is."""
        cut = Cut(split, picture, words=1)
        image_file, mask_file = self._files(split, picture)
        try:
            image = _open_picture(image_file, self.root)
            codes = _open_mask(mask_file, self.root, image, decode_grey_mask)
        except Refusal as refusal:
            cut.leave_out("", refusal.kind, str(refusal))
        else:
            crop = Crop(_read(image_file, self.root), _encode(codes, ".png"), None)
            cut.add("", crop, codes, {}, keep_empty)
        return cut

    def _files(self, split: str, picture: str) -> tuple[Path, Path]:
        folder, stem = self.root / _SLICES[split], Path(picture).stem
        masks = [folder / "mask" / f"{stem}_mask{suffix}" for suffix in _IMAGES]
        return folder / "image" / picture, next((mask for mask in masks if mask.is_file()), masks[0])


def open_pictures(root: Path) -> TextSeg | Slices:
    """What lies in a folder. UserError if that is neither."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give TextSeg's release, or word crops in the folders of SSM")
    for slices in (root, root / "image_slice"):
        found = {split: slices / below / "image" for split, below in _SLICES.items()}
        if any(folder.is_dir() for folder in found.values()):
            return Slices(slices, {split: _names(folder) for split, folder in found.items() if folder.is_dir()})
    if not (root / "image").is_dir():
        below = look_into(root)
        holds = f"{len(below.lmdbs)} LMDBs" if below.lmdbs else count_kinds(below.others) or "nothing"
        raise UserError(
            f"{root}: neither TextSeg's release (no image/ here) nor SSM's word crops (no train_all/ or test/); it "
            f"holds {holds}: name the folder that has one of them"
        )
    masks, words = (_first_of(root, names) for names in (_MASKS, _WORDS))
    return TextSeg(root, masks, words, _read_splits(root / SPLIT))


def _first_of(root: Path, names: tuple[str, ...]) -> str:
    for name in names:
        if (root / name).is_dir():
            return name
    raise UserError(f"{root}: TextSeg's release without {' or '.join(names)}; unpack all of it")


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _IMAGES))


def _read_splits(file: Path) -> dict[str, tuple[str, ...]]:
    try:
        stored = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: missing; it says which pictures are for training, validation and test") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); unpack the release again") from None
    named = isinstance(stored, dict) and all(
        name in _SLICES and isinstance(pictures, list) and all(isinstance(one, str) for one in pictures)
        for name, pictures in stored.items()
    )
    if not (named and stored):
        raise UserError(f'{file}: not of the form {{"train": [ID, …], "val": […], "test": […]}}; unpack it again')
    times = Counter(picture for pictures in stored.values() for picture in pictures)
    if twice := [picture for picture, count in times.items() if count > 1]:
        raise UserError(
            f"{file}: names {len(twice)} pictures twice ({twice[0]} is the first): each belongs to one split; mend it"
        )
    if strange := [picture for picture in times if not re.fullmatch(r"[\w.-]+", picture)]:
        raise UserError(f"{file}: {strange[0]!r} is no name of a picture; unpack it again")
    return {split: tuple(pictures) for split, pictures in stored.items()}


def _cut_word(
    word: Mapping[str, Any], image: np.ndarray, codes: np.ndarray, shape: Shape, notes: dict[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Picture and codes of a word; adds to `notes` what is odd. Raises Refusal if nothing can be cut."""
    if "bbox" not in word:
        raise Refusal("polygon", f"no 'bbox' in its annotation, but {', '.join(map(repr, word)) or 'nothing'}")
    polygon = read_polygon(word["bbox"])
    whole = box_about(polygon)
    box = whole.clipped(codes.shape[1], codes.shape[0])
    if not (box.width and box.height):
        raise Refusal("outside", f"{_told(whole)}: outside the picture of {codes.shape[1]}×{codes.shape[0]} pixels")
    if box != whole:
        notes["clipped"] = f"{_told(whole)}: beyond the picture"
    if shape == "box":
        return box.of(image), box.of(codes)
    rectangle = rectangle_about(polygon)
    width, height = size_of(rectangle)
    if min(width, height) == 0:
        raise Refusal("too small", f"{width}×{height} pixels")
    if max(width, height) > LARGEST_SIDE:
        raise Refusal("polygon", f"{width}×{height} pixels, many times the picture")
    return turn_upright(image, codes, rectangle, outside=IGNORED)  # type: ignore[return-value]


def _told(box: Box) -> str:
    return f"columns {box.left} to {box.right}, rows {box.top} to {box.bottom}"


def _open_picture(file: Path, root: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    data = _read(file, root)
    try:
        header = read_header(data)
        if header.width * header.height > MAX_PIXELS:
            raise Refusal("picture", f"{header.width}×{header.height} pixels")
        return decode_rgb(data)
    except (Refusal, UndecodableImage) as error:
        raise Refusal("picture", f"{file.relative_to(root)}: {error}") from None


def _open_mask(file: Path, root: Path, image: np.ndarray, decode: Any) -> np.ndarray:
    """Codes uint8 [H, W] of the size of its picture."""
    try:
        codes: np.ndarray = decode(_read(file, root))
    except UndecodableImage as error:
        raise Refusal("mask", f"{file.relative_to(root)}: {error}") from None
    if codes.shape != image.shape[:2]:
        sizes = [f"{shape[1]}×{shape[0]}" for shape in (codes.shape, image.shape)]
        raise Refusal("mask size", f"{file.relative_to(root)}: {sizes[0]} pixels, its picture has {sizes[1]}")
    return codes


def _read(file: Path, root: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise Refusal("missing", f"{file.relative_to(root)}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions and the disk") from None


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _encode(pixels: np.ndarray, extension: str) -> bytes:
    """Encodes RGB uint8 [H, W, 3] or codes uint8 [H, W]: JPEG of quality 95, or PNG."""
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    encoded = cv2.imencode(extension, np.ascontiguousarray(stored), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return bytes(encoded)
