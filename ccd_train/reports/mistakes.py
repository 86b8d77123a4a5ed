"""A page of the words that were read wrong, as pictures, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from rapidfuzz.distance import Levenshtein

from ccd_train.data.masks import UndecodableImage, decode_rgb
from ccd_train.data.records import LmdbReader
from ccd_train.files import replace_file
from ccd_train.reports.benchmarks import Set

NAMED = 12  # pairs of characters that were confused
HEIGHT, WIDTH = 64, 320  # pixels that a picture takes at most
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1680px; padding: 0 1rem;
       color-scheme: light dark; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; padding: 0;
     list-style: none; }
li { overflow-wrap: anywhere; }
img { max-width: 100%; min-height: 24px; background: white; }
b { font-weight: 600; }
small { opacity: .7; }
""".strip()


class Mistake(NamedTuple):
    """A word that was read wrong. In their order: the farther off and the surer, the worse."""

    distance: float
    """1 − similarity."""
    confidence: float
    place: int
    """− the number of its record: of equally bad ones the first comes first."""
    label: str
    text: str
    unreadable: bool


class Counts(Protocol):
    @property
    def words(self) -> int: ...
    @property
    def correct(self) -> int: ...


def write_page(path: Path, title: str, sets: Sequence[tuple[Set, Counts, Sequence[Mistake]]]) -> None:
    """Writes the page; the pictures are read from the sets again. Raises OSError where it cannot be written."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for one, counts, worst in sets:
        wrong = counts.words - counts.correct
        shown = f"The worst {len(worst)} of {wrong:,}" if len(worst) < wrong else f"All {wrong:,}"
        parts.append(f"<h2>{escape(one.name)}</h2>\n<p>{shown} wrong words of {counts.words:,}, the worst first.</p>")
        with LmdbReader(one.path) as reader:
            items = [_item(mistake, reader.image(-mistake.place) or b"") for mistake in worst]
        if common := confusions(worst):
            parts.append(f"<p>Confused most often in these: {escape(common)}.</p>")
        parts.append("<ol>\n" + "\n".join(items) + "\n</ol>")
    replace_file(path, whole(title, parts))


def whole(title: str, parts: Sequence[str]) -> bytes:
    """The page of its parts."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    return page.encode()


def confusions(mistakes: Sequence[Mistake]) -> str:
    """`o for 0 (12), l for 1 (7)`: what was read for what, by a shortest edit. Another case is no confusion."""
    pairs = Counter(
        (mistake.text[edit.dest_pos], mistake.label[edit.src_pos])
        for mistake in mistakes
        for edit in Levenshtein.editops(mistake.label, mistake.text)
        if edit.tag == "replace" and mistake.text[edit.dest_pos].lower() != mistake.label[edit.src_pos].lower()
    )
    return ", ".join(f"{read} for {meant} ({count})" for (read, meant), count in pairs.most_common(NAMED))


def _item(mistake: Mistake, data: bytes) -> str:
    read = "cannot be read" if mistake.unreadable else f"{mistake.confidence:.1%} sure"
    return (
        f"<li>{_picture(data)}<br><b>{escape(mistake.text) or '(nothing)'}</b> for {escape(mistake.label)}<br>"
        f"<small>record {-mistake.place:,}, {read}</small></li>"
    )


def _picture(data: bytes) -> str:
    """The image as a small PNG inside the page; nothing for one that cannot be read."""
    try:
        return embedded(decode_rgb(data))
    except UndecodableImage:
        return ""


def embedded(image: np.ndarray) -> str:
    """A picture uint8 [H, W, 3], as large as it may be, inside the page."""
    height, width = image.shape[:2]
    factor = min(HEIGHT / height, WIDTH / width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    png = base64.b64encode(cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1].tobytes()).decode()
    return f'<img alt="" width="{size[0]}" height="{size[1]}" src="data:image/png;base64,{png}">'
