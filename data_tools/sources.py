"""The LMDBs that a conversion reads: their names, whether they are the same as before, and how large they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ccd_train.data.benchmarks import Recognised
from ccd_train.data.guard import benchmark_at
from ccd_train.data.records import FILE, LmdbReader, PairedReader, find_lmdbs, source_fingerprint
from ccd_train.data.shards import Source
from ccd_train.errors import UserError
from data_tools.kinds import Kind, PoorReader, has_codes, kind_of
from data_tools.tar import BLOCK

Pictures = Literal["hr", "lr", "both"]
_READERS: dict[str, type[LmdbReader]] = {
    "image": LmdbReader,
    "image_hr": PairedReader,
    "image_lr": PoorReader,
}  # by key
CODED = "masks for text segmentation (codes 0, 100, 200, 255)"
_TEXTZOOM_TESTS = ("easy", "medium", "hard")  # in `test`


@dataclass(frozen=True)
class Origin:
    """A source and where it is on this machine."""

    source: Source
    path: Path
    mask_path: Path | None
    """Another LMDB with the masks; None: masks, if any, are beside the images."""
    key: str
    """What the keys of its images begin with."""
    masked: bool
    """Whether its masks, if any, are for pretraining."""
    versions: tuple[tuple[int, int], ...]
    """Of the LMDB and the one with its masks: they change when somebody writes."""
    bytes_per_record: float
    """Expected in the tar."""

    def readers(self) -> tuple[LmdbReader, LmdbReader]:
        """Of the images and of the masks (one and the same if they are together)."""
        images = _READERS[self.key](self.path)
        return images, images if self.mask_path is None else LmdbReader(self.mask_path)

    def check_unchanged(self) -> None:
        """UserError if somebody has written to the LMDB since it was opened first."""
        if _versions(*self.readers()) != self.versions:
            raise UserError(f"{self.path}: it is being written to; start again when its writer has ended")


def find_origins(
    roots: Sequence[Path],
    mask_roots: Sequence[Path],
    with_benchmarks: bool = False,
    pictures: Pictures | None = None,
) -> list[Origin]:
    """All LMDBs of the given roots, in order; benchmarks among them are named and, unless asked for, left out.

    `pictures`: which of TextZoom's pairs to take; each kind is a source of its own. UserError unless every LMDB can be
    converted.
    """
    inside_masks = [os.path.realpath(root) for root in mask_roots]
    found = [
        (root, path)
        for root in roots
        for path in find_lmdbs(root)
        if not any(Path(os.path.realpath(path)).is_relative_to(masks) for masks in inside_masks)
    ]
    kinds = {path: kind_of(path) for _, path in found}
    if pictures is not None and "pairs" not in kinds.values():
        raise UserError(f"--images {pictures}: no pairs of pictures among the sources; leave it out")
    found = [(root, path) for root, path in found if _is_wanted(path, kinds[path], with_benchmarks)]
    if not found:
        raise UserError(
            f"{', '.join(map(str, roots))}: nothing but benchmarks, which are not for training; --with-benchmarks "
            "converts them all the same"
        )
    for real_path, times in Counter(os.path.realpath(path) for _, path in found).items():
        if times > 1:
            raise UserError(f"{real_path}: given {times} times; name each LMDB once in --src")
    names = _names([Path(os.path.abspath(root)) for root, _ in found], [path.relative_to(root) for root, path in found])
    origins = []
    for (root, path), name in zip(found, names, strict=True):
        mask_path = _mask_path(root, path, mask_roots) if mask_roots else None
        for key in _keys(path, kinds[path], pictures):
            suffix = key.removeprefix("image").replace("_", "/")  # of pairs: /hr or /lr
            origins.append(_open(name + suffix, path, mask_path, key, kinds[path]))
    return origins


def _keys(path: Path, kind: Kind, pictures: Pictures | None) -> list[str]:
    """What the keys of the wanted pictures begin with. UserError if nobody has said which of a pair those are."""
    if kind != "pairs":
        return ["image"]
    if pictures is None:
        with PairedReader(path) as reader:
            raise UserError(
                f"{path}: {len(reader):,} pairs in TextZoom's layout (image_hr-%09d and image_lr-%09d); say which "
                "pictures to take: --images hr, lr or both"
            )
    return ["image_hr", "image_lr"] if pictures == "both" else [f"image_{pictures}"]


def _is_wanted(path: Path, kind: Kind, with_benchmarks: bool) -> bool:
    """Says what it finds about a benchmark, or what may be one."""
    if kind == "pairs":
        place = path.resolve()
        tested = place.parent.name == "test" and place.name in _TEXTZOOM_TESTS
        found = Recognised(f"TextZoom {place.name}", True, "pairs in test") if tested else None
    elif kind == "crops":
        found = Recognised("TextSeg", True, "crops of its test pictures") if path.resolve().name == "test" else None
    else:
        found = benchmark_at(path)
    if found is None:
        return True
    what = f"{path}: {'' if found.certain else 'bears the name of '}the benchmark {found.name} ({found.why})"
    wanted = with_benchmarks or not found.certain
    print(f"{what}: {'taken' if wanted else 'left out; --with-benchmarks takes it'}", flush=True)
    return wanted


def _names(roots: list[Path], below: list[Path]) -> list[str]:
    """What to call LMDBs that lie `below` their `roots`: as much of the path as tells them apart, but at least the
    root's own name. It depends on no more of the machine's folders than that."""
    depth, names = 0, [""] * len(roots)
    while depth == 0 or len(set(names)) < len(names):
        depth += 1
        names = [str(Path(*root.parts[-depth:]) / path).lstrip("/") for root, path in zip(roots, below, strict=True)]
    return names


def _mask_path(root: Path, path: Path, mask_roots: Sequence[Path]) -> Path:
    """Where the masks of an LMDB are: `training/X` has them in `Mask/X` or `Mask/training/X`."""
    below, name = path.relative_to(root), Path(os.path.abspath(root)).name
    places = [mask_root / inner for mask_root in mask_roots for inner in (below, Path(name) / below)]
    for place in places:
        if (place / FILE).is_file():
            return place
    raise UserError(
        f"{path}: no LMDB with its masks at {' or '.join(map(str, places))}; add it, or leave out --mask-src"
    )


def _versions(images: LmdbReader, masks: LmdbReader) -> tuple[tuple[int, int], ...]:
    return (images.version(),) if masks is images else (images.version(), masks.version())


def _open(name: str, path: Path, mask_path: Path | None, key: str, kind: Kind) -> Origin:
    images = _READERS[key](path)
    masks = images if mask_path is None else LmdbReader(mask_path)
    with images, masks:
        versions = _versions(images, masks)
        records = len(images)
        if mask_path is not None and not masks.has("mask"):
            raise UserError(f"{mask_path}: no mask-%09d keys here; give LMDBs with masks as --mask-src")
        if mask_path is not None:
            masks.check_numbers("mask", records)
            if has_codes(masks, records):
                raise UserError(f"{mask_path}: {CODED}, which pretraining does not take; leave out --mask-src")
        elif kind == "crops":
            print(f"{path}: {CODED}: they are ignored, its images are taken", flush=True)
        fingerprint, probed = source_fingerprint(images, masks)
    bytes_in_tar = sum(BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK for sizes in probed for size in sizes)
    return Origin(
        Source(name, records, fingerprint), path, mask_path, key, kind != "crops", versions, bytes_in_tar / len(probed)
    )
