"""A page and a contact sheet that show what is in a folder of shards, or in LMDBs of pairs or crops.

    ccd-data inspect DIR            a folder of shards; TextZoom's pairs; word crops with masks (`ccd-data crops`)

Of shards, sizes and refused records are those of the whole folder (its manifest counted them); contrast, aspect ratio
and characters are measured on a random part of it, the same one every time. Of LMDBs, evenly spread records are seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ccd_train.data.masks import (
    UndecodableImage,
    decode_mask,
    decode_rgb,
    pseudo_mask,
    resize_image,
    resize_mask,
)
from ccd_train.data.shards import Corpus, DamagedSampleError, Manifest, read_manifest
from ccd_train.errors import FINISHED, UserError
from data_tools.gallery import show
from data_tools.page import Histogram, Table, write_page
from data_tools.partners import find_partners
from data_tools.progress import Progress
from data_tools.sheet import arrange, cell, encode

SLOTS, MIN_PIXELS = 26, 30  # of character regions, as in training
CAPTION = "The crop as the network sees it, its pseudo-mask, and its character regions from left to right."
COLOURS = ((255, 99, 71), (60, 179, 113), (65, 135, 245), (255, 200, 40), (200, 90, 230), (70, 210, 210))


@dataclass(frozen=True)
class Look:
    """What one sample shows. Images uint8 [32, 128, …] as the network sees them."""

    key: str
    label: str
    image: np.ndarray
    mask: np.ndarray
    regions: np.ndarray
    """Ids [32, 128]: 0 background, then the characters from left to right."""
    width: int
    height: int
    contrast: float
    """Grey levels between the mean of the text and that of the background."""
    overlap: float | None
    """Intersection over union of the pseudo-mask and the stored mask, where there is one."""

    @property
    def characters(self) -> int:
        return int(self.regions.max())

    @property
    def joined(self) -> bool:
        """A crop twice as wide as high, mostly a word, that is one region or none."""
        return self.width >= 2 * self.height and self.characters <= 1

    @property
    def astray(self) -> int | None:
        """Regions more than the label has letters (negative: fewer); None without a label."""
        letters = len("".join(self.label.split()))
        return self.characters - letters if letters else None


def main(argv: list[str]) -> int:
    """`ccd-data inspect`: see the module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ccd-data inspect", description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of shards, or LMDBs of pairs or crops")
    parser.add_argument("--out", type=Path, help="where to write inspect.html and inspect.png (default: DIR)")
    parser.add_argument("--measure", type=int, default=2000, help="samples to measure (default 2000)")
    parser.add_argument("--show", type=int, default=64, help="samples on the contact sheet (default 64)")
    options = parser.parse_args(argv)
    if options.measure < 1 or not 1 <= options.show <= 1000:
        raise UserError("--measure must be 1 or more, and --show between 1 and 1000")
    out, measure = options.out or options.folder, max(options.measure, options.show)
    partners = find_partners(options.folder)
    if partners:
        print(show(options.folder.name, partners, out, measure, options.show))
    else:
        print(_show_shards(options.folder, out, measure, options.show))
    return FINISHED


def _show_shards(folder: Path, out: Path, measure: int, shown_samples: int) -> str:
    """Writes the page about a folder of shards; returns two lines."""
    manifest, corpus = read_manifest(folder), Corpus.open(folder)
    looks, unreadable = take_looks(corpus, measure)
    if not looks:
        raise UserError(f"{folder}: none of {unreadable} samples can be read; ccd-data verify tells more")
    chosen = looks[:shown_samples]
    tables = [summary(manifest, looks, unreadable), sources(manifest), refused(manifest), shown(chosen)]
    sheet = encode(contact_sheet(chosen))
    write_page(out, f"Shards {manifest.name}", sheet, histograms(manifest, looks), tables, CAPTION)
    judged = "; ".join(f"{name}: {text}" for name, text in judgement(looks))
    return f"{out / 'inspect.html'} and inspect.png: {len(looks)} samples measured, {unreadable} unreadable\n{judged}"


def take_looks(corpus: Corpus, count: int) -> tuple[list[Look], int]:
    """Random samples, and how many more could not be read."""
    random = np.random.default_rng(0)
    if corpus.num_samples <= 2 * count:
        chosen = random.permutation(corpus.num_samples)[:count].tolist()
    else:
        chosen = list(dict.fromkeys(random.integers(0, corpus.num_samples, 4 * count).tolist()))[:count]
    looks, unreadable = [], 0
    with Progress("inspect", len(chosen), "samples") as progress:
        for sample in chosen:
            progress.update(1)
            try:
                looks.append(look(corpus, *corpus.locate(sample)))
            except (DamagedSampleError, UndecodableImage):
                unreadable += 1
    return looks, unreadable


def look(corpus: Corpus, shard: int, row: int) -> Look:
    """Reads and measures a sample. Raises DamagedSampleError or UndecodableImage."""
    data, label, stored = corpus.read(shard, row)
    image = decode_rgb(data or b"")
    mask = pseudo_mask(image)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    text, background = grey[mask == 1], grey[mask == 0]
    small = resize_mask(mask)
    return Look(
        key=corpus.key(shard, row),
        label="" if label is None else label.decode(errors="replace"),
        image=resize_image(image),
        mask=small,
        regions=character_regions(small),
        width=image.shape[1],
        height=image.shape[0],
        contrast=abs(float(text.mean()) - float(background.mean())) if text.size and background.size else 0.0,
        overlap=None if stored is None else intersection_over_union(small, resize_mask(decode_mask(stored))),
    )


def character_regions(mask: np.ndarray) -> np.ndarray:
    """Ids of the regions of a mask [32, 128], as in training: 8-connected, ≥ 30 pixels, left to right, ≤ 26."""
    count, components, stats, centers = cv2.connectedComponentsWithStats(mask, connectivity=8)
    large = [number for number in range(1, count) if stats[number, cv2.CC_STAT_AREA] >= MIN_PIXELS]
    ordered = sorted(large, key=lambda number: float(centers[number][0]))[:SLOTS]
    ids = np.zeros(count, np.uint8)
    ids[ordered] = np.arange(1, len(ordered) + 1)
    return np.asarray(ids[components])


def intersection_over_union(one: np.ndarray, other: np.ndarray) -> float:
    """Of two 0/1 masks; 1 if both are empty."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def contact_sheet(looks: Sequence[Look]) -> np.ndarray:
    """uint8 [H, W, 3]: each sample's crop, mask, regions, and a line of figures."""
    return arrange([_cell(number, sample) for number, sample in enumerate(looks)])


def _cell(number: int, sample: Look) -> np.ndarray:
    palette = np.array([(24, 24, 24), *(COLOURS[slot % len(COLOURS)] for slot in range(SLOTS))], np.uint8)
    tiles = (sample.image, np.repeat(sample.mask[..., None] * np.uint8(255), 3, axis=2), palette[sample.regions])
    return cell(
        tiles, f"{number}: {sample.width}x{sample.height}, {sample.characters} region{'s' * (sample.characters != 1)}"
    )


def histograms(manifest: Manifest, looks: Sequence[Look]) -> list[Histogram]:
    """Sizes of the whole folder, the rest of the samples looked at."""
    edges = manifest.sizes.get("edges", [])
    whole = [
        Histogram(f"{side.capitalize()} in pixels, all samples", [f"≥ {edge}" for edge in edges], manifest.sizes[side])
        for side in ("width", "height")
        if edges
    ]
    aspect = np.array([sample.width / sample.height for sample in looks])
    ratios = [0.0, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15]
    contrast = np.array([sample.contrast for sample in looks])
    levels = list(range(0, 256, 16))
    characters = np.bincount([sample.characters for sample in looks], minlength=SLOTS + 1)
    return [
        *whole,
        Histogram("Width ÷ height", [f"≥ {ratio:g}" for ratio in ratios], _counts(aspect, ratios)),
        Histogram("Contrast in grey levels", [f"≥ {level}" for level in levels], _counts(contrast, levels)),
        Histogram("Characters (regions) per image", [str(n) for n in range(SLOTS + 1)], characters.tolist()),
    ]


def _counts(values: np.ndarray, edges: Sequence[float]) -> list[int]:
    return [int(count) for count in np.histogram(values, [*edges, np.inf])[0]]


def judgement(looks: Sequence[Look]) -> list[tuple[str, str]]:
    """How far the regions are characters, as far as that can be told."""
    rows = [("words as one region or none", f"{np.mean([sample.joined for sample in looks]):.1%}")]
    off = np.array([sample.astray for sample in looks if sample.astray is not None])
    if off.size:
        near = f"{np.mean(abs(off) <= 1):.1%} within one, {np.mean(off == 0):.1%} exactly"
        rows.append(("as many regions as the label has letters", near))
    return rows


def summary(manifest: Manifest, looks: Sequence[Look], unreadable: int) -> Table:
    """The first table: what there is, and the medians of what was measured."""
    shards = manifest.shards
    s = "" if len(shards) == 1 else "s"
    rows = [
        ("samples", f"{manifest.samples:,} in {len(shards):,} shard{s}, {manifest.bytes / 1e9:.3f} GB"),
        ("with label", f"{sum(shard.labels for shard in shards):,}"),
        ("with stored mask", f"{sum(shard.masks for shard in shards):,}"),
        ("refused", f"{sum(manifest.refused.values()):,}"),
        ("hash", manifest.hash),
        ("measured", f"{len(looks):,} samples; {unreadable:,} more could not be read"),
        ("contrast, median", f"{np.median([sample.contrast for sample in looks]):.0f} grey levels"),
        ("characters, mean", f"{np.mean([sample.characters for sample in looks]):.1f}"),
        *judgement(looks),
        ("without any character", f"{np.mean([sample.characters == 0 for sample in looks]):.1%}"),
        ("text pixels, mean", f"{np.mean([sample.mask.mean() for sample in looks]):.0%}"),
    ]
    overlaps = [sample.overlap for sample in looks if sample.overlap is not None]
    if overlaps:
        rows.append(("pseudo-mask against stored mask, median IoU", f"{np.median(overlaps):.3f}"))
    return Table("Summary", ("", ""), rows)


def sources(manifest: Manifest) -> Table:
    """The LMDBs or tars that the shards were made from."""
    return Table("Sources", ("source", "records"), [(entry.name, f"{entry.records:,}") for entry in manifest.sources])


def refused(manifest: Manifest) -> Table:
    """Records that did not come along, by reason."""
    return Table("Refused records", ("kind", "records"), [(kind, f"{n:,}") for kind, n in manifest.refused.items()])


def shown(looks: Sequence[Look]) -> Table:
    """The samples of the contact sheet, by their numbers on it."""
    rows = [
        (
            str(number),
            sample.key,
            sample.label,
            f"{sample.width}×{sample.height}",
            f"{sample.contrast:.0f}",
            str(sample.characters),
        )
        for number, sample in enumerate(looks)
    ]
    return Table("Samples of the sheet", ("", "key", "label", "size", "contrast", "characters"), rows)
