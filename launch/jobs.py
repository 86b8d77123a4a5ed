"""The jobs that ccd-submit submits: a run that trains, and the sharding of a corpus; checked while they are made."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ccd_train.config.stored import claim
from ccd_train.data.records import find_lmdbs
from ccd_train.errors import UserError
from launch import slurm
from launch.outcome import parse_training
from launch.outlook import outlook
from launch.preflight import check_batch, check_settings, check_writable
from launch.script import array, render

BESIDE_WORKERS = 2  # CPUs per process for what is not the loader: the training process and its helpers
PASSED_ON = ("partition", "account", "qos", "constraint", "mem", "gres")


@dataclass(frozen=True)
class Job:
    """A batch script and the folder in which it is kept and its logs go."""

    folder: Path
    name: str
    text: str
    outlook: list[tuple[str, str]]
    """What it will do, for a dry run: lines with a name."""

    def submit(self, *options: str) -> str:
        """Writes the script and submits it; returns the job's number. One that can never start is refused."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / self.name).write_text(self.text, encoding="utf-8")
        slurm.sbatch(self.folder, ["--test-only", self.name])
        return slurm.sbatch(self.folder, [*options, self.name])


def training(arguments: Namespace, settings: list[str]) -> Job:
    """The job of a run of `ccd-train {arguments.trains}`. Raises UserError for what would fail in the queue.

    A dry run is checked as far as it goes without torch.
    """
    run_dir = arguments.run_dir.resolve()
    settings = [*settings, "--run_dir", str(run_dir)]
    config = parse_training(arguments.trains, settings)
    processes = arguments.gpus_per_node or arguments.processes_per_node
    size = check_settings(
        config, gpus=bool(arguments.gpus_per_node or arguments.gres), later=arguments.after is not None
    )
    facts = None
    if not arguments.dry_run:
        from launch.rehearsal import rehearse  # imports torch, which takes seconds

        facts = rehearse(config, later=arguments.after is not None)
    batch = claim(run_dir, config, facts, config.train.global_batch_size)
    check_batch(config, arguments.nodes * processes, batch)
    options: dict[str, str | None] = {
        "job-name": arguments.job_name or f"ccd-{run_dir.name}".replace("\n", " "),
        "nodes": str(arguments.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str((arguments.cpus_per_gpu or config.data.workers + BESIDE_WORKERS) * processes),
        "time": arguments.time,
        "signal": f"B:USR1@{arguments.save_seconds}",
        "no-requeue" if arguments.chain else "requeue": None,
        "open-mode": "append",
        "output": "slurm-%j.log",
    }
    if arguments.gpus_per_node and arguments.gres is None:
        options["gpus-per-node"] = str(arguments.gpus_per_node)
    lines = common_lines(arguments, settings) | {
        "verb=": f"verb={arguments.trains}",
        "max_requeues=": f"max_requeues={arguments.max_requeues}",
        "requeue=": f"requeue={'no' if arguments.chain else 'yes'}",
        "doctor=": f"doctor={'yes' if getattr(arguments, 'doctor', False) else 'no'}",
        "nproc=": f"nproc={processes}",
    }
    options |= passed_on(arguments)
    check_time(options)
    text = render("slurm_pretrain.sbatch", options, lines)
    told = outlook(config, size, batch, arguments, options)
    return Job(log_folder(run_dir), f"{arguments.trains}.sbatch", text, told)


def sharding(arguments: Namespace, settings: list[str]) -> Job:
    """The job of an array over `ccd-data convert --slice`, and of the merge after it."""
    out = arguments.out.resolve()
    for source in arguments.src:
        find_lmdbs(source)
    check_writable(out)
    sources = [word for source in arguments.src for word in ("--src", str(source.resolve()))]
    settings = [*sources, "--out", str(out), "--name", arguments.name, *settings]
    options: dict[str, str | None] = {
        "job-name": arguments.job_name or f"ccd-shard-{arguments.name}",
        "cpus-per-task": str(arguments.cpus_per_task),
        "time": arguments.time,
        "requeue": None,
        "open-mode": "append",
        "output": "slurm-%A_%a.log",
    }
    lines = common_lines(arguments, settings) | {"slices=": f"slices={arguments.slices}"}
    text = render("slurm_shard.sbatch", options | passed_on(arguments), lines)
    folder = log_folder(out.with_name(f"{out.name}.slurm"))
    told = [
        ("slices", f"{arguments.slices}, {arguments.at_once} at a time, {arguments.cpus_per_task} processes each"),
        ("then", f"a job that merges them into {out} and verifies"),
        ("log", f"{folder}/slurm-*.log"),
    ]
    return Job(folder, "shard.sbatch", text, told)


def common_lines(arguments: Namespace, settings: list[str]) -> dict[str, str]:
    """What every script says in its own way: where it works, with which python, on what."""
    python = f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
    return {
        "hook()": f"hook() {{ {arguments.hook or python}; }}",
        "cd ": f"cd {shlex.quote(str(Path.cwd()))} || exit 2",
        "settings=": array("settings", settings),
    }


def passed_on(arguments: Namespace) -> dict[str, str | None]:
    """The options of sbatch that are given as they are; those in --sbatch stand above all others."""
    options: dict[str, str | None] = {
        name: getattr(arguments, name) for name in PASSED_ON if getattr(arguments, name) is not None
    }
    if arguments.exclusive:
        options["exclusive"] = None
    return options | extra_options(arguments.sbatch)


def extra_options(text: str) -> dict[str, str | None]:
    """`--exclude=n7 --reservation night` as options. Raises UserError for what is no long option."""
    options: dict[str, str | None] = {}
    name = ""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--sbatch {text!r}: {error}; quote it as for a shell") from None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = value if equals else None
        elif name and options[name] is None:
            options[name] = word
        else:
            raise UserError(f"--sbatch {text!r}: {word!r} is no long option of sbatch; write --name=value")
    return options


def check_time(options: dict[str, str | None]) -> None:
    """Refuses a life that would be told to save as soon as it begins."""
    limit, early = seconds(options["time"] or ""), (options["signal"] or "").rpartition("@")[2]
    if limit is not None and early.isdigit() and limit <= int(early):
        raise UserError(
            f"--time {options['time']}: all of it is kept for saving ({early} s); raise it, or lower --save-seconds"
        )


def seconds(limit: str) -> int | None:
    """A time limit as sbatch reads it (its manual page, --time); None for one without end, and for what is none."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        return None
    days, *parts = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:  # minutes, or minutes:seconds
        parts = [0, *parts[:2]]
    return sum(part * unit for part, unit in zip((days, *parts), (86400, 3600, 60, 1), strict=True))


def log_folder(folder: Path) -> Path:
    """The folder, if SLURM can write logs there: it expands % and \\ in their path."""
    if set("%\\") & set(str(folder)):
        raise UserError(f"{folder}: SLURM reads % and \\ in the path of a log; choose another name")
    return folder
