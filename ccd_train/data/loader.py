"""Batches made by worker processes, in an order that their number cannot change.

Step s of a run takes the positions start + [s·G, (s + 1)·G) with the global batch size G; micro-step a of rank r takes
the m of them from (a·W + r)·m on (W ranks, m = micro batch size). So which samples a step sees depends on G alone, and
every rank has the same number of micro-steps.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ccd_train import distributed
from ccd_train.config.pretraining import Data
from ccd_train.data.batches import Batch, BatchReader
from ccd_train.data.masks import MaskMode
from ccd_train.data.order import Mixture, Order
from ccd_train.data.pairs import Pairs
from ccd_train.data.shards import Corpus
from ccd_train.data.stage import Stage
from ccd_train.data.words import Words
from ccd_train.errors import TrainingError, UserError

WINDOWS_AHEAD = 2  # kept in the page cache: the one in use and the next
PREFETCHED = 4  # batches per worker that wait for the trainer
FEW_DAMAGED = 10  # never stop for so few, however few samples were read
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # the trainer decides what they mean
PR_SET_PDEATHSIG = 1  # of Linux' prctl(2)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """What one rank reads of a run."""

    start: int
    end: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size and 0 <= self.start <= self.end
        assert self.global_batch_size % (self.micro_batch_size * self.world_size) == 0

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __len__(self) -> int:
        """Micro-batches in all, of whole steps: the last one may reach beyond the end."""
        return -(-(self.end - self.start) // self.global_batch_size) * self.micro_steps

    def place(self, index: int) -> tuple[int, int]:
        """(first position of this rank's micro-batch number `index`, position after its step)."""
        step, micro_step = divmod(index, self.micro_steps)
        first = self.start + step * self.global_batch_size
        return first + (
            micro_step * self.world_size + self.rank
        ) * self.micro_batch_size, first + self.global_batch_size


class MicroBatches(Dataset[Batch | UserError | TrainingError]):
    """Micro-batch number → batch. Errors for the user are returned: across processes torch would wrap them."""

    def __init__(self, reader: BatchReader, share: Share, stage: Stage | None) -> None:
        self.reader = reader
        self.share = share
        self.stage = stage
        self._ahead: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, index: int) -> Batch | UserError | TrainingError:
        first, position = self.share.place(index)
        ahead = list(islice(self.reader.order.windows(first), WINDOWS_AHEAD))
        moved = not all(map(np.array_equal, ahead, self._ahead)) or not self._ahead
        try:
            if moved and self.stage is not None:
                assert isinstance(self.reader.corpus, Corpus)
                self.stage.redirect(self.reader.corpus, np.concatenate(ahead).tolist())
            batch = self.reader.batch(first, self.share.micro_batch_size, position)
            if moved:
                self._read_ahead(np.concatenate(ahead))
        except (UserError, TrainingError) as error:
            return error
        self._ahead = ahead
        return batch

    def _read_ahead(self, shards: np.ndarray) -> None:
        """Has this worker's share of the shards read into the page cache, from start to end."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in shards[number::workers].tolist():
            self.reader.corpus.prefetch(shard)


class Batches(Iterator[Batch]):
    """The batches of a rank, in order. Close it, or use it in a `with`, to stop its processes.

    Raises TrainingError if more than `max_damaged` of the samples of this life had to be replaced.
    """

    def __init__(self, dataset: MicroBatches, workers: int, max_damaged: float) -> None:
        self.damaged = 0
        """Samples replaced so far, in this life and by this rank."""
        self._samples = 0
        self._max_damaged = max_damaged
        self._told: set[str] = set()
        self._position = multiprocessing.get_context("fork").RawValue("q", dataset.share.start)
        copier = None
        if dataset.stage is not None and distributed.local_rank() == 0:
            copier = _start_copier(dataset.stage, dataset.reader.order, self._position)
        self._running = [_start_workers(dataset, workers)]
        self.close = weakref.finalize(self, _stop, self._running, copier)
        # multiprocessing ends at exit by sending SIGTERM to what still runs, and waiting. The workers ignore that
        # signal: they have to be stopped before, and what is registered last is called first.
        atexit.register(self.close)

    def __next__(self) -> Batch:
        try:
            item = next(self._running[0]) if self._running else None
        except StopIteration:
            item = None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise TrainingError(
                f"a process that reads data was killed ({error}); if memory ran out, try fewer --data.workers"
            ) from error
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, UserError | TrainingError):
            self.close()
            raise item
        self._position.value = item.position
        self._count(item)
        return item

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _count(self, batch: Batch) -> None:
        self._samples += len(batch.sample_ids)
        self.damaged += len(batch.replaced)  # a line of `damaged` may be another try for the same sample
        for line in batch.damaged:
            if line not in self._told:
                _log.warning("damaged sample replaced by the next of its shard: %s", line)
                self._told.add(line)
        if self.damaged > max(FEW_DAMAGED, self._max_damaged * self._samples):
            raise TrainingError(
                f"{self.damaged} of {self._samples} samples were damaged, more than data.max_damaged = "
                f"{self._max_damaged:g} allows; those of shards are listed by `ccd-data verify --deep`; the last was "
                f"{batch.damaged[-1]}"
            )


def loader(
    corpus: Corpus | Words | Pairs,
    order: Order | Mixture,
    share: Share,
    *,
    workers: int,
    mask_mode: MaskMode | None = "otsu",
    with_labels: bool = False,
    max_damaged: float = 0.001,
    stage: Path | None = None,
    stage_gb: float = 100.0,
) -> Batches:
    """The batches of one rank: its share of the run, in whole steps.

    The same batches for any number of workers. UserError if masks or labels are wanted that the shards do not hold, or
    if the stage cannot be used.
    """
    copies = None
    if isinstance(corpus, Corpus):
        _check_parts(corpus, masks=mask_mode == "stored", labels=with_labels)
        copies = None if stage is None else Stage(stage, int(stage_gb * 1e9), corpus)
    return Batches(
        MicroBatches(BatchReader(corpus, order, mask_mode, with_labels), share, copies), workers, max_damaged
    )


def _check_parts(corpus: Corpus, masks: bool, labels: bool) -> None:
    for name, wanted in (("masks", masks), ("labels", labels)):
        lacking = [shard.file for shard in corpus.shards if wanted and getattr(shard, name) < shard.samples]
        if lacking:
            raise UserError(
                f"{lacking[0]}: not every sample has {name} ({len(lacking)} of {len(corpus.shards)} shards lack some); "
                + (
                    "use --data.mask_mode otsu, or convert with --mask-src"
                    if name == "masks"
                    else "convert with labels"
                )
            )


def sample_order(corpus: Corpus, settings: Data, seed: int) -> Order | Mixture:
    """The order that the settings ask for: all shard folders as one corpus, or a mixture by `data.weights`."""
    if settings.weights is None:
        return Order(corpus.shard_samples, seed, settings.window_shards)
    folders = [path.parent for path in corpus.paths]
    orders = []
    for folder in settings.shards:
        shards = [number for number, parent in enumerate(folders) if parent == folder]
        if not shards:
            raise UserError(f"{folder}: no samples here, so it cannot have a weight; leave it out of data.shards")
        samples = corpus.shard_samples[shards]
        orders.append(Order(samples, seed, settings.window_shards, shards[0], int(corpus.first_sample[shards[0]])))
    return Mixture(orders, settings.weights, seed)


def _start_workers(dataset: MicroBatches, workers: int) -> Iterator[Batch | UserError | TrainingError]:
    """torch's loader over the micro-batches. Forked: a worker starts in milliseconds, and a run starts many times."""
    parallel: dict[str, Any] = {"prefetch_factor": PREFETCHED, "multiprocessing_context": "fork"} if workers else {}
    cv2.setNumThreads(1)  # here, not in the workers: its threads do not survive a fork, and ending them there hangs
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # a worker inherits this: it is never without
    on_child = signal.getsignal(signal.SIGCHLD)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's wish
            batches = DataLoader(
                dataset,
                batch_size=None,
                sampler=range(len(dataset)),
                num_workers=workers,
                worker_init_fn=_begin_worker,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else it would draw from the trainer's
                **parallel,
            )
            return iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if on_child is not None and threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever the trainer stands when a worker dies; `__next__` notices it too.
            signal.signal(signal.SIGCHLD, on_child)


def _begin_worker(number: int) -> None:
    for name in IGNORED:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    _die_with_parent()


def _start_copier(stage: Stage, order: Order | Mixture, position: Any) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_copy, args=(stage, order, position), daemon=True)
    process.start()
    return process


def _copy(stage: Stage, order: Order | Mixture, position: Any) -> None:
    """What the copying process does. It may be killed at any moment; the trainer ends it with SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in set(IGNORED) - {signal.SIGTERM}:
        signal.signal(name, signal.SIG_IGN)
    _die_with_parent()
    try:
        stage.run(order, lambda: position.value)
    except OSError as error:
        _log.warning("%s: %s; the shards are read from where they are", stage.folder, error.strerror)


def _die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it was gone before
        os._exit(1)


def _stop(running: list[Iterator[Batch | UserError | TrainingError]], copier: BaseProcess | None) -> None:
    running.clear()  # torch ends the workers of an iterator that nobody holds
    if copier is not None:
        copier.terminate()
        copier.join()
