"""Makes TrueType fonts for tests: letters of Pillow's own font, changed, so that no test needs an installed font."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from data_tools.words import ALPHANUMERIC, PUNCTUATION, open_font

EM = 400  # font units and pixels of a letter's picture; the base line is at ASCENT
ASCENT, HEIGHT, LEFT = 400, 550, 100
ALL = ALPHANUMERIC + PUNCTUATION
Draw = Callable[[str], np.ndarray]


def letter(character: str) -> np.ndarray:
    """A character of Pillow's own font: uint8 [HEIGHT, 3·EM], 0 or 255."""
    canvas = Image.new("L", (3 * EM, HEIGHT))
    ImageDraw.Draw(canvas).text((LEFT, ASCENT), character, fill=255, font=open_font("", EM), anchor="ls")
    return np.where(np.asarray(canvas) > 127, 255, 0).astype(np.uint8)


def bold(character: str) -> np.ndarray:
    return cv2.dilate(letter(character), np.ones((21, 21), np.uint8))


def hairline(character: str) -> np.ndarray:
    """The letter's outline, 6 of 400 units wide: a quarter of a pixel at size 16."""
    return letter(character) - cv2.erode(letter(character), np.ones((7, 7), np.uint8))


def symbol(character: str) -> np.ndarray:
    """Another character in each one's place."""
    return letter(ALL[(ALL.index(character) * 29 + 11) % len(ALL)])


def write_typeface(path: Path, draw: Draw = letter, characters: str = ALL, tables: tuple[bytes, ...] = ()) -> Path:
    """A font named like the file, of these characters; `tables` are added, empty."""
    shapes = [[np.array([[[25, 0]], [[25, 350]], [[225, 350]], [[225, 0]]])]]  # the box of a missing glyph
    advances = [250]
    for character in sorted(characters):
        contours = cv2.findContours(draw(character), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]
        shapes.append([contour * [1, -1] + [-LEFT, ASCENT] for contour in contours if len(contour) > 2])
        advances.append(round(open_font("", EM).getlength(character)))
    glyphs = [_glyph(shape) for shape in shapes]
    lefts = [min((int(contour[..., 0].min()) for contour in shape), default=0) for shape in shapes]
    count = len(glyphs)
    groups = b"".join(struct.pack(">III", ord(one), ord(one), i + 1) for i, one in enumerate(sorted(characters)))
    cmap = struct.pack(">HHHHIHHIII", 0, 1, 3, 10, 12, 12, 0, 16 + len(groups), 0, len(characters)) + groups
    offsets = np.cumsum([0, *map(len, glyphs)]).astype(">u4").tobytes()
    contents = {
        b"cmap": cmap,
        b"glyf": b"".join(glyphs),
        b"head": struct.pack(">IIIIHHQQhhhhHHhhh", 65536, 65536, 0, 0x5F0F3CF5, 0, EM, *[0] * 6, 3 * EM, 0, 8, 2, 1)
        + b"\0\0",
        b"hhea": struct.pack(">IhhhHhhhhhh4xhxxH", 65536, ASCENT, ASCENT - HEIGHT, 0, 3 * EM, *[0] * 6, 0, count),
        b"hmtx": b"".join(struct.pack(">Hh", *widths) for widths in zip(advances, lefts, strict=True)),
        b"loca": offsets,
        b"maxp": struct.pack(">IHHH22x", 65536, count, 5000, 100),
        b"name": _names({1: path.stem, 2: "Regular"}),
        **dict.fromkeys(tables, b""),
    }
    start, directory = 12 + 16 * len(contents), b""
    for tag, content in sorted(contents.items()):
        directory += struct.pack(">4sIII", tag, 0, start, len(content))
        start += len(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = b"".join(content for _, content in sorted(contents.items()))
    path.write_bytes(struct.pack(">IHHHH", 65536, len(contents), 0, 0, 0) + directory + body)
    return path


def _glyph(contours: list[np.ndarray]) -> bytes:
    """Polygons int [N, 1, 2] as a simple glyph: every coordinate in two bytes."""
    if not contours:
        return b""
    points = np.concatenate(contours)[:, 0]
    box = [*points.min(0).tolist(), *points.max(0).tolist()]
    ends = np.cumsum([len(contour) for contour in contours]) - 1
    steps = np.diff(points, axis=0, prepend=[[0, 0]]).astype(">i2")
    head = struct.pack(">hhhhh", len(contours), *box) + ends.astype(">u2").tobytes() + b"\0\0"
    glyph = head + b"\1" * len(points) + steps[:, 0].tobytes() + steps[:, 1].tobytes()
    return glyph + b"\0" * (-len(glyph) % 4)


def _names(names: Mapping[int, str]) -> bytes:
    texts = [text.encode("utf-16-be") for text in names.values()]
    records, start = b"", 0
    for name, text in zip(names, texts, strict=True):
        records += struct.pack(">HHHHHH", 3, 1, 0x409, name, len(text), start)
        start += len(text)
    return struct.pack(">HHH", 0, len(names), 6 + len(records)) + records + b"".join(texts)
