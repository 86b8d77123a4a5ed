"""Pixels and pseudo-masks: every kind of image file, the polarity rule, and degenerate crops."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from ccd_train.data.masks import (
    HEIGHT,
    WIDTH,
    UndecodableImage,
    background_is_bright,
    decode_mask,
    decode_rgb,
    pseudo_mask,
    resize_image,
    resize_mask,
)

MODES = ("otsu", "kmeans")


def word(ink: int, paper: int, height: int = 40, width: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """A crop with three strokes, and which pixels they cover."""
    mask = np.zeros((height, width), np.uint8)
    for left in (20, 55, 90):
        mask[8 : height - 8, left : left + 12] = 1
    return np.where(mask[..., None] == 1, ink, paper).repeat(3, axis=2).astype(np.uint8), mask


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int = 24, width: int = 60) -> np.ndarray:
    """A picture that JPEG keeps well, uint8 [H, W, 3]."""
    noise = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ink", "paper"), [(20, 200), (230, 40)])
def test_text_is_found_dark_on_light_and_light_on_dark(mode: str, ink: int, paper: int) -> None:
    image, glyphs = word(ink, paper)
    np.testing.assert_array_equal(pseudo_mask(image, mode), glyphs)


@pytest.mark.parametrize("mode", MODES)
def test_text_is_found_on_a_textured_border(mode: str) -> None:
    """Up to a third of every border line is as bright as the text: the rest still says what is background."""
    image, glyphs = word(220, 60)
    rng = np.random.default_rng(0)
    for line in (image[0], image[-1], image[:, 0], image[:, -1]):
        line[rng.permutation(len(line))[: len(line) // 3]] = 220
    assert np.array_equal(pseudo_mask(image, mode)[1:-1, 1:-1], glyphs[1:-1, 1:-1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_constant_image_has_no_text(mode: str, level: int) -> None:
    assert not pseudo_mask(np.full((20, 50, 3), level, np.uint8), mode).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1), (1, 2), (2, 2)])
def test_images_of_one_pixel_height_or_width(mode: str, shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 200, np.uint8)
    image[-1, -1] = 10
    mask = pseudo_mask(image, mode)
    assert mask.shape == shape and mask.dtype == np.uint8
    if max(shape) == 30:  # the 29 bright pixels are the background
        assert mask.sum() == 1 and mask[-1, -1] == 1
    assert resize_image(image).shape == (HEIGHT, WIDTH, 3)
    assert resize_mask(mask).shape == (HEIGHT, WIDTH)


def test_a_thin_stroke_survives_that_a_resize_first_would_lose() -> None:
    """The mask is made at full size: the threshold sees all pixels, not a bilinear sample of them."""
    image, glyphs = word(0, 255, height=96, width=512)
    assert np.array_equal(resize_mask(pseudo_mask(image)), resize_mask(glyphs))


@pytest.mark.parametrize(
    ("bright_sides", "bright"),
    [((), False), (("top",), False), (("top", "left", "right"), True), (("top", "bottom", "left", "right"), True)],
)
def test_three_border_lines_decide(bright_sides: tuple[str, ...], bright: bool) -> None:
    marked = np.zeros((21, 81), np.uint8)
    lines = {"top": marked[0], "bottom": marked[-1], "left": marked[:, 0], "right": marked[:, -1]}
    for side in bright_sides:
        lines[side][:] = 1
    assert background_is_bright(marked) is bright


def test_two_against_two_is_decided_by_all_border_pixels() -> None:
    long_sides = np.zeros((20, 80), np.uint8)
    long_sides[[0, -1]] = 1
    long_sides[[0, 0, -1, -1], [0, -1, 0, -1]] = 0
    assert background_is_bright(long_sides)  # 156 of 196 pixels
    assert not background_is_bright(1 - long_sides)
    square = np.zeros((20, 20), np.uint8)
    square[[0, -1], 1:-1] = 1
    assert 2 * 36 < 4 * 19 and not background_is_bright(square)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_otsu_is_the_best_of_all_thresholds(height: int, width: int, seed: int) -> None:
    """Least squared error of 2-means over every threshold, found by trying all of them."""
    rng = np.random.default_rng(seed)
    grey = np.clip(rng.normal(rng.choice([60, 170], (height, width)), 30), 0, 255).astype(np.uint8)
    image = np.repeat(grey[..., None], 3, axis=2)

    def error(bright: np.ndarray) -> float:
        return sum(float(((part - part.mean()) ** 2).sum()) for part in (grey[bright], grey[~bright]) if part.size)

    least = min(error(grey > threshold) for threshold in range(256))
    assert error(pseudo_mask(image) == 1) == pytest.approx(least, rel=1e-6, abs=1e-6)


def test_kmeans_agrees_with_otsu() -> None:
    image = np.clip(word(70, 180)[0] + np.random.default_rng(0).normal(0, 25, (40, 120, 1)), 0, 255).astype(np.uint8)
    one, other = pseudo_mask(image, "otsu"), pseudo_mask(image, "kmeans")
    assert (one & other).sum() / (one | other).sum() > 0.97
    assert np.array_equal(other, pseudo_mask(image, "kmeans"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_kinds_of_files(kind: str) -> None:
    pixels = smooth()
    data = encode(Image.fromarray(pixels), kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    assert np.abs(decode_rgb(data).astype(int) - pixels).mean() < (8 if kind == "GIF" else 4)


def test_modes_of_pillow_become_rgb() -> None:
    pixels = smooth()
    picture = Image.fromarray(pixels)
    grey = np.asarray(picture.convert("L"))
    assert np.array_equal(decode_rgb(encode(picture.convert("L"), "PNG")), np.repeat(grey[..., None], 3, 2))
    palette = picture.convert("P")
    assert np.array_equal(decode_rgb(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert set(np.unique(decode_rgb(encode(picture.convert("1"), "PNG")))) == {0, 255}
    cmyk = decode_rgb(encode(picture.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - pixels).mean() < 3


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = (np.arange(24 * 60).reshape(24, 60) * 45).astype(np.uint16)
    data = cv2.imencode(".png", levels)[1].tobytes()
    assert np.array_equal(decode_rgb(data), np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("ink", [0, 255])
@pytest.mark.parametrize("bits", [8, 16])
def test_text_on_a_transparent_background_stays_visible(ink: int, bits: int) -> None:
    """The colour below transparent pixels is often that of the text: dropping alpha would give a constant image."""
    glyphs = word(0, 0)[1]
    picture = np.full((*glyphs.shape, 4), ink, np.uint8)
    picture[..., 3] = glyphs * 255
    if bits == 16:
        data = cv2.imencode(".png", picture.astype(np.uint16) * 257)[1].tobytes()
    else:
        data = encode(Image.fromarray(picture), "PNG")
    image = decode_rgb(data)
    assert image.dtype == np.uint8 and np.array_equal(image[..., 0], np.where(glyphs == 1, ink, 255 - ink))
    assert np.array_equal(pseudo_mask(image), glyphs)


@pytest.mark.parametrize("ink", [0, 255])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WEBP", {"lossless": True}),
        ("WEBP", {"lossless": False}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("JPEG2000", {}),
    ],
)
def test_so_it_does_in_other_kinds_of_files(kind: str, options: dict[str, object], ink: int) -> None:
    picture, glyphs = stencil(ink)
    image = decode_rgb(encode(picture, kind, **options))
    assert np.abs(image[..., 0].astype(int) - np.where(glyphs == 1, ink, 255 - ink)).max() < 3
    assert np.array_equal(pseudo_mask(image), glyphs)


def test_so_it_does_in_a_big_endian_tiff(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _, *rest = TiffImagePlugin.SAVE_INFO["RGBA"]
    monkeypatch.setitem(TiffImagePlugin.SAVE_INFO, "RGBA", (kind, b"MM", *rest))
    picture, glyphs = stencil(0)
    data = encode(picture, "TIFF")
    assert data[:2] == b"MM" and np.array_equal(pseudo_mask(decode_rgb(data)), glyphs)


def stencil(ink: int) -> tuple[Image.Image, np.ndarray]:
    """Opaque text on a transparent ground of the same colour, and which pixels it covers."""
    glyphs = word(0, 0)[1]
    picture = np.full((*glyphs.shape, 4), ink, np.uint8)
    picture[..., 3] = glyphs * 255
    return Image.fromarray(picture), glyphs


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_the_black_of_a_cmyk_tiff_is_no_transparency(compression: str | None) -> None:
    data = encode(Image.fromarray(smooth()).convert("CMYK"), "TIFF", compression=compression)
    assert np.array_equal(decode_rgb(data), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))


def test_floats_with_alpha_are_named() -> None:
    with pytest.raises(UndecodableImage):
        decode_rgb(cv2.imencode(".tiff", np.full((8, 8, 4), 200, np.float32))[1].tobytes())


def test_opaque_alpha_changes_nothing_and_a_transparent_palette_is_read() -> None:
    pixels = smooth()
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    assert np.array_equal(decode_rgb(encode(Image.fromarray(opaque), "PNG")), pixels)
    grey_alpha = Image.fromarray(pixels).convert("LA")
    assert decode_rgb(encode(grey_alpha, "PNG")).shape == pixels.shape
    palette = encode(Image.fromarray(pixels).convert("P"), "PNG", transparency=3)
    assert decode_rgb(palette).shape == pixels.shape


def test_the_orientation_tag_is_left_alone_unless_asked() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    pixels = smooth()
    data = encode(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
    assert decode_rgb(data).shape == (24, 60, 3)
    assert np.abs(decode_rgb(data, upright=True).astype(int) - np.rot90(pixels, -1)).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_is_cut_or_no_image_is_named(kind: str) -> None:
    data = encode(Image.fromarray(smooth()), kind)
    for broken in (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"no image at all",
        data[:40],
        data[: len(data) // 2],
        data[len(data) // 2 :],
    ):
        with pytest.raises(UndecodableImage):
            decode_rgb(broken)


def test_too_many_pixels_is_the_reason_given() -> None:
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        decode_rgb(b"P6 40000 40000 255\n" + bytes(100))


def test_opencv_itself_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data = encode(Image.fromarray(smooth()), "TIFF")
    with pytest.raises(UndecodableImage):
        decode_rgb(data[: len(data) // 2])
    assert capfd.readouterr().err == ""


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 10_000), st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF"]))
def test_mutated_bytes_give_an_image_or_the_named_error(noise: bytes, place: int, kind: str) -> None:
    data = bytearray(encode(Image.fromarray(smooth()), kind))
    start = place % len(data)
    data[start : start + len(noise)] = noise
    try:
        image = decode_rgb(bytes(data))
    except UndecodableImage:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize("top", [1, 255])
def test_stored_masks_hold_text_as_1_or_255(top: int) -> None:
    glyphs = word(0, 0)[1]
    assert np.array_equal(decode_mask(cv2.imencode(".png", glyphs * top)[1].tobytes()), glyphs)
    assert not decode_mask(cv2.imencode(".png", glyphs * 0)[1].tobytes()).any()


def test_the_resize_of_a_mask_is_bilinear_at_one_half() -> None:
    mask = np.random.default_rng(1).integers(0, 2, (50, 211), dtype=np.uint8)
    exact = cv2.resize(mask.astype(np.float32), (WIDTH, HEIGHT)) >= 0.5
    assert (resize_mask(mask) == exact).mean() > 0.999


@pytest.mark.real
def test_real_words_have_masks() -> None:
    """Curved and perspective words, some with alpha: between 3 % and 60 % of their pixels are text."""
    folder = Path(__file__).parents[2] / "shared" / "real" / "words"
    if not folder.is_dir():
        pytest.skip("no real words beside the checkout")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")]
    shares = [float(pseudo_mask(decode_rgb(path.read_bytes())).mean()) for path in files]
    assert len(shares) == 20 and all(0.03 < share < 0.6 for share in shares), shares
