"""How far a long run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from ccd_train.durations import duration


class Progress:
    """Counts up to `total`. On stderr, so that a verb's own output stays clean."""

    seconds_between_lines = 20.0
    """In a log."""

    def __init__(self, title: str, total: int, unit: str, already: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.count = self._first = already
        self._start = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=already, desc=title, unit=f" {unit}", unit_scale=True, smoothing=0.05)

    def update(self, more: int) -> None:
        """Some more are done."""
        self.count += more
        if self._bar is not None:
            self._bar.update(more)
        elif time.monotonic() - self._said >= self.seconds_between_lines:
            self._said = time.monotonic()
            self._say()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._said > self._start and kind is None:  # a short run needs no lines
            self._say()

    def _say(self) -> None:
        rate = (self.count - self._first) / max(time.monotonic() - self._start, 1e-9)
        left = f"{duration((self.total - self.count) / rate)} left" if rate else "no rate yet"
        share = 100 * self.count // max(self.total, 1)
        print(
            f"{self.title}: {self.count:,} of {self.total:,} {self.unit} ({share} %), {rate:,.0f}/s, {left}",
            file=sys.stderr,
            flush=True,
        )
