"""A device that is not there: what a GPU would be asked to do, counted on a machine without one.

A tensor of it holds a tensor of the CPU, and the real values are computed, so that whatever depends on data runs. A
tensor of the host in an operation with one of the device is an error, as on a GPU. Every operation but views counts as
one launch; every place where the host would have to wait for the device is noted. The device's name is torch's `meta`:
a build for CPUs refuses to index tensors that say `cuda`.

    with Pretended() as device:
        device.phase = "views"
        views = augmentation(up(images), …)
    device.launches, device.waits
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ccd_train.gpu.replay import Replayed

DEVICE = torch.device("meta")
PRODUCT = Path(__file__).parents[1] / "ccd_train"
VIEWS = {
    "view", "_unsafe_view", "expand", "permute", "transpose", "unsqueeze", "squeeze", "slice", "select", "t", "detach",
    "alias", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "lift_fresh", "unfold", "diagonal",
    "is_same_size", "sym_size", "sym_numel", "sym_stride", "empty", "empty_like", "empty_strided", "new_empty",
}  # fmt: skip
MIXES = {"copy_", "_to_copy", "_foreach_copy_"}  # they bring tensors from one device to the other
WAIT = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "is_nonzero"}
INDEXING = {"index", "index_put_", "index_put"}


class Remote(Tensor):
    """A tensor of the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Remote({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if Pretended.now is not None:  # autograd's own threads know no modes
            return Pretended.now.work(function, arguments, named or {})
        assert function.__name__ == "detach.default", f"{function} outside of `with Pretended()`"
        return up(arguments[0].inner.detach())

    __torch_function__ = torch._C._disabled_torch_function_impl


def up(tensor: Tensor) -> Remote:
    return Remote(tensor)


def move(module: nn.Module) -> None:
    """A module's parameters and buffers, to the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(up(parameter.data), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = up(buffer)


def place() -> str:
    """The line of the product that runs: `models/ccd.py:102`."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(str(PRODUCT)):
        frame = frame.f_back  # type: ignore[assignment]
    return "torch" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(PRODUCT)}:{frame.f_lineno}"


class OnHost(torch.autocast):
    """Autocast that takes the device for a CPU."""

    def __init__(self, device_type: str, *arguments: Any, **named: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *arguments, **named)


class OneKernel(torch.autograd.Function):
    """Attention, which on a GPU is one kernel forward and three backward; on this device torch would take it apart."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, named: dict[str, Any]) -> Any:
        ctx.operands, ctx.named = [one.inner.detach() for one in (query, key, value)], tree_map(_inner, named)
        with Pretended.still(launches=1):
            return up(attention(*ctx.operands, **ctx.named))

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:  # type: ignore[override]
        with Pretended.still(launches=3), torch.enable_grad():
            operands = [one.requires_grad_() for one in ctx.operands]
            mixed = attention(*operands, **ctx.named)
            return *map(up, torch.autograd.grad(mixed, operands, gradient.inner)), None


attention = torch.nn.functional.scaled_dot_product_attention


def one_kernel(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    if isinstance(query, Remote):
        return OneKernel.apply(query, key, value, named)  # type: ignore[no-any-return]
    return attention(query, key, value, **named)


class Pretended(TorchDispatchMode):
    """While it is entered, tensors of the device can be worked with, and what that takes is counted."""

    now: Pretended | None = None

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.launches: Counter[tuple[str, str, str]] = Counter()
        """By phase, place and operation."""
        self.waits: Counter[tuple[str, str]] = Counter()
        """By phase and place."""
        self._within = False
        self._met: set[Replayed] = set()
        self._patches = [
            mock.patch.object(Replayed, "__call__", lambda replayed, *inputs: self._replay(replayed, inputs)),
            mock.patch.object(torch, "tensor", self._tensor(torch.tensor)),
            mock.patch.object(torch, "autocast", OnHost),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", one_kernel),
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
        ]

    @classmethod
    @contextmanager
    def still(cls, launches: int) -> Iterator[None]:
        """So many launches, whatever is done within."""
        device = cls.now
        assert device is not None
        before = device._within
        if not before:
            device.launches[device.phase, place(), "whole"] += launches
        device._within = True
        try:
            yield
        finally:
            device._within = before

    def __enter__(self) -> Pretended:
        for patch in self._patches:
            patch.start()
        super().__enter__()
        Pretended.now = self
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        Pretended.now = None
        for patch in self._patches:
            patch.stop()

    def _tensor(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def tensor(data: Any, *arguments: Any, device: Any = None, **named: Any) -> Tensor:
            if device is None or torch.device(device).type != DEVICE.type:
                return original(data, *arguments, device=device, **named)
            self.waits[self.phase, place()] += 1  # from pageable memory
            return up(original(data, *arguments, **named))

        return tensor

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return self.work(function, arguments, named or {})

    def work(self, function: Any, arguments: Any, named: dict[str, Any]) -> Any:
        """Does an operation on the values inside, and counts it."""
        named = dict(named)
        name = function.__name__.partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        remote = [isinstance(tensor, Remote) for tensor in tensors]
        wanted = named.get("device")
        there = any(remote) if wanted is None else torch.device(wanted).type == DEVICE.type
        if any(remote):
            self._check(name, tensors, remote)
        self._count(name, arguments, named, any(remote), there, wanted)
        if wanted is not None:
            named["device"] = torch.device("cpu")
        named.pop("pin_memory", None)
        result = function(*tree_map(_inner, arguments), **tree_map(_inner, named))
        if name == "_local_scalar_dense" or not there:
            return result
        if name.endswith("_") and not name.startswith("__") and isinstance(arguments[0], Remote):
            return arguments[0]
        return named["out"] if "out" in named else tree_map(_outer, result)

    def _replay(self, replayed: Replayed, inputs: tuple[Tensor, ...]) -> Tensor:
        """A graph is one launch, and a copy into each of its inputs; what it waits for, it must not."""
        if not isinstance(inputs[0], Remote):
            return replayed._function(*inputs)
        with Pretended.still(launches=1 + len(inputs)):
            if replayed not in self._met:  # as when it is recorded: what is made once and kept
                self._met.add(replayed)
                replayed._function(*(one.clone() for one in inputs))
            waits = self.waits.copy()
            result = replayed._function(*(one.clone() for one in inputs))
        assert self.waits == waits, f"{place()}: waits within a graph: {self.waits - waits}"
        return result

    def _check(self, name: str, tensors: list[Tensor], remote: list[bool]) -> None:
        strangers = [tensor for tensor, there in zip(tensors, remote, strict=True) if not there and tensor.ndim > 0]
        assert not strangers or name in MIXES, (
            f"{place()}: {name} mixes tensors of host and device: {[list(one.shape) for one in tensors]} {remote}"
        )

    def _count(self, name: str, arguments: Any, named: Any, any_remote: bool, there: bool, wanted: Any) -> None:
        masked = name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        blocking = not (named.get("non_blocking") or (name == "copy_" and len(arguments) > 2 and arguments[2]))
        down = (name == "_to_copy" and wanted is not None and not there) or (
            name == "copy_" and not isinstance(arguments[0], Remote)
        )
        upward = name == "_to_copy" and there and not isinstance(arguments[0], Remote)
        if (any_remote and (name in WAIT or masked or (down and blocking))) or (upward and blocking):
            self.waits[self.phase, place()] += 1
        if (any_remote or there) and name not in VIEWS and not self._within:
            self.launches[self.phase, place(), name] += 1


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Remote) else value


def _outer(value: Any) -> Any:
    return up(value) if isinstance(value, Tensor) and not isinstance(value, Remote) else value
