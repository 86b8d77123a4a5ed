"""The distillation loss against its formula, its memory, the centre and the teacher's figures, in one process.

(Over ranks: test_ranks.py. Against the official values: test_reference_parity.py.)
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.models.losses import CHUNK, Center, distillation_loss, segmentation_loss, teacher_statistics

MEMORY = Path(__file__).parent / "benchmarks" / "loss_memory.py"


def logits(rows: int, prototypes: int, seed: int) -> Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed))


def loss_of(student: Tensor, teacher: Tensor, center: Tensor, pairs: int) -> Tensor:
    return distillation_loss(
        student, teacher, center, student_temperature=0.1, teacher_temperature=0.04, pairs_global=torch.tensor(pairs)
    )


def formula(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """As it is written in the paper, with the two directions apart."""
    target = F.softmax((teacher - center) / 0.04, dim=1)
    log_probability = F.log_softmax(student / 0.1, dim=1)
    regular, irregular = log_probability.chunk(2)
    target_regular, target_irregular = target.chunk(2)
    forward = -(target_irregular * regular).sum(dim=1).mean()
    backward = -(target_regular * irregular).sum(dim=1).mean()
    return (forward + backward) / 2


@pytest.mark.parametrize(("pairs", "prototypes"), [(1, 7), (13, 300), (7, CHUNK // 8)])
def test_loss_and_gradient_are_the_formulas(pairs: int, prototypes: int) -> None:
    """The last case is cut into chunks, one of which crosses from the regular to the irregular views."""
    student = logits(2 * pairs, prototypes, seed=0).requires_grad_()
    teacher, center = logits(2 * pairs, prototypes, seed=1) * 0.3, logits(1, prototypes, seed=2) * 0.1
    ours, expected = loss_of(student, teacher, center, pairs), formula(student, teacher, center)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    upstream = 3.0  # a loss scale, or a weight
    (gradient,) = torch.autograd.grad(ours * upstream, student)
    (expected_gradient,) = torch.autograd.grad(expected * upstream, student)
    tolerance = 1e-5 * float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=tolerance)


def test_without_characters_the_loss_is_zero_and_so_is_the_gradient() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    student = torch.zeros(0, 6) @ weight.t()
    loss = loss_of(student, torch.zeros(0, 4), torch.zeros(1, 4), pairs=0)
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_characters_elsewhere_count() -> None:
    """This rank's sum is divided by the pairs of all ranks, not by its own."""
    student, teacher, center = logits(4, 9, 0), logits(4, 9, 1), torch.zeros(1, 9)
    assert loss_of(student, teacher, center, 8).item() == pytest.approx(loss_of(student, teacher, center, 2).item() / 4)


def test_a_second_backward_pass_is_refused() -> None:
    student = logits(2, 5, 0).requires_grad_()
    loss = loss_of(student, logits(2, 5, 1), torch.zeros(1, 5), 1)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()


def test_half_precision_logits_are_refused() -> None:
    with pytest.raises(AssertionError, match="float32"):
        loss_of(logits(2, 5, 0).bfloat16(), logits(2, 5, 1), torch.zeros(1, 5), 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_one_tensor_of_logits_is_kept_for_the_backward_pass() -> None:
    """In a fresh process, in units of [2M, P] float32; the formula written naively keeps 2 and peaks at 5."""
    result = subprocess.run([sys.executable, MEMORY, "--pairs", "512"], capture_output=True, text=True, check=True)
    figures = dict(line.split()[:2] for line in result.stdout.splitlines() if line.startswith(("kept", "peak")))
    assert float(figures["kept"]) < 1.3
    assert float(figures["peak"]) < 3.7  # student, teacher, gradient, and a few chunks


def test_segmentation_loss_takes_bool_and_integer_masks() -> None:
    scores, masks = torch.randn(3, 2, 4, 5), torch.rand(3, 4, 5) > 0.5
    probability = scores.softmax(dim=1)
    chosen = torch.where(masks, probability[:, 1], probability[:, 0])
    torch.testing.assert_close(segmentation_loss(scores, masks), -chosen.log().mean())
    assert torch.equal(segmentation_loss(scores, masks), segmentation_loss(scores, masks.to(torch.uint8)))
    assert segmentation_loss(scores.bfloat16(), masks).dtype == torch.float32


def test_the_center_moves_towards_the_mean_and_stays_without_characters() -> None:
    center = Center(5)
    rows = logits(6, 5, 0)
    center.update(rows, 0.9)
    torch.testing.assert_close(center.value, 0.1 * rows.mean(dim=0, keepdim=True))
    before = center.value.clone()
    center.update(torch.zeros(0, 5), 0.9)
    assert torch.equal(center.value, before)


def test_a_balanced_center_shares_out_all_prototypes() -> None:
    """Also of rows that are nearly the same: what they have in common decides nothing, what tells them apart does."""
    prototypes, temperature = 32, 0.03
    rows = logits(1, prototypes, 0) + 0.05 * logits(256, prototypes, 1)
    center = Center(prototypes)
    assert teacher_statistics(rows, center.value, temperature)["prototypes_used"] < 2
    center.balance(rows, temperature, 20)
    figures = teacher_statistics(rows, center.value, temperature)
    assert figures["prototypes_used"].item() == pytest.approx(prototypes, rel=1e-3)
    assert figures["teacher_entropy"].item() < 0.8 * math.log(prototypes)


def test_a_balanced_center_is_that_of_sinkhorn_and_knopp() -> None:
    rows, temperature = logits(40, 8, 2), 0.5
    shares = (rows / temperature).double().exp()
    for _ in range(200):
        shares = shares / shares.sum(dim=0)
        shares = shares / shares.sum(dim=1, keepdim=True)
    center = Center(8)
    center.balance(rows, temperature, 200)
    targets = ((rows - center.value) / temperature).softmax(dim=1)
    torch.testing.assert_close(targets, shares.float(), atol=1e-5, rtol=1e-4)


def test_a_balanced_center_without_characters_is_finite() -> None:
    center = Center(5)
    center.balance(torch.zeros(0, 5), 0.04, 3)
    assert torch.equal(center.value, torch.zeros(1, 5))


def test_figures_of_uniform_and_of_collapsed_teachers() -> None:
    prototypes, center = 64, torch.zeros(1, 64)
    uniform = teacher_statistics(torch.zeros(10, prototypes), center, 0.04)
    assert uniform["teacher_entropy"].item() == pytest.approx(math.log(prototypes), rel=1e-5)
    one = torch.zeros(10, prototypes)
    one[:, 3] = 10.0
    collapsed = teacher_statistics(one, center, 0.04)
    assert collapsed["teacher_entropy"].item() == pytest.approx(0.0, abs=1e-5)
    assert collapsed["prototypes_used"].item() == pytest.approx(1.0, rel=1e-4)
    spread = teacher_statistics(torch.eye(prototypes) * 10, center, 0.04)
    assert spread["teacher_entropy"].item() == pytest.approx(0.0, abs=1e-5)
    assert spread["prototypes_used"].item() == pytest.approx(prototypes, rel=1e-4)


def test_figures_without_characters_are_finite() -> None:
    statistics = teacher_statistics(torch.zeros(0, 8), torch.zeros(1, 8), 0.04)
    assert all(torch.isfinite(value) for value in statistics.values())
