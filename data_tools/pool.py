"""Jobs over processes, such that nothing outlives its parent and no failure hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from ccd_train.errors import UserError
from data_tools.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int], None]
"""What a job calls with the number of things that it has done since the last call."""

_POLL = 0.2  # seconds
_counter: Synchronized[int]  # of a worker: things done, over all workers, not yet shown
_stop: Synchronized[int]  # of a worker: whether to give up


class _Stopped(Exception):  # noqa: N818
    """The parent has given up."""


def available_cores() -> int:
    """The cores that this process may use: what a scheduler gave, not what the machine has."""
    return len(os.sched_getaffinity(0))


def run_jobs(
    function: Callable[[Job, Report], Result], jobs: Iterable[Job], workers: int, progress: Progress
) -> Generator[Result, None, None]:
    """Yields the results of `function` over the jobs, in the order in which they finish. Close it to give up.

    With one worker everything runs here. The first error of a job ends all; if the parent dies, its workers do.
    """
    if workers <= 1:
        yield from (function(job, progress.update) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a forked worker would hold the other workers' pipes open
    counter, stop = context.Value("q", 0), context.Value("b", 0)
    with ProcessPoolExecutor(workers, context, _begin, (counter, stop)) as executor:
        waiting: set[Future[Result]] = set()
        remaining = iter(jobs)
        try:
            while True:
                while len(waiting) < 2 * workers and (job := next(remaining, None)) is not None:
                    waiting.add(executor.submit(_work, function, job))
                if not waiting:
                    break
                done, waiting = wait(waiting, _POLL, FIRST_COMPLETED)
                with counter.get_lock():
                    news, counter.value = counter.value, 0
                progress.update(news)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory? try fewer --workers); "
                "start the same command again, it goes on where it stopped"
            ) from None
        finally:
            stop.value = 1
            executor.shutdown(cancel_futures=True)


def _begin(counter: Synchronized[int], stop: Synchronized[int]) -> None:
    """What a new worker does first."""
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(function: Callable[[Job, Report], Result], job: Job) -> Result:
    return function(job, _report)


def _report(more: int) -> None:
    if _stop.value:
        raise _Stopped
    with _counter.get_lock():
        _counter.value += more
