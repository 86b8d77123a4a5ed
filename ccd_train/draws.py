"""Random numbers without a state: each is a pure integer hash of what it is for.

A draw is named by (seed, epoch, sample, operation[, index]), so it does not depend on the batch it is made in, on the
number of ranks or workers, on the device, or on an interruption. torch's generators differ between devices and have
a state that would have to be saved; these have none.

`mix` is one SplitMix64 step (Steele, Lea, Flood 2014), `spread` is the 32-bit finaliser of MurmurHash3 (Appleby 2011)
but for its last step. torch has no unsigned arithmetic: int64 and int32 products wrap as two's complement on every
device, and right shifts are masked to be logical.
"""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB


def _signed(word: int, bits: int = 64) -> int:
    """The two's complement value of an unsigned word, which is what torch's integer constants must be."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def _shift(x: Tensor, by: int, bits: int) -> Tensor:
    return (x >> by) & ((1 << (bits - by)) - 1)


def mix(key: Tensor, word: int | Tensor) -> Tensor:
    """Hashes int64 keys with one more word (an int, or an int64 tensor that broadcasts)."""
    if isinstance(word, int):
        word = _signed(word)
    x = (key ^ (word * _signed(GOLDEN) if isinstance(word, Tensor) else _signed(word * GOLDEN))) + _signed(GOLDEN)
    x = (x ^ _shift(x, 30, 64)) * _signed(FIRST)
    x = (x ^ _shift(x, 27, 64)) * _signed(SECOND)
    return x ^ _shift(x, 31, 64)


def sample_keys(seed: int, epochs: Tensor, sample_ids: Tensor) -> Tensor:
    """The root of all draws of a sample: int64 [B] from int64 epochs [B] and sample ids [B]."""
    start = torch.zeros_like(sample_ids)
    return mix(mix(mix(start, seed), epochs), sample_ids)


@cache
def operation_word(operation: str) -> int:
    """The word that stands for an operation's name; stable over versions, unlike Python's own hash."""
    return zlib.crc32(operation.encode())


def uniform(keys: Tensor, operation: str) -> Tensor:
    """One float32 in [0, 1) per key, with 24 bits: the same on every device."""
    return _shift(mix(keys, operation_word(operation)), 40, 64).to(torch.float32) * 2.0**-24


def uniforms(keys: Tensor, words: Tensor) -> Tensor:
    """float32 [n, B] in [0, 1) for the words int64 [n] of n operations: row by row what `uniform` draws."""
    return _shift(mix(keys, words[:, None]), 40, 64).to(torch.float32) * 2.0**-24


def field(keys: Tensor, operation: str, size: int) -> Tensor:
    """float32 [B, size] in [0, 1) per key: for example one draw per pixel."""
    return spread(mix(keys, operation_word(operation)), size)


def spread(words: Tensor, size: int) -> Tensor:
    """float32 [B, size] in [0, 1) from int64 words [B]. In 32-bit arithmetic, which CPUs do eight at a time."""
    low, high = words.contiguous().view(torch.int32).view(-1, 2, 1).unbind(1)  # little-endian, as all that runs torch
    x = _counter(size, words.device) + low
    x ^= high
    shifted = torch.empty_like(x)
    for by, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        torch.bitwise_right_shift(x, by, out=shifted)
        x ^= shifted.bitwise_and_((1 << (32 - by)) - 1)
        x *= _signed(factor, 32)
    x >>= 8  # the 24 high bits are well mixed by now: the finaliser's last step would only mend the low ones
    return x.bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)


@cache
def _counter(size: int, device: torch.device) -> Tensor:
    """int32 [size]: multiples of the golden ratio, for `spread` to start from; not to be changed."""
    return torch.arange(size, dtype=torch.int32, device=device) * _signed(0x9E3779B1, 32)


def permutation(size: int, *words: int) -> np.ndarray:
    """A permutation of range(size), int64, as a function of the words alone.

    numpy promises no stable `permutation` over its versions; sorting hashes is stable for ever. Two equal 64-bit hashes
    keep their order (stable sort), so the result is defined in that case as well.
    """
    key = np.zeros(1, np.uint64)
    for word in words:
        key = _mix_numpy(key, np.uint64(word & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(_mix_numpy(key, np.arange(size, dtype=np.uint64)), kind="stable")


def _mix_numpy(key: np.ndarray, word: np.ndarray | np.uint64) -> np.ndarray:
    """`mix` in numpy: bit for bit the same function."""
    with np.errstate(over="ignore"):
        x = (key ^ (word * np.uint64(GOLDEN))) + np.uint64(GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
        return x ^ (x >> np.uint64(31))
