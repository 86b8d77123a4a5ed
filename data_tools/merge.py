"""The end of a conversion: its parts become a finished folder.

ccd-data merge DIR        after every slice of `ccd-data convert --slice i/N --out DIR` has ended
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from ccd_train.data.shards import MANIFEST, REFUSED, Manifest, Shard, read_manifest, write_manifest
from ccd_train.errors import FINISHED, UserError
from data_tools.plan import Piece, Plan, SizeCounts, Slice
from data_tools.state import SOURCES, Outcome, State, remove_temporaries, write_errors, write_refused


def finish(state: State, plan: Plan, own: Slice | None = None) -> None:
    """Writes refused.jsonl and, last, the manifest. UserError if a piece is missing, or a slice (not `own`) running."""
    state.check_idle(own)
    state.remove_temporaries(list(plan.pieces()))
    remove_temporaries(state.out, {MANIFEST, REFUSED, SOURCES})
    shards: list[Shard] = []
    kinds: Counter[str] = Counter()
    sizes = SizeCounts()

    def outcomes() -> Iterator[Outcome]:
        missing = []
        for piece in plan.pieces():
            outcome = state.outcome(piece, plan.hash)
            if outcome is None:
                missing.append(piece)
                continue
            if outcome.shard.samples:
                shards.append(outcome.shard)
            kinds.update(entry.kind for entry in outcome.refused)
            sizes.merge(outcome.sizes)
            yield outcome
        if missing:
            raise _incomplete(state, missing)

    write_refused(state.out, outcomes())
    state.keep_sources()
    manifest = Manifest(plan.name, plan.settings, plan.sources, shards, dict(sorted(kinds.items())), sizes.counts())
    write_manifest(state.out, manifest)
    state.remove()
    print(describe(state.out, manifest))


def describe(folder: Path, manifest: Manifest) -> str:
    """A line on what a folder holds."""
    labels = sum(shard.labels for shard in manifest.shards)
    text = f"{folder}: {contents(manifest)}, {manifest.bytes / 1e6:,.1f} MB" + (
        f", {labels:,} labels" if labels else ""
    )
    return text + (f"; refused: {summary(manifest.refused)}, see {REFUSED}" if manifest.refused else "")


def contents(manifest: Manifest) -> str:
    """`12,345 samples in 2 shards`."""
    return f"{manifest.samples:,} samples in {len(manifest.shards):,} shard{'s' if len(manifest.shards) != 1 else ''}"


def summary(kinds: Mapping[str, int]) -> str:
    """`12 truncated, 3 too small`, the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def _incomplete(state: State, missing: list[Piece]) -> UserError:
    """Says which slices are to be done again."""
    begun = state.slices()
    total = max((part.total for part in begun), default=1)
    slices = sorted({piece.index % total for piece in missing})
    named = ", ".join(f"{index}/{total}" for index in slices[:8]) + (" …" if len(slices) > 8 else "")
    return UserError(
        f"{state.out}: {len(missing)} shards are missing ({missing[0].file} is the first), or were made of other "
        f"sources; run the same `ccd-data convert` again with --slice {named}"
    )


def main(argv: list[str]) -> int:
    """`ccd-data merge`: see the module's docstring."""
    parser = argparse.ArgumentParser(
        "ccd-data merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of all slices")
    folder = parser.parse_args(argv).folder
    state = State(folder)
    plan = state.plan()
    if plan is not None and not (folder / MANIFEST).exists():
        with write_errors(folder):
            finish(state, plan)
        return FINISHED
    print(f"{describe(folder, read_manifest(folder))}; nothing to merge")
    return FINISHED
