"""The engine in every ZeRO stage: equal losses and teachers, clipping, skipped steps, the thaw of the prototypes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny
from ranks import run_ranks
from torch import Tensor

from ccd_train import distributed
from ccd_train.config.deepspeed import OURS, read_deepspeed_file
from ccd_train.config.options import from_dict
from ccd_train.config.pretraining import Config
from ccd_train.errors import TrainingError, UserError
from ccd_train.models import ccd
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.engine import parameter_groups
from ccd_train.training.run import Run, begin
from ccd_train.training.train import train_step

SMALL: dict[str, Any] = {
    "model": {
        "width": 16, "depth": 3, "heads": 2, "taps": [1, 2, 3], "segmentation_width": 8,
        "head_hidden": 16, "head_bottleneck": 8, "prototypes": 32, "drop_path": 0.1,
    },
    "distillation": {"teacher_momentum": 0.9, "scale_teacher_momentum": False},
    "optimizer": {"warmup_samples": 16, "freeze_last_layer_samples": 16, "lr": 0.01, "clip_gradient": 0},
    "train": {"total_samples": 400, "micro_batch_size": 2, "threads": 1},
    "data": {"workers": 0},
    "log": {"every_steps": 1, "pictures_every_steps": 0},
}  # fmt: skip


def small(tiny: Tiny, run_dir: Path, **changes: dict[str, Any]) -> Config:
    """A run that takes a few milliseconds a step; `changes` are by section."""
    values = {name: {**SMALL.get(name, {}), **changes.get(name, {})} for name in SMALL | changes}
    config = from_dict(Config, values, "test")
    return replace(config, run_dir=run_dir, data=replace(config.data, shards=(tiny.shards,)))


def stage_file(folder: Path, stage: int, **more: Any) -> str:
    path = folder / f"stage{stage}{''.join(more)}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, **more}))
    return str(path)


def steps(run: Run[Pretraining], count: int) -> list[dict[str, float]]:
    return [train_step(run, logged=True).figures for _ in range(count)]


def several(configs: list[Config], count: int) -> list[tuple[list[dict[str, float]], dict[str, Tensor], Tensor]]:
    """Figures, teacher and centre after `count` steps of each run, one after the other in the same processes."""
    results = []
    for config in configs:
        run = begin(Pretraining(config))
        results.append((steps(run, count), run.task.teacher.state_dict(), run.task.center.value.clone()))
        run.close()
    return results


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_all_stages_give_the_same_losses_and_teacher_in_fp32(tiny: Tiny, tmp_path: Path) -> None:
    files = [stage_file(tmp_path, stage) for stage in range(4)]
    configs = [replace(small(tiny, tmp_path / f"run{stage}"), deepspeed=files[stage]) for stage in range(4)]
    results = run_ranks(2, several, configs, 10)
    for rank in range(2):
        reference_figures, reference_teacher, reference_center = results[rank][0]
        assert len({step["loss"] for step in reference_figures}) == 10
        for figures, teacher, center in results[rank][1:]:
            assert [step["loss"] for step in figures] == [step["loss"] for step in reference_figures]
            assert equal(teacher, reference_teacher)
            assert torch.equal(center, reference_center)


@pytest.mark.slow
def test_stages_agree_under_bf16(tiny: Tiny, tmp_path: Path) -> None:
    losses = []
    for stage in (1, 2, 3):
        file = stage_file(tmp_path, stage, bf16={"enabled": True})
        config = replace(small(tiny, tmp_path / f"run{stage}"), deepspeed=file)
        ((figures, _, _),), _ = run_ranks(2, several, [config], 10)
        losses.append([step["loss"] for step in figures])
    assert losses[0] == losses[1] == losses[2]


def test_clipping_and_accumulation(tiny: Tiny, tmp_path: Path) -> None:
    """Clipped to a tiny norm the stages agree to rounding; accumulation over 2 micro-batches runs in every stage."""
    configs = [
        replace(
            small(tiny, tmp_path / f"run{stage}", optimizer={"clip_gradient": 1e-3}, train={"global_batch_size": 8}),
            deepspeed=stage_file(tmp_path, stage),
        )
        for stage in range(4)
    ]
    results = run_ranks(2, several, configs, 4)[0]
    reference = [step["loss"] for step in results[0][0]]
    for figures, _, _ in results[1:]:
        assert [step["loss"] for step in figures] == pytest.approx(reference, rel=1e-5)


def test_activation_checkpointing_gives_the_same_losses(tiny: Tiny, tmp_path: Path) -> None:
    configs = [
        small(tiny, tmp_path / f"run{again}", train={"activation_checkpointing": again}) for again in (False, True)
    ]
    (plain, _, _), (recomputed, _, _) = run_ranks(1, several, configs, 4)[0]
    assert [step["loss"] for step in recomputed] == [step["loss"] for step in plain]
    assert [step["grad_norm"] for step in recomputed] == [step["grad_norm"] for step in plain]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_compiled_backbone_gives_the_same_losses(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    file = stage_file(tmp_path, stage)
    configs = [
        replace(small(tiny, tmp_path / f"run{compiled}", train={"compile": compiled}), deepspeed=file)
        for compiled in (False, True)
    ]
    (plain, teacher, _), (compiled, compiled_teacher, _) = run_ranks(1, several, configs, 4)[0]
    assert [step["loss"] for step in compiled] == pytest.approx([step["loss"] for step in plain], rel=1e-3)
    assert compiled_teacher.keys() == teacher.keys()


def gradients_after_clipping(config: Config) -> tuple[Tensor, Tensor]:
    run = begin(Pretraining(config))
    for group in run.engine._base.param_groups:
        assert "part" in group
    largest = 0.05
    observed = []
    step = run.engine.step

    def look(finite: bool) -> bool:
        observed.append(run.engine.gradient_norms())
        return step(finite)

    before = []
    clip = run.engine.clip

    def note(norms: Tensor, limit: float) -> None:
        before.append(norms.clone())
        clip(norms, limit)

    run.engine.step, run.engine.clip = look, note  # type: ignore[method-assign]
    train_step(run, logged=False)
    run.close()
    assert run.config.optimizer.clip_gradient == largest
    return before[0], observed[0]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_each_tensor_is_clipped_by_itself(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    config = small(tiny, tmp_path / "run", optimizer={"clip_gradient": 0.05})
    for before, after in run_ranks(2, gradients_after_clipping, replace(config, deepspeed=stage_file(tmp_path, stage))):
        large = before > 0.05
        assert large.any() and not large.all()
        torch.testing.assert_close(after[large], torch.full_like(after[large], 0.05), rtol=1e-3, atol=0)
        torch.testing.assert_close(after[~large], before[~large], rtol=1e-5, atol=0)


def poisoned(config: Config) -> list[tuple[bool, bool, float, int]]:
    """Steps of which the second has an infinite pixel on rank 1 only: what changed, and the counts, after each."""
    run = begin(Pretraining(config))
    seen = []
    augmentation = run.task.augmentation

    def spoil(*arguments: Any) -> Any:
        views = augmentation(*arguments)
        if run.progress.step == 1 and distributed.rank() == 1:
            views.regular[0, 0, 0, 0] = torch.inf
        return views

    run.task.augmentation = spoil  # type: ignore[assignment]
    for _ in range(3):
        weights = [fragment.master.clone() for fragment in run.engine.fragments]
        teacher, center = run.task.teacher.state_dict(), run.task.center.value.clone()
        figures = train_step(run, logged=False).figures
        same = all(torch.equal(f.master, w) for f, w in zip(run.engine.fragments, weights, strict=True))
        untouched = equal(teacher, run.task.teacher.state_dict()) and torch.equal(center, run.task.center.value)
        seen.append((same, untouched, figures["skipped_steps"], run.progress.samples))
    run.close()
    return seen


@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    # the learning rate of the first step of a warm-up is 0, so there is none here
    config = small(tiny, tmp_path / "run", optimizer={"warmup_samples": 0, "freeze_last_layer_samples": 0})
    for seen in run_ranks(2, poisoned, replace(config, deepspeed=stage_file(tmp_path, stage))):
        assert [same for same, _, _, _ in seen] == [False, True, False]
        assert [untouched for _, untouched, _, _ in seen] == [False, True, False]
        assert [skipped for _, _, skipped, _ in seen] == [0, 1, 1]
        assert [samples for _, _, _, samples in seen] == [4, 4, 8]
    (line,) = (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2 and len(json.loads(line)["samples"]) == 4


def always_poisoned(config: Config) -> str:
    run = begin(Pretraining(config))
    augmentation = run.task.augmentation

    def spoil(*arguments: Any) -> Any:
        views = augmentation(*arguments)
        views.irregular.fill_(torch.nan)
        return views

    run.task.augmentation = spoil  # type: ignore[assignment]
    with pytest.raises(TrainingError) as caught:
        for _ in range(5):
            train_step(run, logged=False)
    run.close()
    return str(caught.value)


def refused_step(config: Config) -> tuple[bool, bool]:
    """Whether a step whose loss alone is not finite is applied, and whether it leaves the masters as they were."""
    run = begin(Pretraining(config))
    steps(run, 2)
    before = [fragment.master.clone() for fragment in run.engine.fragments]
    batch = next(run.batches)
    run.task.begin_step(logged=False)
    losses = run.task.losses_of(batch)
    run.engine.backward(losses.distillation + losses.segmentation, last=True)
    applied = run.engine.step(finite=False)
    same = all(torch.equal(old, f.master) for old, f in zip(before, run.engine.fragments, strict=True))
    run.close()
    return applied, same


@pytest.mark.parametrize("name", ["stage 1", "zero2_bf16_offload"])
def test_a_loss_alone_that_is_not_finite_skips_the_step(tiny: Tiny, tmp_path: Path, name: str) -> None:
    file = stage_file(tmp_path, 1) if name == "stage 1" else name
    config = replace(small(tiny, tmp_path / "run"), deepspeed=file)
    assert run_ranks(2, refused_step, config) == [(False, True)] * 2


def test_too_many_bad_steps_in_a_row_end_the_run(tiny: Tiny, tmp_path: Path) -> None:
    for message in run_ranks(2, always_poisoned, small(tiny, tmp_path / "run", train={"max_bad_steps": 3})):
        assert message.startswith("3 steps in a row") and "bad_steps.jsonl" in message


def thaw(config: Config) -> tuple[list[float], list[float]]:
    """How far the prototypes and the rest moved in each step, at most, in units of the learning rate."""
    run = begin(Pretraining(config))
    moved: tuple[list[float], list[float]] = ([], [])
    for _ in range(8):
        weights = [fragment.master.clone() for fragment in run.engine.fragments]
        lr = run.task.rates().lr
        train_step(run, logged=False)
        distance = [0.0, 0.0]
        for fragment, before in zip(run.engine.fragments, weights, strict=True):
            rest = ".prototypes." not in fragment.name
            distance[rest] = max(distance[rest], (fragment.master - before).abs().max().item() / lr)
        moved[0].append(distance[0])
        moved[1].append(distance[1])
    run.close()
    return moved


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_prototypes_are_frozen_to_the_bit_and_thaw_afresh(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    """Frozen for 4 steps; their first update afterwards is one of a fresh Adam: at most lr (and weight decay)."""
    still = {
        "warmup_samples": 0,
        "lr": 0.01,
        "weight_decay": 0,
        "final_weight_decay": 0,
        "freeze_last_layer_samples": 16,
    }
    config = replace(small(tiny, tmp_path / "run", optimizer=still), deepspeed=stage_file(tmp_path, stage))
    results = run_ranks(2, thaw, config)
    prototypes = [max(distance) for distance in zip(*(result[0] for result in results), strict=True)]
    rest = [max(distance) for distance in zip(*(result[1] for result in results), strict=True)]
    assert prototypes[:4] == [0.0] * 4
    assert 0.5 < prototypes[4] <= 1.001
    assert min(rest) > 0.1


def test_groups_decay_what_they_should() -> None:
    config = from_dict(Config, SMALL, "test")
    student = ccd.Student(config.model)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = {(g["part"], g["decays"]): {names[id(p)] for p in g["params"]} for g in parameter_groups(student)}
    assert groups["prototypes", True] == {"projection.prototypes.direction", "projection.prototypes.gain"}
    for name in groups["shared", False] | groups["segmentation", False]:
        assert name.endswith(".bias") or dict(student.named_parameters())[name].ndim == 1
    assert sum(map(len, groups.values())) == len(names)
    assert {part for part, _ in groups} == {"shared", "prototypes", "segmentation"}


@pytest.mark.parametrize("key", sorted(OURS))
def test_a_deepspeed_file_may_not_set_what_is_ours(tmp_path: Path, key: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({key: 1}))
    with pytest.raises(UserError, match=f"{key} does not belong there.*--"):
        read_deepspeed_file(str(file), gpus=False)


def test_deepspeed_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_deepspeed_file(str(broken), gpus=False)
    with pytest.raises(UserError, match=r"there are .*zero1_fp32"):
        read_deepspeed_file("zero9", gpus=False)
    for kind in ("bf16", "fp16"):  # its optimiser at stage 0 takes a step of its own
        (tmp_path / "zero0.json").write_text(json.dumps({kind: {"enabled": True}}))
        with pytest.raises(UserError, match=r"need ZeRO stage 1 or more.*zero0_autocast_bf16"):
            read_deepspeed_file(str(tmp_path / "zero0.json"), gpus=False)
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        read_deepspeed_file("zero1_fp16", gpus=False)
    marked = tmp_path / "marked.json"
    marked.write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 1}}')  # as Windows' editors write it
    assert read_deepspeed_file(str(marked), gpus=False)[1] == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimisation": {"stage": 1}}, "unknown key zero_optimisation; did you mean zero_optimization"),
        ({"elasticity": {"enabled": True}}, "unknown key elasticity; "), ([], "holds a list; it must be an object"),
        ({"zero_optimization": 1}, "zero_optimization = 1: must be an object"),
        ({"compile": {}}, "unknown key compile"),
        ({"zero_optimization": {"stage": 5}}, "stage = 5: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "stage = '2': must be 0"), ({"bf16": True}, "bf16 = True: must be an"),
    ],
)  # fmt: skip
def test_a_slip_in_a_deepspeed_file_is_one_line(tmp_path: Path, content: Any, said: str) -> None:
    """DeepSpeed passes over a key that it does not know: a misspelt stage would train without ZeRO."""
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as refused:
        read_deepspeed_file(str(tmp_path / "mine.json"), gpus=False)
    assert "\n" not in str(refused.value)


def misjudged(config: Config, contents: list[dict[str, Any]], file: Path) -> list[str]:
    """What is said of files that only DeepSpeed itself finds wrong."""
    said = []
    for content in contents:
        file.write_text(json.dumps(content))
        try:
            begin(Pretraining(replace(config, deepspeed=str(file)))).close()
        except UserError as error:
            said.append(str(error))
    return said


def test_what_deepspeed_says_of_a_file_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    contents = [{"zero_optimization": {"stage": 1, name: True}} for name in ("overlap_com", "mics_shard_size")]
    contents += [{"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}]
    (said,) = run_ranks(1, misjudged, small(tiny, tmp_path / "run"), contents, tmp_path / "mine.json")
    assert len(said) == len(contents) and not any("\n" in line for line in said)
    for line, name in zip(said, ("overlap_com", "mics_shard_size", "reduce_bucket_size"), strict=True):
        assert re.search(rf"mine\.json: .*{name}", line)
    assert not (tmp_path / "run" / "identity.json").exists()  # a refused start takes no folder
