"""Whether the LMDBs of a conversion are still what they were when it began: DIR/sources.json.

A source's fingerprint covers some of its records; any write changes one of these facts. They are not in the manifest,
which is the same on every machine. A fact that is absent, as in folders of earlier versions, is not compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from ccd_train.data.records import FILE, LmdbReader
from ccd_train.errors import UserError
from data_tools.sources import Origin

Facts = dict[str, dict[str, int | str]]
"""By the source's name; "NAME, masks" for an LMDB with the masks of a source."""


def facts_of(origins: Iterable[Origin]) -> Facts:
    """What is to be known again of every LMDB that a conversion reads."""
    facts: Facts = {}
    for origin in origins:
        facts[origin.source.name] = _facts(origin.path)
        if origin.mask_path is not None:
            facts[f"{origin.source.name}, masks"] = _facts(origin.mask_path)
    return facts


def to_json(facts: Facts) -> bytes:
    """As they are kept in a file."""
    return json.dumps(facts, indent=1).encode() + b"\n"


def check_unwritten(known: bytes, now: Facts) -> None:
    """UserError if anybody has written to an LMDB since these facts, as `to_json` gives them, were noted."""
    try:
        noted: Facts = json.loads(known)
    except ValueError as error:
        raise UserError(f"sources.json of this conversion: damaged ({error}); choose another --out") from None
    for name, before in noted.items():
        facts = now.get(name, {})
        names = ["entries", "transaction", "bytes"]
        if before.get("path") == facts.get("path"):  # elsewhere a copy has its own time
            names.append("modified")
        for fact in names:
            one, other = before.get(fact), facts.get(fact)
            if None not in (one, other) and one != other:
                raise UserError(
                    f"{facts['path']}: the source was written to since ({fact} {one} → {other}): --out another folder"
                )


def _facts(lmdb: Path) -> dict[str, int | str]:
    file = lmdb / FILE
    with LmdbReader(lmdb) as reader:
        entries, transaction = reader.version()
    status = file.stat()
    modified = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(status.st_mtime))
    path = str(lmdb.resolve())
    return {
        "path": path, "entries": entries, "transaction": transaction, "bytes": status.st_size, "modified": modified
    }  # fmt: skip
