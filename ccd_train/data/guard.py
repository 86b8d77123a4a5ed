"""What a set to learn from may not be: a benchmark, or the same words once more.

Nothing here imports torch: the converter shares this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from ccd_train.data.benchmarks import Recognised, candidates, in_layout, named_folder, recognise
from ccd_train.data.records import FILE, LmdbReader
from ccd_train.data.shards import Corpus, Source, read_manifest
from ccd_train.errors import UserError


def benchmark_at(path: Path) -> Recognised | None:
    """Which benchmark an LMDB is, wherever links lead. UserError if it is damaged."""
    path = path.resolve()
    if not in_layout(path) and not candidates(named_folder(path).name):
        return None
    with LmdbReader(path) as reader:
        records = len(reader)
    beside = [entry.name for entry in os.scandir(path.parent) if (Path(entry.path) / FILE).is_file()]
    return recognise(path, records, beside)


def benchmarks_among(sources: Sequence[Source]) -> dict[str, Recognised]:
    """Which sources of shards are benchmarks, or may be, by their names."""
    paths = {source.name: PurePath(source.name) for source in sources}
    found = {}
    for source in sources:
        path = paths[source.name]
        one = recognise(path, source.records, [other.name for other in paths.values() if other.parent == path.parent])
        if one is not None:
            found[source.name] = one
    return found


def check_shards(corpus: Corpus, folder: Path, option: str) -> tuple[list[str], dict[str, str]]:
    """Warnings about the sources of a folder of shards; and those sources, as `refuse_twice` takes them.

    UserError for a benchmark, unless all of its samples are excluded from the corpus.
    """
    used = {shard.source for path, shard in zip(corpus.paths, corpus.shards, strict=True) if path.parent == folder}
    sources = [source for source in read_manifest(folder).sources if source.name in used]
    warnings: list[str] = []
    for name, one in benchmarks_among(sources).items():
        warnings += check_benchmark(f"--{option} {folder} ({name})", one)
    return warnings, {source.fingerprint: f"{folder} ({source.name})" for source in sources}


def check_benchmark(where: str, found: Recognised | None) -> list[str]:
    """A warning about a set that may be a benchmark. UserError about one that is."""
    if found is None:
        return []
    if found.certain:
        raise UserError(
            f"{where}: a benchmark; neither training nor validation may see it ({found.name}, {found.why}). "
            "`ccd-train evaluate` is for it; a training set that bears a benchmark's name needs another folder name"
        )
    return [f"{where}: bears the name of the benchmark {found.name}, but has {found.why}: taken"]


def refuse_twice(given: Iterable[dict[str, str]], option: str) -> None:
    """UserError where two of the folders that an option names hold the same set.

    `given`: of each folder, by a hash of the content, where its sets are.
    """
    seen: dict[str, str] = {}
    for sets in given:
        for content, place in sets.items():
            if content in seen:
                raise UserError(f"--{option}: {seen[content]} and {place} are the same; name each set once")
        seen |= sets
