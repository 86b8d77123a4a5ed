"""The SLURM scripts against a real controller: jobs that are disturbed in every way end with the same losses."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import CHECKOUT, Cluster, wait_until
from conftest import Tiny

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(Cluster.missing()), reason=Cluster.missing()),
]
STEPS = 40
ODD = 'a run\'s, $(touch executed) `touch executed` "so"\nit goes; on'
DONE = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=3) as cluster:
        yield cluster


def settings(corpus: Tiny, steps: int = STEPS) -> list[str]:
    """Of a run that takes a few seconds, logs every step, and does nothing that a second life could do otherwise."""
    values = {"data.workers": 1, "train.micro_batch_size": 8, "train.threads": 1, "log.every_steps": 1}
    values |= {"checkpoint.every_steps": 10, "max_steps": steps, "log.pictures_every_steps": 0}
    return ["--config", "vit_nano", "--data.shards", str(corpus.shards)] + [
        word for name, value in values.items() for word in (f"--{name}", str(value))
    ]


def submit(cluster: Cluster, run_dir: Path, options: list[str], words: list[str]) -> list[str]:
    """`ccd-submit pretrain` for two nodes with one CPU process each; returns the numbers of its jobs."""
    size = ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-gpu", "2", "--run_dir", str(run_dir)]
    text = ccd_submit(cluster, "pretrain", *size, *options, "--", *words)
    return text.splitlines()[0].removeprefix("submitted job ").split(", then ")


def ccd_submit(cluster: Cluster, *words: str) -> str:
    return cluster.run(sys.executable, "-m", "launch.submit", *words)


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of every step that was logged; {} before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows}


def wait_for_step(cluster: Cluster, job: str, run_dir: Path, step: int) -> None:
    """Until the run has done the step; fails where its job ends before."""

    def reached() -> bool:
        state = cluster.job(job)["JobState"]
        assert state not in DONE, f"job {job} is {state}:\n{log_of(run_dir)}"
        return max(losses(run_dir), default=0) >= step and state == "RUNNING"

    wait_until(reached, 300, lambda: log_of(run_dir))


def wait_for_end(cluster: Cluster, job: str, run_dir: Path) -> dict[str, str]:
    wait_until(lambda: cluster.job(job)["JobState"] in DONE, 300, lambda: f"{cluster.job(job)}\n{log_of(run_dir)}")
    return cluster.job(job)


def log_of(run_dir: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(run_dir.glob("slurm-*.log")))


def lives(run_dir: Path) -> list[int]:
    """The step at which each life began."""
    rows = [json.loads(line) for line in (run_dir / "lives.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == "begin"]


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of two processes under torchrun on one machine."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    command = ["bash", "launch/torchrun_pretrain.sh", *settings(tiny), "--run_dir", str(run_dir)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(command, cwd=CHECKOUT, env=os.environ | {"NPROC": "2", "PATH": path}, timeout=300)
    assert result.returncode == 0
    assert len(losses(run_dir)) == STEPS
    return losses(run_dir)


def test_signal_requeue_and_preemption(
    cluster: Cluster, tiny: Tiny, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """One job in an oddly named folder, disturbed three times, ends as the run that nobody touched."""
    run_dir = tmp_path / ODD
    (job,) = submit(cluster, run_dir, [], settings(tiny))
    wait_for_step(cluster, job, run_dir, 4)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: len(lives(run_dir)) == 2, 60, lambda: log_of(run_dir))
    wait_for_step(cluster, job, run_dir, lives(run_dir)[-1] + 4)
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: len(lives(run_dir)) == 3, 60, lambda: log_of(run_dir))
    wait_for_step(cluster, job, run_dir, lives(run_dir)[-1] + 4)
    urgent = ["--partition=urgent", "--nodes=3", "--exclusive", "--wrap", "true", "--output=/dev/null"]
    cluster.run("sbatch", "--parsable", *urgent)
    end = wait_for_end(cluster, job, run_dir)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "3"), log_of(run_dir)
    assert losses(run_dir) == undisturbed
    assert len(lives(run_dir)) == 4
    assert lives(run_dir) == sorted(set(lives(run_dir)))
    assert not list(tmp_path.rglob("executed")) and not (CHECKOUT / "executed").exists()


def test_time_limit_and_node_loss(cluster: Cluster, tiny: Tiny, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """Told to save 80 s before a limit of two minutes; and in its second life a node loses power."""
    run_dir = tmp_path / "run"
    (job,) = submit(cluster, run_dir, ["--time", "2", "--save-seconds", "80"], settings(tiny, 300))
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", 120, lambda: log_of(run_dir))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    wait_until(lambda: len(lives(run_dir)) == 2, 60, lambda: f"{cluster.job(job)} {log_of(run_dir)}")
    wait_for_step(cluster, job, run_dir, lives(run_dir)[-1] + 4)
    lost = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[-1]
    cluster.power_off(lost)
    before = max(losses(run_dir))
    wait_until(lambda: len(lives(run_dir)) == 3, 90, lambda: f"{cluster.job(job)} {log_of(run_dir)}")
    cluster.power_on(lost)
    wait_for_step(cluster, job, run_dir, before + 2)
    cluster.run("scancel", job)
    end = wait_for_end(cluster, job, run_dir)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "2")  # it saves, and does not come back
    same = {step: loss for step, loss in losses(run_dir).items() if step <= STEPS}
    assert same == {step: undisturbed[step] for step in same}
    assert lives(run_dir)[0] == 0 < lives(run_dir)[1] <= lives(run_dir)[2]


def test_the_cap_on_requeues_holds(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (job,) = submit(cluster, run_dir, ["--max-requeues", "0"], settings(tiny))
    wait_for_step(cluster, job, run_dir, 2)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    end = wait_for_end(cluster, job, run_dir)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "0"), log_of(run_dir)
    assert "which is the cap" in log_of(run_dir)


def test_an_error_of_its_own_is_not_started_again(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    """What ccd-submit would have refused, in a script that was edited by hand afterwards."""
    run_dir = tmp_path / "run"
    script = ccd_submit(
        cluster,
        "pretrain",
        "--nodes",
        "1",
        "--gpus-per-node",
        "0",
        "--run_dir",
        str(run_dir),
        "--dry-run",
        "--",
        *settings(tiny),
    )
    run_dir.mkdir()
    (run_dir / "edited.sbatch").write_text(script.replace(str(tiny.shards), str(tmp_path / "nothing")))
    job = cluster.run("sbatch", "--parsable", "edited.sbatch", cwd=run_dir).strip()
    end = wait_for_end(cluster, job, run_dir)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0"), log_of(run_dir)
    assert "no manifest.json" in log_of(run_dir)


def test_a_dry_run_prints_what_is_submitted(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["pretrain", "--nodes", "64", "--run_dir", str(run_dir), "--sbatch", '--comment "it\'s, $(so)" --nice=5']
    printed = ccd_submit(cluster, *words, "--job-name", "a 'name', $(x)", "--dry-run", "--", *settings(tiny))
    assert not run_dir.exists()
    refused = subprocess.run(
        [sys.executable, "-m", "launch.submit", *words, "--job-name", "a 'name', $(x)", "--", *settings(tiny)],
        cwd=CHECKOUT, env=cluster.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1  # a cluster of 3 nodes
    assert refused.stderr.startswith("error: sbatch refuses: ")
    assert (run_dir / "pretrain.sbatch").read_text() == printed
    smaller = printed.replace("--nodes=64", "--nodes=1").replace("--gpus-per-node=8", "--gpus-per-node=2")
    (run_dir / "held.sbatch").write_text(smaller)
    job = cluster.run("sbatch", "--parsable", "--hold", "held.sbatch", cwd=run_dir).strip()
    known = cluster.run("scontrol", "--oneliner", "show", "job", job)
    for text in ("JobName=a 'name', $(x) ", "Comment=it's, $(so) ", "TresPerNode=gres:gpu:2", "TimeLimit=1-00:00:00"):
        assert text in known
    cluster.run("scancel", job)


def test_a_chain_needs_no_requeue(cluster: Cluster, tiny: Tiny, undisturbed: dict[int, float], tmp_path: Path) -> None:
    """Three jobs: the first is told to stop, the second finishes, the third has nothing to do."""
    run_dir = tmp_path / "run"
    first, second, third = submit(cluster, run_dir, ["--chain", "3", "--doctor"], settings(tiny, 12))
    wait_for_step(cluster, first, run_dir, 4)
    cluster.run("scancel", "--signal=USR1", "--batch", first)
    assert wait_for_end(cluster, first, run_dir)["ExitCode"] == "75:0"
    for job in (second, third):
        assert wait_for_end(cluster, job, run_dir)["JobState"] == "COMPLETED", log_of(run_dir)
    assert losses(run_dir) == {step: undisturbed[step] for step in range(1, 13)}
    assert log_of(run_dir).count("64 MB between 2 ranks") == 2  # both nodes' tables, in the first job
    assert cluster.job(first)["Restarts"] == "0"


def test_a_fine_tuning_is_a_job_like_any_other(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    size = ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-gpu", "2", "--run_dir", str(run_dir)]
    data = ["--data.train", str(tiny.lmdb), "--data.valid", str(tiny.lmdb), "--data.workers", "0"]
    words = ["--config", "recognizer_nano", "--init", "scratch", *data, "--max-steps", "4", "--log.every_steps", "1"]
    words += ["--train.micro_batch_size", "8", "--train.global_batch_size", "16", "--train.threads", "1"]
    text = ccd_submit(cluster, "finetune", *size, "--", *words)
    job = text.splitlines()[0].removeprefix("submitted job ")
    assert wait_for_end(cluster, job, run_dir)["JobState"] == "COMPLETED", log_of(run_dir)
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]
    assert "finished (0)" in ccd_submit(cluster, "status", str(run_dir))


def test_a_slice_that_failed_is_done_again(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    """Slice 2 comes to a node that is not ready; the merge waits for nothing, and the second submission mends it."""
    out, ready = tmp_path / "a, b's $(touch executed)", tmp_path / "ready"
    words = ["shard", "--src", str(tiny.lmdb), "--out", str(out), "--name", "tiny", "--slices", "4", "--time", "5"]
    words += ["--cpus-per-task", "1", "--hook", f'{python_hook()}; [ "$SLURM_ARRAY_TASK_ID" != 2 ] || [ -e {ready} ]']
    words += ["--", "--samples-per-shard", "64"]
    slices, merge = jobs_of(ccd_submit(cluster, *words))
    wait_until(lambda: state_of(cluster, merge) == "CANCELLED", 60, lambda: cluster.run("squeue", "--states=all"))
    assert not (out / "manifest.json").exists()
    states = [state_of(cluster, f"{slices}_{index}") for index in range(4)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    ready.touch()
    _, merge = jobs_of(ccd_submit(cluster, *words))
    wait_until(lambda: state_of(cluster, merge) in DONE, 60, lambda: cluster.run("squeue", "--states=all"))
    log = "".join(path.read_text() for path in out.with_name(f"{out.name}.slurm").glob("slurm-merge-*"))
    assert state_of(cluster, merge) == "COMPLETED", log
    assert "240 samples in 4 shards, all intact" in log
    assert hashes(out) == hashes(tiny.shards)
    assert not (CHECKOUT / "executed").exists()


def jobs_of(text: str) -> tuple[str, str]:
    """The numbers of the array and of the job after it."""
    found = re.search(r"as job (\d+), then merge and verify as job (\d+)", text)
    assert found is not None, text
    return found[1], found[2]


def state_of(cluster: Cluster, job: str) -> str:
    return cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()


def hashes(folder: Path) -> list[str]:
    return [shard["sha256"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]


def python_hook() -> str:
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
