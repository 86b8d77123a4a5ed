"""A step on a device that is not there: no tensor of the host mixes in, and only what must wait for it waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Tiny
from pretend import DEVICE, Pretended, Remote, up
from pretended_step import pretended_step

from ccd_train.augment.affine import Affine
from ccd_train.augment.severities import CHAINS, Augment
from ccd_train.augment.views import Augmentation, WordAugmentation
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Share, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.draws import sample_keys
from ccd_train.gpu.replay import Replayed

BATCH = 16
CHARACTERS = "models/ccd.py"  # how many there are decides the shapes of what follows


@pytest.fixture(scope="module")
def batch(tiny: Tiny) -> Batch:
    corpus = Corpus.open(tiny.shards)
    order = sample_order(corpus, Config().data, 0)
    with loader(corpus, order, Share(0, BATCH, BATCH, BATCH, 0, 1), workers=0) as batches:
        return next(batches)


@pytest.mark.parametrize(
    ("from_student", "rounds"), [(False, 0), (True, 0), (False, 3)], ids=["pseudo-masks", "own regions", "sinkhorn"]
)
def test_a_step_of_pretraining(batch: Batch, from_student: bool, rounds: int) -> None:
    config = read_recipe("vit_nano", Config)
    config = replace(config, distillation=replace(config.distillation, sinkhorn_rounds=rounds))
    device, loss, student = pretended_step(config, batch, from_student)
    assert loss.isfinite() and loss > 1
    assert [place.partition(":")[0] for _, place in device.waits.elements()] == [CHARACTERS]
    gradients = [parameter.grad for parameter in student.parameters() if parameter.requires_grad]
    assert all(isinstance(gradient, Remote) and gradient.inner.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("chain", CHAINS)
def test_views_are_those_of_a_cpu(batch: Batch, chain: str) -> None:
    """In blocks, with copies that fill them up: to the bit, and without a wait."""
    keys = sample_keys(3, batch.epochs, batch.sample_ids)
    bends = CHAINS[chain].warp > 0
    augmentation: Any = (WordAugmentation if bends else Augmentation)(Augment(chain), Affine())
    expected = augmentation(batch.images_u8, batch.native_size, keys)
    with Pretended() as device:
        augmentation(up(batch.images_u8), batch.native_size, keys)
        device.waits.clear()
        found = augmentation(up(batch.images_u8), batch.native_size, keys)
    for name in ("",) if bends else ("regular", "irregular"):
        there, here = (getattr(views, name) if name else views for views in (found, expected))
        assert isinstance(there, Remote) and torch.equal(there.inner, here)
    assert not device.waits


def test_a_tensor_of_the_host_does_not_pass() -> None:
    with Pretended(), pytest.raises(AssertionError, match="mixes tensors of host and device"):
        up(torch.ones(3)) + torch.ones(3)


def test_launches_and_waits_are_counted() -> None:
    with Pretended() as device:
        a: Any = up(torch.arange(6.0))
        (a[1:].view(5, 1) * 2).sum().item()
        assert a[a > 2].shape == (3,)
        a.to("cpu")
        a.to("cpu", non_blocking=True)
        torch.tensor([1.0], device=DEVICE)
    assert device.waits.total() == 4  # item, the mask, the copy, the list
    found = [name for _, _, name in device.launches.elements()]
    assert sorted(found) == ["_local_scalar_dense", "_to_copy", "_to_copy", "gt", "index", "mul", "sum"]


def test_a_graph_is_one_launch_and_may_not_wait() -> None:
    def waits(values: Any) -> Any:
        return values * 2 if values.sum().item() else values

    with Pretended() as device:
        doubled: Any = Replayed(lambda a, b: (a + b) * 2 - a)(up(torch.ones(3)), up(torch.ones(3)))
        assert doubled.inner.tolist() == [3, 3, 3]
        assert device.launches.total() == 3  # two copies, and the graph
        with pytest.raises(AssertionError, match="waits within a graph"):
            Replayed(waits)(up(torch.ones(3)))
