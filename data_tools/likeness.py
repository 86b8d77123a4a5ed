"""Whether two crops are the same picture: by their bytes, or by a hash of what they look like.

The perceptual hash is a "pHash": the grey crop at 32×64, its lowest 8×16 cosine coefficients but the mean, one bit for
each that lies above their median. Brightness and contrast do not change it, encoding and scaling hardly do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from ccd_train.data.masks import UndecodableImage, decode_rgb

ROWS, COLUMNS = 8, 16  # cosine coefficients, one bit each
BITS = ROWS * COLUMNS
SIZE = (64, 32)  # width and height of what is hashed
LEAST_CONTRAST = 3.0  # standard deviation in grey levels below which a crop shows nothing


def digest(data: bytes) -> bytes:
    """16 bytes that stand for an image file's content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def perceptual_hash(data: bytes) -> np.ndarray | None:
    """uint64 [2] of an encoded image; None if it cannot be decoded, or is so flat that its hash would be noise."""
    try:
        image = decode_rgb(data)
    except UndecodableImage:
        return None
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), SIZE, interpolation=cv2.INTER_AREA)
    if grey.std() < LEAST_CONTRAST:
        return None
    coefficients = cv2.dct(grey.astype(np.float32))[:ROWS, :COLUMNS].ravel()
    coefficients[0] = 0
    return np.packbits(coefficients > np.median(coefficients)).view(np.uint64)


@dataclass(frozen=True)
class Index:
    """Images to be found again. N images, n of them with a hash."""

    digests: np.ndarray
    """uint8 [N, 16]."""
    hashes: np.ndarray
    """uint64 [n, 2]."""
    owners: np.ndarray
    """int64 [n], the image of each hash."""
    first: int = 0
    """Number of the first image."""

    @classmethod
    def build(cls, digests: list[bytes], hashes: dict[int, np.ndarray], first: int = 0) -> Index:
        """From all digests, and the hashes by number of image, the first of which is `first`."""
        return cls(
            np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
            np.array(list(hashes.values()), np.uint64).reshape(-1, 2),
            np.array(list(hashes), np.int64),
            first,
        )

    @classmethod
    def load(cls, file: Path) -> Index:
        with np.load(file) as arrays:
            return cls(arrays["digests"], arrays["hashes"], arrays["owners"], int(arrays["first"]))

    def save(self, file: Path) -> None:
        np.savez(file, digests=self.digests, hashes=self.hashes, owners=self.owners, first=self.first)

    @cached_property
    def numbers(self) -> dict[bytes, int]:
        """Digest → number of the first image that has it."""
        last = self.first + len(self.digests) - 1
        return {row.tobytes(): last - place for place, row in enumerate(self.digests[::-1])}

    def nearest(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For hashes uint64 [m, 2]: the images int64 [m] that are most alike, and in how many bits they differ [m]."""
        if not len(self.hashes) or not len(hashes):
            return np.zeros(len(hashes), np.int64), np.full(len(hashes), BITS)
        differences = hashes[:, None, :] ^ self.hashes[None, :, :]
        bits = np.bitwise_count(differences).sum(axis=2, dtype=np.int64)
        best = bits.argmin(axis=1)
        return self.owners[best], bits[np.arange(len(hashes)), best]
