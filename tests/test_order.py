"""The order of samples: each once an epoch, the same however it is cut, well shuffled, and entered anywhere at once."""

from __future__ import annotations

import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccd_train.data.order import Mixture, Order, Samples

SHARDS = np.array([7, 0, 13, 1, 20, 5, 5, 9, 2, 30])


def stacked(samples: Samples) -> np.ndarray:
    return np.stack([samples.sample_ids, samples.epochs, samples.shards, samples.rows])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 14), st.integers(0, 2**40))
def test_every_epoch_holds_each_sample_once(shard_samples: list[int], window_shards: int, seed: int) -> None:
    total = sum(shard_samples)
    if total == 0:
        return
    order = Order(np.array(shard_samples), seed, window_shards)
    assert order.epoch_samples == total
    for epoch in range(3):
        samples = order.at(epoch * total, total)
        assert np.array_equal(np.sort(samples.sample_ids), np.arange(total))
        assert (samples.epochs == epoch).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 12), st.integers(0, 500))
def test_cutting_into_batches_changes_nothing(counts: list[int], window_shards: int, start: int) -> None:
    whole = stacked(Order(SHARDS, 3, window_shards).at(start, sum(counts)))
    order, parts, position = Order(SHARDS, 3, window_shards), [], start
    for count in counts:
        parts.append(stacked(order.at(position, count)))
        position += count
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_ids_shards_and_rows_agree() -> None:
    samples = Order(SHARDS, 0, 3).at(5, 300)
    first = np.cumsum(SHARDS) - SHARDS
    assert np.array_equal(samples.sample_ids, first[samples.shards] + samples.rows)
    assert (samples.rows < SHARDS[samples.shards]).all() and (samples.rows >= 0).all()


def test_any_position_is_entered_without_history() -> None:
    once = Order(SHARDS, 9, 4)
    walked = [once.at(position, 1).sample_ids[0] for position in range(250)]
    fresh = [Order(SHARDS, 9, 4).at(position, 1).sample_ids[0] for position in (0, 17, 91, 92, 93, 249)]
    assert fresh == [walked[position] for position in (0, 17, 91, 92, 93, 249)]


def test_epochs_and_seeds_differ() -> None:
    order = Order(np.full(20, 50), 0, 5)
    first, second = order.at(0, 1000).sample_ids, order.at(1000, 1000).sample_ids
    other = Order(np.full(20, 50), 1, 5).at(0, 1000).sample_ids
    for one, two in ((first, second), (first, other), (second, other)):
        assert (one == two).sum() < 10


def test_the_order_of_this_version_never_changes() -> None:
    """A run that began years ago goes on in the same order: this must not change."""
    order = Order(np.array([4, 3, 5]), 7, 2)
    assert order.at(0, 12).sample_ids.tolist() == [7, 1, 10, 8, 2, 11, 3, 0, 9, 4, 6, 5]
    mixed = Mixture([Order(np.array([4]), 7, 1), Order(np.array([5]), 7, 1, 1, 4)], [1, 3], 7)
    assert mixed.at(0, 8).sample_ids.tolist() == [4, 5, 1, 8, 7, 6, 7, 3]


def test_statistics_of_the_shuffle() -> None:
    """Neighbours of the source are far apart, and a batch draws on every shard of its window evenly."""
    shards, samples, window, batch = 40, 500, 8, 256
    order = Order(np.full(shards, samples), 5, window)
    epoch = order.at(0, shards * samples)
    places = np.argsort(epoch.sample_ids)
    same_shard = np.diff(np.arange(shards * samples) // samples) == 0
    distances = np.abs(np.diff(places))[same_shard]
    expected = window * samples / 3  # mean distance of two random places among n: n / 3
    assert abs(distances.mean() / expected - 1) < 0.03
    assert (distances == 1).mean() < 3 * 2 / (window * samples)

    inside = epoch.shards[: window * samples].reshape(-1)[: 15 * batch].reshape(15, batch)
    assert all(len(np.unique(row)) == window for row in inside)
    counts = np.array([[np.count_nonzero(row == shard) for shard in np.unique(inside)] for row in inside])
    assert 0.7 < counts.var() / (batch / window * (1 - 1 / window)) < 1.3  # that of a multinomial draw

    first_visits = [int(np.flatnonzero(epoch.shards == shard)[0]) for shard in range(shards)]
    assert abs(np.corrcoef(first_visits, np.arange(shards))[0, 1]) < 0.5


def test_rows_are_uniform_over_a_window() -> None:
    rows = Order(np.full(4, 5000), 2, 4).at(0, 2000).rows
    counts = np.histogram(rows, bins=10, range=(0, 5000))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 28  # chi-square, 9 degrees of freedom, p < 0.001


def test_neighbours_in_a_window_are_independent() -> None:
    """Where a sample lies says nothing about where its neighbour in the batch lies: chi-square on a 12 × 12 grid."""
    for size in (3_000, 50_001):
        statistics = []
        for seed in range(12):
            rows = Order(np.array([size]), seed, 1).at(0, size).rows
            counts = np.histogram2d(rows[:-1], rows[1:], bins=12, range=[[0, size], [0, size]])[0]
            statistics.append(
                float(((counts - size / 144) ** 2 / (size / 144)).sum()) / 121
            )  # rows and columns are fixed
        assert 0.85 < np.mean(statistics) < 1.15


def test_windows_are_those_that_will_be_read() -> None:
    order, position = Order(np.full(11, 10), 1, 3), 85
    windows = [set(window.tolist()) for window in islice(order.windows(position), 6)]
    assert set(order.at(position, 5).shards) <= windows[0]
    starts = [60, 90, 110, 140, 170, 200]  # 3 windows of 30 samples and one of 20 make an epoch of 110
    for start, window in zip(starts, windows, strict=True):
        size = 20 if (start % 110) == 90 else 30
        assert set(order.at(start, size).shards.tolist()) == window


def mixture(seed: int = 4) -> Mixture:
    first, second, third = (np.full(5, 40), np.full(3, 400), np.full(2, 10))
    orders = [Order(first, seed, 2), Order(second, seed, 2, 5, 200), Order(third, seed, 2, 8, 1400)]
    return Mixture(orders, [0.25, 0.7, 0.05], seed)


def test_a_mixture_keeps_its_shares() -> None:
    for start in (0, 3_333, 987_654):
        samples = mixture().at(start, 10_000)
        shares = [
            np.count_nonzero((samples.shards >= low) & (samples.shards < high))
            for low, high in ((0, 5), (5, 8), (8, 10))
        ]
        assert np.abs(np.array(shares) - [2500, 7000, 500]).max() <= (0 if start == 0 else 150)


def test_each_corpus_of_a_mixture_has_its_own_epochs() -> None:
    """Every corpus is seen in the order it would have alone, so each of its samples once before any comes again."""
    samples = mixture().at(0, 20_000)
    small = samples.sample_ids >= 1400
    alone = Order(np.full(2, 10), 4, 2, 8, 1400).at(0, 1000)
    assert np.array_equal(samples.sample_ids[small], alone.sample_ids)
    assert np.array_equal(samples.epochs[small], alone.epochs)
    pairs = samples.sample_ids * 10_000 + samples.epochs
    assert len(np.unique(pairs)) == len(pairs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4000), min_size=1, max_size=12), st.integers(0, 50_000))
def test_a_mixture_may_be_cut_and_entered_anywhere(counts: list[int], start: int) -> None:
    whole = stacked(mixture().at(start, sum(counts)))
    parts, position = [], start
    for count in counts:
        parts.append(stacked(mixture().at(position, count)))
        position += count
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_windows_of_a_mixture_cover_what_is_read() -> None:
    windows = mixture().windows(4_321)
    assert set(mixture().at(4_321, 8).shards.tolist()) <= set(next(windows).tolist())


def test_a_corpus_of_the_papers_size_is_entered_in_milliseconds() -> None:
    started = time.perf_counter()
    Order(np.full(2000, 10_000), 0, 16).at(18_000_000, 64)
    assert time.perf_counter() - started < 0.25  # 25 ms on an idle core; the bar is measured in tests/benchmarks


@pytest.mark.parametrize("window_shards", [1, 3, 100])
def test_a_window_larger_than_the_corpus_is_a_full_shuffle(window_shards: int) -> None:
    order = Order(np.array([3, 3]), 0, window_shards)
    assert sorted(order.at(6, 6).sample_ids.tolist()) == list(range(6))
