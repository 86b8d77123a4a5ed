"""Chains of element-wise work that --train.compile turns into one kernel each.

Eagerly, each operation of such a chain reads and writes its whole tensor. Compiled, the sums may be added in another
order and products fused with sums: the last bits differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_FUSED: list[Fused[..., Any]] = []


class Fused(Generic[Parameters, Result]):
    """A function of tensors, compiled or not."""

    def __init__(self, function: Callable[Parameters, Result], sizes_vary: bool) -> None:
        self._eager = self._now = function
        self._sizes_vary = sizes_vary
        _FUSED.append(self)

    def __call__(self, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        return self._now(*arguments, **named)

    def switch(self, compiled: bool) -> None:
        self._now = torch.compile(self._eager, dynamic=self._sizes_vary) if compiled else self._eager


def fused(sizes_vary: bool) -> Callable[[Callable[Parameters, Result]], Fused[Parameters, Result]]:
    """Decorates a function without side effects but on arguments named so. sizes_vary: from batch to batch."""
    return lambda function: Fused(function, sizes_vary)


def compile_all(compiled: bool) -> None:
    """From now on, all of them, in this process."""
    for function in _FUSED:
        function.switch(compiled)
