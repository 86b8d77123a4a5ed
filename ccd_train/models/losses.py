"""The two losses, the centre, and what tells a healthy teacher from a collapsed one.

Shapes: B images, H W pixels, M characters on this rank, P prototypes; [2M, P] holds the regular view's rows, then the
irregular view's.

The engine averages gradients over ranks. A loss that is a sum over this rank's characters is therefore multiplied by
the number of ranks and divided by the characters of all ranks: the average is then the gradient of one process that
holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ccd_train import distributed
from ccd_train.gpu.fusion import fused

CHUNK = 1 << 23  # elements of a [rows, P] chunk: 32 MB in float32
CHUNK_OF_GPU = 1 << 25  # fewer launches


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, 2, H, W] (background, text) against masks [B, H, W] (true or 1 = text).

    Of two classes only the difference of the logits counts; torch's own over images has no deterministic CUDA kernel.
    """
    background, text = logits.float().unbind(dim=1)
    return F.binary_cross_entropy_with_logits(text - background, masks.float())


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    pairs_global: Tensor,
) -> Tensor:
    """½·[CE(regular → irregular) + CE(irregular → regular)] over the characters of all ranks, for averaged gradients.

        target  = softmax((teacher − center) / teacher_temperature)       # no gradient
        loss    = −Σ target of the other view · log softmax(student / student_temperature)
                  · ranks / (2 · pairs_global)

    student, teacher float32 [2M, P]; center [1, P]; pairs_global: the number of characters over all ranks, a tensor of
    one element. M = 0 gives 0 with zero gradients; pairs_global = 0 gives 0 on every rank.

    The backward pass keeps one [2M, P] tensor, the gradient, which is computed together with the loss.
    """
    assert student.dtype == teacher.dtype == torch.float32, "the softmaxes need float32 logits"
    scale = distributed.world_size() / (2 * pairs_global.float().clamp(min=1)).reshape(())
    loss: Tensor = _CrossEntropy.apply(student, teacher, center, student_temperature, teacher_temperature, scale)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of every row with the teacher's row of the other view, times a scale; a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        scale: Tensor,
    ) -> Tensor:
        loss = student.new_zeros(())
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        pairs = len(student) // 2
        for rows in _chunks(student):
            other = (torch.arange(rows.start, rows.stop, device=student.device) + pairs) % (2 * pairs)
            into = None if gradient is None else gradient[rows]
            loss -= _agreement(student[rows], teacher[other], center, student_temperature, teacher_temperature, into)
        if gradient is not None:
            gradient *= scale / student_temperature
        ctx.gradient = gradient
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "one backward pass only: its gradient was scaled in place"
        return gradient.mul_(upstream), None, None, None, None, None


@fused(sizes_vary=True)
def _agreement(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    gradient: Tensor | None,
) -> Tensor:
    """Σ target · log softmax(student / temperature) over some rows; writes softmax − target to `gradient`."""
    target = _targets(teacher, center, teacher_temperature)
    log_probability = F.log_softmax(student / student_temperature, dim=1)
    agreement = (target * log_probability).sum()
    if gradient is not None:
        torch.sub(log_probability.exp_(), target, out=gradient)
    return agreement


class Center:
    """The running mean of the teacher's logits, [1, P] float32, which is subtracted before its softmax."""

    def __init__(self, prototypes: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(1, prototypes, device=device)

    @torch.no_grad()
    def update(self, teacher: Tensor, momentum: float) -> None:
        """Moves towards the mean over the rows [2M, P] of all ranks; stays where no rank has any."""
        sums = torch.cat([teacher.sum(dim=0), teacher.new_full((1,), len(teacher))])
        sums = distributed.all_reduce_sum(sums)
        rows = sums[-1]
        mean = sums[:-1] / rows.clamp(min=1)
        self.value.lerp_(mean[None], (1 - momentum) * (rows > 0))

    @torch.no_grad()
    def balance(self, teacher: Tensor, temperature: float, rounds: int) -> None:
        """Instead of `update`: the centre with which the targets of all ranks' rows [2M, P] share out all prototypes.

        Sinkhorn-Knopp (Cuturi 2013; Caron et al. 2020) divides exp(logit / temperature) by its column sums and by its
        row sums in turn. The row sums are the softmax of the targets, and dividing a column is a shift of its centre.
        """
        self.value.zero_()
        for _ in range(rounds):
            sums = teacher.new_zeros(teacher.shape[1] + 1)
            for rows in _chunks(teacher):
                sums[:-1] += _targets(teacher[rows], self.value, temperature).sum(dim=0)
            sums[-1] = len(teacher)
            sums = distributed.all_reduce_sum(sums)
            share = sums[:-1] * teacher.shape[1] / sums[-1].clamp(min=1)  # 1 where a prototype has its part
            self.value += temperature * share.clamp(min=torch.finfo(share.dtype).tiny).log() * (sums[-1] > 0)


@torch.no_grad()
def teacher_statistics(teacher: Tensor, center: Tensor, temperature: float) -> dict[str, Tensor]:
    """Over the characters of all ranks: how sharp the targets are, and how many prototypes they share out.

    teacher_entropy: mean entropy of a target, in nats. Near ln P: uniform collapse. The distillation loss less this is
    KL(teacher ‖ student).
    prototypes_used: exp of the entropy of the mean target. Near 1: everything falls on one prototype.
    """
    sums = teacher.new_zeros(teacher.shape[1] + 2)
    for rows in _chunks(teacher):
        target = _targets(teacher[rows], center, temperature)
        sums[:-2] += target.sum(dim=0)
        sums[-2] += torch.special.entr(target).sum()
    sums[-1] = len(teacher)
    sums = distributed.all_reduce_sum(sums)
    count = sums[-1].clamp(min=1)
    spread = torch.special.entr(sums[:-2] / count).sum()
    return {"teacher_entropy": sums[-2] / count, "prototypes_used": spread.exp()}


def _targets(teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
    return F.softmax((teacher - center) / temperature, dim=1)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, (CHUNK if logits.device.type == "cpu" else CHUNK_OF_GPU) // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, min(start + rows, len(logits)))
