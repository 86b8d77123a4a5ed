"""Talking with SLURM."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ccd_train.errors import UserError


def sbatch(folder: Path, arguments: list[str]) -> str:
    """Submits from a folder, in which relative paths of the script then stand; returns the job's number."""
    return _run(["sbatch", "--parsable", *arguments], folder).strip().partition(";")[0]


def state(job: str) -> str | None:
    """PENDING, RUNNING, …; None where SLURM has forgotten the job, or is not here."""
    try:
        text = _run(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T (%r)"], Path.cwd())
    except UserError:
        return None
    return text.strip().replace(" (None)", "") or None


def _run(command: list[str], folder: Path) -> str:
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not here; submit on a login node of the cluster") from None
    if result.returncode:
        message = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise UserError(f"{command[0]} refuses: {message}")
    return result.stdout
