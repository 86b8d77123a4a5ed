"""What the parts of the GPU test have in common: their arguments, their rows, and the runs that they start."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """Where a part writes, and until when it may run."""

    out: Path
    deadline: float
    """Seconds since 1970."""
    rehearse: bool

    def left(self) -> float:
        return self.deadline - time.time()

    def add(self, kind: str, **values: Any) -> None:
        """Adds a row to the table of this kind."""
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        print(kind, values, flush=True)


def arguments() -> Part:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    return Part(options.out, options.deadline, options.rehearse)


def start(log: Path, *command: object, threads: int = 2) -> subprocess.Popen[bytes]:
    """A program of ours, in a process group of its own, with its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )


def train(verb: str, run_dir: Path, *options: object) -> subprocess.Popen[bytes]:
    return start(run_dir.with_name(f"{run_dir.name}.log"), "-m", "ccd_train", verb, "--run_dir", run_dir, *options)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def shards(part: Part, name: str, seconds: float = 60) -> Path:
    """A finished folder of words.py, waited for."""
    path, end = part.out / "words" / name, time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} was not rendered in time; see {part.out / 'words.log'}"
        time.sleep(0.5)
    return path
