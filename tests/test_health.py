"""Health: the figures by their definitions and over ranks, and alarms in runs that really collapse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pretrain import pretrain
from torch import Tensor
from torch.nn import functional as F

from ccd_train.config.options import from_dict, to_dict
from ccd_train.config.pretraining import Config
from ccd_train.errors import UserError
from ccd_train.tasks.pretrain import health
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.metrics import Metrics
from ccd_train.training.run import begin
from ccd_train.training.train import train
from launch.status import describe

PROTOTYPES = 32
HEALTHY: dict[str, Any] = {
    "max_steps": 60,
    "model": {
        "width": 16, "depth": 3, "heads": 2, "taps": [1, 2, 3], "segmentation_width": 8, "drop_path": 0.0,
        "head_hidden": 32, "head_bottleneck": 8, "prototypes": PROTOTYPES, "freeze_gain": True, "initial_std": 0.1,
    },
    "distillation": {"teacher_momentum": 0.9, "center_momentum": 0.2, "teacher_temperature": 0.05},
    "optimizer": {"lr": 0.1, "warmup_samples": 80, "freeze_last_layer_samples": 100_000},
    "train": {"total_samples": 1600, "micro_batch_size": 8, "threads": 1},
    "data": {"workers": 0},
    "augment": {"chain": "severity_2"},
    "affine": {"probability": 0.4},
    "log": {"every_steps": 2, "pictures_every_steps": 0},
    "health": {"patience_steps": 20},
}  # fmt: skip
TOO_HOT = {"distillation": {"student_temperature": 1.0, "teacher_temperature": 1.0}}
WITHOUT_CENTER = {
    "model": {"initial_std": 0.02},
    "distillation": {"center_momentum": 1.0, "teacher_temperature": 0.03, "teacher_momentum": 0.5,
                     "segmentation_weight": 0.1},
}  # fmt: skip


def settings(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: {**HEALTHY[name], **changes[name]} if name in changes else HEALTHY[name] for name in HEALTHY}


def live(configs: list[Config]) -> None:
    """The real loop, one run after the other in one process."""
    for config in configs:
        run = begin(Pretraining(config))
        metrics = Metrics(run.run_dir, 0, run.last_step)
        assert train(run, metrics)
        metrics.close()
        run.close()


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that is well, one whose temperatures are too high, and one whose centre is never updated."""
    folder = tmp_path_factory.mktemp("runs")
    changes: dict[str, dict[str, Any]] = {"healthy": {}, "hot": TOO_HOT, "centerless": WITHOUT_CENTER}
    configs = []
    for name in changes:
        config = from_dict(Config, settings(changes[name]), name)
        configs.append(replace(config, run_dir=folder / name, data=replace(config.data, shards=(tiny.shards,))))
    for config in configs:  # each has its own patience
        run_ranks(1, live, [config])
    return {name: folder / name for name in changes}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_that_is_well_raises_no_alarm(runs: dict[str, Path]) -> None:
    assert not lines(runs["healthy"] / "alarms.jsonl")
    late = lines(runs["healthy"] / "metrics.jsonl")[-10:]
    assert all(0.1 < line["teacher_entropy"] < math.log(PROTOTYPES) - 0.5 for line in late)
    assert all(line["kl"] > 0 and line["feature_rank"] > 1.5 and line["images_without_regions"] < 0.5 for line in late)
    assert "alarm" not in describe(runs["healthy"])


@pytest.mark.parametrize(("run", "kind"), [("hot", health.UNIFORM), ("centerless", health.CONSTANT)])
def test_a_run_that_collapses_raises_one_alarm(runs: dict[str, Path], run: str, kind: str) -> None:
    (alarm,) = lines(runs[run] / "alarms.jsonl")
    assert alarm["kind"] == kind and alarm["step"] <= 60 and not alarm["over"]
    assert "prototypes in use" in alarm["message"] and health.REMEDIES[kind] in alarm["message"]
    last = lines(runs[run] / "metrics.jsonl")[-1]
    if kind == health.UNIFORM:
        assert last["teacher_entropy"] > 0.95 * math.log(PROTOTYPES) and last["loss_over_ln_p"] > 0.95
    else:
        assert last["teacher_entropy"] < 0.1 and last["prototypes_used"] < 1.5
    board = EventAccumulator(str(runs[run] / "tensorboard"))
    board.Reload()
    (event,) = board.Tensors("alarm/text_summary")
    assert event.step == alarm["step"] and kind.encode() in event.tensor_proto.string_val[0]
    assert kind in describe(runs[run])


def test_stop_on_collapse_ends_as_failed(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "hot.json.yaml"
    recipe.write_text(json.dumps(settings(TOO_HOT)))
    arguments = ("--config", str(recipe), "--run_dir", str(tmp_path / "run"), "--data.shards", str(tiny.shards))
    result = pretrain(*arguments, "--health.stop_on_collapse")
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["outcome"] == "failed" and health.UNIFORM in outcome["message"]
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] < 60


def micro_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets [2M, P], features [2M, D] and has_regions [B] of M = 6, and the student's logits."""
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(12, size, generator=generator) for size in (20, 5, 20)]
    return draws[0], draws[1], torch.tensor([True, True, False, True]), draws[2]


def statistics_of_half(half: int | None) -> dict[str, float]:
    targets, features, has_regions, student = micro_batch()
    rank = torch.distributed.get_rank() if half is None else half
    rows = slice(6 * rank, 6 * rank + 6) if half is None else slice(None)
    images = slice(2 * rank, 2 * rank + 2) if half is None else slice(None)
    logarithm = F.log_softmax(student / 0.1, dim=1)
    cross_entropy = -(F.softmax(targets / 0.04, dim=1) * logarithm).sum(dim=1)[rows].sum() / 12
    world = torch.distributed.get_world_size() if half is None else 1
    figures = health.statistics(
        targets[rows], torch.zeros(1, 20), 0.04, cross_entropy * world, features[rows], has_regions[images]
    )
    return {name: value.item() for name, value in figures.items()}


def test_the_figures_are_those_of_their_definitions() -> None:
    targets, features, _, student = micro_batch()
    figures = statistics_of_half(0)
    teacher = F.softmax(targets / 0.04, dim=1)
    divergence = F.kl_div(F.log_softmax(student / 0.1, dim=1), teacher, reduction="batchmean")
    assert figures["kl"] == pytest.approx(divergence.item(), rel=1e-4)
    unit = features / features.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(unit.t() @ unit / 12)
    assert figures["feature_rank"] == pytest.approx((1 / eigenvalues.square().sum()).item(), rel=1e-4)
    deviation = unit.var(dim=0, unbiased=False).sum().sqrt()
    assert figures["feature_std"] == pytest.approx(deviation.item(), rel=1e-4)
    assert figures["images_without_regions"] == 0.25


def test_the_figures_are_over_all_ranks() -> None:
    whole = statistics_of_half(0)
    for figures in run_ranks(2, statistics_of_half, None):
        assert figures == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("rows", [0, 8])
def test_rank_and_deviation_of_equal_features(rows: int) -> None:
    figures = health.statistics(
        torch.zeros(rows, 16), torch.zeros(1, 16), 0.04, torch.zeros(()), torch.ones(rows, 6), torch.ones(4) > 0
    )
    assert all(value.isfinite() for value in figures.values())
    assert figures["feature_rank"].item() == pytest.approx(1.0 if rows else 0.0)
    assert figures["feature_std"].item() == pytest.approx(0.0, abs=1e-3)


def guard(**health_settings: Any) -> health.Guard:
    values = {"model": {"prototypes": 128}, "health": {"after_samples": 0, "patience_steps": 10, **health_settings}}
    return health.Guard(from_dict(Config, values, "test"), global_batch=32)


def figures(step: int, **changes: float) -> dict[str, float]:
    """Of a healthy step."""
    values = {
        "step": step, "samples": 32 * step, "loss_distillation": 3.5, "teacher_entropy": 2.5, "prototypes_used": 40.0,
        "characters": 4.0, "images_without_regions": 0.1, "feature_rank": 5.0, "feature_std": 0.8,
    }  # fmt: skip
    return values | changes


def test_an_alarm_waits_and_ends() -> None:
    flat = {"loss_distillation": 4.84, "teacher_entropy": 4.8}
    watched = guard()
    assert not watched.look(figures(10, **flat)) and not watched.look(figures(19, **flat))
    (alarm,) = watched.look(figures(20, **flat))
    assert (alarm.kind, alarm.step, alarm.over) == (health.UNIFORM, 20, False)
    assert not watched.look(figures(30, **flat))
    (end,) = watched.look(figures(40))
    assert end.over and end.kind == health.UNIFORM
    assert not watched.look(figures(50, **flat))
    assert watched.look(figures(60, **flat))


def test_what_is_no_collapse() -> None:
    """Sharp targets on many prototypes; a loss at ln P under sharp targets; too few characters to tell; the start."""
    for healthy in (
        {"teacher_entropy": 0.01},
        {"loss_distillation": 4.85, "teacher_entropy": 3.0},
        {"teacher_entropy": 0.0, "prototypes_used": 1.0, "characters": 0.1},
    ):
        watched = guard()
        assert not [alarm for step in range(0, 100, 10) for alarm in watched.look(figures(step, **healthy))]
    early = guard(after_samples=10_000)
    flat = {"loss_distillation": 4.84, "teacher_entropy": 4.8}
    assert not [alarm for step in range(0, 300, 10) for alarm in early.look(figures(step, **flat))]


def test_images_without_characters_raise_an_alarm() -> None:
    watched = guard()
    empty = {"images_without_regions": 1.0, "characters": 0.0, "teacher_entropy": 0.0, "prototypes_used": 1.0}
    alarms = [alarm for step in (0, 10, 20) for alarm in watched.look(figures(step, **empty))]
    assert [alarm.kind for alarm in alarms] == [health.EMPTY]


def test_impossible_settings_are_refused() -> None:
    for name, value in (("patience_steps", -1), ("constant_prototypes", 1.0), ("uniform_nats", 0.0)):
        config = from_dict(Config, {"health": {name: value}}, "test")
        assert to_dict(config)["health"][name] == value
        with pytest.raises(UserError, match=f"health.{name}"):
            config.health.check()


def test_blank_crops_raise_an_alarm_before_the_warm_up_is_over() -> None:
    """There is nothing to wait for: a run of 60 steps on them ended as finished, without a word."""
    guard = health.Guard(Config(), 8)  # a warm-up of 10 M samples, a patience of 100 steps
    blank = {"images_without_regions": 1.0, "characters": 0.0, "teacher_entropy": 0.0, "prototypes_used": 0.0,
             "loss_distillation": 0.0, "feature_rank": 0.0, "feature_std": 0.0}  # fmt: skip
    found = [alarm for step in range(1, 60) for alarm in guard.look(blank | {"step": step, "samples": 8 * step})]
    assert [(alarm.kind, alarm.step) for alarm in found] == [(health.EMPTY, 1 + health.EMPTY_STEPS)]
