"""ccd-submit without a cluster: what it refuses, the script that it makes, and how a run stands."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CHECKOUT, Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from painted import write_crops, write_pairs

from ccd_train.config.options import describe as describe_settings
from ccd_train.config.options import parse, read_recipe, to_dict
from ccd_train.config.pixels import Segmenting
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.run import Checkpoint, identity
from ccd_train.data.shards import Corpus
from ccd_train.errors import UserError
from launch.jobs import extra_options, seconds
from launch.lives import note
from launch.outcome import parse_training
from launch.preflight import check_space
from launch.rehearsal import rehearse
from launch.script import array, directive, render
from launch.status import describe
from launch.submit import newest_job, read

ODD = ["a b", "it's", '"so"', "$(touch executed)", "`touch executed`", "a\nb", "", "-x", "*", "\\", "ü, ;&|"]


def submit(*words: str) -> int:
    arguments, rest = read(list(words))
    return int(arguments.verb(arguments, rest))


def pretrain_words(run_dir: Path, *more: str) -> list[str]:
    return ["pretrain", "--run_dir", str(run_dir), "--nodes", "2", "--gpus-per-node", "4", *more]


def run_on(corpus: Tiny) -> list[str]:
    return ["--config", "vit_nano", "--data.shards", str(corpus.shards)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12), max_size=4))
def test_bash_reads_every_value_literally(values: list[str]) -> None:
    values = [*values, *ODD]
    program = array("values", values) + "\nprintf '%s\\0' \"${values[@]}\""
    result = subprocess.run(["bash", "-c", program], capture_output=True, check=True)
    assert result.stdout.decode().split("\0")[:-1] == values


def test_directives_are_quoted_as_sbatch_unquotes_them() -> None:
    assert directive("time", "1-00:00:00") == "#SBATCH --time=1-00:00:00"
    assert directive("requeue", None) == "#SBATCH --requeue"
    assert directive("comment", 'a "b" \\ c') == '#SBATCH --comment="a \\"b\\" \\\\ c"'
    with pytest.raises(UserError, match="no line break"):
        directive("comment", "a\nb")


def test_extra_options_of_sbatch() -> None:
    wanted = {"exclude": "n7", "reservation": "of the night", "hold": None}
    assert extra_options("--exclude=n7 --reservation 'of the night' --hold") == wanted
    with pytest.raises(UserError, match="write --name=value"):
        extra_options("-x n7")
    with pytest.raises(UserError, match="No closing quotation"):
        extra_options("it's")


def test_time_limits_are_read_as_sbatch_reads_them() -> None:
    limits = ["10", "10:30", "1:00:30", "2-1", "2-1:30", "2-01:30:05", "UNLIMITED", "tomorrow"]
    assert [seconds(limit) for limit in limits] == [600, 630, 3630, 176400, 178200, 178205, None, None]


def test_the_script_asks_for_what_the_run_needs(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = pretrain_words(tmp_path / "run", "--qos", "long", "--mem", "200G", "--sbatch", "--time=50 --exclude=n7")
    chosen = [*run_on(tiny), "--data.workers", "6"]
    assert submit(*words, "--dry-run", "--", *chosen) == 0
    lines = capsys.readouterr().out.splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {
        "nodes=2",
        "gpus-per-node=4",
        "cpus-per-task=32",
        "qos=long",
        "mem=200G",
        "time=50",
        "exclude=n7",
    } <= options
    assert "nproc=4" in lines and "requeue=yes" in lines and "requeue" in options
    assert array("settings", [*chosen, "--run_dir", str((tmp_path / "run").resolve())]) in lines
    assert not (tmp_path / "run").exists()
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)


@pytest.mark.parametrize(
    ("name", "rest", "message"),
    [
        ("run", ["--train.global_batch_size", "100"], "not a multiple of 8 ranks"),
        ("run", ["--data.shards", "nothing"], "no manifest.json"),
        ("file/run", [], "Not a directory"),
        ("run%j", [], "SLURM reads %"),
        ("run", ["--optimizer.lr", "-1"], "optimizer.lr"),
        ("run", ["--deepspeed", "zero9"], "--deepspeed zero9: No such file"),
        ("run", ["--init", "/nowhere"], "^/nowhere: no such file or folder"),
        ("run", ["--checkpoint.keep", "1000000000"], "checkpoints take"),
        ("run", ["--probe.every-steps", "5", "--probe.data", "/nowhere"], "/nowhere: no such folder"),
        ("run", ["--resume.mode", "must"], "--resume.mode must: no complete checkpoint"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["submission", "dry run"])
def test_what_would_fail_in_the_queue_is_refused(
    tiny: Tiny, tmp_path: Path, name: str, rest: list[str], message: str, dry: list[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        submit(*pretrain_words(tmp_path / name, *dry), "--", *run_on(tiny), *rest)


def test_a_dry_run_says_what_the_job_will_do(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In six lines; the script, a wall on a terminal, goes where it is piped to."""
    rest = ["--", *run_on(tiny), "--train.global_batch_size", "512", "--train.total_samples", "51200"]
    samples = Corpus.open(tiny.shards).num_samples
    assert submit(*pretrain_words(tmp_path / "run", "--dry-run"), *rest) == 0
    printed = capsys.readouterr()
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in printed.err.splitlines()}
    assert printed.out.startswith("#!/usr/bin/env bash") and list(told) == [
        "batch",
        "steps",
        "disk",
        "time",
        "log",
        "next",
    ]
    assert told["batch"] == "512 samples a step: 8 ranks × 32 × 2 micro-batches"
    assert told["steps"] == f"100: each of {samples} samples is seen {51200 / samples:,.0f} times"
    assert told["disk"].startswith("3 checkpoints and one being written, 0.0033 GB each; ")
    assert "24:00:00 a life, saving 600 s before; started again up to 50 times" in told["time"]
    assert told["time"].endswith("ccd-train estimate --gpus 8 --gpus-per-node 4")
    assert told["log"] == f"{tmp_path}/run/slurm-JOB.log"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert submit(*pretrain_words(tmp_path / "run", "--dry-run"), *rest, "--max-steps", "30") == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "steps   30 of 100 (--max-steps): " in printed.err


def test_a_dry_run_says_that_it_does_not_read_weights(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--", *run_on(tiny), "--init", "/dev"]
    assert submit(*pretrain_words(tmp_path / "run", "--dry-run"), *rest) == 0
    assert "without --dry-run data and --init are read" in capsys.readouterr().err
    with pytest.raises(UserError, match="no weights here"):
        submit(*pretrain_words(tmp_path / "run"), *rest)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--time", "10"], "--time 10: all of it is kept for saving .600 s."),
        (["--sbatch", "--time=0:60"], "--time 0:60: all of it"),
        (["--sbatch", "it's"], "No closing quotation"),
    ],
)
def test_a_job_that_could_do_nothing_is_refused(tiny: Tiny, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        submit(*pretrain_words(tmp_path / "run", *more), "--", *run_on(tiny))


def test_fp16_needs_gpus_where_the_run_is_not_where_it_is_submitted(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "fp16.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}))
    rest = ["--dry-run", "--", *run_on(tiny), "--deepspeed", str(tmp_path / "fp16.json")]
    assert submit(*pretrain_words(tmp_path / "run"), *rest) == 0
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        submit(*pretrain_words(tmp_path / "run"), "--gpus-per-node", "0", *rest)


def finetune_words(run_dir: Path, corpus: Tiny, *more: str) -> list[str]:
    words = ["finetune", "--run_dir", str(run_dir), "--gpus-per-node", "2", "--dry-run", "--"]
    size = ["--train.micro_batch_size", "8"]
    data = ["--data.train", str(corpus.lmdb), "--data.valid", str(corpus.shards)]
    return [*words, "--config", "recognizer_nano", "--init", "scratch", *size, *data, *more]


def test_a_fine_tuning_is_checked_and_written_likewise(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*finetune_words(tmp_path / "run", tiny)) == 0
    printed = capsys.readouterr()
    assert f"each of {Corpus.open(tiny.shards).num_samples} samples" in printed.err and "estimate" not in printed.err
    lines = printed.out.splitlines()
    assert "verb=finetune" in lines and "nproc=2" in lines and "doctor=no" in lines
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)
    for more, message in (
        (["--init", str(tmp_path / "nothing")], "nothing: no such file"),
        (["--data.train", str(tmp_path)], "LMDB"),
        (["--data.charset", "nothing.txt"], "charset"),
        (["--train.global_batch_size", "7"], "not a multiple of 2 ranks"),
    ):
        with pytest.raises(UserError, match=message):
            submit(*finetune_words(tmp_path / "run", tiny, *more))


def test_a_pixel_task_is_checked_and_written_likewise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe chooses the task; what only the data tell is looked at before the job queues."""
    crops, pairs = write_crops(tmp_path / "crops", 40), write_pairs(tmp_path / "pairs", 40)
    for name, data, other in (("segmenter_nano", crops, pairs), ("upscaler_nano", pairs, crops)):
        words = ["finetune", "--run_dir", str(tmp_path / name), "--gpus-per-node", "2", "--dry-run", "--"]
        words += ["--config", name, "--init", "scratch", "--train.micro_batch_size", "8", "--data.train"]
        assert submit(*words, str(data)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "verb=finetune" in lines and "nproc=2" in lines
        with pytest.raises(UserError, match="nothing: no such folder"):
            submit(*words, str(tmp_path / "nothing"))
        settings = [*words[words.index("--") + 1 :], str(data), "--run_dir", str(tmp_path / "run")]
        config = parse_training("finetune", settings)
        assert {"corpus", "valid"} <= rehearse(config, later=False).keys()
        with pytest.raises(UserError, match=str(other)):
            rehearse(replace(config, data=replace(config.data, train=(other,))), later=False)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["submission", "dry run"])
def test_a_run_folder_of_another_run_is_refused(tiny: Tiny, tmp_path: Path, dry: list[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/identity.json").write_text(json.dumps({"seed": 5, "train.global_batch_size": 64}))
    with pytest.raises(UserError, match="belongs to another run"):
        submit(*pretrain_words(tmp_path / "run", *dry), "--", *run_on(tiny))


def test_an_existing_run_keeps_its_global_batch(tiny: Tiny, tmp_path: Path) -> None:
    """Which the ranks of this job must be able to share, though nobody names it."""
    words = ["--run_dir", str(tmp_path / "run"), "--", *run_on(tiny)]
    config = parse(Config, [*run_on(tiny), "--run_dir", str(tmp_path / "run")], "test")
    facts = {"corpus": Corpus.open(config.data.shards).hash, "train.global_batch_size": 100}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/identity.json").write_text(json.dumps(identity(to_dict(config)) | facts))
    with pytest.raises(UserError, match="batch_size = 100: not a multiple of 8 ranks"):
        submit("pretrain", *words)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    config = Config(run_dir=tmp_path, checkpoint=Checkpoint(keep=1))
    check_space(config, 10**6)
    with pytest.raises(UserError, match="checkpoints take"):
        check_space(replace(config, checkpoint=Checkpoint(keep=100)), 10**9)


def test_a_source_that_is_no_lmdb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LMDB"):
        submit("shard", "--src", str(tmp_path), "--out", str(tmp_path / "out"), "--name", "x")


def test_a_dry_run_of_sharding_shows_both_jobs(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--src", str(tiny.lmdb), "--out", str(tmp_path / "out"), "--name", "x", "--slices", "8", "--dry-run"]
    assert submit("shard", *words) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-2:] == [
        "# job=$(sbatch --parsable --array=0-7%16 shard.sbatch)",
        "# sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes --output=slurm-merge-%j.log shard.sbatch",
    ]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("out", [["--out", "a b"], ["--out=a b"]])
def test_shards_are_merged_where_the_slices_are(tmp_path: Path, out: list[str]) -> None:
    """The template submitted by hand, without an array."""
    (tmp_path / "python").write_text("#!/bin/bash\nprintf '<%s>' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    text = render(
        "slurm_shard.sbatch", {}, {"hook()": f'hook() {{ export PATH={shlex.quote(str(tmp_path))}:"$PATH"; }}'}
    )
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = subprocess.run(
        ["bash", "-c", text, "_", "--src", "lmdbs", *out, "--name", "x"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == "<-m><data_tools><merge><a b><-m><data_tools><verify><a b>"


@pytest.mark.parametrize("template", ["slurm_pretrain.sbatch", "slurm_shard.sbatch"])
def test_no_array_is_empty_which_bash_before_4_4_takes_for_unset(template: str) -> None:
    text = (CHECKOUT / "launch" / template).read_text()
    assert "set -u" in text and "=()" not in text


def test_how_a_run_stands(tiny: Tiny, tmp_path: Path) -> None:
    config = read_recipe("vit_nano", Config)
    (tmp_path / "config.yaml").write_text(describe_settings(config))
    row = {"step": 40, "samples": 40 * 32, "samples_per_second": 10.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 4')
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step_00000030\n")
    life = {"event": "begin", "job": "7", "first": "7", "requeues": 2, "step": 30, "outcome": None}
    (tmp_path / "lives.jsonl").write_text(json.dumps(life) + "\n")
    text = describe(tmp_path)
    left = (-(-config.train.total_samples // 32) - 40) * 32 / 10
    for part in (
        "job           7",
        "(requeue 2) from step 30",
        f"run           {tmp_path}",
        "step          40 of 1,875, logged",
        "10 samples/s",
        "checkpoint    step 30",
    ):
        assert part in text
    assert f"{round(left / 60) // 60} h" in text
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row | {"samples_per_second": 0}) + "\n")
    assert "left          nobody knows how long" in describe(tmp_path)
    (tmp_path / "config.yaml").write_text(describe_settings(read_recipe("recognizer_nano", FineTuning)))
    assert "step          40" in describe(tmp_path) and "validation" not in describe(tmp_path)
    lines = [row | {"valid_best": 0.125}, row | {"step": 41}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "validation    12.50% of the words right at best" in describe(tmp_path)
    (tmp_path / "config.yaml").write_text(describe_settings(read_recipe("segmenter_nano", Segmenting)))
    assert "validation    fg_iou 0.1250 at best" in describe(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        describe(tmp_path / "nothing")


def test_the_script_to_edit_asks_for_what_ccd_submit_asks_for(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For 8 GPUs; its lines to fill in are not in the script that is made."""
    assert (
        submit("pretrain", "--run_dir", str(tmp_path / "run"), "--dry-run", "--", *run_on(tiny), "--data.workers", "4")
        == 0
    )
    made, by_hand = capsys.readouterr().out, (CHECKOUT / "launch/slurm_pretrain.sbatch").read_text()
    for line in ("#SBATCH --cpus-per-task=48", "#SBATCH --output=slurm-%j.log"):
        assert line in made.splitlines() and line in by_hand.splitlines()
    assert "##SBATCH --partition=gpu" in by_hand.splitlines() and "##SBATCH" not in made


def test_a_folder_with_the_script_of_a_refused_job_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "pretrain.sbatch").write_text("#!/bin/bash\n")
    assert describe(tmp_path) == f"{tmp_path}: no run yet, and no job was submitted for it"


SBATCH = """#!/bin/bash
case " $* " in *" --test-only "*) exit ;; esac
number=$(($(cat "$COUNT" 2>/dev/null || echo 100) + 1))
echo $number > "$COUNT"
echo $number
"""


def test_a_job_is_known_before_it_begins(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM's two programs, as far as they are needed here; the real ones are in test_slurm.py."""
    for name, text in (("sbatch", SBATCH), ("squeue", '#!/bin/bash\necho "PENDING (${3#--jobs=})"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    run_dir = tmp_path / "run"
    assert submit(*pretrain_words(run_dir, "--chain", "2"), "--", *run_on(tiny)) == 0
    assert "submitted job 101, then 102" in capsys.readouterr().out
    assert [line.split() for line in describe(run_dir).splitlines()[1:3]] == [
        ["submitted", "job", "101,", "PENDING", "(101)"],
        ["submitted", "job", "102,", "PENDING", "(102)"],
    ]
    note(run_dir, "begin", job="101", requeues=0, step=0, first="101", outcome=None)
    rows = [line.split()[:3] for line in describe(run_dir).splitlines()[1:4]]
    assert rows == [["job", "101,", "PENDING"], ["lives", "1,", "the"], ["submitted", "job", "102,"]]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("24h", "24:00:00"), ("90m", "01:30:00"), ("1d12h", "36:00:00"), ("2d", "48:00:00"), ("45min", "00:45:00"),
     ("24:00:00", "24:00:00"), ("1-12", "1-12"), ("30", "30")],
)  # fmt: skip
def test_a_time_may_be_written_as_people_do(given: str, meant: str) -> None:
    assert read(["finetune", "--run_dir", "runs/x", "--time", given])[0].time == meant


@pytest.mark.parametrize("given", ["", "h", "soon", "24 h", "1:2:3:4"])
def test_what_is_no_time_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(["finetune", "--run_dir", "runs/x", f"--time={given}"])
    assert "is no time; write 24:00:00" in capsys.readouterr().err


def test_settings_without_dashes_before_them_are_shown_their_place() -> None:
    with pytest.raises(
        UserError, match="no option of ccd-submit pretrain; settings of the run go behind --: … -- --config"
    ):
        read(["pretrain", "--run_dir", "runs/a", "--nodes", "2", "--config", "vit_small"])


def test_a_fine_tuning_may_wait_for_its_pretraining(tiny: Tiny, tmp_path: Path) -> None:
    """Its weights are not there yet, and nobody looks for them; the job waits for that run's newest job."""
    waiting = tmp_path / "pretraining"
    words = ["--run_dir", str(tmp_path / "reader"), "--gpus-per-node", "0", "--dry-run", "--after", str(waiting), "--"]
    words += ["--config", "recognizer_nano", "--init", str(waiting), "--data.train", str(tiny.lmdb)]
    words += ["--data.valid", str(tiny.lmdb), "--train.micro_batch_size", "8"]
    assert submit("finetune", *words) == 0
    with pytest.raises(UserError, match="no job was submitted for this folder"):
        newest_job(str(waiting))
    waiting.mkdir()
    for job in ("41", "42"):
        note(waiting, "submit", job=job, requeues=0)
    assert newest_job(str(waiting)) == "42" and newest_job("17") == "17"
