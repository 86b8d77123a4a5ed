"""Schedules: their ends, their corners, and that the batch changes only what it should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccd_train.training.schedules import cosine, scaled_learning_rate, scaled_momentum, warmup_cosine


def test_a_cosine_ends_where_it_should_and_stays_there() -> None:
    assert [cosine(seen, 0.04, 0.4, 100) for seen in (0, 50, 100, 10_000)] == pytest.approx([0.04, 0.22, 0.4, 0.4])


def test_warm_up_starts_at_zero_and_its_last_step_has_the_peak() -> None:
    def rate(seen: int) -> float:
        return warmup_cosine(seen, 10, peak=2.0, final=0.5, warmup=100, total=1000)

    assert [rate(0), rate(90), rate(100), rate(1000), rate(5000)] == pytest.approx([0.0, 2.0, 2.0, 0.5, 0.5])
    assert rate(50) == pytest.approx(2.0 * 50 / 90)


def test_no_warm_up_and_nothing_but_warm_up() -> None:
    assert warmup_cosine(0, 10, peak=1.0, final=0.1, warmup=0, total=100) == pytest.approx(1.0)
    assert warmup_cosine(0, 200, peak=1.0, final=0.1, warmup=100, total=100) == 0.0
    assert warmup_cosine(200, 200, peak=1.0, final=0.1, warmup=100, total=100) == pytest.approx(0.1)


@given(st.integers(0, 2000), st.sampled_from([1, 7, 100]), st.integers(0, 900))
def test_a_learning_rate_stays_between_zero_and_its_peak(seen: int, batch: int, warmup: int) -> None:
    assert 0.0 <= warmup_cosine(seen, batch, peak=1.0, final=0.1, warmup=warmup, total=1000) <= 1.0


def test_the_learning_rate_of_a_batch() -> None:
    assert scaled_learning_rate(5e-4, 256, 1024) == pytest.approx(5e-4)
    assert scaled_learning_rate(5e-4, 1024, 1024) == pytest.approx(2e-3)
    assert scaled_learning_rate(5e-4, 4096, 1024) == pytest.approx(4e-3)  # 4 × linear, then √4
    assert scaled_learning_rate(5e-4, 4096, None) == pytest.approx(8e-3)


def test_momentum_forgets_per_sample() -> None:
    """16 steps of 256 samples forget as much as one of 4,096."""
    assert scaled_momentum(0.9995, 4096) == pytest.approx(0.9995**16)
    assert scaled_momentum(0.9995, 256) == 0.9995
    assert scaled_momentum(1.0, 64) == 1.0
