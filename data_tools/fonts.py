"""Which fonts words are drawn with: those that are named, or those of this machine that draw legible letters.

Their order follows from what is in the files: neither folders nor file names nor the order of naming change a picture.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import ImageFont

from ccd_train.errors import UserError
from data_tools.words import ALPHANUMERIC, PUNCTUATION, SIZES, open_font

FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
)
PILLOW = "pillow"  # names Pillow's own font in `--fonts`
PILLOWS_OWN = f"Pillow {PIL.__version__}'s own font"
COLOURS = {b"CBDT", b"COLR", b"SVG ", b"sbix"}  # tables of coloured glyphs
LETTERS = "CDFGJLPQRSUVWYabcdefghjmnpqrsuwy"  # those of a Greek symbol font look otherwise
STROKES = "Hamburgefonts"  # has every kind of stroke
JUDGED = 48  # font size at which letters are judged; in much smaller ones hinting widens hairlines
BOX = 20  # pixels a side of a letter that is compared with others
LEAST_LIKENESS = 0.67  # text fonts have 0.70 to 1, pictures 0.35 to 0.63, Greek letters 0.59
LEAST_STROKE = 0.75  # mean pixels at the smallest size, stems have more: Times 1.0, light faces 0.8, extra light 0.7


@dataclass(frozen=True)
class Face:
    """A font file. Faces are in the order of family, style and content."""

    name: tuple[str, str]
    """Family and style, as the file says."""
    sha256: str
    file: str


@dataclass(frozen=True)
class Fonts:
    """The fonts of a corpus; without a face, Pillow's own font."""

    faces: tuple[Face, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    """File → what keeps it from use."""

    @property
    def files(self) -> tuple[str, ...]:
        """What `render` takes."""
        return tuple(face.file for face in self.faces)

    def summary(self) -> str:
        """A line on the fonts in use, by family, and one on those left out, by reason."""
        families = Counter(face.name[0] for face in self.faces)
        used = ", ".join(f"{family} ({count})" if count > 1 else family for family, count in families.items())
        lines = [f"drawing with {len(self.faces)} fonts: {used}" if self.faces else f"drawing with {PILLOWS_OWN}"]
        if self.left_out:
            reasons = Counter(self.left_out.values()).most_common()
            lines.append(f"{len(self.left_out)} left out: " + ", ".join(f"{why} {count}" for why, count in reasons))
        return "\n".join(lines)

    def record(self) -> str:
        """A text that `sha256sum -c` reads: hash and file of each face, and what was left out as comments."""
        lines = [f"{face.sha256}  {face.file}" for face in self.faces] or [f"# {PILLOWS_OWN}"]
        lines += [f"# left out, {why}: {file}" for file, why in self.left_out.items()]
        return "\n".join(lines) + "\n"


def installed_fonts() -> Fonts:
    """The legible fonts of this machine; files of the same content count once."""
    folders = [Path(folder).expanduser() for folder in FOLDERS]
    if sys.platform == "win32":
        folders.append(Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"))
    files = sorted({str(path) for folder in folders for kind in ("ttf", "otf") for path in folder.rglob(f"*.{kind}")})
    faults = {file: fault(file) for file in files}
    left_out = {file: why for file, why in faults.items() if why}
    return Fonts(_faces(file for file in files if file not in left_out), left_out)


def named_fonts(files: Sequence[str]) -> Fonts:
    """These files, in whatever order; `pillow` alone is Pillow's own font.

    Raises `UserError` for a file that is missing or draws nothing legible.
    """
    if list(files) == [PILLOW]:
        return Fonts()
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--fonts {file}: no such file; name font files, or {PILLOW} alone for Pillow's own font")
        why = fault(file)
        if why:
            raise UserError(f"--fonts {file}: a font that draws nothing legible ({why}); name another one")
    return Fonts(_faces(files))


def fault(file: str) -> str:
    """Why words cannot be drawn with this font, or "" if they can."""
    try:
        if COLOURS & _tables(file):
            return "colour"
        font = open_font(file, JUDGED)
        no_glyph = _bitmap(font, "\uffff")  # the empty box: no font has this character
        glyphs = {character: _bitmap(font, character) for character in ALPHANUMERIC + PUNCTUATION}
    except OSError:  # not a font, or only bitmaps of another size
        return "not scalable"
    if any(not glyph.any() or np.array_equal(glyph, no_glyph) for glyph in glyphs.values()):
        return "lacking Latin letters"
    letters = [glyphs[letter] for letter in LETTERS]
    if likeness(letters) < LEAST_LIKENESS:
        return "symbol"
    return "hairline" if stroke(_bitmap(font, STROKES)) * SIZES[0] / JUDGED < LEAST_STROKE else ""


def likeness(letters: Sequence[np.ndarray]) -> float:
    """How much pictures of LETTERS look like them, in [0, 1]; 0.5 is chance.

    That is the share of other letters of Pillow's own font that a picture is less like than its own letter.
    """
    alike = np.einsum("ip,jp->ij", _shapes(letters), _pillows_shapes())  # BLAS would start threads for this little
    return float((alike < alike.diagonal()[:, None]).sum() / (len(letters) * (len(letters) - 1)))


def stroke(line: np.ndarray) -> float:
    """Mean width of the strokes of a line of text in pixels: twice the ink over the length of its edges."""
    covered = np.pad(line, 1).astype(np.float32) / 255
    edges = np.hypot(np.diff(covered, axis=0)[:, :-1], np.diff(covered, axis=1)[:-1])
    return float(2 * covered.sum() / edges.sum())


def _shapes(letters: Sequence[np.ndarray]) -> np.ndarray:
    """The ink of each letter squeezed into a square, of mean 0 and norm 1: float32 [N, BOX²]."""
    boxes = []
    for letter in letters:
        x, y, width, height = cv2.boundingRect(letter)
        ink = letter[y : y + height, x : x + width]
        boxes.append(cv2.resize(ink, (BOX, BOX), interpolation=cv2.INTER_AREA))
    shapes = np.stack(boxes).reshape(len(boxes), -1).astype(np.float32)
    shapes -= shapes.mean(1, keepdims=True)
    return np.asarray(shapes / np.maximum(np.linalg.norm(shapes, axis=1, keepdims=True), 1.0))


@cache
def _pillows_shapes() -> np.ndarray:
    font = open_font("", JUDGED)
    return _shapes([_bitmap(font, letter) for letter in LETTERS])


def _bitmap(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
    """Coverage within the text's own box, uint8 [H, W]."""
    mask = font.getmask(text)
    return np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])


def _tables(file: str) -> set[bytes]:
    """Tags of the tables of a TrueType or OpenType file."""
    with open(file, "rb") as font:
        count = int.from_bytes(font.read(12)[4:6], "big")
        directory = font.read(16 * count)
    return {directory[entry : entry + 4] for entry in range(0, len(directory), 16)}


def _faces(files: Iterable[str]) -> tuple[Face, ...]:
    faces: dict[str, Face] = {}
    for file in files:
        family, style = open_font(file, JUDGED).getname()
        face = Face((family or "unnamed", style or ""), hashlib.sha256(Path(file).read_bytes()).hexdigest(), file)
        faces.setdefault(face.sha256, face)
    return tuple(sorted(faces.values(), key=lambda face: (face.name, face.sha256)))
