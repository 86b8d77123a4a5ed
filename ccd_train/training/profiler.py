"""What some steps did, for whoever looks for lost time or memory: files in RUN/profile (docs/performance.md).

steps_100-105.json.gz          every operation with its shapes, on host and device; ui.perfetto.dev shows it
memory_steps_100-105.pickle    on CUDA: who asked for which memory, and when; PyTorch's memory_viz page shows it
memory_full_rank3.pickle       on CUDA: what lay in memory when rank 3 had none left
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ccd_train import distributed

log = logging.getLogger(__name__)

FOLDER = "profile"
ALLOCATIONS = 200_000  # remembered for a snapshot; the oldest are forgotten


class Profiler:
    """Watches rank 0 from the first step to the last that --log.profile_steps names, if it names any."""

    def __init__(self, run_dir: Path, steps: tuple[int, ...]) -> None:
        self._folder = run_dir / FOLDER
        self._steps = steps if distributed.rank() == 0 else ()
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Begins if `step` is the first; where a life starts among the steps, with that."""
        if not self._steps or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        cuda = torch.cuda.is_available()
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda], record_shapes=True, acc_events=True
        )
        self._began = step
        self._profile.start()
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)

    def after(self, step: int) -> None:
        """Ends after the last step, and writes what was seen."""
        if self._profile is not None and step >= self._steps[1]:
            self._end(step)

    def close(self, step: int) -> None:
        """The run ends with this step, whatever was asked for."""
        if self._profile is not None:
            self._end(step)

    def _end(self, step: int) -> None:
        assert self._profile is not None
        watched, self._profile, self._steps = self._profile, None, ()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        watched.stop()
        name = f"steps_{self._began}-{step}"
        write(self._folder / f"{name}.json.gz", watched.export_chrome_trace)
        if torch.cuda.is_available():
            write(self._folder / f"memory_{name}.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile of steps %d to %d: %s", self._began, step, self._folder)


def memory_is_full(run_dir: Path) -> Path:
    """Writes what lies in this rank's memory of CUDA. Returns the file."""
    path = run_dir / FOLDER / f"memory_full_rank{distributed.rank()}.pickle"
    write(path, torch.cuda.memory._dump_snapshot)
    return path


def write(path: Path, export: Callable[[str], None]) -> None:
    """A disk that takes no more costs the file, not the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        export(str(path))
    except OSError as error:
        log.warning("%s: %s; the run goes on without it", path, error.strerror)
