"""Renders words: the demo's corpus, and the tests' fixture with true glyph masks.

A word is a pure function of (seed, index, fonts), so any process may render any of them. Pixels also depend on the
versions of Pillow, FreeType, OpenCV and NumPy; with the same versions, every machine renders the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ONSETS = (
    "b bl br c ch cr d dr f fl fr g gl gr h j k kl l m n p pl pr qu r s sc sh sk sl sp st str sw t th tr v w wh y z"
)
VOWELS = "a a e e i i o o u y ai ea ee io oo ou"
CODAS = "b ck d ft g k l m n nd ng p r rt s st t v x z"
ALPHANUMERIC = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PUNCTUATION = "!&'-.?:%$"
LUMA = np.array([0.299, 0.587, 0.114])  # grey level of an RGB colour, ITU-R BT.601
SIZES = (16, 72)  # font sizes in pixels
LEAST_CONTRAST = 60.0  # grey levels between text and background


@dataclass(frozen=True)
class Word:
    """One rendered crop: JPEG bytes, its label, and its glyphs as a PNG of the same size with values 0 and 255."""

    image: bytes
    label: str
    mask: bytes


def render(seed: int, index: int, fonts: Sequence[str], alphabet: str = "", length: tuple[int, int] = (3, 7)) -> Word:
    """Renders word `index` of the corpus `seed`. `fonts`: font files; none means Pillow's own font.

    Of an `alphabet`, words are random strings whose `length` lies in this range.
    """
    rng = np.random.default_rng((seed, index))
    label = "".join(rng.choice(list(alphabet), rng.integers(length[0], length[1] + 1))) if alphabet else _text(rng)
    size = round(float(np.exp(rng.uniform(*np.log(SIZES)))))
    glyphs = _glyphs(rng, label, fonts[int(rng.integers(len(fonts)))] if fonts else "", size)
    glyphs = _perspective(rng, glyphs)
    image = _colour(rng, glyphs)
    image = _photograph(rng, image)
    quality = int(rng.integers(35, 96))
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    mask = cv2.imencode(".png", np.where(glyphs >= 0.5, 255, 0).astype(np.uint8))[1]
    return Word(encoded.tobytes(), label, mask.tobytes())


@lru_cache(maxsize=256)
def open_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font file, or Pillow's own font for "". Raises `OSError` if Pillow cannot read it.

    Letters are set one by one by Pillow itself: Raqm rounds their widths differently, and not every machine has it.
    """
    if path:
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what it is whenever a size is given
    return font


def _text(rng: np.random.Generator) -> str:
    """A word that can be spoken, a random string or a number: all characters appear, none in a fixed place."""
    kind = rng.random()
    if kind < 0.15:
        return "".join(rng.choice(list("0123456789"), rng.integers(1, 6)))
    if kind < 0.35:
        return "".join(rng.choice(list(ALPHANUMERIC), rng.integers(2, 9)))
    word = ""
    for _ in range(rng.integers(1, 4)):
        word += str(rng.choice(ONSETS.split())) + str(rng.choice(VOWELS.split()))
        word += str(rng.choice(CODAS.split())) if rng.random() < 0.85 else ""
    style = rng.random()
    word = word.upper() if style < 0.4 else word.capitalize() if style < 0.7 else word
    return word + str(rng.choice(list(PUNCTUATION))) if rng.random() < 0.06 else word


def _glyphs(rng: np.random.Generator, text: str, path: str, size: int) -> np.ndarray:
    """Coverage of the glyphs, float32 [H, W] in [0, 1], with a random margin and letter spacing."""
    font = open_font(path, size)
    spacing = size * max(0.0, rng.uniform(-0.05, 0.2))
    canvas = Image.new("L", (round(len(text) * (1.4 * size + spacing)) + 2 * size, 3 * size))
    draw = ImageDraw.Draw(canvas)
    x = float(size)
    for character in text:
        draw.text((x, size), character, fill=255, font=font)
        x += draw.textlength(character, font=font) + spacing
    left, top, right, bottom = canvas.getbbox() or (0, 0, size, size)
    margins = np.round(size * rng.uniform(0.02, 0.4, 4)).astype(int)
    drawn = np.asarray(canvas.crop((left, top, right, bottom)), np.float32) / 255
    return np.pad(drawn, (tuple(margins[:2]), tuple(margins[2:])))


def _perspective(rng: np.random.Generator, glyphs: np.ndarray) -> np.ndarray:
    """Moves the four corners inwards, seen at an angle, by up to a sixth of the height (half of the time)."""
    height, width = glyphs.shape
    moves = rng.uniform(0, height / 6, (4, 2)).astype(np.float32) * np.float32(rng.random() < 0.5)
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float32)
    matrix = cv2.getPerspectiveTransform(corners, corners + inwards * moves)
    return np.asarray(cv2.warpPerspective(glyphs, matrix, (width, height), flags=cv2.INTER_LINEAR))


def _colour(rng: np.random.Generator, glyphs: np.ndarray) -> np.ndarray:
    """Text in one colour on a plain, shaded or textured background: float32 [H, W, 3], 0–255."""
    background, ink = rng.uniform(0, 255, (2, 3))
    if abs((background - ink) @ LUMA) < LEAST_CONTRAST:
        ink = ink * 0.25 if background @ LUMA > 127 else 255 - (255 - ink) * 0.25
        background = 255 - (255 - background) * 0.5 if background @ LUMA > 127 else background * 0.5
    surface = _surface(rng, *glyphs.shape)[..., None] + background
    covered = glyphs[..., None]
    return np.asarray(surface * (1 - covered) + ink * covered, np.float32)


def _surface(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Grey levels added to a background, float32 [H, W]: nothing, a slope of light, or texture of two grains."""
    kind = rng.random()
    if kind < 0.45:
        return np.zeros((height, width), np.float32)
    if kind < 0.65:
        across, down = rng.uniform(-45, 45, 2)
        slope = across * np.linspace(-1, 1, width)[None, :] + down * np.linspace(-1, 1, height)[:, None]
        return np.asarray(slope, np.float32)
    surface = np.zeros((height, width), np.float32)
    for grain in (rng.uniform(2, 5), rng.uniform(8, 30)):
        coarse = rng.standard_normal((max(2, int(height / grain)), max(2, int(width / grain)))).astype(np.float32)
        surface += rng.uniform(5, 25) * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return surface


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blur that grows with the size of the crop, then sensor noise: uint8 [H, W, 3]."""
    if rng.random() < 0.6:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, 0.03 * image.shape[0] + 0.4)))
    image = image + rng.uniform(0, 8) * rng.standard_normal(image.shape, np.float32)
    return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8)
