"""Watching over the other ranks: one that dies or hangs ends the run on all, with its name, instead of a silent wait.

Every rank's thread writes a sign of life into the process group's store once a second: host, step, and what its main
thread is doing. A dead rank stops signing; a hanging one signs, but stays behind the others.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from ccd_train import distributed
from ccd_train.errors import UNFINISHED

log = logging.getLogger(__name__)

SECONDS = 1.0  # between two signs
SILENCE = 5.0  # seconds without a sign after which a rank counts as dead
PHASES = ("start", "data", "forward", "backward", "update", "validation", "save")


@dataclass(frozen=True)
class Sign:
    host: str
    step: int
    phase: int
    """Index into PHASES."""
    seconds: float
    """Of the signing rank's clock; only differences count."""


class Watch:
    """Ends this process (exit code 75) if its main thread gets nowhere for `timeout` seconds."""

    def __init__(self, timeout: float, on_loss: Callable[[str], None]) -> None:
        """`on_loss` is told why, before the process ends: it writes the outcome."""
        self._timeout, self._on_loss = timeout, on_loss
        self._step, self._phase, self._moved = 0, 0, time.monotonic()
        self._seen: dict[int, tuple[Sign, float]] = {}
        self._store = dist.distributed_c10d._get_default_store()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._hosts = distributed.gather_objects(socket.gethostname())
        self._sign()
        if distributed.world_size() > 1:
            # The store may hang when its keeper is gone: who watches the time must not touch it.
            threading.Thread(target=self._exchange, name="signs", daemon=True).start()
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def at(self, step: int, phase: str) -> None:
        """The main thread begins a phase of a step."""
        self._step, self._phase, self._moved = step, PHASES.index(phase), time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def lost(self) -> None:
        """Says who is missing and ends this process. For whoever notices: the thread, or a collective that failed."""
        with self._lock:  # only one of them
            if self._closed.is_set():
                return
            time.sleep(SILENCE + 2 * SECONDS)  # what died just now is silent by then
            message = self._explain()
            log.error("unfinished: %s", message)
            self._on_loss(message)
            logging.shutdown()
            os._exit(UNFINISHED)

    def _exchange(self) -> None:
        while not self._closed.wait(SECONDS if self._seen else SECONDS / 10):
            try:
                self._sign()
                self._look()
                self._looked = time.monotonic()
            except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
                continue  # the store is gone, which `_explain` sees by the time of the last look

    def _watch(self) -> None:
        while not self._closed.wait(SECONDS):
            if time.monotonic() - self._moved > self._timeout:
                self.lost()

    def _sign(self) -> None:
        mine = Sign(socket.gethostname(), self._step, self._phase, time.monotonic())
        self._store.set(self._key(distributed.rank()), json.dumps(asdict(mine)))

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(distributed.world_size()):
            if self._store.check([self._key(rank)]):
                sign = Sign(**json.loads(self._store.get(self._key(rank))))
                if rank not in self._seen or self._seen[rank][0].seconds != sign.seconds:
                    self._seen[rank] = (sign, now)

    def _explain(self) -> str:
        now = time.monotonic()
        if now - self._looked > SILENCE:
            return f"no sign of life from {self._name(0)} or its launcher; start the same command again to go on"
        others = set(range(distributed.world_size())) - {distributed.rank()}
        silent = sorted(rank for rank in others if now - self._heard(rank) > SILENCE)
        if silent:
            return f"no sign of life from {', '.join(map(self._name, silent))}; start the same command again to go on"
        places = {rank: (sign.step, sign.phase) for rank, (sign, _) in self._seen.items()}
        last = max(places.values())
        behind = [rank for rank, place in places.items() if place < last]
        if behind:
            return f"{', '.join(map(self._name, behind))} did not get on; start the same command again to go on"
        return (
            f"all ranks wait in step {last[0]} ({PHASES[last[1]]}) since {self._timeout:.0f} s: the network? "
            "start the same command again to go on"
        )

    def _heard(self, rank: int) -> float:
        return self._seen[rank][1] if rank in self._seen else -SILENCE

    def _name(self, rank: int) -> str:
        if rank not in self._seen:
            return f"rank {rank} on {self._hosts[rank]} (in its first steps)"
        sign = self._seen[rank][0]
        return f"rank {rank} on {sign.host} (step {sign.step}, {PHASES[sign.phase]})"

    @staticmethod
    def _key(rank: int) -> str:
        return f"sign of life/{rank}"


def lost_in(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank did not take part (gloo says so in a plain RuntimeError)."""
    return isinstance(error, dist.DistBackendError) or "gloo/transport" in str(error)
