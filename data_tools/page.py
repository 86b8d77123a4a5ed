"""A page of histograms and tables in one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ccd_train.errors import UserError

BAR, GAP, HEIGHT, FOOT = 22, 4, 120, 46  # pixels of a histogram

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1680px; padding: 0 1rem;
       color-scheme: light dark; }
img { max-width: 100%; background: white; }
figure { display: inline-block; margin: 0 2rem 1rem 0; vertical-align: top; }
figcaption { font-weight: 600; }
svg text { font: 10px system-ui, sans-serif; fill: currentColor; }
svg rect { fill: #4a7fc1; }
table { border-collapse: collapse; }
td, th { padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
""".strip()


@dataclass(frozen=True)
class Histogram:
    """Counts of bins, each with its name."""

    title: str
    names: list[str]
    counts: list[int]


@dataclass(frozen=True)
class Table:
    """Rows of text below a heading."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(
    out: Path, title: str, sheet: bytes, histograms: Sequence[Histogram], tables: Sequence[Table], caption: str
) -> None:
    """Writes inspect.html with a contact sheet (PNG), of which the caption says what it shows; and inspect.png.

    UserError if it cannot.
    """
    picture = base64.b64encode(sheet).decode()
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(tables[0]),
        "<h2>Samples</h2>",
        f"<p>{escape(caption)}</p>",
        f'<img alt="Contact sheet" src="data:image/png;base64,{picture}">',
        "<h2>Distributions</h2>",
        *map(_histogram, histograms),
        *map(_table, tables[1:]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "inspect.png").write_bytes(sheet)
        (out / "inspect.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder with --out") from None


def _histogram(histogram: Histogram) -> str:
    """Bars with their counts above and their names, turned, below; empty bins at both ends are left out."""
    filled = [number for number, count in enumerate(histogram.counts) if count]
    first, last = (filled[0], filled[-1]) if filled else (0, 0)
    bins = list(zip(histogram.names, histogram.counts, strict=True))[first : last + 1]
    highest = max([count for _, count in bins] + [1])
    bars = []
    for place, (name, count) in enumerate(bins):
        x = place * (BAR + GAP)
        height = round((HEIGHT - 14) * count / highest)
        middle = x + BAR / 2
        bars.append(
            f'<rect x="{x}" y="{HEIGHT - height}" width="{BAR}" height="{height}">'
            f"<title>{escape(name)}: {count:,}</title></rect>"
            f'<text x="{middle}" y="{HEIGHT - height - 3}" text-anchor="middle">{_short(count)}</text>'
            f'<text transform="translate({middle + 3},{HEIGHT + FOOT - 4}) rotate(-90)">{escape(name)}</text>'
        )
    width = len(bins) * (BAR + GAP)
    label = f"Histogram: {histogram.title}"
    svg = f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{HEIGHT + FOOT}">{"".join(bars)}</svg>'
    return f"<figure><figcaption>{escape(histogram.title)}</figcaption>{svg}</figure>"


def _short(count: int) -> str:
    """A count in at most four characters: 950, 12k, 3.4M; nothing for 0."""
    if count < 1000:
        return str(count or "")
    thousands = count / 1000
    return f"{thousands:.0f}k" if thousands < 999.5 else f"{thousands / 1000:.1f}M"


def _table(table: Table) -> str:
    if not table.rows:
        return f"<h2>{escape(table.title)}</h2><p>None.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{escape(table.title)}</h2>\n<table><tr>{head}</tr>\n{rows}</table>"
