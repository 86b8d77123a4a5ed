"""What makes a record usable; the same for LMDBs and for tars of other tools."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

from ccd_train.errors import UserError
from data_tools.images import Refusal, check_decodes, check_mask, read_extension, read_header


@dataclass(frozen=True)
class Checks:
    """How closely to look at a record."""

    check: Literal["header", "decode", "none"]
    min_size: int
    """Pixels that each side must have."""
    max_pixels: int
    """More are refused: a small file may unfold to fill the memory."""

    def examine(self, image: bytes, label: bytes | None, mask: bytes | None) -> tuple[str, tuple[int, int] | None]:
        """The image's extension ("jpg" or "png"), and its width and height unless `check` is "none".

        Raises Refusal if the record cannot be used.
        """
        if not image:
            raise Refusal("empty", "the image has 0 bytes")
        if self.check == "none":
            return read_extension(image), None
        header = read_header(image)
        size = f"{header.width}×{header.height} pixels"
        if min(header.width, header.height) < self.min_size:
            raise Refusal("too small", size)
        if header.width * header.height > self.max_pixels:
            raise Refusal("too large", size)
        if self.check == "decode":
            check_decodes(image)
        if label is not None:
            try:
                label.decode()
            except UnicodeDecodeError:
                raise Refusal("label", "the label is not UTF-8") from None
        if mask is not None:
            check_mask(mask, self.max_pixels, decode=self.check == "decode")
        return header.extension, (header.width, header.height)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command-line options of `Checks`, and of how much may be refused."""
    add = parser.add_argument
    add(
        "--check",
        choices=("header", "decode", "none"),
        default="header",
        help="look at each image's header and whether it is complete; decode it as well; or neither (%(default)s)",
    )
    add("--min-size", type=int, default=7, metavar="PIXELS", help="refuse images with a shorter side (%(default)s)")
    add("--max-pixels", type=int, default=1 << 24, metavar="N", help="refuse images with more pixels (%(default)s)")
    add(
        "--max-refused",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="stop when more than this share of the records is refused, 0 to 1 (%(default)s)",
    )


def check_options(given: argparse.Namespace) -> None:
    """UserError if one of the common options has an impossible value."""
    for option in ("workers", "samples_per_shard", "min_size", "max_pixels"):
        if getattr(given, option, 1) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(given, option)}: give 1 or more")
    if not 0 <= given.max_refused <= 1:
        raise UserError(f"--max-refused {given.max_refused}: give a share from 0 to 1, such as 0.05")
