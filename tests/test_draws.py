"""Draws: pure, the same for ever and everywhere, uniform, and independent of their neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photometric_reference import hashed
from torch import Tensor

from ccd_train import draws

WORDS = st.integers(-(2**63), 2**63 - 1)
GOLDEN_KEYS = [484692998028658458, 8474303559968977115]
GOLDEN_UNIFORM = [0.3121544122695923, 0.977833092212677]
GOLDEN_FIELD = [
    0.6641295552253723,
    0.8872898817062378,
    0.16767442226409912,
    0.48509150743484497,
    0.6685754060745239,
    0.8975555896759033,
]
GOLDEN_PERMUTATION = [5, 2, 7, 6, 0, 3, 4, 1]


def keys(count: int, seed: int = 0, epoch: int = 0) -> Tensor:
    return draws.sample_keys(seed, torch.full((count,), epoch), torch.arange(count))


def deviations(counts: Tensor) -> float:
    """How many standard deviations a χ² of equally likely counts lies from its mean (normal approximation)."""
    expected = counts.sum().item() / len(counts)
    chi2 = ((counts.double() - expected) ** 2 / expected).sum().item()
    return (chi2 - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1))


def test_values_are_the_same_for_ever() -> None:
    """A change of these numbers changes every run that was ever started: it needs a new version of the recipes."""
    key = draws.sample_keys(7, torch.tensor([0, 1]), torch.tensor([5, 123_456_789]))
    assert key.tolist() == GOLDEN_KEYS
    assert draws.uniform(key, "affine.rotate").tolist() == GOLDEN_UNIFORM
    assert draws.field(key, "noise", 3).flatten().tolist() == GOLDEN_FIELD
    assert draws.permutation(8, 1, 2).tolist() == GOLDEN_PERMUTATION


@given(st.lists(WORDS, min_size=1, max_size=20), WORDS)
def test_mix_equals_plain_integer_arithmetic(values: list[int], word: int) -> None:
    def splitmix(key: int, step: int) -> int:
        mask = 2**64 - 1
        x = ((key ^ (step * draws.GOLDEN & mask)) + draws.GOLDEN) & mask
        x = (x ^ (x >> 30)) * draws.FIRST & mask
        x = (x ^ (x >> 27)) * draws.SECOND & mask
        return x ^ (x >> 31)

    expected = [splitmix(value & (2**64 - 1), word & (2**64 - 1)) for value in values]
    assert [value & (2**64 - 1) for value in draws.mix(torch.tensor(values), word).tolist()] == expected
    assert torch.equal(draws.mix(torch.tensor(values), word), draws.mix(torch.tensor(values), torch.tensor(word)))


@given(WORDS, st.integers(1, 5000))
def test_spread_equals_its_numpy_twin(seed: int, size: int) -> None:
    assert np.array_equal(draws.spread(torch.tensor([seed]), size)[0].numpy(), hashed(seed)(size))


def test_draws_are_below_one_and_reach_both_ends() -> None:
    field = draws.field(keys(2000), "ends", 4096)
    assert field.dtype == torch.float32
    assert 0 <= field.min() < 1e-6 and 1 - 1e-6 < field.max() < 1


def test_no_generator_is_consumed() -> None:
    before = torch.random.get_rng_state()
    draws.field(keys(4), "noise", 100)
    draws.uniform(keys(4), "noise")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_draw_depends_on_every_word_that_names_it() -> None:
    names = [
        draws.uniform(keys(1), "a"),
        draws.uniform(keys(1), "b"),
        draws.uniform(keys(1, seed=1), "a"),
        draws.uniform(keys(1, epoch=1), "a"),
        draws.uniform(keys(2)[1:], "a"),
        draws.field(keys(1), "a", 1)[0],
    ]
    assert len({name.item() for name in names}) == len(names)


def test_keys_do_not_collide() -> None:
    every = [keys(50_000, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(torch.cat(every).unique()) == 9 * 50_000


@pytest.mark.parametrize("name", ["noise", "color"])
def test_draws_are_uniform(name: str) -> None:
    of_samples = draws.uniform(keys(400_000), name)
    of_pixels = draws.field(keys(100), name, 4096).flatten()
    for values in (of_samples, of_pixels):
        assert abs(deviations(torch.histc(values, 256, 0, 1))) < 5
        assert abs(values.double().mean().item() - 0.5) < 5 / math.sqrt(12 * len(values))
        low_bits = ((values * 2**24).long() & 255).bincount(minlength=256)
        assert abs(deviations(low_bits)) < 5


NEIGHBOURS = {
    "next pixel": lambda f: (f[:, :-1], f[:, 1:]),
    "pixel after next": lambda f: (f[:, :-2], f[:, 2:]),
    "pixel below": lambda f: (f[:, :-128], f[:, 128:]),
    "next channel": lambda f: (f[:, :-4096], f[:, 4096:]),
    "next sample": lambda f: (f[:-1], f[1:]),
    "sample after 64": lambda f: (f[:-64], f[64:]),
}


@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbours_are_independent(pair: str) -> None:
    first, second = (values.flatten() for values in NEIGHBOURS[pair](draws.field(keys(300), "noise", 2 * 4096)))
    product = ((first - 0.5) * (second - 0.5)).double().mean().item() * 12 * math.sqrt(len(first))
    assert abs(product) < 5
    joint = ((first * 16).long() * 16 + (second * 16).long()).bincount(minlength=256)
    assert abs(deviations(joint)) < 5


def test_epochs_seeds_and_operations_are_independent() -> None:
    streams = {
        "epoch": draws.uniform(keys(200_000, epoch=1), "a"),
        "seed": draws.uniform(keys(200_000, seed=1), "a"),
        "operation": draws.uniform(keys(200_000), "b"),
    }
    base = draws.uniform(keys(200_000), "a")
    for name, other in streams.items():
        joint = ((base * 16).long() * 16 + (other * 16).long()).bincount(minlength=256)
        assert abs(deviations(joint)) < 5, name


@given(st.integers(0, 300), WORDS)
def test_a_permutation_is_one(size: int, word: int) -> None:
    order = draws.permutation(size, word)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, draws.permutation(size, word))


def test_permutations_are_uniform() -> None:
    first = torch.tensor([draws.permutation(8, word)[0] for word in range(4000)])
    assert abs(deviations(first.bincount(minlength=8))) < 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_numbers() -> None:
    on_cpu, on_gpu = keys(64), keys(64).cuda()
    assert torch.equal(draws.uniform(on_gpu, "a").cpu(), draws.uniform(on_cpu, "a"))
    assert torch.equal(draws.field(on_gpu, "a", 4096).cpu(), draws.field(on_cpu, "a", 4096))
