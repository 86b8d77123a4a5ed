"""The teacher's average: fp32, from the fp32 masters, whatever the stage; one kept in bf16 would stand still."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import Tiny
from ranks import run_ranks
from test_engine import small, stage_file
from torch import Tensor

from ccd_train.config.pretraining import Config
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.run import begin
from ccd_train.training.train import train_step

MOMENTUM = 0.9995
STEPS = 20


@dataclass
class Followed:
    """What a rank saw of its fragments of the teacher's parameters over STEPS steps; one long tensor each."""

    first: Tensor
    """The masters at the start."""
    expected: Tensor
    """Their average by the formula, in fp32."""
    teacher: Tensor
    """The teacher's own."""
    in_bf16: Tensor
    """The same average kept in bf16."""
    type: torch.dtype
    """Of the teacher's forward pass."""
    collectives: list[str]
    """Of one update, until the teacher is ready."""


def follow(config: Config) -> Followed:
    run = begin(Pretraining(config))
    names = {name for name, _ in run.task.teacher.network.named_parameters()}
    fragments = [fragment for fragment in run.engine.fragments if fragment.name in names]
    first = [fragment.master.clone() for fragment in fragments]
    expected = [master.clone() for master in first]
    in_bf16 = [master.bfloat16() for master in first]
    for _ in range(STEPS):
        momentum = run.task.rates().momentum
        train_step(run, logged=False)
        for average, fragment in zip(expected, fragments, strict=True):
            average.lerp_(fragment.master, 1 - momentum)
        for average, fragment in zip(in_bf16, fragments, strict=True):
            average.lerp_(fragment.master.bfloat16(), 1 - momentum)
    state = run.task.teacher.state_dict()
    pieces = [state[f.name].view(-1)[f.start : f.start + len(f.master)] for f in fragments]
    run.task.teacher.ready()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.task.teacher.update(1.0)
        run.task.teacher.ready()
    collectives = [event.name for event in profile.events() if event.name.startswith("c10d::")]
    kind = next(run.task.teacher.network.parameters()).dtype
    run.close()
    return Followed(*map(torch.cat, (first, expected, pieces, in_bf16)), kind, collectives)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_it_follows_the_masters_where_an_average_in_bf16_stalls(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    momentum = {"teacher_momentum": MOMENTUM, "scale_teacher_momentum": False}
    config = small(
        tiny, tmp_path / "run", distillation=momentum, optimizer={"lr": 1e-3, "freeze_last_layer_samples": 0}
    )
    config = replace(config, deepspeed=stage_file(tmp_path, stage, bf16={"enabled": True}))
    for seen in run_ranks(2, follow, config):
        assert seen.type == torch.bfloat16
        assert torch.equal(seen.teacher, seen.expected)
        moved = seen.expected != seen.first
        assert moved.float().mean() > 0.9
        stood = seen.in_bf16 == seen.first.bfloat16()
        assert stood[moved].float().mean() > 0.9
        motion, error = (seen.expected - seen.first).norm(), (seen.in_bf16.float() - seen.expected).norm()
        assert error > 0.5 * motion
        assert len(seen.collectives) == 1, "one all-gather, however many parameters there are"
