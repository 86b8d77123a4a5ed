"""Batch normalisation over all ranks, on every backend (torch's SyncBatchNorm refuses CPUs).

Statistics are sums, all-reduced: in the forward pass of the values, in the backward pass of the gradients. So a batch
split over ranks gives the outputs and the gradients of the whole batch. All arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ccd_train import distributed

SPACE = (0, 2, 3)  # all but the channels of [B, C, H, W]


class _Normalize(torch.autograd.Function):
    """(x − mean) / std of the global batch; only the input is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised x [B, C, H, W] in float32, mean [C], variance [C], and the global count of values per channel.

        The sums are taken of x − shift, any rough guess [C] of the mean that is the same on all ranks: a sum of squares
        loses what a mean much larger than the deviation takes up.
        """
        shifted = x.float() - shift[:, None, None]
        channels = len(shift)
        sums = torch.cat([shifted.sum(SPACE), shifted.square().sum(SPACE), shift.new_full((1,), x.numel() / channels)])
        sums = distributed.all_reduce_sum(sums)
        count = sums[-1]
        offset = sums[:channels] / count
        variance = (sums[channels:-1] / count - offset.square()).clamp(min=0)
        mean, scale = shift + offset, (variance + eps).rsqrt()
        ctx.save_for_backward(x, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return (shifted - offset[:, None, None]) * scale[:, None, None], mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor, None, None]:
        x, mean, scale, count = ctx.saved_tensors
        normalized = (x.float() - mean[:, None, None]) * scale[:, None, None]
        sums = torch.stack([gradient.sum(SPACE), (gradient * normalized).sum(SPACE)])
        along_mean, along_deviation = (distributed.all_reduce_sum(sums) / count)[:, :, None, None]
        into = (gradient - along_mean - normalized * along_deviation) * scale[:, None, None]
        return into.to(x.dtype), None, None


class BatchNorm(nn.Module):
    """Normalises [B, C, H, W] per channel: by the global batch in training, by running statistics in evaluation."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            # A copy: the running mean changes in place below.
            normalized, mean, variance, count = _Normalize.apply(x, self.running_mean.clone(), self.eps)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_variance.lerp_(unbiased, self.momentum)
        else:
            scale = (self.running_variance + self.eps).rsqrt()[:, None, None]
            normalized = (x.float() - self.running_mean[:, None, None]) * scale
        y: Tensor = normalized * self.weight.float()[:, None, None] + self.bias.float()[:, None, None]
        return y.to(x.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BatchNorm:
        """module.bfloat16() leaves the running statistics in float32, or a tenth of a change would round off."""
        super()._apply(fn, recurse)
        self.running_mean = self.running_mean.float()
        self.running_variance = self.running_variance.float()
        return self
