"""Offsets and a manifest for webdataset tars that another tool wrote; the tars stay as they are.

    ccd-data index DIR
    ccd-data index DIR --out OTHER      where DIR is read-only: OTHER gets the offsets, and links to the tars

Every *.tar in DIR becomes a shard: samples with a .jpg, .jpeg or .png, with the .txt and .mask.png beside it. Samples
that cannot be used are refused as in a conversion: they get no row in the offsets. Members that are no part of a
sample are counted by what their names end in.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ccd_train.data.shards import (
    IMAGE_EXTENSIONS,
    MANIFEST,
    PARTS,
    REFUSED,
    Manifest,
    Shard,
    Source,
    offsets_name,
    write_manifest,
)
from ccd_train.data.signatures import HEAD, packed_with
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
_READ = 1 << 20
_PACKED = re.compile(r"\.(t[bgx]z|tbz2|tzst|tar\.\w+)$")  # how the names of compressed tars end
_TAR = re.compile(r".*\.(tar|t[bgx]z|tbz2|tzst|tar\.(gz|bz2|xz|zst|lz4))", re.DOTALL)
_NAMED = 4  # kinds of members that are named


@dataclass(frozen=True)
class Job:
    """A tar to index."""

    path: Path
    out: Path
    checks: Checks


@dataclass(frozen=True)
class Indexed:
    """What became of a tar. One without usable samples has no offsets file."""

    outcome: Outcome
    left_out: Counter[str]
    """Members that are no part of a sample, by kind."""


def find_tars(folder: Path, out: Path) -> list[Path]:
    """The tars of a folder, sorted. UserError if there are none, if any is compressed, or if `out` has a manifest."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; give the folder of the tars")
    if (out / MANIFEST).exists():
        raise UserError(f"{out}: it has a {MANIFEST} already; delete that to index the tars again")
    packed: list[tuple[Path, str]] = []
    tars: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not _TAR.fullmatch(path.name) or not path.is_file():
            continue
        with open(path, "rb") as file:
            how = packed_with(file.read(HEAD))
        if how is None:
            tars.append(path)
        else:
            packed.append((path, how))
    beside = [path for path, _ in packed if path.with_name(_PACKED.sub(".tar", path.name)) in tars]
    for path in beside:
        print(f"{path}: not read; it is compressed, and {_PACKED.sub('.tar', path.name)} stands beside it")
    packed = [(path, how) for path, how in packed if path not in beside]
    if packed:
        path, how = packed[0]
        raise UserError(
            f"{path}: compressed with {how} ({len(packed)} compressed files here): no sample in it can be read without "
            "all before it; unpack it to a .tar first"
        )
    if not tars:
        raise UserError(f"{folder}: no .tar files here; give the folder of the tars")
    return tars


def index_tar(job: Job, done: Report) -> Indexed:
    """Writes the offsets of a tar. UserError if it is damaged."""
    path = job.path
    refused: list[Refused] = []
    sizes, present, left_out = SizeCounts(), Counter[str](), Counter[str]()
    places: dict[str, int] = {}
    number = 0
    with open(path, "rb") as tar, closing(HashedFile(job.out / offsets_name(path.name))) as offsets:
        sha256 = hashlib.sha256()
        while chunk := tar.read(_READ):
            sha256.update(chunk)
        try:
            for number, sample in enumerate(read_samples(tar, left_out), 1):
                left_out.update(sample.left_out)
                try:
                    if places.setdefault(sample.key, sample.place) != sample.place:
                        raise Refusal("ambiguous", f"its key is at byte {places[sample.key]} already")
                    contents, image_size = _examine(tar.fileno(), sample, job.checks)
                except Refusal as refusal:
                    refused.append(Refused(path.name, number, refusal.kind, f"{sample.key}: {refusal}"))
                    continue
                offsets.write(make_row(sample.members["image"], contents))
                sizes.add(image_size)
                present.update(contents.keys())
        except BadTar as error:
            raise UserError(f"{path}: {error}; copy it again, or take it out of the folder") from None
        if present["image"]:
            offsets.commit()
    done(path.stat().st_size >> 20)
    counts = (present["image"], present["label"], present["mask"], path.stat().st_size)
    shard = Shard(path.name, path.name, 1, number, *counts, sha256.hexdigest(), offsets.sha256())
    return Indexed(Outcome("", shard, refused, sizes.counts()), left_out)


def _examine(
    file: int, sample: TarSample, wanted: Checks
) -> tuple[dict[str, tuple[int, bytes]], tuple[int, int] | None]:
    """Place and content of a sample's parts, and the image's size. Raises Refusal if it cannot be used."""
    if "image" not in sample.members:
        raise Refusal("missing", f"no .jpg, .jpeg or .png in the sample{_instead(sample.left_out)}")
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


def _instead(left_out: list[str]) -> str:
    """What may have been meant for the image of a sample."""
    images = [kind for kind in left_out if kind.removesuffix(" (a link)").rpartition(".")[2] in IMAGE_EXTENSIONS]
    if not images:
        return ""
    if links := [kind for kind in images if kind.endswith("link)")]:
        return f", but {_counted(Counter(links))}: make the tar with --dereference --hard-dereference"
    return (
        f", but {len(images)} whose names go on before it ({images[0]}): the key ends at the first dot, as in "
        "webdataset; make the tar with other names"
    )


def _counted(kinds: Counter[str]) -> str:
    """`10 × .label, 1 × .json`, the most frequent first."""
    named = [f"{count:,} × {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED:,} more kinds" if len(named) > _NAMED else "")


def index(folder: Path, out: Path, name: str, wanted: Checks, workers: int, max_refused: float) -> None:
    """Indexes all tars of a folder into `out`. UserError if too many samples cannot be used."""
    jobs = [Job(path, out, wanted) for path in find_tars(folder, out)]
    total = sum(job.path.stat().st_size >> 20 for job in jobs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Progress(name, total, "MB") as progress, closing(run_jobs(index_tar, jobs, workers, progress)) as made:
            results = sorted(made, key=lambda result: result.outcome.shard.file)
        left_out: Counter[str] = sum((result.left_out for result in results), Counter())
        others = f"left out: {_counted(left_out)}" if left_out else ""
        outcomes = [result.outcome for result in results]
        manifest = _manifest(folder, out, name, wanted, outcomes, max_refused, others)
        if out.resolve() != folder.resolve():
            _link(jobs, manifest)
        write_manifest(out, manifest)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read, or {out} not be written to ({error}); mend that and start again, or name "
            "another folder with --out"
        ) from None
    print(describe(out, manifest) + (f"; {others}" if others else ""))


def _manifest(
    folder: Path, out: Path, name: str, wanted: Checks, outcomes: list[Outcome], max_refused: float, others: str
) -> Manifest:
    """What was found, once refused.jsonl is written. UserError if that is nothing, or too little."""
    records = sum(outcome.shard.last for outcome in outcomes)
    shards = [outcome.shard for outcome in outcomes if outcome.shard.samples]
    refused = [entry for outcome in outcomes for entry in outcome.refused]
    kinds = Counter(entry.kind for entry in refused)
    if not records:
        found = f" ({others})" if others else ""
        raise UserError(f"{folder}: no samples in {len(outcomes)} tars{found}; give tars with .jpg, .jpeg or .png")
    write_refused(out, outcomes)
    if not shards or len(refused) > max_refused * records:
        remedy = "mend them" + (" or raise --max-refused" if shards else "")
        raise UserError(
            f"{folder}: {len(refused):,} of {records:,} samples are refused ({summary(kinds)}; the first: "
            f"{refused[0].source}, {refused[0].reason}); see {out / REFUSED}, {remedy}"
        )
    sizes = SizeCounts()
    for outcome in outcomes:
        sizes.merge(outcome.sizes)
    sources = [Source(o.shard.file, o.shard.last, o.shard.sha256) for o in outcomes]
    return Manifest(
        name, asdict(wanted) | {INDEXED: True}, sources, shards, dict(sorted(kinds.items())), sizes.counts()
    )


def _link(jobs: list[Job], manifest: Manifest) -> None:
    """Puts links to the tars beside their offsets. UserError if something else has such a name."""
    wanted = {shard.file for shard in manifest.shards}
    for job in jobs:
        link, target = job.out / job.path.name, Path(os.path.abspath(job.path))
        if job.path.name not in wanted or (link.is_symlink() and link.readlink() == target):
            continue
        if os.path.lexists(link):
            raise UserError(f"{link}: is there already, and is no link to {target}; choose another --out")
        link.symlink_to(target)


def main(argv: list[str]) -> int:
    """`ccd-data index`: see the module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ccd-data index", description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the tars")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the offsets (default: beside the tars)")
    parser.add_argument("--name", help="name of the corpus (default: the folder's)")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="processes (%(default)s)")
    checks.add_options(parser)
    given = parser.parse_args(argv)
    checks.check_options(given)
    wanted = Checks(given.check, given.min_size, given.max_pixels)
    name = given.name or given.folder.resolve().name
    index(given.folder, given.out or given.folder, name, wanted, given.workers, given.max_refused)
    return FINISHED
