"""Are the shards what they were when they were made? Are pairs and crops whole?

    ccd-data verify DIR             hashes, sizes, offsets, counts, gaps, duplicate keys; damage is traced to its member
    ccd-data verify DIR --deep      also decodes every image and mask
    ccd-data verify LMDBS           TextZoom's pairs, word crops with masks: decodes all, compares sizes, counts codes

Exit code 0: all is well. 1: something is damaged, with a line for each finding. 2: nothing to verify.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ccd_train.data.shards import (
    PARTS,
    REFUSED,
    ROW,
    DamagedManifestError,
    Manifest,
    Shard,
    read_manifest,
    read_offsets,
)
from ccd_train.errors import FINISHED, UserError
from data_tools.images import Refusal, check_decodes, check_mask
from data_tools.index import INDEXED
from data_tools.kinds import Kind
from data_tools.merge import contents
from data_tools.partners import RECORD, find_partners, is_as_recorded, open_partners, walk_partners
from data_tools.pool import Report, available_cores, run_jobs
from data_tools.progress import Progress
from data_tools.tar import BadTar, TarSample, read_samples

DAMAGED = 1  # exit code
_LINES = 20  # findings printed for one shard
_READ = 1 << 20
KEY = np.dtype([("hash", "<u8"), ("place", "<i8")])  # of the key; and where its sample begins


@dataclass(frozen=True)
class Job:
    """A shard to look at."""

    folder: Path
    shard: Shard
    foreign: bool
    """From another tool: the tar may hold samples that are in no row."""
    deep: bool
    max_pixels: int


@dataclass(frozen=True)
class Findings:
    """What is wrong with a shard, and which keys it has."""

    file: str
    problems: list[str]
    keys: np.ndarray
    """A row (dtype KEY) for each sample that has one in the offsets."""


def check_shard(job: Job, done: Report) -> Findings:
    """Compares a shard with the manifest, with its offsets and with itself."""
    problems: list[str] = []
    keys: list[tuple[int, int]] = []
    tar_path = job.folder / job.shard.file
    try:
        rows = _check_offsets(job, problems)
        with open(tar_path, "rb") as tar:
            intact = _hash(tar) == job.shard.sha256
            if not intact:
                size = tar_path.stat().st_size
                problems.append(f"{size} bytes with another sha256 than the {job.shard.bytes} bytes of the manifest")
            problems.extend(_walk(job, tar, rows, intact, keys))
    except FileNotFoundError as error:
        problems.append(f"{Path(error.filename).name} is missing")
    except OSError as error:
        problems.append(f"cannot be read: {error}")
    done(job.shard.samples)
    return Findings(job.shard.file, problems, np.array(keys, KEY))


def _check_offsets(job: Job, problems: list[str]) -> np.ndarray:
    """The rows of the offsets file, as many as are whole."""
    path = job.folder / job.shard.offsets_file
    with open(path, "rb") as file:
        if _hash(file) != job.shard.offsets_sha256:
            problems.append(f"{path.name}: another sha256 than in the manifest")
    size, expected = path.stat().st_size, job.shard.samples * ROW.itemsize
    if size != expected:
        problems.append(f"{path.name}: {size} bytes instead of {expected}")
        return np.frombuffer(path.read_bytes()[: size // ROW.itemsize * ROW.itemsize], ROW)
    return read_offsets(path)


def _hash(file: BinaryIO) -> str:
    sha256 = hashlib.sha256()
    while chunk := file.read(_READ):
        sha256.update(chunk)
    return sha256.hexdigest()


def _walk(job: Job, tar: BinaryIO, rows: np.ndarray, intact: bool, keys: list[tuple[int, int]]) -> Iterator[str]:
    """Goes through the tar and the rows side by side; yields what does not fit, and collects the keys."""
    row = number = 0
    try:
        for sample in read_samples(tar):
            number += 1
            image = sample.members.get("image")
            while row < len(rows) and rows[row]["header"] < sample.place:
                yield f"row {row} of the offsets names byte {rows[row]['header']}, where no sample begins"
                row += 1
            if image is not None and row < len(rows) and rows[row]["header"] == image.header:
                yield from _check_sample(job, tar, sample, rows[row], intact)
                keys.append((_key_hash(sample.key), sample.place))
                row += 1
            elif not job.foreign:
                yield f"{sample.key} at byte {sample.place} is in no row of the offsets"
    except BadTar as error:
        yield str(error)
    else:
        if job.foreign and intact and number != job.shard.last:
            yield f"{number} samples in the tar, of which {job.shard.last} were looked at; index it again"
    if row < len(rows):
        yield f"the last {len(rows) - row} rows of the offsets name no sample of the tar"


def _check_sample(job: Job, tar: BinaryIO, sample: TarSample, row: np.void, intact: bool) -> Iterator[str]:
    for part in PARTS:
        member = sample.members.get(part)
        if (int(row[part]), int(row[f"{part}_size"])) != ((member.place, member.size) if member else (0, 0)):
            yield f"{sample.key} at byte {sample.place}: its {part} is not where the offsets say"
        elif member is not None and not (intact and not job.deep):
            content = os.pread(tar.fileno(), member.size, member.place)
            if zlib.crc32(content) != row[f"{part}_crc"]:
                yield f"{member.name} at byte {member.place}: damaged (its CRC-32 differs)"
            elif job.deep and part != "label":
                try:
                    check_decodes(content) if part == "image" else check_mask(content, job.max_pixels, decode=True)
                except Refusal as refusal:
                    yield f"{member.name} at byte {member.place}: {refusal.kind} ({refusal})"


def check_manifest(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What does not fit in the books: gaps and overlaps of record ranges, refused records, files that nobody knows."""
    kinds: Counter[str] = Counter()
    refused: dict[str, set[int]] = defaultdict(set)
    try:
        for line in (folder / REFUSED).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            kinds[entry["kind"]] += 1
            refused[entry["source"]].add(entry["record"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{REFUSED}: cannot be read ({error})"
    else:
        if kinds != manifest.refused:
            yield f"{REFUSED}: {dict(kinds)} does not fit the manifest's {manifest.refused}"
    ranges: dict[str, list[Shard]] = defaultdict(list)
    for shard in manifest.shards:
        ranges[shard.source].append(shard)
    for source in manifest.sources:
        following, kept = 1, 0
        for shard in sorted(ranges[source.name], key=lambda shard: shard.first):
            if shard.first < following:
                yield f"{shard.file}: records {shard.first} to {following - 1} of {source.name} are in two shards"
            following = shard.last + 1
            kept += shard.samples
        if kept + len(refused[source.name]) != source.records:
            gap = source.records - kept - len(refused[source.name])
            yield f"{source.name}: {gap} of {source.records} records are neither in a shard nor refused"
    known = {shard.file for shard in manifest.shards} | {source.name for source in manifest.sources}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path.name}: not in the manifest"


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "little")


def find_duplicates(folder: Path, findings: list[Findings]) -> Iterator[str]:
    """Names keys that are there more than once."""
    hashes = np.concatenate([entry.keys["hash"] for entry in findings])
    values, counts = np.unique(hashes, return_counts=True)
    for value in values[counts > 1][:_LINES]:
        found = [(entry.file, int(at)) for entry in findings for at in entry.keys["place"][entry.keys["hash"] == value]]
        with open(folder / found[0][0], "rb") as tar:
            key = next(sample.key for sample in read_samples(tar) if sample.place == found[0][1])
        places = ", ".join(f"{file} at byte {place}" for file, place in found[:3])
        yield f"key {key} is there {len(found)} times: {places}"


def verify(folder: Path, deep: bool, workers: int) -> bool:
    """Prints a line for all that is wrong; returns whether nothing is."""
    try:
        manifest = read_manifest(folder)
    except DamagedManifestError as error:
        print(error)
        return False
    if not manifest.shards:
        raise UserError(f"{folder}: no samples here, so nothing to verify; give shards with samples")
    foreign, max_pixels = bool(manifest.settings.get(INDEXED)), int(manifest.settings.get("max_pixels", 1 << 24))
    jobs = [Job(folder, shard, foreign, deep, max_pixels) for shard in manifest.shards]
    problems = list(check_manifest(folder, manifest))
    with (
        Progress("verify", manifest.samples, "samples") as progress,
        closing(run_jobs(check_shard, jobs, workers, progress)) as results,
    ):
        findings = sorted(results, key=lambda entry: entry.file)
    for entry in findings:
        problems += [f"{entry.file}: {problem}" for problem in entry.problems[:_LINES]]
        if len(entry.problems) > _LINES:
            problems.append(f"{entry.file}: and {len(entry.problems) - _LINES} more")
    if foreign:  # as webdataset has it, a key belongs to its tar
        problems += (line for entry in findings for line in find_duplicates(folder, [entry]))
    else:
        problems += find_duplicates(folder, findings)
    for problem in problems:
        print(f"{folder}: {problem}")
    if foreign and not problems:
        for line in find_duplicates(folder, findings):
            print(f"{folder}: note: {line}")
    if not problems:
        checked = "hashes, offsets, counts, keys" + (" and images" if deep else "")
        print(f"{folder}: {contents(manifest)}, all intact ({checked})")
    return not problems


def verify_partners(path: Path, kind: Kind) -> bool:
    """Prints what is wrong with an LMDB of pairs or crops, and what is in it; returns whether nothing is wrong."""
    survey = open_partners(path, kind)
    with Progress("verify", survey.records, "records") as progress:
        for _ in walk_partners(survey, range(1, survey.records + 1)):
            progress.update(1)
    if kind == "crops" and is_as_recorded(path) is False:
        survey.note(survey.wrong, "changed", f"not the crops of {path.parent / RECORD}: they were changed since")
    for found in survey.wrong:
        for line in survey.lines[found][:_LINES]:
            print(f"{path}: {line}")
    print(f"{path}: {survey.told}{'' if survey.wrong else '; all intact'}")
    return not survey.wrong


def main(argv: list[str]) -> int:
    """`ccd-data verify`: see the module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ccd-data verify", description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of shards, or LMDBs of pairs or crops")
    parser.add_argument("--deep", action="store_true", help="also decode every image and mask")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="processes (%(default)s)")
    given = parser.parse_args(argv)
    partners = find_partners(given.folder)
    if partners:
        intact = [verify_partners(path, kind) for path, kind in partners.items()]
        return FINISHED if all(intact) else DAMAGED
    return FINISHED if verify(given.folder, given.deep, given.workers) else DAMAGED
