"""Charts as SVG, drawn by hand: lines over steps or hours, with vertical marks. No script, no library, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

COLORS = ("#2563a8", "#c2571a", "#2e8b57", "#8e44ad", "#b8860b", "#c0392b", "#16828a", "#6b6b6b")
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 30
POINTS = 400  # of a line: more cannot be told apart at this width


@dataclass(frozen=True)
class Line:
    name: str
    x: np.ndarray
    """[N], rising."""
    y: np.ndarray
    """[N]; NaN where there is nothing."""
    color: str = COLORS[0]
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    x: float
    text: str


@dataclass(frozen=True)
class Axes:
    """From values to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool

    def across(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        share = (value - low) / (high - low)
        if self.logarithmic:
            share = math.log(value / low) / math.log(high / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def chart(title: str, lines: Sequence[Line], marks: Sequence[Mark] = (), unit: str = "step", log: bool = False) -> str:
    """A figure with its title and, where there are several lines, a legend with their last values; empty without data.

    log: a logarithmic scale, where all values are positive.
    """
    known = [line for line in lines if np.isfinite(line.y).any()]
    if not known:
        return ""
    axes = _axes(known, log)
    parts = [_grid(axes, unit)]
    for mark in marks:
        if axes.x[0] <= mark.x <= axes.x[1]:
            x = axes.across(mark.x)
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{escape(mark.text)}</title></line>"
            )
    parts += [_polyline(line, axes) for line in known]
    legend = "".join(
        f'<span><i style="background:{line.color}"></i>{escape(line.name)} <b>{number(_last(line))}</b></span>'
        for line in known
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )


def number(value: float) -> str:
    """Short: 12,300; 0.0123; 1.2e-05."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.2g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring finite values, so that at most `points` remain; a few values stay as they are."""
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) <= points:
        return x, y
    groups = np.array_split(np.arange(len(x)), points)
    return np.array([x[group].mean() for group in groups]), np.array([y[group].mean() for group in groups])


def _axes(lines: Sequence[Line], log: bool) -> Axes:
    x = np.concatenate([line.x[np.isfinite(line.y)] for line in lines])
    y = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    left, right = float(x.min()), float(x.max())
    low, high = float(y.min()), float(y.max())
    logarithmic = log and low > 0 and high > 1.05 * low
    if logarithmic:
        low, high = low / 1.1, high * 1.1
    else:
        high = 1.0 if low == high == 0 else high
        spread = (high - low) or abs(high)
        low = 0.0 if 0 <= low < 0.5 * high else low - 0.06 * spread
        high += 0.06 * spread
    return Axes((left, right if right > left else left + 1), (low, high), logarithmic)


def _grid(axes: Axes, unit: str) -> str:
    parts = []
    if axes.logarithmic:
        low, high = (math.log10(value) for value in axes.y)
        powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
        heights = powers if len(powers) > 1 else ticks(*axes.y)
    else:
        heights = ticks(*axes.y)
    for value in heights:
        y = axes.down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(value, heights)}</text>')
    places = ticks(*axes.x)
    for value in places:
        x = axes.across(value)
        if x < WIDTH - RIGHT - 60:  # the unit stands there
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_label(value, places)}</text>'
            )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM + 17}" text-anchor="end">{escape(unit)}</text>')
    return "".join(parts)


def _label(value: float, among: Sequence[float]) -> str:
    """With as many decimals as tell it from the others."""
    step = min((b - a for a, b in pairwise(among)), default=abs(value) or 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return number(value) if decimals > (8 if abs(value) > 0.1 else 5) or abs(value) >= 1e7 else f"{value:,.{decimals}f}"


def _polyline(line: Line, axes: Axes) -> str:
    x, y = thinned(line.x, line.y)
    places = [(axes.across(a), axes.down(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{line.color}"/>'
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<polyline points="{path}" stroke="{line.color}"{dashes}/>'


def _last(line: Line) -> float:
    return float(line.y[np.isfinite(line.y)][-1])
