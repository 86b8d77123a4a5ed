"""Whether a job shall be started again, decided from the run folder: no SLURM is needed for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.lives import main, note, read_lives


class Run:
    """A run folder, and the two calls that the batch script makes around a life."""

    def __init__(self, folder: Path, environment: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.environment = environment
        (folder / "checkpoints").mkdir(parents=True)

    def call(self, event: str, restarts: int = 0, cap: int = 5, job: int = 7, after: str = "") -> int:
        for name, value in {"JOB_ID": job, "RESTART_COUNT": restarts, "JOB_DEPENDENCY": after}.items():
            self.environment.setenv(f"SLURM_{name}", str(value))
        settings = ["--config", "vit_nano", "--data.shards", "shards", "--run_dir", str(self.folder)]
        return main([event, str(cap), "--", "pretrain", *settings])

    def outcome(self, code: int) -> None:
        (self.folder / "outcome.json").unlink(missing_ok=True)
        (self.folder / "outcome.json").write_text(json.dumps({"outcome": "w", "code": code, "message": "m"}))

    def reach(self, step: int) -> None:
        (self.folder / "checkpoints/latest").write_text(f"step_{step:08d}\n")


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path / "run", monkeypatch)


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_a_life_ends_as_its_run(one: Run, code: int) -> None:
    assert one.call("begin") == 0
    one.reach(5)
    one.outcome(code)
    assert one.call("end") == code


def test_killed_without_an_outcome_is_started_again(one: Run, capsys: pytest.CaptureFixture[str]) -> None:
    one.outcome(3)  # of an earlier life
    assert one.call("begin") == 0
    one.reach(5)
    assert one.call("end") == 75
    assert "without an outcome" in capsys.readouterr().out


def test_two_lives_without_progress_are_the_last(one: Run, capsys: pytest.CaptureFixture[str]) -> None:
    one.reach(5)
    for restarts, code in ((0, 75), (1, 3)):
        assert one.call("begin", restarts) == 0
        one.outcome(75)
        assert one.call("end", restarts) == code
    assert "two lives in a row ended at step 5" in capsys.readouterr().out
    assert one.call("begin", 2) == 3  # SLURM itself starts a job again after a node is lost
    assert one.call("begin", job=8) == 0  # somebody has mended it and submits anew


def test_the_cap_holds(one: Run) -> None:
    for restarts in (0, 1, 2):
        assert one.call("begin", restarts, cap=2) == 0
        one.reach(restarts + 1)
        one.outcome(75)
        assert one.call("end", restarts, cap=2) == (75 if restarts < 2 else 3)
    assert one.call("begin", 3, cap=2) == 3


def test_a_chain_stops_after_an_error(one: Run) -> None:
    one.call("begin")
    one.outcome(3)
    one.call("end")
    assert one.call("begin", job=8, after="afterany:7") == 3
    assert one.call("begin", job=9, after="afterany:8") == 3
    assert one.call("begin", job=10) == 0


def test_a_chain_stops_where_two_jobs_made_no_progress(one: Run) -> None:
    for job in (7, 8):
        assert one.call("begin", job=job, after="" if job == 7 else "afterany:7") == 0
        one.outcome(75)
        code = one.call("end", job=job, after="" if job == 7 else "afterany:7")
    assert code == 3
    assert one.call("begin", job=9, after="afterany:8") == 3


def test_a_torn_line_is_left_out(one: Run) -> None:
    one.call("begin")
    with (one.folder / "lives.jsonl").open("a") as file:
        file.write('{"event": "end", "jo')
    one.outcome(0)
    assert one.call("end") == 0
    assert [life["event"] for life in read_lives(one.folder)] == ["begin", "end"]


@pytest.mark.parametrize("torn", [False, True])
def test_the_end_of_a_life_is_compared_with_its_own_beginning(one: Run, torn: bool) -> None:
    one.call("begin", job=6)
    one.outcome(75)
    one.call("begin", job=7)
    if torn:  # and with it the beginning of this life
        path = one.folder / "lives.jsonl"
        path.write_text(path.read_text()[:-20])
        one.outcome(0)
    note(one.folder, "submit", job="9", requeues=0)
    one.reach(5)
    assert one.call("end", job=7) == (0 if torn else 75)
    assert one.call("begin", job=8, after="afterany:7") == 0
