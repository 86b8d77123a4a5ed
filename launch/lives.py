"""The lives of a run on a cluster: whether the job that has just ended shall be started again.

    python -m launch.lives begin MAX_REQUEUES -- pretrain SETTINGS    before a life; refuses what would get nowhere
    python -m launch.lives end MAX_REQUEUES -- pretrain SETTINGS      after it; ends with 75: it shall be started again

Called by slurm_pretrain.sbatch, whose verb (pretrain, finetune) and settings follow. The run folder remembers:
`RUN/lives.jsonl` has a line when ccd-submit submits a job, one when a life begins (job, requeues so far, step, the
outcome that lay there) and one when it ends (exit code).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from ccd_train.errors import FAILED, FINISHED, REFUSED, UNFINISHED, UserError, run
from launch.outcome import checked_run_dir, outcome_identity, read_outcome


def newest_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    try:
        return int((run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip().removeprefix("step_"))
    except (OSError, ValueError):
        return 0


def read_lives(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of lives.jsonl; one that a power cut tore is left out."""
    lives = []
    try:
        lines = (run_dir / "lives.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            lives.append(json.loads(line))
    return lives


def begins(lives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The beginnings of lives."""
    return [life for life in lives if life["event"] == "begin"]


def hopeless(lives: list[dict[str, Any]], step: int, max_requeues: int) -> str | None:
    """Why another life would get nowhere, or None: two in a row made no progress, or the cap is reached.

    Only lives that nobody asked for anew count: those of this job, and of the jobs that it was to follow in a chain.
    """
    begun = [life for life in begins(lives) if life["first"] == first_job(lives)]
    if [life["step"] for life in begun[-2:]] == [step, step]:
        return f"two lives in a row ended at step {step}, where they began; look at the log of job {begun[-1]['job']}"
    if requeues() > max_requeues:
        return f"started again {requeues()} times, which is the cap; raise max_requeues in the script to go on"
    return None


def first_job(lives: list[dict[str, Any]]) -> str:
    """The first job of the chain (`--dependency`) that this one belongs to; itself where there is none."""
    return next((str(life["first"]) for life in begins(lives) if life["job"] == job_before()), _job())


def job_before() -> str:
    """The job that this one was to follow; empty where there is none."""
    return os.environ.get("SLURM_JOB_DEPENDENCY", "").rpartition(":")[2]


def requeues() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def failed_before(lives: list[dict[str, Any]]) -> int | None:
    """The exit code of the job that this one was to follow, if that failed on its own error."""
    codes = [life["code"] for life in lives if life["event"] == "end" and life["job"] == job_before()]
    return codes[-1] if codes and codes[-1] in (REFUSED, FAILED) else None


def begin(run_dir: Path, max_requeues: int) -> int:
    """Notes that a life begins; does not end with 0 where it is hopeless, or the job before it in a chain failed."""
    lives, step = read_lives(run_dir), newest_step(run_dir)
    reason = hopeless(lives, step, max_requeues)
    failed = failed_before(lives)
    note(run_dir, "begin", step=step, first=first_job(lives), outcome=outcome_identity(run_dir))
    if reason or failed:
        code = failed or FAILED
        note(run_dir, "end", code=code, step=step)
        return _say(code, f"stopped: {reason or 'the job before this one failed by an error of its own'}")
    return _say(FINISHED, f"job {_job()}, requeue {requeues()}: from step {step}")


def end(run_dir: Path, max_requeues: int) -> int:
    """The exit code of the job: the run's own; 75 where it shall be started again, also after a kill from outside."""
    lives, step = read_lives(run_dir), newest_step(run_dir)
    outcome = read_outcome(run_dir)
    before = [life["outcome"] for life in begins(lives) if life["job"] == _job()]
    if outcome is None or outcome_identity(run_dir) in before[-1:]:
        code, message = UNFINISHED, "killed: the life ended without an outcome"
    else:
        code, message = outcome.code, f"{outcome.word}: {outcome.message}"
    note(run_dir, "end", code=code, step=step)
    if code == UNFINISHED:
        reason = hopeless(lives, step, max_requeues - 1)
        if reason:
            return _say(FAILED, f"{message}\nstopped: {reason}")
    return _say(code, message)


def note(run_dir: Path, event: str, **values: Any) -> None:
    """Adds a line to lives.jsonl; on a line of its own also where a power cut tore the last one."""
    path = run_dir / "lives.jsonl"
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    line = {"event": event, "job": _job(), "requeues": requeues()} | values
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def main(argv: list[str]) -> int:
    if len(argv) < 3 or argv[0] not in ("begin", "end") or not argv[1].isdigit() or argv[2] != "--":
        raise UserError("usage: python -m launch.lives begin|end MAX_REQUEUES -- VERB SETTINGS")
    run_dir = checked_run_dir(["ccd_train", *argv[3:]])
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return (begin if argv[0] == "begin" else end)(run_dir, int(argv[1]))
    except OSError as error:
        raise UserError(f"{run_dir}: {error.strerror}; choose a run folder that this job can write to") from None


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _say(code: int, message: str) -> int:
    print(message, flush=True)
    return code


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
