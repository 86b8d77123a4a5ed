"""What a conversion knows of itself while it is not finished: DIR/.conversion, which the manifest replaces.

plan.json            sources and settings; whoever starts with others is refused
sources.json         how to notice that somebody writes to a source; stays beside the manifest (see versions.py)
000123.json          the outcome of a piece, written after its shard is safe on the disk
slice-3-of-8.lock    held (flock) by whoever converts that slice
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ccd_train.data.shards import MANIFEST, REFUSED, ROW, Shard, offsets_name, write_atomically
from ccd_train.errors import UserError
from data_tools.plan import Piece, Plan, Slice

FOLDER = ".conversion"
PLAN = "plan.json"
SOURCES = "sources.json"


@dataclass(frozen=True)
class Refused:
    """A record that is in no shard."""

    source: str
    record: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a piece. A shard without samples has no file."""

    plan: str
    shard: Shard
    refused: list[Refused]
    sizes: dict[str, list[int]]


class State:
    """The unfinished conversion in a folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER

    def begin(self, plan: Plan, sources: bytes) -> None:
        """Makes the folder this plan's own. UserError if it holds anything else.

        `sources` is kept from the first start on, for `sources` to return.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / PLAN).exists() and not (self.out / MANIFEST).exists():
            self._check_empty()
            write_atomically(self.folder / SOURCES, [sources])
            write_atomically(self.folder / PLAN, [plan.json()])

    def plan(self) -> Plan | None:
        """The plan of the unfinished conversion, None if there is none."""
        try:
            return Plan.parse((self.folder / PLAN).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / PLAN}: damaged ({error}); delete {self.out} and convert again") from None

    def sources(self) -> bytes | None:
        """What `begin` was given first, also of a finished conversion; None if an earlier version began it."""
        folder = self.out if (self.out / MANIFEST).exists() else self.folder
        return (folder / SOURCES).read_bytes() if (folder / SOURCES).exists() else None

    def keep_sources(self) -> None:
        """Puts that where the finished conversion has it."""
        if (sources := self.sources()) is not None:
            write_atomically(self.out / SOURCES, [sources])

    def record(self, piece: Piece, outcome: Outcome) -> None:
        """Notes that a piece is done. Its files must be safe on the disk."""
        write_atomically(self._note(piece.index), [json.dumps(asdict(outcome)).encode()])

    def outcome(self, piece: Piece, plan_hash: str) -> Outcome | None:
        """The outcome of a piece of this plan, None if it is to be made (again)."""
        try:
            stored = json.loads(self._note(piece.index).read_bytes())
            refused = [Refused(**entry) for entry in stored["refused"]]
            outcome = Outcome(stored["plan"], Shard(**stored["shard"]), refused, stored["sizes"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return outcome if outcome.plan == plan_hash and is_whole(self.out, outcome.shard) else None

    def slices(self) -> list[Slice]:
        """The slices that somebody has begun."""
        names = (re.fullmatch(r"slice-(\d+)-of-(\d+)\.lock", entry.name) for entry in os.scandir(self.folder))
        return sorted((Slice(int(n[1]), int(n[2])) for n in names if n), key=lambda part: (part.total, part.index))

    @contextmanager
    def locked(self, part: Slice) -> Iterator[None]:
        """Holds a slice. UserError if another process does; it is free as soon as that one has ended, however."""
        what = "a conversion" if part.total == 1 else f"a conversion of slice {part}"
        with held(self.folder / f"slice-{part.index}-of-{part.total}.lock", what, self.out):
            yield

    def check_idle(self, own: Slice | None) -> None:
        """UserError if any slice but `own` is being converted."""
        for part in self.slices():
            if part != own:
                with self.locked(part):
                    pass

    def remove_temporaries(self, pieces: Sequence[Piece]) -> None:
        """Removes what a killed conversion of these pieces has left half-written."""
        files = {piece.file for piece in pieces} | {offsets_name(piece.file) for piece in pieces}
        remove_temporaries(self.out, files)
        remove_temporaries(self.folder, {self._note(piece.index).name for piece in pieces})

    def remove(self) -> None:
        """Forgets the conversion, which the manifest now describes."""
        shutil.rmtree(self.folder)

    def _note(self, index: int) -> Path:
        return self.folder / f"{index:06d}.json"

    def _check_empty(self) -> None:
        foreign = sorted(entry.name for entry in os.scandir(self.out) if entry.name != FOLDER)
        if foreign:
            raise UserError(
                f"{self.out}: not empty, and not of an unfinished conversion (it holds {foreign[0]!r}, "
                f"{len(foreign)} in all); choose another --out or empty it"
            )


def remove_temporaries(folder: Path, files: set[str]) -> None:
    """Removes what killed writers of these files have left half-written (see shards.temporary_path)."""
    for entry in os.scandir(folder):
        match = re.fullmatch(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp", entry.name, re.DOTALL)
        if match and match[1] in files:
            Path(entry.path).unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """A full or failing disk becomes a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room or mend the disk, then start the same command "
            "again: it goes on where it stopped"
        ) from None


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a shard's files are there with their sizes (their names are given to complete files only)."""
    if shard.samples == 0:
        return True
    try:
        sizes = [(folder / name).stat().st_size for name in (shard.file, shard.offsets_file)]
    except FileNotFoundError:
        return False
    return sizes == [shard.bytes, shard.samples * ROW.itemsize]


def write_refused(out: Path, outcomes: Iterable[Outcome]) -> None:
    """Writes DIR/refused.jsonl: one line for each refused record."""
    entries = (entry for outcome in outcomes for entry in outcome.refused)
    write_atomically(out / REFUSED, (json.dumps(asdict(entry)).encode() + b"\n" for entry in entries))


@contextmanager
def held(path: Path, what: str, out: Path) -> Iterator[None]:
    """Holds a lock: `what` is being written into `out`. UserError if another process does it."""
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: {what} into this folder is running already; wait for it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{out}: this file system has no locks; see to it that {what} does not run twice", file=sys.stderr)
        yield
