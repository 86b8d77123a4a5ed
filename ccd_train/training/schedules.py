"""Learning rate, weight decay and momentum as pure functions of the samples seen.

`samples` is the number of samples consumed before the step in question, so step i of a run with global batch G has
samples = i·G, and the official per-step schedules are those of this module at these points.
"""

from __future__ import annotations

import math

OFFICIAL_BATCH = 256  # the batch for which the official constants are stated


def cosine(samples: int, start: float, end: float, total: int) -> float:
    """Half a cosine from `start` at 0 samples to `end` at `total`, and `end` ever after."""
    progress = min(samples / total, 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def warmup_cosine(samples: int, batch: int, peak: float, final: float, warmup: int, total: int) -> float:
    """A straight line from 0 over the first `warmup` samples, then a cosine from `peak` to `final` over the rest.

    As in the official code, the last step within the warm-up has the peak already, and the next one has it again.
    """
    if samples < warmup:
        return peak * min(samples / max(warmup - batch, 1), 1.0)
    return cosine(samples - warmup, peak, final, max(total - warmup, 1))


def scaled_learning_rate(base: float, batch: int, linear_up_to: int | None) -> float:
    """The peak for a global batch: `base` at 256, linear up to `linear_up_to` (None: always), then by the square root.

    Linear is Goyal et al. 2017; the square root is what keeps Adam's updates alike (Malladi et al. 2022).
    """
    if linear_up_to is None or batch <= linear_up_to:
        return base * batch / OFFICIAL_BATCH
    return base * linear_up_to / OFFICIAL_BATCH * math.sqrt(batch / linear_up_to)


def scaled_momentum(momentum: float, batch: int) -> float:
    """An EMA momentum stated for steps of 256 samples, for steps of `batch`: the same half-life in samples."""
    return float(momentum ** (batch / OFFICIAL_BATCH))
