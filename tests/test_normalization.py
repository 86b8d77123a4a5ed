"""Our batch normalisation in one process against torch's own. (Over ranks: test_ranks.py.)"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ccd_train.models.normalization import BatchNorm


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pair(channels: int) -> tuple[BatchNorm, nn.BatchNorm2d]:
    ours, theirs = BatchNorm(channels), nn.BatchNorm2d(channels)
    with torch.no_grad():
        for parameter, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            parameter.copy_(torch.randn(channels, generator=generator()) + 1)
            other.copy_(parameter)
    return ours, theirs


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of input, weight and bias under a fixed upstream gradient."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    upstream = torch.randn(y.shape, generator=generator()).to(y.dtype)
    return y, list(torch.autograd.grad((y * upstream).sum(), [leaf, *module.parameters()]))


def test_training_equals_torch() -> None:
    ours, theirs = pair(5)
    for step in range(3):
        x = torch.randn(4, 5, 8, 6, generator=torch.Generator().manual_seed(step)) * 3 + 2
        (y, gradients), (expected, expected_gradients) = run(ours, x), run(theirs, x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    assert theirs.running_mean.abs().min() > 0.1, "three steps must have moved it"


def test_evaluation_equals_torch() -> None:
    ours, theirs = pair(5)
    x = torch.randn(4, 5, 8, 6, generator=generator())
    run(ours, x + 1), run(theirs, x + 1)
    (y, gradients), (expected, expected_gradients) = run(ours.eval(), x), run(theirs.eval(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients[0], expected_gradients[0])


def test_a_large_mean_does_not_drown_the_deviation() -> None:
    """Once the running mean has followed, sums are taken about it: σ = 0.1 about 300 is normalised to 1 percent."""
    norm = BatchNorm(1)
    x = 300 + 0.1 * torch.randn(16, 1, 16, 16, generator=generator())
    for _ in range(120):
        y = norm(x)
    expected = (x.double() - x.double().mean()) / x.double().std()
    assert (y - expected).abs().max() < 0.02


def test_bfloat16_keeps_its_running_statistics_in_float32() -> None:
    norm = BatchNorm(3).bfloat16()
    assert (norm.weight.dtype, norm.running_mean.dtype) == (torch.bfloat16, torch.float32)
    x = torch.randn(8, 3, 16, 16, generator=generator())
    y = norm(x.bfloat16())
    y.sum().backward()
    assert y.dtype == norm.weight.grad.dtype == torch.bfloat16
    reference = BatchNorm(3)(x)
    assert (y.float() - reference).abs().max() < 0.05
    assert norm.running_mean.ne(norm.running_mean.bfloat16().float()).any()
