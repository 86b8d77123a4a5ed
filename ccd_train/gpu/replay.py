"""Work of fixed shapes that a GPU is asked for as a whole: a CUDA graph in the place of its hundred launches.

Each launch takes the host 10 to 40 µs, and small kernels are done sooner than the next is launched. What is recorded is
what would have been launched: the values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """What a graph reads, does and leaves behind. The tensors stay where they are."""

    inputs: tuple[Tensor, ...]
    graph: Any
    result: Tensor


class Replayed:
    """A function of tensors that returns one, recorded once for every shape that it meets on a GPU.

    It must not wait for the device, nor depend on anything but its arguments. Its result is overwritten by whatever of
    the same `memory` is replayed next, so what shares one must belong to one thread.
    """

    def __init__(self, function: Callable[..., Tensor], memory: str) -> None:
        self._function, self._memory = function, memory
        self._recordings: dict[tuple[Any, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not inputs[0].is_cuda:
            return self._function(*inputs)
        key = tuple((tuple(one.shape), one.dtype, one.device) for one in inputs)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(inputs)
        torch._foreach_copy_(list(recording.inputs), list(inputs))
        recording.graph.replay()
        return recording.result

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        static = tuple(one.clone() for one in inputs)
        self._function(*(one.clone() for one in inputs))  # what it makes once and keeps must not be made in a graph
        stream, pool = _place(self._memory, inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # Other threads go on launching. `torch.cuda.graph` would wait for them and empty the allocator's cache.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = self._function(*static)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return Recording(static, graph, result)


@cache
def _place(memory: str, device: torch.device) -> tuple[Any, Any]:
    """The stream on which graphs of this memory are recorded, and its handle."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
