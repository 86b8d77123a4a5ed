"""The views of a batch: what is drawn how often, the same in any batch, and nobody waits for a device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccd_train.augment.affine import Affine
from ccd_train.augment.geometry import sample_theta, warp_images
from ccd_train.augment.photometric.chain import ChainStage, Runner, Table
from ccd_train.augment.severities import CHAINS, Augment, Group
from ccd_train.augment.views import MEAN, STD, Augmentation, Views, WordAugmentation
from ccd_train.draws import mix, sample_keys
from ccd_train.errors import UserError

SIZE = (64, 3, 32, 128)
SEVERITIES = [name for name in CHAINS if name.startswith("severity")]


def keys(count: int, epoch: int = 0) -> Tensor:
    return sample_keys(5, torch.full((count,), epoch), torch.arange(count))


def crops(count: int = 64) -> tuple[Tensor, Tensor]:
    """Soft random pictures, uint8 [B, 3, 32, 128], and native sizes [B, 2]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (count, 3, 6, 20), generator=generator).float()
    images = torch.nn.functional.interpolate(coarse, size=(32, 128), mode="bilinear").to(torch.uint8)
    return images, torch.randint(12, 90, (count, 2), generator=generator)


def levels(view: Tensor) -> Tensor:
    """Grey levels 0–255 of a normalised view."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (view * std + mean) * 255


def test_views_are_normalised_pictures() -> None:
    images, sizes = crops()
    views = Augmentation(Augment(), Affine())(images, sizes, keys(64))
    assert views.regular.shape == views.irregular.shape == SIZE and views.theta.shape == (64, 2, 3)
    for view in (views.regular, views.irregular):
        assert view.dtype == torch.float32 and torch.isfinite(view).all()
        assert levels(view).min() > -0.01 and levels(view).max() < 255.01
    assert torch.equal(views.theta, sample_theta(keys(64), sizes, Affine()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chain", SEVERITIES)
def test_a_batch_of_one_equals_a_row_of_64_bit_for_bit(chain: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images, sizes = crops()
        augmentation = Augmentation(Augment(chain), Affine())
        whole = augmentation(images, sizes, keys(64))
        for row in range(0, 64, 1 if chain == "severity_5" else 9):
            rows = slice(row, row + 1)
            one = augmentation(images[rows], sizes[rows], keys(64)[rows])
            assert torch.equal(one.regular[0], whole.regular[row])
            assert torch.equal(one.irregular[0], whole.irregular[row])
            assert torch.equal(one.theta[0], whole.theta[row])
    finally:
        torch.set_num_threads(before)


def test_the_order_of_a_batch_does_not_matter() -> None:
    images, sizes = crops()
    augmentation, order = Augmentation(Augment(), Affine()), torch.randperm(64)
    there, back = augmentation(images, sizes, keys(64)), augmentation(images[order], sizes[order], keys(64)[order])
    assert torch.equal(there.regular[order], back.regular) and torch.equal(there.irregular[order], back.irregular)


def test_nothing_is_consumed_or_changed() -> None:
    images, sizes = crops()
    kept, state = images.clone(), torch.random.get_rng_state()
    augmentation = Augmentation(Augment(), Affine())
    first, again = (augmentation(images, sizes, keys(64)) for _ in range(2))
    assert torch.equal(images, kept)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.regular, again.regular) and torch.equal(first.irregular, again.irregular)


def test_the_callers_precision_and_deterministic_mode_change_nothing() -> None:
    images, sizes = crops()
    augmentation = Augmentation(Augment(), Affine())
    plain = augmentation(images, sizes, keys(64))
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            under = augmentation(images, sizes, keys(64))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert under.regular.dtype == torch.float32 and torch.equal(plain.regular, under.regular)
    assert torch.equal(plain.irregular, under.irregular)


def test_epochs_and_views_differ() -> None:
    images, sizes = crops()
    augmentation = Augmentation(Augment("severity_5", ("identity=0",)), Affine())
    first, second = (augmentation(images, sizes, keys(64, epoch)) for epoch in (0, 1))

    def differ(one: Tensor, other: Tensor) -> float:
        return (one != other).flatten(1).any(dim=1).float().mean().item()

    assert differ(first.regular, second.regular) > 0.9
    assert differ(first.regular, first.irregular) > 0.9


def test_where_no_affine_is_drawn_the_irregular_view_is_the_crop() -> None:
    images, sizes = crops()
    views = Augmentation(Augment(), Affine())(images, sizes, keys(64))
    still = (views.theta == torch.eye(2, 3)).flatten(1).all(dim=1)
    assert 5 < still.sum() < 40
    assert (levels(views.irregular[still]).round() == images[still]).all()


def test_the_irregular_view_is_the_chain_and_then_theta() -> None:
    images, sizes = crops()
    views = Augmentation(Augment(), Affine(probability=1.0))(images, sizes, keys(64))
    chain = Runner(Augment().resolve())
    bent = warp_images(chain(images, mix(keys(64), 2), torch.zeros(64, dtype=torch.bool)), views.theta)
    assert (levels(views.irregular) - bent).abs().max() < 0.01
    black = bent.amax(dim=1) == 0
    assert black.float().mean() > 0.05  # the corners are filled with zeros


def stages(chain: str, count: int) -> tuple[list[Table], list[ChainStage]]:
    resolved = CHAINS[chain]
    tables = [Table(resolved, group) for group in resolved.groups]
    return tables, [table.stage(keys(count), torch.zeros(count, dtype=torch.bool)) for table in tables]


@pytest.mark.parametrize("chain", CHAINS)
def test_groups_and_operations_are_drawn_as_often_as_they_should(chain: str) -> None:
    count = 40_000
    for table, stage in zip(*stages(chain, count), strict=True):
        drawn = {part.operation: part.stop - part.start for part in stage.slices}
        group = next(group for group in CHAINS[chain].groups if group.name == table.name)
        for operation, weight in group.operations.items():
            share = group.probability * weight
            bound = 4.5 * math.sqrt(count * share * (1 - share)) + 1e-6
            assert abs(drawn.get(operation, 0) - count * share) <= bound, operation


def test_the_identity_is_drawn_as_often_as_it_should() -> None:
    """Counted by a chain that otherwise inverts every image."""
    chain = CHAINS["severity_5"]
    always = replace(chain, groups=(Group("noise", 1.0, {"invert": 1.0}),), ranges={"invert.probability": (1.0, 1.0)})
    count = 2000
    black = torch.zeros(count, 3, 32, 128, dtype=torch.uint8)
    kept = (Runner(always)(black, keys(count), torch.zeros(count, dtype=torch.bool)) == 0).flatten(1).all(dim=1)
    assert abs(kept.float().mean().item() - 0.2) < 4.5 * math.sqrt(0.2 * 0.8 / count)


def test_parameters_fill_their_ranges() -> None:
    for table, stage in zip(*stages("severity_5", 60_000), strict=True):
        for part in stage.slices:
            row = table.operations.index(part.operation)
            values = stage.parameters[part.start : part.stop, : part.parameters]
            low, span = table.low[row, : part.parameters], table.span[row, : part.parameters]
            whole = table.whole[row, : part.parameters]
            top = low + span - whole.float()
            assert (values >= low - 1e-5).all() and (values <= top + 1e-4).all(), part.operation
            wide = span - whole.float() > 0
            reach = (values.amax(dim=0) - values.amin(dim=0))[wide] / (top - low)[wide]
            assert (reach > 0.97).all(), part.operation
            assert torch.equal(values[:, whole], values[:, whole].round())


class Calls(TorchDispatchMode):
    """Counts what torch is asked to compute, and what would make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero")
    FREE = (
        *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "permute", "select"),
        *("slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "lift_fresh"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        self.calls += name not in self.FREE
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.WAITING or by_mask:
            self.waiting.append(name)
        return function(*args, **(kwargs or {}))


def test_operations_never_wait_for_the_device() -> None:
    """What the host decides is decided before the first image is touched; constants are copied once."""
    images, _ = crops()
    _, planned = stages("severity_5", 512)
    pixels = images.float().repeat(8, 1, 1, 1)

    def apply() -> None:
        for stage in planned:
            stage.apply(pixels, stage.seeds, stage.parameters)

    apply()  # the constants
    with Calls() as calls:
        apply()
    assert not calls.waiting
    assert calls.calls > 100  # they are seen


def test_kernels_of_a_batch_are_bounded() -> None:
    """Nearly every call below is a kernel on a GPU. The medians are left out: there, each is one kernel and a few."""
    _, planned = stages("severity_5", 512)
    kept = [
        replace(stage, slices=[part for part in stage.slices if "median" not in part.operation]) for stage in planned
    ]
    pixels = crops()[0].float().repeat(8, 1, 1, 1)
    with Calls() as calls:
        for stage in kept:
            stage.apply(pixels, stage.seeds, stage.parameters)
    print(f"{calls.calls} calls for both views of 256 samples")
    assert 500 < calls.calls < 1900


def test_fine_tuning_has_no_place_in_pretraining() -> None:
    with pytest.raises(UserError, match="finetune_small"):
        Augmentation(Augment("finetune_small"), Affine())


@pytest.mark.parametrize("chain", ["finetune_small", "finetune_base"])
def test_words_for_fine_tuning(chain: str) -> None:
    images, sizes = crops()
    augmentation = WordAugmentation(Augment(chain), Affine())
    whole = augmentation(images, sizes, keys(64))
    assert whole.shape == SIZE and torch.isfinite(whole).all()
    assert levels(whole).min() > -0.01 and levels(whole).max() < 255.01
    for row in range(0, 64, 5):
        rows = slice(row, row + 1)
        assert torch.equal(augmentation(images[rows], sizes[rows], keys(64)[rows])[0], whole[row])


def test_a_third_of_the_warps_are_of_each_kind() -> None:
    """Told apart by what they do to a white page: rotations keep its area, the others shrink or bend it."""
    only_warps = ("invert=0", "any=0", "sharpness=0", "contrast=0", "warp=1")
    page = torch.full((600, 3, 32, 128), 255, dtype=torch.uint8)
    bent = WordAugmentation(Augment("finetune_small", only_warps), Affine())(
        page, torch.tensor([32, 128]).expand(600, 2), keys(600)
    )
    straight = levels(bent)[:, 0, 16, 64] > 128
    assert straight.float().mean() > 0.99  # the middle stays
    unchanged = (levels(bent) > 254).flatten(1).all(dim=1).float().mean()
    assert unchanged < 0.02
    none = WordAugmentation(Augment("finetune_small", (*only_warps[:-1], "warp=0")), Affine())(
        page, torch.tensor([32, 128]).expand(600, 2), keys(600)
    )
    assert (levels(none) > 254).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_views_without_a_wait() -> None:
    images, sizes = crops()
    augmentation = Augmentation(Augment(), Affine())
    on_cpu = augmentation(images, sizes, keys(64))
    augmentation(images.cuda(), sizes, keys(64))
    there = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu: Views = augmentation(there, sizes, keys(64))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_gpu.theta.cpu(), on_cpu.theta)
    for one, other in ((on_gpu.regular, on_cpu.regular), (on_gpu.irregular, on_cpu.irregular)):
        near = (levels(one.cpu()) - levels(other)).abs() <= 1
        assert near.float().mean() >= 0.995
