"""Work on the next batch while the device is busy with this one.

The views of a batch are thousands of small operations. To launch them takes the host ten times as long as they take the
device, so a thread launches them, on a stream of its own, while the batch before is trained on. What is made is a pure
function of the batch: only the time changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.config.run import RunConfig
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Batches


@dataclass(frozen=True, kw_only=True)
class Prepared(Batch):
    """A batch on the host, with what was made of it on the device."""

    made: tuple[Tensor, ...]


class Ahead(Iterator[Prepared]):
    """The batches of a loader, each with what `make` makes of it: begun as soon as the one before is taken.

    `make` returns a tuple of tensors on this rank's device. It runs beside the training, so it must not change what all
    threads share: torch's deterministic mode, for example.
    """

    def __init__(self, batches: Batches, make: Callable[[Batch], tuple[Tensor, ...]]) -> None:
        self._batches, self._make = batches, make
        self._stream = torch.cuda.Stream(distributed.device()) if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._coming: Future[tuple[Prepared, Any] | None] = self._thread.submit(self._prepare, None)
        self.damaged = 0
        """Samples replaced in the batches that were taken, by this rank."""

    def __next__(self) -> Prepared:
        found = self._coming.result()
        if found is None:
            raise StopIteration
        prepared, ready = found
        copied = None
        if self._stream is not None:
            # Copies belong to this stream, whoever keeps them for how long. The memory of what was copied goes back to
            # the thread's, which waits for the copies before it uses that again. (`record_stream` would save them; but
            # a worker process that is forked meanwhile would die of such a tensor: it has no CUDA.)
            torch.cuda.current_stream().wait_event(ready)
            prepared = replace(prepared, made=tuple(tensor.clone() for tensor in prepared.made))
            copied = torch.cuda.current_stream().record_event()
        del found
        self._coming = self._thread.submit(self._prepare, copied)
        self.damaged += len(prepared.replaced)
        return prepared

    def close(self) -> None:
        """Ends the thread and the loader's processes."""
        self._thread.shutdown(cancel_futures=True)
        self._batches.close()

    def _prepare(self, copied: Any) -> tuple[Prepared, Any] | None:
        """The next batch, and the event after which the device has all of it; None after the last one."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        if self._stream is None:
            return Prepared(**vars(batch), made=self._make(batch)), None
        with torch.cuda.stream(self._stream):  # sets the device as well
            if copied is not None:
                self._stream.wait_event(copied)
            return Prepared(**vars(batch), made=self._make(batch)), self._stream.record_event()


def ahead(batches: Batches, make: Callable[[Batch], tuple[Tensor, ...]], config: RunConfig) -> Batches | Ahead:
    """The batches, made ahead where that pays: on a GPU.

    Not with --train.deterministic: the views turn torch's mode off for themselves, which all threads would see.
    """
    pays = distributed.device().type == "cuda" and not config.train.deterministic
    return Ahead(batches, make) if pays else batches


def made_of(batch: Batch, make: Callable[[Batch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What was made of the batch ahead, or what is made of it now."""
    return batch.made if isinstance(batch, Prepared) else make(batch)
