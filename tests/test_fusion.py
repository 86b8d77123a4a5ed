"""--train.compile: what is compiled is whole, and few graphs serve batches of any size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ccd_train import draws
from ccd_train.models import losses
from ccd_train.models.losses import distillation_loss
from ccd_train.models.vit import VisionTransformer

SIZES = 200


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_block_is_one_graph_stochastic_depth_included() -> None:
    vit, counters = VisionTransformer(64, 4, 2, taps=(2,), drop_path=0.5).train(), []
    for block in vit.blocks:
        counters.append(CompileCounter())
        block.compile(backend=counters[-1], fullgraph=True)  # raises at a graph break
    keys = draws.sample_keys(0, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    for batch in range(3):
        vit(torch.rand(4, 3, 32, 128), keys + batch)[0].sum().backward()
    # the first block of a rising rate drops nothing, and so has another graph than the rest
    assert [counter.frame_count for counter in counters] == [1] * 4


def test_the_loss_of_two_hundred_batches_needs_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compiled = torch.compile(losses._agreement._eager, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(losses._agreement, "_now", compiled)
    monkeypatch.setattr(losses, "CHUNK", 64 * 37)  # rows of 64 prototypes at once
    random = torch.Generator().manual_seed(0)
    for pairs in torch.randint(1, 150, (SIZES,), generator=random).tolist():
        student = torch.randn(2 * pairs, 64, generator=random, requires_grad=True)
        teacher, center = torch.randn(2 * pairs, 64, generator=random), torch.zeros(1, 64)
        distillation_loss(
            student, teacher, center, student_temperature=0.1, teacher_temperature=0.04,
            pairs_global=torch.tensor(float(pairs)),
        ).backward()  # fmt: skip
    assert 1 <= counter.frame_count <= 4
