"""LMDBs of word crops → shards. Image bytes are copied as they are.

    ccd-data convert --src LMDB_OR_TREE [--src …] --out DIR --name NAME
    ccd-data convert --src TEXTZOOM --out DIR --name NAME --images hr      (the good pictures of pairs; lr, both)
    ccd-data convert --src TREE --out DIR --name NAME --slice 3/8          (each of 0/8 … 7/8; then ccd-data merge DIR)

A shard is a fixed range of --samples-per-shard records of one source, less those that are refused. So what a shard
holds depends on the sources and the settings alone, never on workers, slices or interruptions: shards can be made in
any order and by anyone, and a conversion that was killed goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ccd_train.data.shards import MANIFEST, REFUSED, ROW, Manifest, Shard, read_manifest
from ccd_train.errors import FINISHED, UserError
from data_tools import checks
from data_tools.images import Refusal
from data_tools.merge import finish, summary
from data_tools.plan import Piece, Plan, Settings, SizeCounts, Slice
from data_tools.pool import Report, available_cores, run_jobs
from data_tools.progress import Progress
from data_tools.sources import Origin, Pictures, find_origins
from data_tools.state import Outcome, Refused, State, is_whole, write_errors, write_refused
from data_tools.tar import ShardWriter, directory_of
from data_tools.versions import check_unwritten, facts_of, to_json

_REPORT_EVERY = 1000  # records
_MAPPED = 64 << 20  # bytes of an LMDB to have mapped at once: mapped pages count as memory of the process


@dataclass(frozen=True)
class Options:
    """The command line."""

    roots: list[Path]
    mask_roots: list[Path]
    out: Path
    name: str
    settings: Settings
    workers: int
    part: Slice
    max_refused: float
    """Share of the records, above which the conversion stops."""
    with_benchmarks: bool
    """Also convert what is to be measured on, not trained on."""
    pictures: Pictures | None
    """Which of TextZoom's pairs."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to make a shard."""

    options: Options
    plan_hash: str
    origin: Origin
    piece: Piece


def make_shard(job: Job, done: Report) -> Outcome:
    """Converts a piece, and notes that it is done. Its shard is written whole or not at all."""
    with write_errors(job.options.out / job.piece.file):
        outcome = _write_shard(job, done)
        State(job.options.out).record(job.piece, outcome)
    return outcome


def _write_shard(job: Job, done: Report) -> Outcome:
    piece, source, settings = job.piece, job.origin.source.name, job.options.settings
    refused: list[Refused] = []
    sizes = SizeCounts()
    labels = masks_there = mapped = unreported = size = 0
    sha256 = offsets_sha256 = ""
    images, masks = job.origin.readers()
    with images, masks, ShardWriter(job.options.out / piece.file, directory_of(source)) as writer:
        for number in range(piece.first, piece.last + 1):
            image, mask = images.image(number), masks.mask(number) if job.origin.masked else None
            label = images.label_bytes(number) if settings.labels == "keep" else None
            try:
                if image is None:
                    raise Refusal("missing", f"there is no key {job.origin.key}-{number:09d}")
                if mask is None and settings.masks == "required":
                    raise Refusal("no mask", f"there is no key mask-{number:09d}")
                extension, image_size = settings.examine(image, label, mask)
            except Refusal as refusal:
                refused.append(Refused(source, number, refusal.kind, str(refusal)))
            else:
                writer.add(number, extension, image, label, mask)
                sizes.add(image_size)
                labels += label is not None
                masks_there += mask is not None
            unreported += 1
            if unreported == _REPORT_EVERY:
                done(unreported)
                unreported = 0
            mapped += len(image or b"") + len(mask or b"")
            if mapped > _MAPPED:
                images.close()
                masks.close()
                mapped = 0
        job.origin.check_unchanged()
        if writer.samples:
            size, sha256, offsets_sha256 = writer.finish()
    done(unreported)
    counts = (writer.samples, labels, masks_there, size)
    shard = Shard(piece.file, source, piece.first, piece.last, *counts, sha256, offsets_sha256)
    return Outcome(job.plan_hash, shard, refused, sizes.counts())


def convert(options: Options) -> None:
    """Converts what is missing of a slice; if the slice is everything, writes the manifest. UserError if it cannot."""
    origins = find_origins(options.roots, options.mask_roots, options.with_benchmarks, options.pictures)
    plan = Plan(options.name, asdict(options.settings), [origin.source for origin in origins])
    state, facts = State(options.out), facts_of(origins)
    state.begin(plan, to_json(facts))
    with state.locked(options.part):
        finished = read_manifest(options.out) if (options.out / MANIFEST).exists() else None
        before = Plan.of_manifest(finished) if finished else state.plan()
        if before and (differences := before.differences(plan)):
            raise UserError(
                f"{options.out}: holds another conversion: {differences}; choose another --out, or empty it"
            )
        if (known := state.sources()) is not None:
            check_unwritten(known, facts)
        pieces = list(plan.pieces(options.part))
        jobs = [Job(options, plan.hash, origins[piece.origin], piece) for piece in pieces]
        state.remove_temporaries(pieces)
        if finished:
            _mend(options, finished, jobs)
            state.remove()
            return
        refused = _convert_missing(options, state, jobs)
        if options.part.total == 1:
            finish(state, plan, options.part)
        else:
            kept = sum(piece.records for piece in pieces) - refused
            print(f"{options.out}: slice {options.part} is done, {kept:,} samples; when all are: ccd-data merge DIR")


def _convert_missing(options: Options, state: State, jobs: list[Job]) -> int:
    """Makes the shards that are not there; returns the number of refused records in all of the jobs."""
    records = sum(job.piece.records for job in jobs)
    outcomes = ((job, state.outcome(job.piece, job.plan_hash)) for job in jobs)
    refused, missing = 0, []
    for job, outcome in outcomes:
        if outcome is None:
            missing.append(job)
        else:
            refused += len(outcome.refused)
    _check_space(options.out, missing)
    already = records - sum(job.piece.records for job in missing)
    with (
        Progress(options.name, records, "records", already) as progress,
        closing(run_jobs(make_shard, missing, options.workers, progress)) as made,
    ):
        for outcome in made:
            refused += len(outcome.refused)
            if refused > options.max_refused * records:
                break
    if refused > options.max_refused * records:
        raise _too_many_refused(state, jobs, refused, records)
    return refused


def _mend(options: Options, finished: Manifest, jobs: list[Job]) -> None:
    """Makes those shards of a finished folder again whose files have gone."""
    shards = {shard.file: shard for shard in finished.shards}
    missing = [j for j in jobs if j.piece.file in shards and not is_whole(options.out, shards[j.piece.file])]
    _check_space(options.out, missing)
    with (
        Progress(options.name, sum(job.piece.records for job in missing), "records") as progress,
        closing(run_jobs(make_shard, missing, options.workers, progress)) as made,
    ):
        for outcome in made:
            if outcome.shard != shards[outcome.shard.file]:
                raise UserError(
                    f"{options.out / outcome.shard.file}: made again, it is not what {MANIFEST} says: the source has "
                    "changed; convert everything into a new folder"
                )
    print(f"{options.out}: complete; {f'{len(missing)} shards were made again' if missing else 'nothing to do'}")


def _check_space(out: Path, jobs: Sequence[Job]) -> None:
    """UserError if the disk has not the room that the shards are expected to need."""
    needed = sum(job.piece.records * (job.origin.bytes_per_record + ROW.itemsize) for job in jobs)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"{out}: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free; make room, choose another "
            "--out, or convert a part of it with --slice"
        )


def _too_many_refused(state: State, jobs: Sequence[Job], refused: int, records: int) -> UserError:
    """Writes the list of what was refused so far, and says the most frequent kind."""
    outcomes = [outcome for job in jobs if (outcome := state.outcome(job.piece, job.plan_hash))]
    write_refused(state.out, outcomes)
    kinds = Counter(entry.kind for outcome in outcomes for entry in outcome.refused)
    example = next(entry for outcome in outcomes for entry in outcome.refused)
    return UserError(
        f"{state.out}: {refused:,} of {records:,} records are refused ({summary(kinds)}; the first: {example.source} "
        f"{example.record}, {example.reason}); see {REFUSED} there, mend the source or raise --max-refused"
    )


def main(argv: list[str]) -> int:
    """`ccd-data convert`: see the module's docstring."""
    options = _parse(argv)
    with write_errors(options.out):
        convert(options)
    return FINISHED


def _parse(argv: list[str]) -> Options:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ccd-data convert", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--src", action="append", required=True, type=Path, metavar="DIR", help="an LMDB, or a folder with LMDBs below")
    add(
        "--mask-src",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="LMDBs with mask-%%09d, laid out as those of --src; without it, masks beside the images are taken",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="new or empty folder, or one of this conversion")
    add("--name", required=True, help="beginning of the shards' file names")
    add(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="processes (default: %(default)s, all cores)",
    )
    add("--samples-per-shard", type=int, default=10_000, metavar="N", help="records that a shard covers (%(default)s)")
    add("--labels", choices=("keep", "drop"), default="keep", help="whether labels go with the images (%(default)s)")
    add(
        "--images",
        choices=("hr", "lr", "both"),
        help="of pairs in TextZoom's layout: the good pictures, the poor, or both",
    )
    add("--with-benchmarks", action="store_true", help="take sets to measure on, too; training refuses such shards")
    add("--slice", default="0/1", metavar="i/N", help="convert part i of N, counted from 0; afterwards: ccd-data merge")
    checks.add_options(parser)
    given = parser.parse_args(argv)
    checks.check_options(given)
    if not re.fullmatch(r"\w[\w.-]*", given.name):
        raise UserError(
            f"--name {given.name!r}: begin with a letter or digit; after it, '_', '-' and '.' may stand too"
        )
    settings = Settings(
        check=given.check,
        min_size=given.min_size,
        max_pixels=given.max_pixels,
        samples_per_shard=given.samples_per_shard,
        labels=given.labels,
        masks="required" if given.mask_src else "where present",
    )
    return Options(
        roots=given.src,
        mask_roots=given.mask_src,
        out=given.out,
        name=given.name,
        settings=settings,
        workers=given.workers,
        part=Slice.parse(given.slice),
        max_refused=given.max_refused,
        with_benchmarks=given.with_benchmarks,
        pictures=given.images,
    )
