"""What images say of themselves, and that no damaged one can crash or hang the checks."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from crops import REAL, crop, mask
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ccd_train.data.masks import decode_rgb
from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.data.shards import Corpus, read_manifest
from data_tools import convert, verify
from data_tools.images import Header, Refusal, check_decodes, check_mask, read_header


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 5, "optimize": True}, {"comment": b"x" * 999}]
)
def test_jpeg_sizes(mode: str, options: dict[str, object]) -> None:
    assert read_header(encode(Image.new(mode, (37, 21), 77), "JPEG", **options)) == Header("jpg", 37, 21)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_sizes(mode: str) -> None:
    assert read_header(encode(Image.new(mode, (37, 21)), "PNG")) == Header("png", 37, 21)


def test_bytes_after_the_end_do_no_harm() -> None:
    for extension in (".jpg", ".png"):
        assert read_header(crop(1, extension, 40, 20) + bytes(999)) == Header(extension[1:], 40, 20)


def kind_of(data: bytes) -> str:
    with pytest.raises(Refusal) as refused:
        read_header(data)
    return refused.value.kind


def test_every_cut_is_noticed() -> None:
    for extension in (".jpg", ".png"):
        data = crop(1, extension, 40, 20)
        assert {kind_of(data[:length]) for length in range(8, len(data) - 1)} == {"truncated"}
        assert {kind_of(data[:length]) for length in range(3)} == {"not an image"}


def test_what_no_decoder_reads_is_named() -> None:
    jpeg, png = crop(1, ".jpg", 40, 20), crop(1, ".png", 40, 20)
    frame = jpeg.index(b"\xff\xc0")
    assert kind_of(jpeg[: frame + 1] + b"\xc3" + jpeg[frame + 2 :]) == "mode"  # lossless
    assert kind_of(jpeg[: frame + 5] + bytes(2) + jpeg[frame + 7 :]) == "not an image"  # no lines
    header = struct.pack(">IIBBBBB", 40, 20, 4, 2, 0, 0, 0)  # RGB of 4 bits
    assert kind_of(png[:16] + header + zlib.crc32(b"IHDR" + header).to_bytes(4, "big") + png[33:]) == "mode"
    assert kind_of(png[:18] + b"\1" + png[19:]) == "not an image"  # its CRC is wrong
    assert kind_of(encode(Image.new("RGB", (30, 20)), "WEBP")) == "format"
    assert kind_of(b"") == kind_of(b"\x80\x04K\x01.") == "not an image"


def test_masks_have_two_values() -> None:
    levels = np.zeros((20, 40), np.uint8)
    levels[5:9] = 1
    for good in (mask(1), *(bytes(cv2.imencode(".png", levels * top)[1]) for top in (0, 1, 255))):
        check_mask(good, max_pixels=1000, decode=True)
    check_mask(encode(Image.fromarray(levels * 255).convert("1"), "PNG"), max_pixels=1000, decode=True)
    three = bytes(cv2.imencode(".png", levels * 7)[1])
    check_mask(three, max_pixels=1000, decode=False)
    for bad in (three, crop(1), crop(1, ".png"), mask(1)[:-9]):
        with pytest.raises(Refusal) as refused:
            check_mask(bad, max_pixels=10_000, decode=True)
        assert refused.value.kind == "mask"
    with pytest.raises(Refusal, match="40×16 pixels"):
        check_mask(mask(1), max_pixels=639, decode=True)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", b""]), st.binary(max_size=200))
def test_any_bytes_have_a_header_or_a_refusal(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest)
    except Refusal as refusal:
        assert refusal.kind in ("not an image", "truncated", "mode", "format")
    else:
        assert header.width > 0 and header.height > 0


def mutate(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Flips bytes, cuts, removes or repeats a stretch, or puts the head of one image on another."""
    kind = rng.integers(6)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    if kind == 0:  # anywhere
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(0, len(changed), rng.integers(1, 20))] = rng.integers(0, 256)
        return changed.tobytes()
    if kind == 1:  # in the headers
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(0, min(len(changed), 700), rng.integers(1, 5))] ^= 1 << int(rng.integers(8))
        return changed.tobytes()
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at + length :]
    if kind == 4:
        return data[:at] + data[max(0, at - length) :]
    return other[: int(rng.integers(2, 200))] + data[at:]


def originals() -> list[bytes]:
    """Real words where they are, else noise: baseline and progressive, RGB, RGBA, palette and grey."""
    if REAL.exists():
        files = [path.read_bytes() for path in sorted((REAL / "words").rglob("*.*g"))]
        for name in ("iiit5k_train", "mmocr_toy", "bengali_non_ascii_labels"):
            reader = LmdbReader(REAL / name)
            files += [reader.image(number) or b"" for number in range(1, 11)]
        return [data for data in files if len(data) < 60_000]
    picture = Image.open(io.BytesIO(crop(1, ".png", 60, 30)))
    pngs = [encode(picture.convert(mode), "PNG") for mode in ("L", "P", "RGBA", "RGB")]
    return pngs + [crop(2), crop(3), encode(picture, "JPEG", progressive=True)]


@pytest.mark.parametrize("check", ["none", "header", "decode"])
def test_two_thousand_mutated_records_are_all_accounted_for(tmp_path: Path, check: str) -> None:
    rng = np.random.default_rng(3)
    images = originals()
    with LmdbWriter(tmp_path / "w") as writer:
        for number in range(2000):
            writer.add(mutate(rng, images[number % len(images)], images[int(rng.integers(len(images)))]), "word")
    out = tmp_path / "o"
    options = ["--name", "x", "--samples-per-shard", "500", "--workers", "1", "--max-refused", "1", "--check", check]
    assert convert.main(["--src", str(tmp_path / "w"), "--out", str(out), *options]) == 0
    manifest, corpus, reader = read_manifest(out), Corpus.open(out), LmdbReader(tmp_path / "w")
    refused = sum(manifest.refused.values())
    assert manifest.samples + refused == 2000
    assert refused > {"none": 20, "header": 500, "decode": 700}[check]
    for sample in range(corpus.num_samples):
        place = corpus.locate(sample)
        assert corpus.read(*place, ("image",)) == (reader.image(int(corpus.key(*place).rpartition("/")[2])),)
    assert verify.main([str(out), "--workers", "1"]) == 0
    if check != "none":
        assert verify.main([str(out), "--workers", "1", "--deep"]) == (0 if check == "decode" else 1)


def test_a_decompression_bomb_is_refused_by_its_header_and_cheap(tmp_path: Path) -> None:
    bomb = encode(Image.new("L", (8_000, 8_000)), "PNG")
    assert len(bomb) < 100_000
    with LmdbWriter(tmp_path / "w") as writer:
        writer.add(bomb)
        writer.add(crop(1))
    options = ["--name", "x", "--max-refused", "0.5", "--check", "decode", "--workers", "1"]
    assert convert.main(["--src", str(tmp_path / "w"), "--out", str(tmp_path / "o"), *options]) == 0
    assert read_manifest(tmp_path / "o").refused == {"too large": 1}


def test_decoding_finds_what_headers_do_not_show() -> None:
    data = bytearray(crop(3, ".png", 60, 30))
    check_decodes(bytes(data))
    data[300:330] = bytes(30)
    read_header(bytes(data))
    with pytest.raises(Refusal) as refused:
        check_decodes(bytes(data))
    assert refused.value.kind == "undecodable"


def test_decoding_is_judged_by_the_decoder_that_training_uses() -> None:
    """Good pixels with heavy or broken metadata, which stricter decoders refuse."""
    png = crop(1, ".png", 40, 20)

    def with_chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
        crc = zlib.crc32(name + content) if checksum is None else checksum
        return png[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc) + png[33:]

    heavy = with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20)))
    for data in (png, heavy, with_chunk(b"tEXt", b"Comment\0good", checksum=1)):
        check_decodes(data)
        assert decode_rgb(data).shape == (20, 40, 3)


def test_the_reason_of_a_refusal_is_the_same_every_time() -> None:
    broken = bytearray(crop(3, ".png", 60, 30))
    broken[300:330] = bytes(30)
    reasons = set()
    for _ in range(2):
        with pytest.raises(Refusal) as refused:
            check_decodes(bytes(broken))
        reasons.add(str(refused.value))
    assert len(reasons) == 1 and "0x" not in reasons.pop()
