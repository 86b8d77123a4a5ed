"""ccd-submit: training jobs for a SLURM cluster, checked before they queue.

    ccd-submit pretrain --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu --run_dir runs/first \\
        -- --config vit_small --data.shards shards
    ccd-submit status runs/first

What stands after `--` are the settings of `ccd-train pretrain`. The job's script is written into the run folder, where
it can be read, edited and submitted again by hand (`cd RUN && sbatch pretrain.sbatch`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from ccd_train.config import Config
from ccd_train.errors import FINISHED, UserError, run
from ccd_train.options import parse
from launch import slurm
from launch.preflight import check_pretraining
from launch.script import array, render
from launch.status import describe

PREPARE_CPUS = 2  # per process, beside the loader's workers: the training process and what it starts


@dataclass(frozen=True)
class Job:
    """A batch script and where it goes."""

    folder: Path
    name: str
    text: str

    def submit(self, *options: str) -> str:
        """Writes the script into its folder and submits it there; returns the job's number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / self.name).write_text(self.text, encoding="utf-8")
        slurm.sbatch(self.folder, ["--test-only", self.name])  # a job that can never start is refused, not queued
        return slurm.sbatch(self.folder, [*options, self.name])


def pretraining(arguments: argparse.Namespace, settings: list[str]) -> Job:
    """The job of a pretraining run. Raises UserError for what would fail in the queue."""
    settings = [*settings, "--run_dir", str(arguments.run_dir.resolve())]
    config = parse(Config, settings, "ccd-train pretrain")
    processes = arguments.gpus_per_node or arguments.processes_per_node
    check_pretraining(config, arguments.nodes * processes)
    cpus = arguments.cpus_per_gpu or config.data.workers + PREPARE_CPUS
    options: dict[str, str | None] = {
        "job-name": arguments.job_name or f"ccd-{arguments.run_dir.resolve().name}".replace("\n", " "),
        "nodes": str(arguments.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cpus * processes),
        "time": arguments.time,
        "signal": f"B:USR1@{arguments.save_seconds}",
        "no-requeue" if arguments.chain else "requeue": None,
        "open-mode": "append",
        "output": "slurm-%j.log",
    }
    if arguments.gres is None and arguments.gpus_per_node:
        options["gpus-per-node"] = str(arguments.gpus_per_node)
    for name in ("partition", "account", "qos", "constraint", "mem", "gres"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if arguments.exclusive:
        options["exclusive"] = None
    options |= extra_options(arguments.sbatch)
    lines = {
        "hook()": f"hook() {{ {arguments.hook or python_hook()}; }}",
        "max_requeues=": f"max_requeues={arguments.max_requeues}",
        "requeue=": f"requeue={'no' if arguments.chain else 'yes'}",
        "cd ": f"cd {shlex.quote(str(Path.cwd()))} || exit 2",
        "settings=": array("settings", settings),
        "nproc=": f"nproc={processes}",
    }
    return Job(config_run_dir(config), "pretrain.sbatch", render("slurm_pretrain.sbatch", list(options.items()), lines))


def config_run_dir(config: Config) -> Path:
    """The run folder; SLURM expands % and \\ in the path of a log."""
    assert config.run_dir is not None
    if set("%\\") & set(str(config.run_dir)):
        raise UserError(f"--run_dir {config.run_dir}: SLURM reads % and \\ in the path of a log; choose another name")
    return config.run_dir


def extra_options(text: str) -> dict[str, str | None]:
    """`--sbatch "--exclude=n7 --reservation night"` as options; they stand above those of ccd-submit."""
    options: dict[str, str | None] = {}
    name = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = value if equals else None
        elif name and options[name] is None:
            options[name] = word
        else:
            raise UserError(f"--sbatch {text!r}: {word!r} is no long option of sbatch; write --name=value")
    return options


def python_hook() -> str:
    """What makes `python` the one that runs this program."""
    return f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'


def submit_pretraining(arguments: argparse.Namespace, settings: list[str]) -> int:
    job = pretraining(arguments, settings)
    if arguments.dry_run:
        print(job.text, end="")
        return FINISHED
    numbers = [job.submit()]
    while len(numbers) < arguments.chain:
        numbers.append(job.submit(f"--dependency=afterany:{numbers[-1]}", "--kill-on-invalid-dep=yes"))
    folder = shlex.quote(str(job.folder))
    print(
        f"submitted job {', then '.join(numbers)}\n"
        f"  watch    tail -F {folder}/slurm-{numbers[0]}.log\n"
        f"           ccd-submit status {folder}\n"
        f"  stop     scancel {' '.join(numbers)}      (saves, and is not started again)\n"
        f"  resume   cd {folder} && sbatch {job.name}"
    )
    return FINISHED


def submit_status(arguments: argparse.Namespace, settings: list[str]) -> int:
    print(describe(arguments.run_dir))
    return FINISHED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ccd-submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    pretrain = verbs.add_parser("pretrain", help="submit a pretraining run", allow_abbrev=False)
    pretrain.set_defaults(verb=submit_pretraining)
    pretrain.add_argument("--run_dir", "--run-dir", type=Path, required=True, help="on a shared disk")
    pretrain.add_argument("--nodes", type=positive, default=1)
    pretrain.add_argument("--gpus-per-node", type=natural, default=8, help="0: processes on CPUs (default: 8)")
    pretrain.add_argument("--processes-per-node", type=positive, default=1, help="without GPUs (default: 1)")
    pretrain.add_argument("--time", default="24:00:00", help="limit of one life of the run (24:00:00)")
    pretrain.add_argument("--cpus-per-gpu", type=positive, help="default: the loader's workers + 2")
    for name in ("partition", "account", "qos", "constraint", "mem", "gres", "job-name"):
        pretrain.add_argument(f"--{name}", help="as in sbatch")
    pretrain.add_argument("--exclusive", action="store_true", help="as in sbatch")
    pretrain.add_argument("--sbatch", default="", metavar="OPTIONS", help='anything else: "--exclude=n7 --nice=100"')
    pretrain.add_argument("--save-seconds", type=positive, default=600, help="time to save before the limit (600)")
    pretrain.add_argument("--max-requeues", type=natural, default=50, help="lives after the first, at most (50)")
    pretrain.add_argument("--chain", type=positive, default=0, metavar="K", help="K jobs in a row instead of requeues")
    pretrain.add_argument("--hook", help="bash that makes `python` the right one (default: this program's own python)")
    pretrain.add_argument("--dry-run", action="store_true", help="check, and print the script")
    status = verbs.add_parser("status", help="how a run stands, from SLURM and its folder", allow_abbrev=False)
    status.set_defaults(verb=submit_status)
    status.add_argument("run_dir", type=Path, metavar="RUN")
    return parser


def natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def verb() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments = build_parser().parse_args(words[:end])
    return int(arguments.verb(arguments, words[end + 1 :]))


def main() -> None:
    run(verb)


if __name__ == "__main__":
    main()
