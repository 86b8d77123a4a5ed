"""What a run folder tells about its run: settings, lives, figures, alarms, pictures and tables.

Read only, and from files alone, so a run may be looked at while it runs, and where it has been copied to.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ccd_train.config.options import read_recipe, recipes, to_dict
from ccd_train.config.run import RunConfig, flatten
from ccd_train.config.stored import read_settings
from ccd_train.errors import UserError

OWN = {"run_dir", "data.shards", "data.train", "data.valid", "max_steps", "max_minutes", "init"}  # no recipe sets them
PICTURE = re.compile(r"(?P<name>.+)_(?P<step>\d{8})\.png")


@dataclass(frozen=True)
class Life:
    """From a start of the run to the last line of metrics before the next one."""

    started: float
    """Seconds since 1970."""
    ended: float
    first_step: int
    """The first logged step of this life that was kept; 0 where there is none."""
    ranks: int
    hosts: str
    device: str
    versions: tuple[str, ...]
    """Python, packages and the commit, a line each."""


@dataclass(frozen=True)
class History:
    path: Path
    config: RunConfig
    identity: dict[str, Any]
    metrics: dict[str, np.ndarray]
    """Each figure [N] of the logged steps, NaN where a line has none."""
    lives: tuple[Life, ...]
    alarms: tuple[dict[str, Any], ...]
    outcome: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def nearest_recipe(self) -> str:
        """The recipe of the package from which the fewest settings differ."""
        kind = type(self.config)
        return min(recipes(kind), key=lambda name: len(self._from(name)))

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not those of the nearest recipe: there, and here."""
        return self._from(self.nearest_recipe)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return flatten(to_dict(self.config))

    @property
    def seconds(self) -> float:
        """In which some life was at work; what a kill took away after its last kept line is not known."""
        return sum(life.ended - life.started for life in self.lives)

    @property
    def rate(self) -> float:
        """Samples per second over the time of all lives; 0 where there is only a single line."""
        samples, seconds = float(self.metrics["samples"][-1]), self.seconds
        return samples / seconds if seconds else 0.0

    @property
    def rank_hours(self) -> float:
        return sum((life.ended - life.started) * life.ranks for life in self.lives) / 3600

    def pictures(self) -> dict[str, list[tuple[int, Path]]]:
        """Each kind's pictures with their steps, in order."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted((self.path / "pictures").glob("*.png")):
            match = PICTURE.fullmatch(path.name)
            if match:
                found.setdefault(match["name"], []).append((int(match["step"]), path))
        return found

    def tables(self) -> dict[str, str]:
        """Markdown tables of evaluations, by their place in the run folder."""
        paths = sorted(self.path.glob("**/table.md"))
        return {str(path.parent.relative_to(self.path)): path.read_text(encoding="utf-8") for path in paths}

    def _from(self, recipe: str) -> dict[str, tuple[Any, Any]]:
        theirs = flatten(to_dict(read_recipe(recipe, type(self.config))))
        mine = self.settings
        return {name: (theirs[name], mine[name]) for name in mine if name not in OWN and mine[name] != theirs[name]}


def read_history(path: Path) -> History:
    """UserError where there is no run folder, or nothing has been logged yet."""
    config = read_settings(path)
    try:
        identity = json.loads((path / "identity.json").read_text(encoding="utf-8"))
        environment = (path / "environment.txt").read_text(encoding="utf-8")
        lines = read_lines(path / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give the folder of a run that has begun") from None
    except json.JSONDecodeError:
        raise UserError(f"{path}: identity.json cannot be read; give the folder of a run") from None
    if not lines:
        raise UserError(f"{path}/metrics.jsonl has no line yet; wait for the first logged step")
    names = dict.fromkeys(name for line in lines for name in line)
    metrics = {name: np.array([line.get(name, np.nan) for line in lines], float) for name in names}
    alarms = read_lines(path / "alarms.jsonl") if (path / "alarms.jsonl").exists() else []
    outcome = path / "outcome.json"
    return History(
        path,
        config,
        identity,
        metrics,
        read_lives(environment, metrics),
        tuple(alarms),
        json.loads(outcome.read_text(encoding="utf-8")) if outcome.exists() else {},
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; a torn last line is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_lives(environment: str, metrics: dict[str, np.ndarray]) -> tuple[Life, ...]:
    """The blocks of environment.txt, each with the end that the metrics tell."""
    blocks = [block.splitlines() for block in environment.split("\n\n") if block.strip()]
    starts = [_time(block[0].removeprefix("started ")) for block in blocks]
    times = metrics.get("time", np.full(len(metrics["step"]), np.nan))
    lives = []
    for block, start, after in zip(blocks, starts, [*starts[1:], np.inf], strict=True):
        mine = (times >= start) & (times < after)
        facts = dict(line.partition(" ")[::2] for line in block)
        hosts = facts.get("hosts", "")
        lives.append(
            Life(
                started=start,
                ended=float(times[mine].max()) if mine.any() else start,
                first_step=int(metrics["step"][mine].min()) if mine.any() else 0,
                ranks=sum(int(count) for count in re.findall(r"× (\d+)", hosts)) or 1,
                hosts=hosts,
                device=facts.get("device", "unknown"),
                versions=tuple(line for line in block if not line.startswith(("started", "hosts", "device"))),
            )
        )
    return tuple(lives)


def _time(text: str) -> float:
    """Of '2026-11-22 15:00:00 +0100', as environment.txt has it, in seconds since 1970."""
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S %z").timestamp()
