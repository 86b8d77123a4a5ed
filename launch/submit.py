"""ccd-submit: jobs for a SLURM cluster, checked before they queue.

    ccd-submit pretrain --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu --run_dir runs/first \\
        -- --config vit_small --data.shards shards
    ccd-submit finetune --run_dir runs/reader -- --config recognizer_small --init runs/first --data.train …
    ccd-submit shard --src lmdbs --out shards --name mj --slices 64
    ccd-submit status runs/first

`--after runs/first` starts a fine-tuning when the pretraining that it begins with has finished.
What stands after `--` goes to `ccd-train pretrain` or `finetune`, or to `ccd-data convert`. The script of a job is
written beside its logs, in the run folder or in OUT.slurm, where it can be read, edited and submitted by hand.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from ccd_train.errors import FINISHED, UserError, run
from ccd_train.programs import choose
from launch.jobs import PASSED_ON, Job, sharding, training
from launch.lives import note, read_lives
from launch.status import describe

SBATCH_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
WORDED_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?")
VERBS = {
    "pretrain": "a pretraining run",
    "finetune": "a fine-tuning run",
    "shard": "LMDBs to shards, an array of jobs",
    "status": "how a run stands, from SLURM and its folder",
}


def show(job: Job, script: str) -> None:
    """What a dry run says: the script where it is piped or written to a file, and what the job will do."""
    if not sys.stdout.isatty():
        print(script, end="", flush=True)
    print("\n".join(f"{name:8}{text}" for name, text in job.outlook), file=sys.stderr)


def submit_training(arguments: argparse.Namespace, settings: list[str]) -> int:
    """ccd-submit pretrain and finetune: one job, or a chain of them."""
    job = training(arguments, settings)
    if arguments.dry_run:
        show(job, job.text)
        return FINISHED
    numbers: list[str] = []
    first = None if arguments.after is None else f"afterok:{newest_job(arguments.after)}"
    for _ in range(max(arguments.chain, 1)):
        before = f"afterany:{numbers[-1]}" if numbers else first
        after = [f"--dependency={before}", "--kill-on-invalid-dep=yes"] if before else []
        numbers.append(job.submit(*after))
        note(job.folder, "submit", job=numbers[-1], requeues=0)
    folder = shlex.quote(str(job.folder))
    print(
        f"submitted job {', then '.join(numbers)}\n"
        f"  watch    tail -F {folder}/slurm-{numbers[0]}.log\n"
        f"           ccd-submit status {folder}\n"
        f"  stop     scancel {' '.join(numbers)}      (it saves, and is not started again)\n"
        f"  resume   cd {folder} && sbatch {job.name}"
    )
    return FINISHED


def submit_sharding(arguments: argparse.Namespace, settings: list[str]) -> int:
    """ccd-submit shard: an array of slices, then a job that merges and verifies."""
    job = sharding(arguments, settings)
    slices = f"--array=0-{arguments.slices - 1}%{arguments.at_once}"
    merging = ["--kill-on-invalid-dep=yes", "--output=slurm-merge-%j.log"]
    if arguments.dry_run:
        merge = f"sbatch --dependency=afterok:$job {' '.join(merging)} {job.name}"
        show(job, f"{job.text}\n# job=$(sbatch --parsable {slices} {job.name})\n# {merge}\n")
        return FINISHED
    number = job.submit(slices)
    merge = job.submit(f"--dependency=afterok:{number}", *merging)
    folder = shlex.quote(str(job.folder))
    print(
        f"submitted {arguments.slices} slices as job {number}, then merge and verify as job {merge}\n"
        f"  watch    squeue --jobs={number},{merge}; tail {folder}/slurm-*.log\n"
        f"  stop     scancel {number} {merge}\n"
        f"  after a failure: the same command once more; slices that are whole stay"
    )
    return FINISHED


def print_status(arguments: argparse.Namespace, settings: list[str]) -> int:
    """ccd-submit status."""
    print(describe(arguments.run_dir))
    return FINISHED


def build_parser() -> argparse.ArgumentParser:
    """Of all verbs."""
    parser = argparse.ArgumentParser(prog="ccd-submit", allow_abbrev=False)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    pretrain, finetune, shard, status = (verbs.add_parser(name, help=VERBS[name], allow_abbrev=False) for name in VERBS)
    add_training_options(pretrain, "pretrain", time="24:00:00")
    add_training_options(finetune, "finetune", time="12:00:00")
    shard.set_defaults(verb=submit_sharding)
    shard.add_argument("--src", type=Path, action="append", required=True, help="an LMDB or a tree of them; repeatable")
    shard.add_argument("--out", type=Path, required=True, help="on a disk that all nodes see")
    shard.add_argument("--name", required=True, help="beginning of the shards' names")
    shard.add_argument("--slices", type=positive, default=64, help="jobs of the array (64)")
    shard.add_argument("--at-once", type=positive, default=16, help="that may run at the same time (16)")
    shard.add_argument("--cpus-per-task", type=positive, default=4, help="workers of a slice (4)")
    add_sbatch_options(shard, time="04:00:00")
    status.set_defaults(verb=print_status)
    status.add_argument("run_dir", type=Path, metavar="RUN")
    return parser


def add_training_options(parser: argparse.ArgumentParser, trains: str, time: str) -> None:
    """What pretraining and fine-tuning have in common; `time` is the default limit."""
    parser.set_defaults(verb=submit_training, trains=trains)
    parser.add_argument("--run_dir", "--run-dir", type=Path, required=True, help="on a disk that all nodes see")
    parser.add_argument("--nodes", type=positive, default=1)
    parser.add_argument("--gpus-per-node", type=natural, default=8, help="0: processes on CPUs (default: 8)")
    parser.add_argument("--processes-per-node", type=positive, default=1, help="without GPUs (default: 1)")
    parser.add_argument("--cpus-per-gpu", type=positive, help="default: the loader's workers + 2")
    parser.add_argument("--save-seconds", type=positive, default=600, help="time to save before the limit (600)")
    parser.add_argument("--max-requeues", type=natural, default=50, help="lives after the first, at most (50)")
    parser.add_argument("--chain", type=positive, default=0, metavar="K", help="K jobs in a row instead of requeues")
    if trains == "pretrain":
        parser.add_argument("--doctor", action="store_true", help="first look at every node (`ccd-train doctor`)")
    parser.add_argument(
        "--after", metavar="RUN|JOB", help="start when this run's newest job, or this job, has finished"
    )
    add_sbatch_options(parser, time)


def add_sbatch_options(parser: argparse.ArgumentParser, time: str) -> None:
    """What every job has, most of it as sbatch names it."""
    parser.add_argument("--time", type=time_limit, default=time, help=f"limit of one life of the job ({time}); or 24h")
    for name in (*PASSED_ON, "job-name"):
        parser.add_argument(f"--{name}", help="as in sbatch")
    parser.add_argument("--exclusive", action="store_true", help="as in sbatch")
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help='anything else: "--exclude=n7 --nice=100"')
    parser.add_argument("--hook", help="bash that makes `python` the right one (default: this program's own python)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and say what the job will do; `| less` shows its script"
    )


def natural(text: str) -> int:
    """0 or more, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """1 or more, for argparse."""
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def time_limit(text: str) -> str:
    """A time as sbatch takes it, for argparse: as it is, or from 90m, 24h, 2d, 1d12h."""
    if SBATCH_TIME.fullmatch(text):
        return text
    found = WORDED_TIME.fullmatch(text)
    if not text or found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 24:00:00, 1-12, 24h or 1d12h")
    days, hours, minutes = (int(part or 0) for part in found.groups())
    return f"{24 * days + hours + minutes // 60:02}:{minutes % 60:02}:00"


def newest_job(after: str) -> str:
    """The job that --after names, by its number or by its run folder. UserError if none was submitted for that."""
    if after.isdigit():
        return after
    submitted = [life["job"] for life in read_lives(Path(after)) if life["event"] in ("submit", "begin")]
    if not submitted:
        raise UserError(f"--after {after}: no job was submitted for this folder; give a run folder or a job's number")
    return str(submitted[-1])


def read(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of ccd-submit, and what stands after `--`."""
    end = words.index("--") if "--" in words else len(words)
    own = words[:end]
    for option in ("--sbatch", "--hook"):  # argparse takes a value that begins with - for an option
        while option in own[:-1]:
            place = own.index(option)
            own[place : place + 2] = [f"{option}={own[place + 1]}"]
    arguments, strange = build_parser().parse_known_args(own)
    if strange:
        behind = f"settings of the run go behind --: … -- {' '.join(strange)}"
        raise UserError(f"{strange[0]}: no option of ccd-submit {words[0]}; {behind}")
    return arguments, words[end + 1 :]


def verb() -> int:
    choose("ccd-submit", __doc__, VERBS, sys.argv[1:])
    arguments, settings = read(sys.argv[1:])
    return int(arguments.verb(arguments, settings))


def main() -> None:
    run(verb)


if __name__ == "__main__":
    main()
