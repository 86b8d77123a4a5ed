"""How a run stands, from its folder and SLURM."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ccd_train.config.stored import read_settings
from ccd_train.durations import duration
from ccd_train.errors import UserError
from launch import slurm
from launch.lives import begins, newest_step, read_lives
from launch.outcome import read_outcome

BEST = "valid_best"  # of metrics, where there are validations
UNKNOWN = "no longer known to SLURM"


def describe(run_dir: Path) -> str:
    """A few lines: job, requeues, step, rate, time left, newest checkpoint, and how the last life ended."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the --run_dir of a run")
    lives, metrics, outcome = read_lives(run_dir), _last_metrics(run_dir), read_outcome(run_dir)
    rows = [("run", str(run_dir))]
    begun = begins(lives)
    if not lives and not (run_dir / "config.yaml").is_file():
        return f"{run_dir}: no run yet, and no job was submitted for it"
    jobs = [str(life["job"]) for life in begun]
    if begun:
        rows.append(("job", f"{jobs[-1]}, {slurm.state(jobs[-1]) or UNKNOWN}"))
        rows.append(
            (
                "lives",
                f"{len(begun)}, the last one (requeue {begun[-1]['requeues']}) from step {begun[-1]['step']}",
            )
        )
    for job in (str(life["job"]) for life in lives if life["event"] == "submit" and str(life["job"]) not in jobs):
        state = slurm.state(job)
        if state or not begun:
            rows.append(("submitted", f"job {job}, {state or UNKNOWN}"))
    if metrics is not None:
        rows += _progress(run_dir, metrics)
    rows += _alarms(run_dir)
    rows.append(("checkpoint", _checkpoint(run_dir)))
    if outcome is not None:
        rows.append(("last outcome", f"{outcome.word} ({outcome.code}): {outcome.message}"))
    return "\n".join(f"{name:14}{text}" for name, text in rows)


def _progress(run_dir: Path, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    step, rate = int(metrics["step"]), float(metrics["samples_per_second"])
    age = time.time() - (run_dir / "metrics.jsonl").stat().st_mtime
    config = read_settings(run_dir)
    batch = metrics["samples"] / step
    last_step = config.max_steps or -(-config.train.total_samples // batch)
    left = duration(max(last_step - step, 0) * batch / rate) if rate else "nobody knows how long"
    score = config.score or "{:.2%} of the words right"
    return [
        ("step", f"{step:,} of {last_step:,.0f}, logged {duration(age)} ago"),
        ("rate", f"{rate:,.0f} samples/s"),
        ("left", left),
        *([] if metrics[BEST] is None else [("validation", f"{score.format(metrics[BEST])} at best")]),
    ]


def _alarms(run_dir: Path) -> list[tuple[str, str]]:
    """The alarms that are not over."""
    try:
        lines = (run_dir / "alarms.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    newest = {alarm["kind"]: alarm for alarm in (json.loads(line) for line in lines if line.endswith("\n"))}
    return [("ALARM", f"step {alarm['step']}: {alarm['message']}") for alarm in newest.values() if not alarm["over"]]


def _checkpoint(run_dir: Path) -> str:
    step = newest_step(run_dir)
    if step == 0:
        return "none yet"
    age = time.time() - (run_dir / "checkpoints" / "latest").stat().st_mtime
    return f"step {step}, {duration(age)} ago"


def _last_metrics(run_dir: Path) -> dict[str, Any] | None:
    """The newest line of metrics.jsonl, with the best validation so far; None where there is no line."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return None
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        return None
    validated = next((line for line in reversed(whole) if f'"{BEST}"' in line), "{}")
    newest: dict[str, Any] = json.loads(whole[-1])
    return {BEST: json.loads(validated).get(BEST)} | newest
