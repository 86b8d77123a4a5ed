"""What a conversion will make, before anything is made: a pure function of its sources and settings."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ccd_train.data.shards import FORMAT, Manifest, Source
from ccd_train.errors import UserError
from data_tools.checks import Checks

SIZE_EDGES = (0, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)  # pixels


@dataclass(frozen=True)
class Settings(Checks):
    """What decides, beside the sources, which bytes the shards have."""

    samples_per_shard: int
    labels: Literal["keep", "drop"]
    masks: Literal["where present", "required"]


@dataclass(frozen=True)
class Piece:
    """The records `first` to `last` of a source, which make one shard."""

    index: int
    file: str
    origin: int
    """The source's place in the plan."""
    first: int
    last: int

    @property
    def records(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Slice:
    """Every `total`-th piece, from number `index` on: what one machine converts."""

    index: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """From "3/8", the fourth of eight (they count from 0, as the tasks of a SLURM array do)."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not int(match[1]) < int(match[2]):
            raise UserError(f"--slice {text}: give i/N with 0 ≤ i < N, for example 0/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.total}"


@dataclass(frozen=True)
class Plan:
    """A conversion. Equal plans make equal bytes."""

    name: str
    settings: dict[str, Any]
    sources: list[Source]

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Plan:
        """The plan by which a folder was made."""
        return cls(manifest.name, manifest.settings, manifest.sources)

    @classmethod
    def parse(cls, text: bytes) -> Plan:
        """The inverse of `json`. Raises ValueError, KeyError or TypeError."""
        stored = json.loads(text)
        return cls(stored["name"], stored["settings"], [Source(**source) for source in stored["sources"]])

    def json(self) -> bytes:
        return json.dumps({"format": FORMAT} | asdict(self), indent=1).encode() + b"\n"

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.json()).hexdigest()

    def pieces(self, part: Slice | None = None) -> Iterator[Piece]:
        """The pieces of all sources, or of a slice, in order."""
        index, size = 0, int(self.settings["samples_per_shard"])
        for origin, source in enumerate(self.sources):
            for first in range(1, source.records + 1, size):
                if part is None or index % part.total == part.index:
                    file = f"{self.name}-{index:06d}.tar"
                    yield Piece(index, file, origin, first, min(first + size - 1, source.records))
                index += 1

    def differences(self, other: Plan) -> str:
        """How `other` differs, in words; "" if it does not."""
        found = [] if self.name == other.name else [f"name is {self.name!r}, not {other.name!r}"]
        for key in sorted(self.settings.keys() | other.settings.keys()):
            mine, theirs = self.settings.get(key), other.settings.get(key)
            found += [] if mine == theirs else [f"{key} is {mine}, not {theirs}"]
        mine_by_name, theirs_by_name = ({source.name: source for source in plan.sources} for plan in (self, other))
        for name in sorted(mine_by_name.keys() | theirs_by_name.keys()):
            if name not in theirs_by_name:
                found.append(f"it has the source {name}")
            elif name not in mine_by_name:
                found.append(f"it has no source {name}")
            elif mine_by_name[name] != theirs_by_name[name]:
                found.append(f"the source {name} has other contents ({mine_by_name[name].records} records)")
        if not found and self != other:
            found.append("its sources are in another order")
        return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


class SizeCounts:
    """A histogram of image sizes."""

    def __init__(self) -> None:
        self.width = [0] * len(SIZE_EDGES)
        self.height = [0] * len(SIZE_EDGES)

    def add(self, size: tuple[int, int] | None) -> None:
        """Counts an image by its width and height, if they are known."""
        if size is None:
            return
        width, height = size
        self.width[bisect_right(SIZE_EDGES, width) - 1] += 1
        self.height[bisect_right(SIZE_EDGES, height) - 1] += 1

    def merge(self, other: dict[str, list[int]]) -> None:
        """Adds the counts of another histogram, as `counts` gives them."""
        self.width = [mine + more for mine, more in zip(self.width, other["width"], strict=True)]
        self.height = [mine + more for mine, more in zip(self.height, other["height"], strict=True)]

    def counts(self) -> dict[str, list[int]]:
        """As the manifest has them."""
        return {"edges": list(SIZE_EDGES), "width": self.width, "height": self.height}
