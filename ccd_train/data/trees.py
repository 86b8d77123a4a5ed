"""What lies in a folder and below it: LMDBs, folders of shards, and files that are neither.

Everything is looked at, so that nobody takes the first thing found for all there is.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ccd_train.data.signatures import HEAD, is_image
from ccd_train.errors import UserError

LMDB_FILE = "data.mdb"  # which makes a folder an LMDB
SHARDS_FILE = "manifest.json"  # which makes it a folder of shards
_BESIDE_LMDB = {LMDB_FILE, "lock.mdb", "fonts.txt"}  # the last by `ccd-data synth`
_BESIDE_SHARDS = {SHARDS_FILE, "refused.jsonl", "sources.json"}
_OF_SHARDS = (".tar", ".offsets")
_NAMED = 4  # kinds of files, or folders, that are named
_PATTERN = re.compile(r"[*?{\[]|^pipe:|^\w+:/")
_STREAMS = {"chunks": "LitData", "shards": "MosaicML Streaming (MDS)"}  # by a key of their index.json


@dataclass(frozen=True)
class Tree:
    """What was found, each sorted by path."""

    lmdbs: list[Path]
    shards: list[Path]
    """Folders of shards."""
    others: list[Path]
    """Files that belong to neither."""


def look_into(root: str | Path) -> Tree:
    """Everything at or below a folder. Follows symbolic links. UserError if that cannot be read."""
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder; give one that is there")
    lmdbs, shards, others = [], [], []
    for folder, files in walk(root):
        mine: set[str] = set()
        if LMDB_FILE in files:
            lmdbs.append(folder)
            mine |= _BESIDE_LMDB
        if SHARDS_FILE in files:
            shards.append(folder)
            mine |= _BESIDE_SHARDS | {name for name in files if name.endswith(_OF_SHARDS)}
        others += [folder / name for name in files if name not in mine]
    return Tree(sorted(lmdbs), sorted(shards), sorted(others))


def walk(root: str | Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder at or below `root` once, with the names of its files."""
    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        identity = os.path.realpath(folder)
        if identity in seen:  # a link to a folder above, or a second way to the same place
            subfolders.clear()
            continue
        seen.add(identity)
        subfolders.sort()
        yield Path(folder), files


def is_hidden(file: Path, root: Path) -> bool:
    """Whether a file below `root` is not meant to be seen, or is what macOS leaves beside files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(root).parts)


def holds_image(file: Path) -> bool:
    """Whether a file is a picture by its content. OSError if it cannot be read."""
    if not file.is_file():  # a link to nowhere, a pipe
        return False
    with open(file, "rb") as opened:
        return is_image(opened.read(HEAD))


def count_kinds(files: Iterable[Path]) -> str:
    """`10 × .txt, 1 × README`, the most frequent first."""
    kinds = Counter(file.suffix.lower() or file.name for file in files)
    named = [f"{count:,} × {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED:,} more kinds" if len(named) > _NAMED else "")


def instead_of_shards(path: Path) -> str:
    """What is at a place where shards were expected, with the remedy; "" if that cannot be told."""
    if not path.exists():
        return "a pattern or an address: name the folder that holds the shards" if _PATTERN.search(str(path)) else ""
    if not path.is_dir():
        what = "a tar" if path.name.endswith(".tar") else "a file"
        return f"{what}: name its folder, after `ccd-data index` if another tool made the tars"
    if (path / LMDB_FILE).is_file():
        return f"this is an LMDB: `ccd-data convert --src {path}` it first"
    for key, kind in _STREAMS.items():
        if key in _keys(path / "index.json"):
            return f"this is a folder of {kind}: write its samples as webdataset tars and `ccd-data index` those"
    if tars := sum(1 for _ in path.glob("*.tar")):
        unfinished = (path / ".conversion").is_dir()
        return "" if unfinished else f"{tars} tars of another tool: `ccd-data index {path}` them first"
    below = look_into(path)
    if below.shards:
        named = " ".join(str(folder) for folder in below.shards[:_NAMED]) + (" …" if below.shards[_NAMED:] else "")
        return f"{len(below.shards)} folders of shards are below: name them ({named})"
    if below.lmdbs:
        return f"{len(below.lmdbs)} LMDBs are below: `ccd-data convert --src {path}` them first"
    return f"what it holds is {count_kinds(below.others)}" if below.others else ""


def _keys(file: Path) -> set[str]:
    """The keys of a JSON object in a file; none if there is no such thing."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return set()
    return set(content) if isinstance(content, dict) else set()


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
