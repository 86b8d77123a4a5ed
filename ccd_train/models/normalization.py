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
from ccd_train.gpu.fusion import fused

SPACE = (0, 2, 3)  # all but the channels of [B, C, H, W]


class _Normalize(torch.autograd.Function):
    """weight · (x − mean) / deviation + bias over the global batch; only the input is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normalised x [B, C, H, W], mean [C], variance [C], and the global count of values per channel.

        The sums are taken of x − shift, any rough guess [C] of the mean that is the same on all ranks: a sum of squares
        loses what a mean much larger than the deviation takes up.
        """
        channels = len(shift)
        own_count = shift.new_full((1,), x.numel() / channels)
        sums = distributed.all_reduce_sum(torch.cat([*_moments(x, shift), own_count]))
        count = sums[-1]
        offset = sums[:channels] / count
        variance = (sums[channels:-1] / count - offset.square()).clamp(min=0)
        mean, scale = shift + offset, (variance + eps).rsqrt()
        slope = scale * weight
        intercept = bias - offset * slope
        ctx.save_for_backward(x, mean, scale, slope, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return _scaled(x, shift, slope, intercept), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, slope, count = ctx.saved_tensors
        total, along = _gradient_moments(x, gradient, mean)
        own_sums = torch.stack([total, along * scale])
        along_mean, along_deviation = distributed.all_reduce_sum(own_sums.clone()) / count
        into = _gradient_of(x, gradient, mean, -slope * scale * along_deviation, slope * along_mean, slope)
        return into, own_sums[1], own_sums[0], None, None


@fused(sizes_vary=False)
def _moments(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, the sums of x − shift and of its square."""
    shifted = x - _per_channel(shift)
    return shifted.sum(SPACE), shifted.square().sum(SPACE)


@fused(sizes_vary=False)
def _scaled(x: Tensor, shift: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    """(x − shift) · slope + intercept, in the type of x."""
    shifted = x - _per_channel(shift)
    return shifted.mul_(_per_channel(slope)).add_(_per_channel(intercept)).to(x.dtype)


@fused(sizes_vary=False)
def _gradient_moments(x: Tensor, gradient: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, the sums of the gradient, and of the gradient times x − mean."""
    gradient = gradient.float()
    return gradient.sum(SPACE), (gradient * (x - _per_channel(mean))).sum(SPACE)


@fused(sizes_vary=False)
def _gradient_of(x: Tensor, gradient: Tensor, mean: Tensor, along: Tensor, level: Tensor, slope: Tensor) -> Tensor:
    """slope · (gradient − its mean − normalised x · its mean along it), in the type of x."""
    into = (x - _per_channel(mean)).mul_(_per_channel(along)).sub_(_per_channel(level))
    return into.addcmul_(gradient.float(), _per_channel(slope)).to(x.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


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
            return self._over_the_batch(x)
        slope = (self.running_variance + self.eps).rsqrt() * self.weight.float()
        y: Tensor = (x - _per_channel(self.running_mean)) * _per_channel(slope) + _per_channel(self.bias.float())
        return y.to(x.dtype)

    def _over_the_batch(self, x: Tensor) -> Tensor:
        guess = self.running_mean.clone()  # a copy, as the running mean changes in place
        y: Tensor
        y, mean, variance, count = _Normalize.apply(x, self.weight.float(), self.bias.float(), guess, self.eps)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_variance.lerp_(unbiased, self.momentum)
        return y

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BatchNorm:
        """module.bfloat16() leaves the running statistics in float32, or a tenth of a change would round off."""
        super()._apply(fn, recurse)
        self.running_mean = self.running_mean.float()
        self.running_variance = self.running_variance.float()
        return self
