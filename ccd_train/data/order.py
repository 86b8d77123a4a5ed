"""Which sample comes at which position: a pure function of (seed, position) that can be entered anywhere.

The position counts samples over all epochs, so a batch may cross the border between two of them, nothing is dropped or
padded, and the whole state of the data is one integer. Ranks, workers and batch sizes are unknown here.

An epoch permutes the shards, cuts them into windows of `window_shards`, and permutes all samples of a window together:
while one window is read at random, the next one can be read ahead from start to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ccd_train.draws import permutation

# What a permutation is for: the last but one of its words.
_SHARDS, _SAMPLES, _CORPORA = 1, 2, 3
_ROUNDS = 8  # of the shuffle within a window; from 4 on, tests cannot tell it from a sort by random keys
_KEPT = 4  # plans and windows in memory; a batch sees one or two


@dataclass(frozen=True)
class Samples:
    """Consecutive positions: int64 arrays of one length."""

    sample_ids: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


class Order:
    """The order of the samples of shards that are visited once each in every epoch.

    `shard_samples` int64 [S]. With several corpora, `first_shard` and `first_sample` say where these shards begin in
    the numbering of all: they are added to what `at` returns, and set the shuffle apart from that of other corpora.
    """

    def __init__(
        self, shard_samples: np.ndarray, seed: int, window_shards: int, first_shard: int = 0, first_sample: int = 0
    ) -> None:
        assert window_shards >= 1 and len(shard_samples) > 0
        self.shard_samples = np.asarray(shard_samples, np.int64)
        self.epoch_samples = int(self.shard_samples.sum())
        assert self.epoch_samples > 0 and self.shard_samples.min() >= 0
        self._first_samples = np.cumsum(self.shard_samples) - self.shard_samples + first_sample
        self._first_shard = first_shard
        self._seed = seed
        self._window_shards = window_shards
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, int, np.ndarray]] = {}

    def at(self, position: int, count: int) -> Samples:
        """The samples at positions `position` … `position + count - 1`."""
        assert position >= 0 and count >= 0
        shards, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        epochs = (position + np.arange(count)) // self.epoch_samples
        done = 0
        while done < count:
            epoch, window, offset = self._locate(position + done)
            members, starts, size, tables = self._window(epoch, window)
            places = _shuffle(np.arange(offset, min(size, offset + count - done)), size, tables)
            owners = np.searchsorted(starts, places, side="right") - 1
            filled = slice(done, done + len(places))
            shards[filled], rows[filled] = members[owners], places - starts[owners]
            done = filled.stop
        return Samples(self._first_samples[shards] + rows, epochs, shards + self._first_shard, rows)

    def windows(self, position: int) -> Iterator[np.ndarray]:
        """The shards of the window at a position, then those of the following windows, for ever: int64 arrays."""
        epoch, window, _ = self._locate(position)
        while True:
            shards, starts = self._plan(epoch)
            for index in range(window, len(starts)):
                yield shards[index * self._window_shards :][: self._window_shards] + self._first_shard
            epoch, window = epoch + 1, 0

    def _locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, window, place in the window) of a position."""
        epoch, offset = divmod(position, self.epoch_samples)
        starts = self._plan(epoch)[1]
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, window, offset - int(starts[window])

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order [S], and the first place of each window in the epoch."""
        if epoch not in self._plans:
            shards = permutation(len(self.shard_samples), self._seed, self._first_shard, _SHARDS, epoch)
            ends = np.cumsum(self.shard_samples[shards])
            _make_room(self._plans)
            self._plans[epoch] = (shards, np.append(0, ends[:-1])[:: self._window_shards])
        return self._plans[epoch]

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """The shards of a window, the first place of each when they lie one after another, the size, the shuffle."""
        if (epoch, window) not in self._windows:
            members = self._plan(epoch)[0][window * self._window_shards :][: self._window_shards]
            counts = self.shard_samples[members]
            size = int(counts.sum())
            tables = _shuffle_tables(size, self._seed, self._first_shard, _SAMPLES, epoch, window)
            _make_room(self._windows)
            self._windows[epoch, window] = (members, np.cumsum(counts) - counts, size, tables)
        return self._windows[epoch, window]


class Mixture:
    """Several corpora, each in its own order and with its own epochs, drawn in fixed shares.

    Every block of 10,000 positions holds the same number of samples of each corpus, at shuffled places: shares are
    exact to 0.01 %, and any position can still be found without counting from the start.
    """

    BLOCK = 10_000

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        assert len(orders) == len(weights) > 0
        self._orders = list(orders)
        self._seed = seed
        self.quotas = _apportion(weights, self.BLOCK)
        assert self.quotas.min() > 0
        self.epoch_samples = sum(order.epoch_samples for order in orders)
        self._block: tuple[int, np.ndarray] | None = None

    def at(self, position: int, count: int) -> Samples:
        """The samples at positions `position` … `position + count - 1`; `epochs` are those of each sample's corpus."""
        columns = np.empty((4, count), np.int64)
        done = 0
        while done < count:
            block, offset = divmod(position + done, self.BLOCK)
            owners = self._owners(block)
            taken = owners[offset : offset + count - done]
            for corpus, order in enumerate(self._orders):
                places = np.flatnonzero(taken == corpus) + done
                before = int(np.count_nonzero(owners[:offset] == corpus))
                found = order.at(block * int(self.quotas[corpus]) + before, len(places))
                columns[:, places] = (found.sample_ids, found.epochs, found.shards, found.rows)
            done += len(taken)
        return Samples(*columns)

    def windows(self, position: int) -> Iterator[np.ndarray]:
        """The shards in use at a position, one window of each corpus, then those that follow, for ever."""
        block, offset = divmod(position, self.BLOCK)
        owners = self._owners(block)[:offset]
        streams = [
            order.windows(block * int(self.quotas[corpus]) + int(np.count_nonzero(owners == corpus)))
            for corpus, order in enumerate(self._orders)
        ]
        while True:
            yield np.concatenate([next(stream) for stream in streams])

    def _owners(self, block: int) -> np.ndarray:
        """Which corpus each of the block's positions belongs to, int64 [BLOCK]."""
        if self._block is None or self._block[0] != block:
            owners = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._block = (block, np.take(owners, permutation(self.BLOCK, self._seed, _CORPORA, block)))
        return self._block[1]


def _shuffle_tables(size: int, *words: int) -> np.ndarray:
    """The key of `_shuffle` for a range, as a function of the words: int64 [_ROUNDS, ⌈√size⌉]."""
    side = math.isqrt(max(size, 1) - 1) + 1
    return np.stack([permutation(side, *words, step) for step in range(_ROUNDS)])


def _shuffle(places: np.ndarray, size: int, tables: np.ndarray) -> np.ndarray:
    """Where a permutation of range(size) takes some places, int64; the others are not computed.

    A Feistel network on the two digits of a place in base ⌈√size⌉, each added to a table's value at the other one.
    What falls outside of the range goes through again until it is inside ("cycle walking": Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002). Sorting a window of 160,000 random keys instead would take 20 ms.
    """
    side = tables.shape[1]
    shuffled = places.copy()
    outside = np.arange(len(places))
    while len(outside):
        high, low = np.divmod(shuffled[outside], side)
        for first, second in zip(tables[::2], tables[1::2], strict=True):
            high = (high + first[low]) % side
            low = (low + second[high]) % side
        shuffled[outside] = high * side + low
        outside = outside[shuffled[outside] >= size]
    return shuffled


def _make_room(kept: dict[Any, Any]) -> None:
    """Drops the oldest entries, so that one more may come in."""
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]


def _apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers that add up to `total`, in the proportions of the weights (largest remainders): int64."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    quotas: np.ndarray = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")[: total - int(quotas.sum())]
    quotas[largest] += 1
    return quotas
