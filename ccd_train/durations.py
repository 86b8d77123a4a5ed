"""Times, and how often, for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """5 s, 12 min, 3 h 20 min, 4 d 6 h."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def times(count: float) -> str:
    """0.35 times, 2.5 times, 1,200 times."""
    return f"{count:,.0f} times" if count >= 10 else f"{count:.2g} times"
