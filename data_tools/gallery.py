"""The page of `ccd-data inspect` about pairs and crops: both pictures, or picture and mask, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ccd_train.data.masks import resize_image
from ccd_train.data.pixels import EFFECT, GROUND, IGNORED, WORD, fit_mask
from ccd_train.errors import UserError
from data_tools.kinds import Kind
from data_tools.merge import summary
from data_tools.page import Histogram, Table, write_page
from data_tools.partners import Partners, Survey, open_partners, walk_partners
from data_tools.plan import SIZE_EDGES
from data_tools.progress import Progress
from data_tools.sheet import arrange, cell, encode

COLOURS = {GROUND: (24, 24, 24), WORD: (255, 255, 255), EFFECT: (255, 160, 40), IGNORED: (65, 135, 245)}
CAPTION = (
    "Of a pair the poor picture above the good one; of a crop its mask below it: text white, effects (shadow, glow) "
    "orange, ignored blue. All are stretched to 128×32."
)


def show(name: str, found: Mapping[Path, Kind], out: Path, measure: int, shown: int) -> str:
    """Writes inspect.html and inspect.png about some LMDBs; returns a line. UserError if no record is whole."""
    surveys = [open_partners(path, kind) for path, kind in found.items()]
    share = max(1, measure // len(surveys))
    kept: list[tuple[Survey, Partners]] = []
    with Progress("inspect", sum(min(share, survey.records) for survey in surveys), "records") as progress:
        for survey in surveys:
            numbers = np.unique(np.linspace(1, survey.records, share).astype(int)).tolist()
            every = max(1, len(numbers) * len(surveys) // shown)  # spread over all that is looked at
            for place, record in enumerate(walk_partners(survey, numbers)):
                progress.update(1)
                if place % every == 0 and len(kept) < shown:
                    kept.append((survey, record))
    if not kept:
        raise UserError(f"{name}: none of the records can be read ({surveys[0].told}); ccd-data verify tells more")
    sheet = encode(arrange([cell(_tiles(record), _line(place, record)) for place, (_, record) in enumerate(kept)]))
    write_page(out, f"Pictures of {name}", sheet, _histograms(surveys), _tables(surveys, kept), CAPTION)
    wrong: Counter[str] = sum((survey.wrong for survey in surveys), Counter())
    text = f"{out / 'inspect.html'} and inspect.png: {sum(survey.seen for survey in surveys)} records looked at"
    return text + (f"; wrong: {summary(wrong)}" if wrong else "")


def _tiles(record: Partners) -> tuple[np.ndarray, np.ndarray]:
    picture = resize_image(record.picture)
    if record.partner.ndim == 3:
        return resize_image(record.partner), picture
    codes = fit_mask(record.partner)
    coloured = np.zeros((*codes.shape, 3), np.uint8)
    for code, colour in COLOURS.items():
        coloured[codes == code] = colour
    return picture, coloured


def _line(place: int, record: Partners) -> str:
    return f"{place}: {record.picture.shape[1]}x{record.picture.shape[0]}"


def _histograms(surveys: Sequence[Survey]) -> list[Histogram]:
    sizes = np.array([size for survey in surveys for size in survey.sizes])
    names = [f"≥ {edge}" for edge in SIZE_EDGES]
    return [
        Histogram(f"{side} in pixels", names, np.histogram(sizes[:, column], [*SIZE_EDGES, np.inf])[0].tolist())
        for column, side in enumerate(("Width", "Height"))
    ]


def _tables(surveys: Sequence[Survey], kept: Sequence[tuple[Survey, Partners]]) -> list[Table]:
    whole = [(str(one.path), one.kind, f"{one.records:,}", f"{one.seen:,}", one.told) for one in surveys]
    odd = [(str(one.path), kind, f"{len(lines):,}", lines[0]) for one in surveys for kind, lines in one.lines.items()]
    rows = [
        (str(place), str(survey.path), str(record.number), record.label) for place, (survey, record) in enumerate(kept)
    ]
    return [
        Table("Summary", ("LMDB", "kind", "records", "looked at", "what is in them"), whole),
        Table("Wrong or odd", ("LMDB", "kind", "records", "the first"), odd),
        Table("Samples of the sheet", ("", "LMDB", "number", "label"), rows),
    ]
