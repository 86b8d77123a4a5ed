"""Both pixel tasks: they learn, go on where they were killed, are the same on any ranks, and refuse what cannot be."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Tiny
from crops import REAL, crop
from painted import png, write_crops, write_pairs, write_records
from ranks import run_ranks
from test_engine import SMALL, small, stage_file
from test_resume import live, losses, metrics
from torch import Tensor

from ccd_train.config.options import from_dict, read_recipe, recipes
from ccd_train.config.pixels import MaskedPictures, PicturePairs, PixelTuning, Segmenting, Upscaling
from ccd_train.config.pretraining import Config
from ccd_train.config.stored import read_settings
from ccd_train.data.pairs import open_pairs
from ccd_train.data.pixels import fit, fit_mask
from ccd_train.data.records import LmdbWriter
from ccd_train.errors import UserError
from ccd_train.tasks.choice import task_of
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.tasks.pretrain.weights import BACKBONE, open_weights
from ccd_train.training.run import begin
from ccd_train.training.train import train, train_step
from ccd_train.weights import pixels

KINDS: dict[str, type[PixelTuning]] = {"segment": Segmenting, "superresolve": Upscaling}
SECTIONS = {"segment": "segmenter", "superresolve": "upscaler"}
RECIPE: dict[str, Any] = {
    "init": "scratch",
    "model": {"width": 16, "depth": 3, "heads": 2, "taps": [1, 2, 3], "drop_path": 0.1},
    "optimizer": {"lr": 3e-3, "warmup_samples": 16},
    "train": {"total_samples": 160, "micro_batch_size": 8, "global_batch_size": 8, "threads": 1},
    "data": {"workers": 0},
    "log": {"every_steps": 1, "pictures_every_steps": 5},
    "valid": {"every_steps": 5},
    "checkpoint": {"every_steps": 3},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {"segment": write_crops(folder / "crops", 40), "superresolve": write_pairs(folder / "pairs", 40)}


def tuned(task: str, pictures: Path, run_dir: Path, **changes: Any) -> PixelTuning:
    """A run of a few milliseconds a step; `changes` are sections, or settings of no section."""
    values: dict[str, Any] = {"run_dir": str(run_dir), **RECIPE, SECTIONS[task]: {"layers": 1}}
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    values["data"] = {"train": [str(pictures)], **values["data"]}
    return from_dict(KINDS[task], values, "test")


def learn(config: PixelTuning) -> tuple[list[dict[str, float]], float, str, list[str]]:
    """The validations of a run, its best score, and what is said at its end."""
    found, seen = begin(task_of(config)), []
    judged = found.task.judged
    found.task.judged = lambda rows: seen.append(judged(rows)) or seen[-1]
    train(found, None)
    found.close()
    return seen, found.task.best.score, found.task.remarks(), list(found.task.pictures())


@pytest.mark.parametrize("task", KINDS)
def test_it_learns(sets: dict[str, Path], tmp_path: Path, task: str) -> None:
    """From scratch, a few words again and again; the best weights are exported and score the same elsewhere."""
    config = tuned(
        task, sets[task], tmp_path / "run",
        model={"drop_path": 0.0, "width": 32, "initial_std": 0.1},
        optimizer={"lr": 4e-3, "warmup_samples": 160},
        train={"total_samples": 16 * 160, "micro_batch_size": 16, "global_batch_size": 16},
        valid={"every_steps": 40},
        data={"valid": [str(sets[task])]},
    )  # fmt: skip
    ((seen, best, said, sheets),) = run_ranks(1, learn, config)
    headline = "valid_fg_iou" if task == "segment" else "valid_psnr"
    assert best == max(figures[headline] for figures in seen) == seen[-1]["valid_best"]
    assert sheets == ["validation"] and f"{headline.removeprefix('valid_')} on the pictures held out at best" in said
    if task == "segment":
        assert seen[0][headline] < best and best > 0.3
    else:
        assert [round(figures["valid_gain"], 2) for figures in seen][-1] > 0.3, seen
    trained = pixels.read(tmp_path / "run")
    assert trained.about["score"] == best and trained.task == task


def several(configs: list[PixelTuning], count: int) -> list[list[dict[str, float]]]:
    """Figures of some steps of each run, and of a validation, one after the other in the same processes."""
    results = []
    for config in configs:
        found = begin(task_of(config))
        results.append([train_step(found, logged=True).figures for _ in range(count)])
        results[-1].append(found.task.validate())
        found.close()
    return results


@pytest.mark.parametrize("task", KINDS)
def test_ranks_stages_and_micro_batches_change_nothing(sets: dict[str, Path], tmp_path: Path, task: str) -> None:
    """The loss is a mean over all that is not ignored, of which ranks and micro-batches hold different numbers."""

    def configs(*variants: tuple[int, int]) -> list[PixelTuning]:
        return [
            replace(
                tuned(task, sets[task], tmp_path / f"{micro}_{stage}", train={"micro_batch_size": micro}),
                deepspeed=stage_file(tmp_path, stage),
            )
            for micro, stage in variants
        ]

    ((whole, cut, plain),) = run_ranks(1, several, configs((8, 1), (2, 1), (8, 0)), 5)
    shared = run_ranks(2, several, configs((4, 1), (4, 2), (2, 3)), 5)
    assert shared[1][0] == shared[0][0]
    validations = [figures.pop() for figures in (whole, cut, plain, *shared[0])]
    for figures in validations:
        assert figures == pytest.approx(validations[0], rel=2e-3, abs=1e-3)
    stage_1, stage_2, stage_3 = shared[0]
    assert [step["loss"] for step in stage_1] == [step["loss"] for step in stage_2]
    for name in ("loss", "grad_norm"):
        expected = [step[name] for step in whole]
        for other in (cut, plain, stage_1, stage_3):
            assert [step[name] for step in other] == pytest.approx(expected, rel=2e-4), name


def command(recipe: Path, data: Path, run_dir: Path) -> list[str]:
    arguments = ["--config", str(recipe), "--run_dir", str(run_dir), "--data.train", str(data)]
    return [sys.executable, "-m", "ccd_train", "finetune", *arguments]


def without_time(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.mark.parametrize("task", KINDS)
def test_killed_it_ends_as_if_undisturbed(sets: dict[str, Path], tmp_path: Path, task: str) -> None:
    """Losses, validations and the best weights, to the bit."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "task": task, SECTIONS[task]: {"layers": 1}}))
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    assert live(quiet, command(recipe, sets[task], quiet)) == 0
    live(killed, command(recipe, sets[task], killed), lambda: len(metrics(killed)) >= 11, signal.SIGKILL)
    assert live(killed, command(recipe, sets[task], killed)) == 0
    assert [line["step"] for line in losses(killed)] == list(range(1, 21))
    assert without_time(losses(killed)) == without_time(losses(quiet))
    one, other = pixels.read(killed), pixels.read(quiet)
    assert one.about == other.about
    assert all(torch.equal(one.state[name], other.state[name]) for name in other.state)
    assert isinstance(read_settings(quiet), KINDS[task])
    assert json.loads((quiet / "pictures.json").read_text())["left_out"] == {"train": []}
    assert (quiet / "pictures" / "validation_00000020.png").exists()


def starts(configs: list[PixelTuning]) -> list[dict[str, Tensor]]:
    """The weights with which runs begin."""
    results = []
    for config in configs:
        found = begin(task_of(config))
        results.append({name: value.detach().clone() for name, value in found.engine.student.state_dict().items()})
        found.close()
    return results


def pretrain_steps(config: Any) -> None:
    found = begin(Pretraining(config))
    for _ in range(2):
        train_step(found, logged=False)
    found.save()
    found.close()


def test_init_takes_the_teachers_backbone_or_the_students(sets: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    run_ranks(1, pretrain_steps, small(tiny, tmp_path / "pretraining"))
    model = {name: SMALL["model"][name] for name in BACKBONE}
    configs = [
        tuned("segment", sets["segment"], tmp_path / f"run{n}", init=str(tmp_path / "pretraining"), model=model, **more)
        for n, more in enumerate([{}, {"student": True}])
    ]
    ((teachers, students),) = run_ranks(1, starts, configs)
    found = open_weights(tmp_path / "pretraining")
    for begun, state in ((teachers, found.teacher), (students, found.student)):
        backbone = [name for name in begun if name.startswith("vit.")]
        assert len(backbone) > 30 and all(torch.equal(begun[name], state[name]) for name in backbone)
    assert any(not torch.equal(teachers[name], students[name]) for name in backbone)


def refusals(configs: list[PixelTuning]) -> list[str]:
    messages = []
    for config in configs:
        try:
            config.check()
            begin(task_of(config)).close()
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def only(folder: Path, source: Path, prefix: str, keep: bool) -> Path:
    """The pairs of a set without one of their parts, or with that part alone."""
    from ccd_train.data.records import PairedReader

    reader = PairedReader(source)
    parts = {"image_hr": reader.image, "image_lr": reader.partner}
    records = {
        b"%s-%09d" % (name.encode(), number): get(number) or b""
        for name, get in parts.items()
        for number in range(1, len(reader) + 1)
        if (name == prefix) is keep
    }
    return write_records(folder, {**records, b"num-samples": b"%d" % len(reader)})


def test_bad_input_is_one_line(sets: dict[str, Path], tmp_path: Path) -> None:
    hr = only(tmp_path / "hr", sets["superresolve"], "image_hr", True)
    lr = only(tmp_path / "lr", sets["superresolve"], "image_lr", True)
    misspelt = write_records(tmp_path / "misspelt", {b"image_HR-000000001": b"x", b"num-samples": b"1"})
    with LmdbWriter(tmp_path / "unmasked") as writer:
        writer.add(crop(1), "a")
    with LmdbWriter(tmp_path / "strange") as writer:
        writer.add(crop(1, height=8, width=8), "a", png(np.full((8, 8), 7, np.uint8)))
    with LmdbWriter(tmp_path / "textless") as writer:
        for number in range(60):
            writer.add(crop(number, height=8, width=8), "a", png(np.full((8, 8), 255, np.uint8)))
    (tmp_path / "empty").mkdir()
    cases: list[tuple[str, Path, dict[str, Any], str]] = [
        ("superresolve", hr, {}, "none of the 40 pictures can be used .*image_lr-000000001: missing"),
        ("superresolve", lr, {}, "poor pictures .* without the good ones .*image_hr-%09d"),
        ("superresolve", misspelt, {}, "no image_hr-%09d keys .its first are 'image_HR-000000001'"),
        ("superresolve", sets["segment"], {}, "word images .image-%09d. without partners"),
        ("segment", tmp_path / "unmasked", {}, "no masks .mask-%09d. beside its images; .*ccd-data crops"),
        ("segment", tmp_path / "strange", {}, "none of the 1 pictures .*image-000000001: code 7 in the mask"),
        ("segment", tmp_path / "textless", {}, "no pixel of text in any mask"),
        ("segment", tmp_path / "empty", {}, "--data.train .*empty: no LMDB or a folder with image/ and mask/"),
        ("segment", tmp_path / "nothing", {}, "nothing: no such folder"),
        ("segment", sets["superresolve"], {}, "pairs: "),
        (
            "segment",
            sets["segment"],
            {"data": {"train": [str(sets["segment"])] * 2}},
            "are the same; name each set once",
        ),
        ("segment", sets["segment"], {"init": None}, "init = None: name weights"),
        ("segment", sets["segment"], {"segmenter": {"heads": 3}}, "segmenter.heads = 3: must divide"),
        ("segment", sets["segment"], {"data": {"fraction": 1e-9}}, "no picture of --data.train falls into it"),
    ]
    configs = [tuned(task, data, tmp_path / f"run{n}", **changes) for n, (task, data, changes, _) in enumerate(cases)]
    (messages,) = run_ranks(1, refusals, configs)
    for message, (*_, expected) in zip(messages, cases, strict=True):
        assert message and "\n" not in message
        with pytest.raises(UserError, match=expected):
            raise UserError(message)


def test_what_cannot_be_used_is_left_out_counted_and_named(
    sets: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing, a cut, a grey and a small partner; masks of another size, another code, a palette, 3 channels."""
    pairs = write_pairs(tmp_path / "pairs", 30)
    whole = png(np.zeros((20, 60, 3), np.uint8))
    changes = {2: b"", 3: whole[:60], 4: png(np.full((16, 50), 90, np.uint8)), 5: b"not a picture"}
    write_records(pairs, {b"image_lr-%09d" % number: value for number, value in changes.items()})
    opened = open_pairs(PicturePairs(train=(pairs,)), 0)
    assert opened.train.num_samples + opened.valid.num_samples == 27
    lines = opened.left_out["train"]
    assert [line.partition(": ")[2][:18] for line in lines] == [f"image_lr-00000000{number}" for number in (2, 3, 5)]
    assert "3 of 30 pictures left out" in caplog.text
    crops = tmp_path / "crops"
    masks = [
        png(np.full((20, 40), 100, np.uint8)), png(np.full((21, 40), 100, np.uint8)),
        png(np.full((20, 40), 50, np.uint8)),
        png(np.full((20, 40, 3), 100, np.uint8)), None, png(np.full((20, 40), 200, np.uint8)),
    ]  # fmt: skip
    with LmdbWriter(crops) as writer:
        for mask in masks:
            writer.add(crop(3, ".png", 40, 20), "a", mask)
    usable = open_pairs(MaskedPictures(train=(crops,), valid=(crops,)), 0)
    assert usable.train.num_samples == 2 and len(usable.left_out["valid"]) == 4
    said = " ".join(usable.left_out["train"])
    for reason in ("40×21 pixels for a picture of 40×20", "code 50", "3 channels", "mask-000000005: missing"):
        assert reason in said


def test_a_tenth_is_held_out_by_key_and_fractions_are_nested(sets: dict[str, Path]) -> None:
    def keys(fraction: float, seed: int) -> tuple[set[str], set[str]]:
        opened = open_pairs(PicturePairs(train=(sets["superresolve"],), fraction=fraction), seed)
        return tuple(  # type: ignore[return-value]
            {one.key(shard, row) for shard, rows in enumerate(one.shard_samples) for row in range(rows)}
            for one in (opened.train, opened.valid)
        )

    (whole, held), (half, held_again), (other, held_still) = keys(1, 0), keys(0.5, 0), keys(0.5, 1)
    assert held == held_again == held_still and held and not held & whole and len(held | whole) == 40
    assert half < whole and other < whole and half != other


def test_codes_stay_codes_and_pictures_are_not_shifted() -> None:
    codes = np.zeros((7, 50), np.uint8)
    codes[3, 20], codes[5, 10:30] = 100, 255
    assert set(np.unique(fit_mask(codes)).tolist()) <= {0, 100, 255}
    step = np.repeat(np.array([0, 200], np.uint8), 200)[None].repeat(90, 0)  # shrinks in both
    assert abs(int(fit(np.dstack([step] * 3))[16, :64].max()) - 0) <= 0
    assert np.array_equal(fit_mask(codes.repeat(2, 0)[:32]), fit_mask(codes.repeat(2, 0)))


@pytest.mark.parametrize("name", [name for kind in KINDS.values() for name in recipes(kind)])
def test_recipes_are_possible_and_fit_a_pretraining(name: str) -> None:
    kind = Segmenting if name.startswith("segmenter") else Upscaling
    config = replace(read_recipe(name, kind), run_dir=Path("run"), init=Path("scratch"))
    theirs = read_recipe(f"vit_{name.partition('_')[2]}", Config).model
    for size in (*BACKBONE, "initial_std", "contrast_std"):
        assert getattr(config.model, size) == getattr(theirs, size)
    replace(config, data=replace(config.data, train=(Path("a"),))).check()
    assert config.optimizer.betas == (0.9, 0.95) and config.optimizer.clip_gradient == 0


def test_the_recipe_is_the_public_one() -> None:
    """FaltingsA/SSM, pretrain/main_pixel.py, with TextZoom's 17,367 pairs in an epoch."""
    config = read_recipe("upscaler_small", Upscaling)
    assert config == replace(Upscaling(), model=config.model)
    assert config.train.total_samples == 100 * 17_367 == 20 * config.optimizer.warmup_samples
    assert (config.optimizer.lr, config.optimizer.final_lr, config.optimizer.weight_decay) == (1e-4, 0.0, 0.05)
    assert config.train.global_batch_size == 96 and config.upscaler.residual
    assert read_recipe("segmenter_small", Segmenting).segmenter.loss == "bce"


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no real pictures beside the checkout")
def test_public_folders_are_read(tmp_path: Path) -> None:
    """SSM's folders of words, and pairs in TextZoom's layout, one of them grey."""
    crops = REAL / "textseg_like" / "word_crops"
    opened = open_pairs(MaskedPictures(train=(crops / "train_all",), valid=(crops / "test",)), 0)
    assert (opened.train.num_samples, opened.valid.num_samples) == (19, 12) and not opened.left_out["train"]
    pairs = REAL / "textzoom_like"
    found = open_pairs(PicturePairs(train=(pairs / "train1", pairs / "train2"), valid=(pairs / "test",)), 0)
    assert (found.train.num_samples, found.valid.num_samples) == (48, 29) and not found.left_out["train"]
