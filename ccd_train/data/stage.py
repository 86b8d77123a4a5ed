"""Copies of shards on a node's own disk: made in the order in which they will be read, verified, and shared.

A copy lies in FOLDER/<first 32 digits of its sha256>/ and gets that name once it is whole and its hash is right. So all
processes of a node use the same copies, and later lives and other jobs find them again. Copies change where bytes
come from, never which: a shard without a copy is read from where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ccd_train.data.order import Mixture, Order
from ccd_train.data.shards import Corpus
from ccd_train.errors import UserError

BLOCK = 1 << 20  # bytes copied at once
IDLE_SECONDS = 2.0  # between two looks at how far the training has come
UNFINISHED = ".unfinished-"

_log = logging.getLogger(__name__)


class Stage:
    """The copies of a corpus' shards below `folder`, which may hold `limit` bytes in all."""

    def __init__(self, folder: Path, limit: int, corpus: Corpus) -> None:
        self.folder = folder
        self.limit = limit
        self._shards = corpus.shards
        self._sources = list(corpus.paths)
        largest = max(map(self.size, range(len(self._shards))))
        if limit < largest:
            raise UserError(
                f"data.stage_gb = {limit / 1e9:g}: the largest shard has {largest / 1e9:g} GB; allow at least as much"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".lock").touch()
        except OSError as error:
            raise UserError(f"data.stage = {folder}: {error.strerror}; name a folder that can be written") from None

    def size(self, shard: int) -> int:
        """Bytes of a shard's copy: the tar and its offsets."""
        return self._shards[shard].bytes + self._offsets(self._sources[shard], shard).stat().st_size

    def copy_of(self, shard: int) -> Path | None:
        """The tar's copy, if there is one."""
        path = self._home(shard) / self._shards[shard].file
        return path if path.exists() else None

    def redirect(self, corpus: Corpus, shards: Iterable[int]) -> None:
        """Lets this process read these shards from their copies, and those that have none at their source."""
        moved = False
        for shard in shards:
            path = self.copy_of(shard) or self._sources[shard]
            moved = moved or path != corpus.paths[shard]
            corpus.paths[shard] = path
        if moved:
            corpus.close()  # what is open still lies at the old place

    def run(self, order: Order | Mixture, position: Callable[[], int]) -> None:
        """Copies what will be read next, until all of the corpus is here. One process of a node at a time."""
        with (self.folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for broken_off in self.folder.glob(UNFINISHED + "*"):
                shutil.rmtree(broken_off, ignore_errors=True)
            refused: set[int] = set()
            while True:
                plan = self.plan(order, position())
                missing = [shard for shard in plan if shard not in refused and self.copy_of(shard) is None]
                if missing:
                    self._make_room(plan, self.size(missing[0]))
                    if not self._copy(missing[0]):
                        refused.add(missing[0])
                elif len(plan) == len(self._shards):
                    return
                else:
                    time.sleep(IDLE_SECONDS)

    def plan(self, order: Order | Mixture, position: int) -> list[int]:
        """The shards that are read from a position on, in that order, as many as fit."""
        plan: dict[int, None] = {}
        room = self.limit
        for shard in itertools.chain.from_iterable(window.tolist() for window in order.windows(position)):
            if shard in plan:
                continue
            room -= self.size(shard)
            if room < 0:
                break
            plan[shard] = None
            if len(plan) == len(self._shards):
                break
        return list(plan)

    def _make_room(self, plan: Sequence[int], needed: int) -> None:
        """Removes copies that the plan does not want, those first that were made first."""
        wanted = {self._home(shard) for shard in plan}
        homes = sorted((home for home in self.folder.iterdir() if home.is_dir()), key=lambda home: home.stat().st_mtime)
        used = {home: sum(file.stat().st_size for file in home.iterdir()) for home in homes}
        for home in homes:
            if sum(used.values()) + needed <= self.limit:
                return
            if home not in wanted:
                shutil.rmtree(home)
                del used[home]

    def _copy(self, shard: int) -> bool:
        """Copies and verifies one shard; False, with a line in the log, if its content is not what it should be."""
        source, facts = self._sources[shard], self._shards[shard]
        unfinished = self.folder / f"{UNFINISHED}{facts.sha256[:32]}"
        unfinished.mkdir()
        offsets = self._offsets(source, shard)
        hashes = (_copy_file(source, unfinished / source.name), _copy_file(offsets, unfinished / offsets.name))
        if hashes != (facts.sha256, facts.offsets_sha256):
            _log.warning("%s: not what its manifest says; it is not copied. `ccd-data verify` tells more", source)
            shutil.rmtree(unfinished)
            return False
        unfinished.rename(self._home(shard))
        return True

    def _home(self, shard: int) -> Path:
        return self.folder / self._shards[shard].sha256[:32]

    def _offsets(self, tar: Path, shard: int) -> Path:
        return tar.with_name(self._shards[shard].offsets_file)


def _copy_file(source: Path, target: Path) -> str:
    """Copies a file to the disk, and returns the sha256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()
