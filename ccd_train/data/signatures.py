"""What the first bytes of a file say it is, whatever its name says. Nothing here imports a decoder."""

from __future__ import annotations

import re

HEAD = 64  # bytes that are enough to tell

# What OpenCV decodes, and HEIF, which it does not: phones write it, and nobody should miss it in silence.
_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"  # a BMP's second header has one of these lengths
    rb"|II\*\0|MM\0\*|II\+\0|MM\0\+"  # TIFF, BigTIFF
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51"  # JPEG 2000, and its bare codestream
    rb"|.{4}ftyp(avif|avis|heic|heix|heim|heis|hevc|mif1|msf1)"
    rb"|P[1-7Ff][ \t\r\n]|#\?RADIANCE|#\?RGBE|\x59\xa6\x6a\x95",  # portable maps, Radiance, Sun raster
    re.DOTALL,
)
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_LFS_POINTER = b"version https://git-lfs"


def is_image(head: bytes) -> bool:
    """Whether a file that begins so is a picture."""
    return _IMAGE.match(head) is not None


def packed_with(head: bytes) -> str | None:
    """What a file that begins so was compressed with; None if it was not."""
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether this is the note that Git LFS leaves in a file's place until the file is fetched."""
    return head.startswith(_LFS_POINTER)
