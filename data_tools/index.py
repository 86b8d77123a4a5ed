"""Offsets and a manifest for webdataset tars that another tool wrote; the tars stay as they are.

    ccd-data index DIR

Every *.tar in DIR becomes a shard: samples with a .jpg, .jpeg or .png, with the .txt and .mask.png beside it. Samples
that cannot be used are refused as in a conversion: they get no row in the offsets.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ccd_train.data.shards import MANIFEST, PARTS, Manifest, Shard, Source, offsets_name, write_manifest
from ccd_train.errors import FINISHED, UserError
from data_tools import checks
from data_tools.checks import Checks
from data_tools.images import Refusal
from data_tools.merge import describe, summary
from data_tools.plan import SizeCounts
from data_tools.pool import Report, available_cores, run_jobs
from data_tools.progress import Progress
from data_tools.state import Outcome, Refused, write_refused
from data_tools.tar import BadTar, HashedFile, TarSample, make_row, read_samples

INDEXED = "indexed"  # a key of the manifest's settings: its tars come from elsewhere
_GZIP = b"\x1f\x8b"
_READ = 1 << 20


@dataclass(frozen=True)
class Job:
    """A tar to index."""

    path: Path
    checks: Checks


def find_tars(folder: Path) -> list[Path]:
    """The tars of a folder, sorted. UserError if there are none, if any is compressed, or if they have a manifest."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of the tars")
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder}: it has a {MANIFEST} already; delete that to index the tars again")
    packed: list[Path] = []
    tars: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith((".tar", ".tgz", ".tar.gz")) or not path.is_file():
            continue
        with open(path, "rb") as file:
            (packed if file.read(2) == _GZIP else tars).append(path)
    if packed:
        raise UserError(
            f"{packed[0]}: compressed with gzip ({len(packed)} such files here): no sample in it can be read without "
            "all before it; unpack it (gunzip) to a .tar first"
        )
    if not tars:
        raise UserError(f"{folder}: no .tar files here; give the folder of the tars")
    return tars


def index_tar(job: Job, done: Report) -> Outcome:
    """Writes the offsets of a tar. UserError if it is damaged."""
    path = job.path
    refused: list[Refused] = []
    sizes, present = SizeCounts(), Counter[str]()
    number = 0
    with open(path, "rb") as tar, closing(HashedFile(path.with_name(offsets_name(path.name)))) as offsets:
        sha256 = hashlib.sha256()
        while chunk := tar.read(_READ):
            sha256.update(chunk)
        try:
            for number, sample in enumerate(read_samples(tar), 1):
                try:
                    contents, image_size = _examine(tar.fileno(), sample, job.checks)
                except Refusal as refusal:
                    refused.append(Refused(path.name, number, refusal.kind, f"{sample.key}: {refusal}"))
                    continue
                offsets.write(make_row(sample.members["image"], contents))
                sizes.add(image_size)
                present.update(contents.keys())
        except BadTar as error:
            raise UserError(f"{path}: {error}; copy it again, or take it out of the folder") from None
        offsets.commit()
    done(path.stat().st_size >> 20)
    counts = (present["image"], present["label"], present["mask"], path.stat().st_size)
    shard = Shard(path.name, path.name, 1, number, *counts, sha256.hexdigest(), offsets.sha256())
    return Outcome("", shard, refused, sizes.counts())


def _examine(
    file: int, sample: TarSample, wanted: Checks
) -> tuple[dict[str, tuple[int, bytes]], tuple[int, int] | None]:
    """Place and content of a sample's parts, and the image's size. Raises Refusal if it cannot be used."""
    if "image" not in sample.members:
        raise Refusal("missing", "no .jpg, .jpeg or .png in the sample")
    if sample.repeated:
        raise Refusal("ambiguous", "more than one image, label or mask in the sample")
    if max(member.size for member in sample.members.values()) >> 32:
        raise Refusal("too large", "a member of 4 GB or more")
    contents = {
        part: (member.place, os.pread(file, member.size, member.place)) for part, member in sample.members.items()
    }
    image, label, mask = (contents[part][1] if part in contents else None for part in PARTS)
    assert image is not None
    return contents, wanted.examine(image, label, mask)[1]


def index(folder: Path, name: str, wanted: Checks, workers: int, max_refused: float) -> None:
    """Indexes all tars of a folder and writes its manifest. UserError if too many samples cannot be used."""
    jobs = [Job(path, wanted) for path in find_tars(folder)]
    total = sum(job.path.stat().st_size >> 20 for job in jobs)
    try:
        with Progress(name, total, "MB") as progress, closing(run_jobs(index_tar, jobs, workers, progress)) as made:
            outcomes = sorted(made, key=lambda outcome: outcome.shard.file)
        write_refused(folder, outcomes)
        records = sum(outcome.shard.last for outcome in outcomes)
        kinds = Counter(entry.kind for outcome in outcomes for entry in outcome.refused)
        if kinds.total() > max_refused * records:
            raise UserError(
                f"{folder}: {kinds.total():,} of {records:,} samples are refused ({summary(kinds)}); see "
                "refused.jsonl there, mend them or raise --max-refused"
            )
        sizes = SizeCounts()
        for outcome in outcomes:
            sizes.merge(outcome.sizes)
        sources = [Source(o.shard.file, o.shard.last, o.shard.sha256) for o in outcomes]
        shards = [outcome.shard for outcome in outcomes if outcome.shard.samples]
        settings = asdict(wanted) | {INDEXED: True}
        manifest = Manifest(name, settings, sources, shards, dict(sorted(kinds.items())), sizes.counts())
        write_manifest(folder, manifest)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read or written to ({error}); mend that and start again") from None
    print(describe(folder, manifest))


def main(argv: list[str]) -> int:
    """`ccd-data index`: see the module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ccd-data index", description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="the folder of the tars; the offsets are written there"
    )
    parser.add_argument("--name", help="name of the corpus (default: the folder's)")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="processes (%(default)s)")
    checks.add_options(parser)
    given = parser.parse_args(argv)
    checks.check_options(given)
    wanted = Checks(given.check, given.min_size, given.max_pixels)
    index(given.folder, given.name or given.folder.resolve().name, wanted, given.workers, given.max_refused)
    return FINISHED
