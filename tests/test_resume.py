"""A run that is killed, asked to stop, or moved to other ranks and stages, beside one that nobody touched."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import Tiny
from ranks import run_ranks
from test_engine import SMALL, equal, small, stage_file, steps
from torch import Tensor

from ccd_train.config.pretraining import Config
from ccd_train.errors import UserError
from ccd_train.files import write_file
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.tasks.pretrain.weights import open_weights, read_weights
from ccd_train.training import checkpoint
from ccd_train.training.library import read_file
from ccd_train.training.life import Stop, lock
from ccd_train.training.run import Run, begin

TIMES = {"samples_per_second", "data_wait", "time"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"checkpoint": {"every_steps": 4}}))
    return path


def command(recipe: Path | str, shards: Path, run_dir: Path, ranks: int, *more: str) -> list[str]:
    arguments = ["--config", str(recipe), "--run_dir", str(run_dir), "--data.shards", str(shards), *more]
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    return [*launcher, "ccd_train", "pretrain", *arguments]


def live(run_dir: Path, arguments: list[str], until: Callable[[], bool] | None = None, number: int = 0) -> int:
    """One life of a run; sends signal `number` to all its processes as soon as `until` holds. Returns the exit code."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    limit = time.monotonic() + 400
    while until is not None and not until():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0].decode()
        time.sleep(0.01)
    if until is not None:
        launcher = psutil.Process(process.pid)
        for member in (launcher, *launcher.children(recursive=True)):  # torchrun's workers have sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
    print(process.communicate(timeout=400)[0].decode())  # pytest shows it where a test fails
    return process.returncode


def metrics(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(run_dir)]


def outcome(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "outcome.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 steps of 2 processes."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert live(run_dir, command(recipe, tiny.shards, run_dir, 2, "--max-steps", "30")) == 0
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 31))
    assert outcome(run_dir)["outcome"] == "finished"
    return run_dir


def test_killed_three_times_it_ends_with_the_same_losses(
    tiny: Tiny, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = command(recipe, tiny.shards, run_dir, 2, "--max-steps", "30")
    for step in (7, 16, 25):
        live(run_dir, arguments, lambda step=step: len(metrics(run_dir)) >= step, signal.SIGKILL)  # type: ignore[misc]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "torn')  # as a kill inside a write would leave it
    assert live(run_dir, arguments) == 0
    assert losses(run_dir) == losses(undisturbed)
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {"latest", "step_00000024", "step_00000028", "step_00000030"}


def test_asked_to_stop_it_saves_at_once_and_goes_on(
    tiny: Tiny, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = command(recipe, tiny.shards, run_dir, 2, "--max-steps", "30")
    live(run_dir, arguments, lambda: len(metrics(run_dir)) >= 9, signal.SIGTERM)
    assert outcome(run_dir)["outcome"] == "unfinished" and outcome(run_dir)["code"] == 75
    stopped = len(metrics(run_dir))
    assert (run_dir / "checkpoints" / f"step_{stopped:08d}" / "COMPLETE").exists()
    assert live(run_dir, arguments) == 0
    assert losses(run_dir) == losses(undisturbed)


def test_more_signals_do_not_break_the_save(tiny: Tiny, recipe: Path, tmp_path: Path) -> None:
    """An impatient scheduler: USR1, then TERM and INT again and again until the run has ended."""
    run_dir = tmp_path / "run"
    arguments = command(recipe, tiny.shards, run_dir, 1, "--max-steps", "30", "--train.global_batch_size", "4")
    process = subprocess.Popen([*arguments, "--train.micro_batch_size", "4"])
    limit = time.monotonic() + 200
    while len(metrics(run_dir)) < 5:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    while not list((run_dir / "checkpoints").glob("writing_*")) and process.poll() is None:
        time.sleep(0.0005)
    sent = 0
    while not (run_dir / "outcome.json").exists() and process.poll() is None:
        process.send_signal((signal.SIGTERM, signal.SIGINT)[sent % 2])
        sent += 1
        time.sleep(0.002)
    assert process.wait(timeout=60) == 75
    assert sent > 0
    assert outcome(run_dir)["message"].startswith("SIG") and ": saved after step" in outcome(run_dir)["message"]
    found = checkpoint.newest(run_dir)
    assert found is not None and checkpoint.step_of(found) == len(metrics(run_dir))


def test_the_time_limit_ends_it_as_unfinished(tiny: Tiny, recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert live(run_dir, command(recipe, tiny.shards, run_dir, 1, "--max-minutes", "0.01")) == 75
    assert outcome(run_dir)["outcome"] == "unfinished"
    assert checkpoint.newest(run_dir) is not None


def save_and_go_on(config: Config) -> tuple[list[dict[str, float]], dict[str, Any], Any]:
    """5 steps, a checkpoint, and 4 more steps that are lost."""
    run = begin(Pretraining(config))
    steps(run, 5)
    run.save()
    kept = run.task.teacher.state_dict(), run.task.center.value.clone()
    after = steps(run, 4)
    run.close()
    return after, *kept


def restore(config: Config) -> tuple[list[dict[str, float]], dict[str, Any], Any]:
    run = begin(Pretraining(config))
    kept = run.task.teacher.state_dict(), run.task.center.value.clone()
    after = steps(run, 4)
    run.close()
    return after, *kept


@pytest.mark.parametrize(
    ("ranks", "stages"),
    [
        ((2, 1), (1, 1)),
        ((1, 2), (2, 3)),
        *(pytest.param(ranks, stages, marks=pytest.mark.slow) for ranks, stages in (
            ((1, 2), (1, 1)), ((2, 3), (2, 2)), ((2, 2), (1, 2)), ((2, 2), (2, 3)), ((2, 2), (3, 1)), ((2, 1), (3, 0)),
            ((1, 2), (0, 3)), ((2, 3), (3, 3)),
        )),
    ],
)  # fmt: skip
def test_other_ranks_and_stages_go_on_alike(
    tiny: Tiny, tmp_path: Path, ranks: tuple[int, int], stages: tuple[int, int]
) -> None:
    base = small(tiny, tmp_path / "run", train={"global_batch_size": 12}, optimizer={"freeze_last_layer_samples": 40})
    configs = [
        replace(
            base,
            deepspeed=stage_file(tmp_path, stage),
            train=replace(base.train, micro_batch_size=12 // count),
        )
        for count, stage in zip(ranks, stages, strict=True)
    ]
    expected, teacher, center = run_ranks(ranks[0], save_and_go_on, configs[0])[0]
    for after, loaded_teacher, loaded_center in run_ranks(ranks[1], restore, configs[1]):
        assert equal(loaded_teacher, teacher)
        assert torch.equal(loaded_center, center)
        for name in ("loss_distillation", "loss_segmentation", "grad_norm", "center_norm", "characters"):
            # ranks add in another order
            assert [s[name] for s in after] == pytest.approx([s[name] for s in expected], rel=2e-4), name


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_weights_read_from_disk_are_the_live_ones(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    config = replace(small(tiny, tmp_path / "run"), deepspeed=stage_file(tmp_path, stage))
    for masters, teacher, read in run_ranks(2, live_and_read, config):
        assert equal(read["teacher"], teacher)
        for name, start, master in masters:
            assert torch.equal(read["student"][name].view(-1)[start : start + len(master)], master)
        assert "segmentation.branches.0.1.running_mean" in read["student"]


def live_and_read(config: Config) -> tuple[Any, Any, Any]:
    run = begin(Pretraining(config))
    steps(run, 3)
    run.save()
    masters = [(fragment.name, fragment.start, fragment.master.clone()) for fragment in run.engine.fragments]
    found = checkpoint.newest(run.run_dir)
    assert found is not None
    run.close()
    return masters, run.task.teacher.state_dict(), read_weights(found)


def gains(run: Run[Pretraining]) -> dict[str, Tensor]:
    """The frozen gain as student and teacher read it back from disk."""
    found = checkpoint.newest(run.run_dir)
    assert found is not None
    return {name: part["projection.prototypes.gain"] for name, part in read_weights(found).items()}


def frozen_gains(start: Config, stages: list[Config]) -> tuple[Tensor, list[tuple[str, dict[str, Tensor], Tensor]]]:
    """Gains that were trained, then frozen by another run that moves from stage to stage: read back, and live."""
    run = begin(Pretraining(start))
    steps(run, 3)
    run.save()
    run.close()
    trained, seen = gains(run)["student"], []
    for config in stages:
        run = begin(Pretraining(config))
        steps(run, 1)
        run.save()
        run.close()
        live = dict(run.task.teacher.network.named_parameters())["projection.prototypes.gain"].detach().clone()
        seen.append((str(config.deepspeed), gains(run), live))
    return trained, seen


def test_frozen_gains_move_along(tiny: Tiny, tmp_path: Path) -> None:
    """DeepSpeed's universal format forgets what is frozen; here nothing may."""
    thawed = {"freeze_last_layer_samples": 0, "warmup_samples": 0}
    start = small(tiny, tmp_path / "start", optimizer=thawed)
    frozen = replace(small(tiny, tmp_path / "run", model={"freeze_gain": True}), init=tmp_path / "start")
    stages = [replace(frozen, deepspeed=stage_file(tmp_path, stage)) for stage in (3, 3, 1, 3, 0)]
    trained, seen = run_ranks(2, frozen_gains, start, stages)[0]
    assert not torch.equal(trained, torch.ones_like(trained))
    for stage, read, live in seen:
        assert torch.equal(read["student"], trained), stage
        assert torch.equal(read["teacher"], trained), stage
        assert torch.equal(live, trained), stage


def after_a_move(config: Config) -> dict[str, Any]:
    """What the traps of DeepSpeed's universal format would leave wrong."""
    run = begin(Pretraining(config))
    count = [state["step"] for state in run.engine._base.state.values()]
    before = [float(step) for step in count]
    steps(run, 1)
    found = {
        "shared": len({step.data_ptr() for step in count}) < len(count),
        "counts": (before, [float(step) for step in count]),
        "rates": {(g["part"], g["decays"]): (g["lr"], g["weight_decay"]) for g in run.engine._base.param_groups},
    }
    run.close()
    return found


def test_moved_to_stage_3_the_groups_and_the_counters_are_their_own(tiny: Tiny, tmp_path: Path) -> None:
    base = small(tiny, tmp_path / "run", train={"global_batch_size": 12}, optimizer={"freeze_last_layer_samples": 400})
    alone = replace(base, deepspeed=stage_file(tmp_path, 1), train=replace(base.train, micro_batch_size=12))
    run_ranks(1, save_and_go_on, alone)
    moved = replace(base, deepspeed=stage_file(tmp_path, 3), train=replace(base.train, micro_batch_size=6))
    for found in run_ranks(2, after_a_move, moved):
        before, after = found["counts"]
        assert not found["shared"] and set(before) == {5.0} and set(after) == {6.0}
        lr, weight_decay = found["rates"]["shared", True]
        assert lr > 0 and weight_decay > 0
        for (part, decays), (group_lr, group_decay) in found["rates"].items():
            assert group_lr == (0.0 if part == "prototypes" else lr)
            assert group_decay == (weight_decay if decays else 0.0)


def test_a_missing_or_lying_latest_changes_nothing(tmp_path: Path) -> None:
    """DeepSpeed starts from nothing, without a word, where `latest` is missing; ours does not read it."""
    folder = tmp_path / "checkpoints"
    for step in (4, 8):
        complete(folder / checkpoint.step_name(step))
    (folder / "step_00000012").mkdir()  # not complete
    assert checkpoint.newest(tmp_path) == folder / "step_00000008"
    (folder / "latest").write_text("garbage")
    assert checkpoint.newest(tmp_path) == folder / "step_00000008"


def complete(folder: Path) -> None:
    """A checkpoint of one file, whole."""
    folder.mkdir(parents=True)
    digest = write_file(folder / "state.json", b"{}")
    write_file(folder / checkpoint.COMPLETE, json.dumps({"state.json": digest}).encode())


def test_a_step_is_set_aside_as_often_as_it_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        complete(folder / checkpoint.step_name(4))
        (folder / "step_00000004" / "state.json").write_bytes(b"[]")
        assert checkpoint.newest(tmp_path) is None
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004.damaged", "step_00000004.damaged.2"]


def saves_in_the_way(config: Config) -> tuple[list[str], list[str | None]]:
    """Names after saving a step that lies there in half, and the problems of saves whose writing breaks off."""
    run = begin(Pretraining(config))
    half = run.run_dir / "checkpoints" / checkpoint.step_name(1)
    half.mkdir(parents=True)
    steps(run, 1)
    run.save()
    names = sorted(path.name for path in half.parent.iterdir())
    problems = []
    for contents in ({"a.pt": b"1"}, {"a.pt": None}):  # None: an error that is not the disk's
        save = checkpoint.Save.__new__(checkpoint.Save)
        save._folder, save._temporary, save._written, save.seconds = half.parent, half.parent / "writing_x", {}, 0.0
        save._temporary.mkdir(exist_ok=True)
        save._problem, save.step = "not written to its end", 7
        save._thread = threading.Thread(target=save._write, args=(dict(contents), True))
        save._thread.start()
        problems.append(save.finish())
    run.close()
    return names, problems


def test_a_damaged_checkpoint_that_is_named_itself_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.step_name(4)
    complete(folder)
    (folder / "state.json").write_bytes(b"[]")
    with pytest.raises(UserError, match=r"damaged .state\.json has changed"):
        open_weights(folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_half_a_step_is_set_aside_and_a_save_that_breaks_off_is_none(tiny: Tiny, tmp_path: Path) -> None:
    ((names, problems),) = run_ranks(1, saves_in_the_way, small(tiny, tmp_path / "run"))
    assert names == ["latest", "step_00000001", "step_00000001.damaged"]
    assert problems == [None, "rank 0: not written to its end"]


def before_the_first_update(config: Config) -> tuple[set[str], bool]:
    """A checkpoint in which no step was applied, read back as a whole."""
    run = begin(Pretraining(config))
    run.save()
    found = checkpoint.newest(run.run_dir)
    assert found is not None
    whole, _ = checkpoint.read_whole(found)
    run.close()
    moments = [parts[key] for parts in whole.values() for key in ("exp_avg", "exp_avg_sq")]
    return set(whole), all(not moment.any() for moment in moments)


@pytest.mark.parametrize("stage", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_checkpoint_from_before_the_first_update_is_read(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    config = replace(small(tiny, tmp_path / "run"), deepspeed=stage_file(tmp_path, stage))
    ((names, zero),) = run_ranks(1, before_the_first_update, config)
    assert "vit.patch_embedding.weight" in names and zero


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (4, 8):
        complete(folder / checkpoint.step_name(step))
    (folder / "step_00000008" / "state.json").write_bytes(b"[]")
    assert checkpoint.newest(tmp_path) == folder / "step_00000004"
    assert "step_00000008" in caplog.text and "state.json has changed" in caplog.text
    assert (folder / "step_00000008.damaged").is_dir()


def test_a_killed_launcher_takes_its_workers_with_it(tiny: Tiny, recipe: Path, tmp_path: Path) -> None:
    """They are told to stop: they save, and a new life waits for them instead of writing beside them."""
    run_dir = tmp_path / "run"
    arguments = command(recipe, tiny.shards, run_dir, 2, "--train.total_samples", "100000")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 200
    while len(metrics(run_dir)) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert outcome(run_dir)["outcome"] == "unfinished"
    found = checkpoint.newest(run_dir)
    assert found is not None and checkpoint.step_of(found) == len(metrics(run_dir))


def test_two_lives_at_once_are_refused(tmp_path: Path) -> None:
    first = lock(tmp_path)
    assert first is not None
    with pytest.raises(UserError, match="in use by another process"):
        lock(tmp_path, patience=0.5)
    first.close()
    again = lock(tmp_path, patience=0.5)
    assert again is not None
    again.close()


class Evil:
    """What a stranger may have put into a checkpoint."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


def test_a_checkpoint_of_a_stranger_runs_no_code(tmp_path: Path) -> None:
    for name, value in (("evil.pt", Evil(tmp_path / "executed")), ("odd.pt", Stop)):
        torch.save({"module": value}, tmp_path / name)
        with pytest.raises(UserError, match="it could run code"):
            read_file(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    package = Path(read_file.__code__.co_filename).parent
    assert not [path for path in package.rglob("*.py") if "weights_only=False" in path.read_text()]
