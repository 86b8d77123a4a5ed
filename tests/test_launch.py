"""The wrappers on one machine: they end as the run ended, pass signals on, and nothing of ours confuses torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Tiny
from torch.distributed import DistNetworkError
from torch.distributed.run import get_args_parser

from ccd_train.config.options import option_names
from ccd_train.config.pretraining import Config
from ccd_train.errors import UserError
from launch import hostfile
from launch.outcome import Outcome, read_outcome
from launch.torchrun import explain

CHECKOUT = Path(__file__).parents[1]
PAYLOAD = """
import json, pathlib, signal, sys, time
run_dir = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
def end(code):
    (run_dir / "outcome.json").write_text(json.dumps({"outcome": "word", "code": code, "message": "line"}))
    sys.exit(1)  # what torchrun makes of every code
signal.signal(signal.SIGTERM, lambda *_: end(75))
"""


def wrapped(program: str, *settings: str) -> list[str]:
    """launch.outcome around a program that stands where torchrun would."""
    payload = [sys.executable, "-c", PAYLOAD + program, "-m", "ccd_train", "pretrain"]
    return [sys.executable, "-m", "launch.outcome", *payload, *settings]


def finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    run_dir = tmp_path / 'it\'s a run, $(touch executed) "so"'
    run_dir.mkdir()
    return ["--config", "vit_nano", "--run_dir", str(run_dir), "--data.shards", str(tmp_path)]


@pytest.mark.parametrize("code", [0, 75])
def test_the_wrapper_ends_as_the_run_ended(settings: list[str], code: int) -> None:
    result = finish(wrapped(f"end({code})", *settings))
    assert (result.returncode, result.stdout) == (code, f"the run ended with {code} (word)\n")


def test_an_outcome_of_an_earlier_life_is_not_believed(settings: list[str]) -> None:
    assert finish(wrapped("end(0)", *settings)).returncode == 0
    result = finish(wrapped("sys.exit(1)", *settings))
    assert result.returncode == 3
    assert "without an outcome" in result.stderr


def test_signals_reach_the_run(settings: list[str]) -> None:
    process = subprocess.Popen(
        wrapped("print('up', flush=True); time.sleep(60)", *settings), cwd=CHECKOUT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert time.monotonic() - start < 10


def test_told_to_stop_before_it_can_is_unfinished(settings: list[str]) -> None:
    program = "signal.signal(signal.SIGTERM, signal.SIG_DFL); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen(
        wrapped(program, *settings), cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors.startswith("unfinished: SIGTERM before the run could save")


SLOW_TO_SAVE = """
def save(*_):
    print("saving", flush=True)
    time.sleep(3)  # longer than torchrun waits between two looks at its workers
    end(75)
signal.signal(signal.SIGUSR1, save)
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_usr1_reaches_the_workers_of_torchrun(settings: list[str], tmp_path: Path, ignored: bool) -> None:
    """Torchrun passes it on and waits; where the batch script has it ignored, torchrun leaves it to SLURM."""
    (tmp_path / "payload.py").write_text(PAYLOAD + SLOW_TO_SAVE)
    torchrun = ["-m", "launch.torchrun", "--standalone", "--nproc_per_node", "1", str(tmp_path / "payload.py")]
    command = [sys.executable, "-m", "launch.outcome", sys.executable, *torchrun, "-m", "ccd_train", "pretrain"]
    shell = ["bash", "-c", 'trap "" USR1; exec "$@"', "_"] if ignored else []
    with subprocess.Popen([*shell, *command, *settings], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        if ignored:
            time.sleep(2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert output == ("" if ignored else "saving\n") + "the run ended with 75 (word)\n"


ORPHAN = """
import fcntl, json, os, pathlib, sys, time
run_dir = pathlib.Path(sys.argv[1])
with (run_dir / "lock").open("a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    pathlib.Path(run_dir / "at_work").touch()
    time.sleep(1.5)  # saves
if len(sys.argv) > 2:
    time.sleep(0.5)  # the lock is gone a moment before the outcome is there
    (run_dir / "outcome.json").write_text(json.dumps({"outcome": "unfinished", "code": 75, "message": "saved"}))
"""


def test_workers_of_a_killed_launcher_are_waited_for(settings: list[str], tmp_path: Path) -> None:
    """A job that ends with 3 is not started again, though its workers have saved and said 75."""
    (tmp_path / "orphan.py").write_text(ORPHAN)
    program = (
        f"import os, subprocess\nsubprocess.Popen([sys.executable, {str(tmp_path / 'orphan.py')!r}, run_dir, 'x'])\n"
        "while not (run_dir / 'at_work').exists(): time.sleep(0.05)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    result = finish(wrapped(program, *settings))
    assert (result.returncode, result.stdout) == (75, "the run ended with 75 (unfinished)\n")


def test_a_run_that_another_process_trains_is_refused(settings: list[str], tmp_path: Path) -> None:
    """The launcher turns the worker's 2 into 1; that is no failure of the run."""
    (tmp_path / "orphan.py").write_text(ORPHAN.replace("1.5", "600"))
    with subprocess.Popen([sys.executable, str(tmp_path / "orphan.py"), settings[3]]) as other:
        while not Path(settings[3], "at_work").exists():
            time.sleep(0.05)
        result = finish(wrapped("sys.exit(1)", *settings))
        other.kill()
    assert result.returncode == 2
    assert (
        result.stderr == f"error: {settings[3]} is in use by another process that trains; stop that, or wait for it\n"
    )


@pytest.mark.parametrize(
    ("changed", "named"),
    [(["--train.micro_batch_siz", "4"], "micro_batch_siz"), (["--train.micro_batch_size", "0"], "micro_batch_size")],
)
def test_impossible_settings_are_refused_before_anything_starts(
    settings: list[str], changed: list[str], named: str
) -> None:
    result = finish(wrapped("pathlib.Path('started').touch()", *settings, *changed))
    assert result.returncode == 2
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path(settings[3], "outcome.json").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"outcome": "finished"}', '{"outcome": "x", "code": "y", "message": ""}']
)
def test_an_outcome_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "outcome.json").write_text(text)
    assert read_outcome(tmp_path) is None
    (tmp_path / "outcome.json").write_text(json.dumps({"outcome": "finished", "code": 0, "message": "m"}))
    assert read_outcome(tmp_path) == Outcome("finished", 0, "m")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1:8\n", "line 1 is 'node1:8'"), ("node1 slots = 8\n", "line 1 is"), ("# nobody\n\n", "no host in it"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2 names node1 again"), ("node1 slots=0", "line 1 is"), ("", "no host"),
    ],
)  # fmt: skip
def test_a_hostfile_by_hand_is_judged_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        hostfile.main([str(tmp_path / "hosts"), "--config", "vit_nano"])
    assert "\n" not in str(refused.value)
    (tmp_path / "hosts").write_text("\ufeffnode1 slots=8  # the first\n\nnode2\tslots=4\n")
    hostfile.check_hostfile(tmp_path / "hosts")


def test_a_wrapper_without_its_environment_says_so() -> None:
    """From another folder, with a Python that has not got the package."""
    bare = {"PATH": "/usr/bin:/bin", "PYTHONNOUSERSITE": "1"}
    for wrapper in ("torchrun_pretrain.sh", "torchrun_finetune.sh", "deepspeed_pretrain.sh"):
        command = ["bash", str(CHECKOUT / "launch" / wrapper), "--config", "vit_nano"]
        result = subprocess.run(command, cwd="/", env=bare, capture_output=True, text=True)
        assert result.returncode == 2 and "activate the environment" in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", "gpu"])
def test_a_number_of_processes_that_is_none_is_one_line(number: str) -> None:
    bare = os.environ | {
        "NPROC": number,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    command = ["bash", str(CHECKOUT / "launch/torchrun_pretrain.sh"), "--config", "vit_nano"]
    result = subprocess.run(command, env=bare, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"error: NPROC={number}: no number of processes; give 1 or more")


@pytest.mark.parametrize(
    ("soft", "hard", "told"), [(48, 48, "only 48 files may be open here"), (48, 1024, "no manifest")]
)
def test_too_few_open_files_are_raised_or_refused(settings: list[str], soft: int, hard: int, told: str) -> None:
    """With so few, the loader's workers used to spin for ever."""
    command = [sys.executable, "-m", "ccd_train", "pretrain", *settings]
    limit = ["prlimit", f"--nofile={soft}:{hard}", *command]
    result = subprocess.run(limit, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and told in result.stderr, result.stderr


def test_a_task_that_srun_started_without_a_launcher_is_noticed(settings: list[str]) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}
    command = [sys.executable, "-m", "ccd_train", "pretrain", *settings]
    result = subprocess.run(command, cwd=CHECKOUT, env=os.environ | slurm, capture_output=True, text=True)
    assert result.returncode == 2 and "task 2 of 2 of SLURM, but no launcher" in result.stderr


def test_no_option_is_a_prefix_of_one_of_torchruns() -> None:
    """torchrun reads the script's options too where they are unambiguous beginnings of its own."""
    options = [option.lstrip("-") for action in get_args_parser()._actions for option in action.option_strings]
    theirs = {option.replace("-", "_") for option in options if len(option) > 1}
    for ours in [*option_names(Config), "config", "help", "print_config"]:
        if ours != "help":  # torchrun's own, as everywhere
            assert not [option for option in theirs if option.startswith(ours)], ours


def test_a_machine_without_python_is_told_in_one_line() -> None:
    result = finish(["bash", "-c", ". launch/set_up.sh; check_machine python-that-is-not-here; echo reached"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: python-that-is-not-here is not here; install Python 3.10")


def meet(place: str, *options: str) -> subprocess.CompletedProcess[str]:
    """One node of two that shall meet."""
    size = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", place, *options]
    return finish([sys.executable, "-m", "launch.torchrun", *size, "-m", "ccd_train", "pretrain", "--help"])


def test_a_host_without_an_address_is_one_line() -> None:
    result = meet("no-such-host.invalid:29500")
    assert result.returncode == 1
    assert "cannot resolve no-such-host.invalid:29500" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_in_use_is_one_line_with_the_remedy(settings: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = ["--master_addr", "localhost", "--master_port", str(port)]
        size = ["--nnodes", "2", "--node_rank", "0", "--nproc_per_node", "1", *place]
        result = finish([sys.executable, "-m", "launch.torchrun", *size, "-m", "ccd_train", "pretrain", *settings])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {socket.gethostname()}: the port of localhost:{port} is in use here; set MASTER_")


def test_a_first_node_that_cannot_be_reached_is_one_line() -> None:
    error = DistNetworkError("The client socket has timed out\nat frame #0")
    assert explain(error, "node1:29500").startswith("no meeting at node1:29500 (The client socket has timed out); look")


@pytest.mark.slow
def test_a_node_that_does_not_come_is_one_line_and_those_that_came_are_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"localhost:{free.getsockname()[1]}"
    result = meet(place, "--rdzv_conf", "join_timeout=2")
    assert result.returncode == 1
    assert result.stdout.startswith(f"{socket.gethostname()} (127.0.0.1): 1 processes, meeting at {place}")
    assert "not all 2 nodes met" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


REMOTE_SHELL = """#!/bin/bash
# ssh and pdsh as DeepSpeed calls them, on this machine: the words are joined and given to a shell, as over there
n=0 words=()
while [ $# -gt 0 ]; do
    case $1 in -w) hosts=$2; shift 2 ;; -S) shift ;; -*) shift 2 ;; *) break ;; esac
done
[ -n "$hosts" ] || { shift; exec sh -c "$*"; }
line="$*"
for host in ${hosts//,/ }; do sh -c "${line//%n/$n}" & n=$((n + 1)); done
wait
"""


@pytest.mark.slow
def test_deepspeeds_launcher_with_two_nodes(tiny: Tiny, tmp_path: Path) -> None:
    """The settings reach every node literally, though DeepSpeed hands one line to a remote shell."""
    for name in ("ssh", "pdsh"):
        (tmp_path / name).write_text(REMOTE_SHELL)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    shards = tmp_path / 'it\'s $(touch executed) "so"'
    shards.symlink_to(tiny.shards)
    values = ["--data.shards", str(shards), "--data.workers", "0", "--max-steps", "2", "--train.micro_batch_size", "4"]
    words = [str(tmp_path / "hosts"), "--config", "vit_nano", "--run_dir", str(tmp_path / "run"), *values]
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(CHECKOUT / "launch/deepspeed_pretrain.sh"), *words],
        cwd=CHECKOUT, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "× 2" in (tmp_path / "run/environment.txt").read_text()
    assert not list(tmp_path.rglob("executed")) and not (CHECKOUT / "executed").exists()


def test_deepspeeds_launcher_refuses_what_a_remote_shell_would_split(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("first slots=1\n")
    words = ["--config", "vit_nano", "--run_dir", str(tmp_path / "a b"), "--data.shards", str(tiny.shards)]
    with pytest.raises(UserError, match="remote shell"):
        hostfile.main([str(tmp_path / "hosts"), *words])
    with pytest.raises(UserError, match="not a file"):
        hostfile.main([str(tmp_path / "nothing"), *words])
