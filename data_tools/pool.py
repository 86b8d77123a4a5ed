"""Jobs over processes, such that nothing outlives its parent, no failure hangs, and a killed run leaves nothing behind.

Each worker has a pipe of its own and nothing is shared: the standard pools keep their locks as named semaphores, which
stay in /dev/shm when a scheduler kills the whole job.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from ccd_train.errors import UserError
from data_tools.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int], None]
"""What a job calls with the number of things that it has done since the last call."""


def available_cores() -> int:
    """The cores that this process may use: what a scheduler gave, not what the machine has."""
    return len(os.sched_getaffinity(0))


def run_jobs(
    function: Callable[[Job, Report], Result], jobs: Iterable[Job], workers: int, progress: Progress
) -> Generator[Result, None, None]:
    """Yields the results of `function` over the jobs, in the order in which they finish. Close it to give up.

    With one worker everything runs here. The first UserError or OSError of a job ends all and is raised here; if the
    parent dies, its workers do.
    """
    if workers <= 1:
        yield from (function(job, progress.update) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a forked worker would hold the ends of the other workers' pipes
    processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
    remaining = iter(jobs)
    try:
        for _, job in zip(range(workers), remaining, strict=False):
            connection, theirs = context.Pipe()
            processes[connection] = context.Process(target=_serve, args=(theirs, function), daemon=True)
            processes[connection].start()
            theirs.close()
            connection.send(job)
        busy = set(processes)
        while busy:
            for connection in [ready for ready in wait(list(busy)) if isinstance(ready, Connection)]:
                kind, content = _receive(connection, processes[connection])
                if kind == "done":
                    progress.update(content)
                    continue
                yield content
                for job in remaining:
                    connection.send(job)
                    break
                else:
                    busy.remove(connection)
    finally:
        for connection in processes:  # a worker that is still at work ends when it reports next
            connection.close()
        for process in processes.values():
            process.join()


def run_in_order(
    function: Callable[[Job, Report], Result], jobs: Sequence[Job], workers: int, progress: Progress
) -> Generator[Result, None, None]:
    """As `run_jobs`, with the results in the order of the jobs."""
    finished: dict[int, Result] = {}
    following = 0
    numbered = partial(_numbered, function)
    with closing(run_jobs(numbered, list(enumerate(jobs)), workers, progress)) as results:
        for number, result in results:
            finished[number] = result
            while following in finished:
                yield finished.pop(following)
                following += 1


def _numbered(function: Callable[[Job, Report], Result], job: tuple[int, Job], done: Report) -> tuple[int, Result]:
    return job[0], function(job[1], done)


def _receive(connection: Connection, process: multiprocessing.process.BaseProcess) -> tuple[str, Any]:
    """What a worker says: ("done", count) or ("result", …). Raises the error of a job or of a worker's death."""
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        if process.exitcode is not None and process.exitcode > 0:
            raise RuntimeError("a worker process failed; its traceback is above") from None
        raise UserError(
            "a worker process was killed (out of memory? try fewer --workers); "
            "start the same command again, it goes on where it stopped"
        ) from None
    if kind == "error":
        assert isinstance(content, UserError | OSError)
        raise content
    return kind, content


def _serve(connection: Connection, function: Callable[[Job, Report], Result]) -> None:
    """A worker: does jobs until there are no more, or nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        while parent.is_alive():  # else its successor may have tidied up already what would be begun here
            job = connection.recv()
            try:
                result = function(job, lambda more: connection.send(("done", more)))
            except (ConnectionResetError, BrokenPipeError):  # nobody listens
                return
            except (UserError, OSError) as error:
                connection.send(("error", error))
            else:
                connection.send(("result", result))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
