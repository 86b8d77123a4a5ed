"""What an encoded image says of itself, read from its headers without decoding it; and whether it decodes.

JPEG as in ITU-T T.81 (annex B), PNG as in the W3C's PNG specification (third edition), chunks in §5, IHDR in §11.2.2.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # colour type → bit depths
JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # baseline, extended, progressive; the last two with arithmetic coding
JPEG_LOSSLESS = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}  # lossless or hierarchical: no common decoder reads it
OTHER_FORMATS = {b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


class Refusal(Exception):  # noqa: N818
    """A record that cannot be used: its kind (one of a few words, which are counted), and the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image promise."""

    extension: str
    width: int
    height: int


def read_extension(data: bytes) -> str:
    """ "jpg" or "png", by the first bytes alone. Raises Refusal for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == PNG_SIGNATURE:
        return "png"
    for magic, name in OTHER_FORMATS.items():
        if data.startswith(magic):
            raise Refusal("format", f"{name}; only JPEG and PNG are read")
    raise Refusal("not an image", f"begins with {data[:8].hex(' ')}, which is neither JPEG nor PNG")


def read_header(data: bytes) -> Header:
    """Format and size of a JPEG or PNG. Raises Refusal if it is neither, is cut short, or has pixels of an odd kind."""
    if read_extension(data) == "jpg":
        return Header("jpg", *_jpeg_size(data))
    return Header("png", *_png_size(data))


def check_decodes(data: bytes) -> None:
    """Decodes the whole image as training does. Raises Refusal if that fails."""
    from ccd_train.data.masks import UndecodableImage, decode_rgb  # OpenCV: converting without decoding needs none

    try:
        decode_rgb(data)
    except UndecodableImage as error:
        raise Refusal("undecodable", str(error)) from None


def check_mask(data: bytes, max_pixels: int, decode: bool) -> None:
    """Raises Refusal unless this is a whole PNG and, if `decode`, its values are 0 and 1, or 0 and 255."""
    try:
        header = read_header(data)
        if header.extension != "png":
            raise Refusal("mask", "it is not a PNG")
        if header.width * header.height > max_pixels:
            raise Refusal("mask", f"it has {header.width}×{header.height} pixels")
        if decode:
            values = sorted(_values(data))
            if not (set(values) <= {0, 1} or set(values) <= {0, 255}):
                raise Refusal("mask", f"it has values other than 0 and 1, or 0 and 255: {values[:5]} …")
    except Refusal as refusal:
        raise Refusal("mask", f"unusable mask: {refusal}") from None


def _values(data: bytes) -> set[int]:
    """The grey levels of an image, as training sees them."""
    from ccd_train.data.masks import UndecodableImage, decode_grey

    try:
        return set(decode_grey(data).tobytes())
    except UndecodableImage as error:
        raise Refusal("undecodable", str(error)) from None


def _png_size(data: bytes) -> tuple[int, int]:
    if len(data) < 33:
        raise Refusal("truncated", f"PNG of {len(data)} bytes")
    if data[8:16] != b"\0\0\0\x0dIHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        raise Refusal("not an image", "PNG whose header is damaged")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if width == 0 or height == 0:
        raise Refusal("not an image", f"PNG of {width}×{height} pixels")
    if depth not in PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise Refusal("mode", f"PNG with colour type {colour} and {depth} bits")
    place = 33
    while place + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        place += 12 + size
        if name == b"IEND" and place <= len(data):
            return width, height
    raise Refusal("truncated", f"PNG that ends after {len(data)} bytes, before its IEND chunk")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    size: tuple[int, int] | None = None
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            raise Refusal("not an image", f"JPEG without a marker at byte {place}")
        marker = data[place + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # fill byte; markers without a length
            place += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in JPEG_FRAMES:
            size = _jpeg_frame(data[place + 4 : place + 2 + length])
        elif marker in JPEG_LOSSLESS:
            raise Refusal("mode", f"lossless or hierarchical JPEG (frame type {marker - 0xC0})")
        elif marker == 0xDA:
            break
        elif marker == 0xD9 or length < 2:
            raise Refusal("not an image", f"JPEG whose header is damaged at byte {place}")
        place += 2 + length
    else:
        raise Refusal("truncated", f"JPEG that ends after {len(data)} bytes, within its header")
    if size is None:
        raise Refusal("not an image", "JPEG without a frame header")
    if data.rfind(b"\xff\xd9", place) < 0:  # an 0xFF within a scan is followed by 0: this can only be the end
        raise Refusal("truncated", f"JPEG that ends after {len(data)} bytes, without its end marker")
    return size


def _jpeg_frame(frame: bytes) -> tuple[int, int]:
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        raise Refusal("truncated", "JPEG that ends within its frame header")
    bits, height, width, components = struct.unpack_from(">BHHB", frame)
    if width == 0 or height == 0:
        raise Refusal("not an image", f"JPEG of {width}×{height} pixels")
    if bits != 8 or components not in (1, 3, 4):
        raise Refusal("mode", f"JPEG with {components} components of {bits} bits")
    return width, height
