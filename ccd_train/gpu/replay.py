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
    """A function of tensors that returns one, recorded for every shape that it meets on a GPU, and for every stream.

    It must not wait for the device, nor depend on anything but its arguments. Read its result before anything else is
    replayed on the same stream: that may overwrite it. Threads need streams of their own.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recordings: dict[tuple[Any, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not inputs[0].is_cuda:
            return self._function(*inputs)
        stream = torch.cuda.current_stream(inputs[0].device)
        key = (stream, *((tuple(one.shape), one.dtype) for one in inputs))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(inputs)
        torch._foreach_copy_(list(recording.inputs), list(inputs))
        recording.graph.replay()
        return recording.result

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        static = tuple(one.clone() for one in inputs)
        self._function(*(one.clone() for one in inputs))  # what it makes once and keeps must not be made in a graph
        now = torch.cuda.current_stream(inputs[0].device)
        aside, pool = _place(now)
        aside.wait_stream(now)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            # Other threads go on launching. `torch.cuda.graph` would wait for them and empty the allocator's cache.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = self._function(*static)
            finally:
                graph.capture_end()
        now.wait_stream(aside)
        return Recording(static, graph, result)


@cache
def _place(stream: Any) -> tuple[Any, Any]:
    """Where graphs for a stream are recorded, and the memory that they share: work on one stream does not overlap."""
    return torch.cuda.Stream(stream.device), torch.cuda.graph_pool_handle()
