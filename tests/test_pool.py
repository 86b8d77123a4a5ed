"""Workers: all results, the first error ends them, nobody outlives the parent; and what a long run prints."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import closing
from pathlib import Path

import pytest

from ccd_train.errors import UserError
from data_tools.pool import Report, run_jobs
from data_tools.progress import Progress


def square(job: int, done: Report) -> int:
    done(1)
    return job * job


def fail_at_five(job: int, done: Report) -> int:
    if job == 5:
        raise UserError("five")
    for _ in range(1000):
        time.sleep(0.01)
        done(0)
    return job


def write_and_wait(job: tuple[Path, int], done: Report) -> None:
    folder, _ = job
    (folder / str(os.getpid())).touch()
    time.sleep(60)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_jobs_are_done_once(workers: int) -> None:
    with Progress("x", 50, "jobs") as shown, closing(run_jobs(square, range(50), workers, shown)) as results:
        assert sorted(results) == [job * job for job in range(50)]
    assert shown.count == 50


def test_an_error_of_a_job_ends_the_others_soon() -> None:
    start = time.monotonic()
    with Progress("x", 10, "jobs") as shown, pytest.raises(UserError, match="five"):
        list(run_jobs(fail_at_five, [0, 5, 1, 2, 3], 2, shown))
    assert time.monotonic() - start < 8


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_pool as t\n"
        "if __name__ == '__main__':\n"
        "    jobs = [(Path(sys.argv[1]), i) for i in range(4)]\n"
        "    list(t.run_jobs(t.write_and_wait, jobs, 2, t.Progress('x', 4, 'jobs')))\n"
    )
    (tmp_path / "main.py").write_text(code)
    (tmp_path / "pids").mkdir()
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py", tmp_path / "pids", Path(__file__).parent])
    while len(workers := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < 2:
        assert parent.poll() is None
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_log_has_lines_with_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("words", 1000, "records", already=200) as shown:
        shown.seconds_between_lines = 0.0
        time.sleep(0.02)
        shown.update(400)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("words: 600 of 1,000 records (60 %), ") and lines[0].endswith(" left")


def test_a_terminal_has_a_bar() -> None:
    code = "from data_tools.progress import Progress as P\nwith P('words', 100, 'records') as p:\n  p.update(60)\n"
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True)
    os.close(terminal)
    assert b"words:" in (shown := os.read(controller, 10_000)) and b" records/s" in shown
    os.close(controller)
