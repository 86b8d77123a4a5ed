"""Fine-tuning: it learns to read, goes on where it was killed, is the same on any ranks, and refuses what cannot be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from conftest import CHECKOUT, Tiny
from crops import crop
from ranks import run_ranks
from test_engine import SMALL, small, stage_file
from test_resume import live, losses, metrics
from torch import Tensor

from ccd_train.config.options import from_dict, read_recipe, recipes
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.data.charset import read_charset
from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.data.words import open_words
from ccd_train.errors import UserError
from ccd_train.models.ccd import Student, Teacher
from ccd_train.models.recognizer import Recognizer
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.tasks.pretrain.weights import BACKBONE, open_weights
from ccd_train.tasks.recognize.reading import Reader
from ccd_train.tasks.recognize.task import BEST, Recognition
from ccd_train.training import checkpoint
from ccd_train.training.run import begin
from ccd_train.training.train import train, train_step
from ccd_train.weights import backbone as weights
from ccd_train.weights import recognizer as recognizers
from data_tools.words import render

GOLDEN = CHECKOUT / "tests" / "golden"
RECIPE: dict[str, Any] = {
    "init": "scratch",
    "model": {"width": 16, "depth": 3, "heads": 2, "taps": [1, 2, 3], "drop_path": 0.1},
    "recognizer": {"layers": 1, "width": 32, "heads": 2, "hidden": 32, "encoder_hidden": 32, "dropout": 0.1},
    "augment": {"chain": "finetune_small"},
    "optimizer": {"lr": 3e-3, "warmup_samples": 16},
    "train": {"total_samples": 160, "micro_batch_size": 8, "global_batch_size": 8, "threads": 1},
    "data": {"workers": 0},
    "log": {"every_steps": 1},
    "valid": {"every_steps": 5},
    "checkpoint": {"every_steps": 3},
}


def tuned(tiny: Tiny, run_dir: Path, **changes: Any) -> FineTuning:
    """A run of a few milliseconds a step; `changes` are sections, or settings of no section."""
    values: dict[str, Any] = {"run_dir": str(run_dir), **RECIPE}
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    values["data"] = {"train": [str(tiny.lmdb)], "valid": [str(tiny.lmdb)], **values["data"]}
    return from_dict(FineTuning, values, "test")


def written(folder: Path, labels: int, seed: int = 5) -> Path:
    """Rendered words of at most 10 characters."""
    with LmdbWriter(folder) as writer:
        index = 0
        while writer.count < labels:
            word = render(seed, index, fonts=())
            index += 1
            if len(word.label) <= 10:
                writer.add(word.image, word.label)
    return folder


def learn(config: FineTuning) -> tuple[bool, float]:
    found = begin(Recognition(config))
    finished = train(found, None)
    found.close()
    return finished, found.task.best.score


def test_it_learns_to_read(tiny: Tiny, tmp_path: Path) -> None:
    """32 words, seen again and again; then the best weights read them from their files."""
    words = written(tmp_path / "words", 32)
    config = tuned(
        tiny, tmp_path / "run",
        data={"train": [str(words)], "valid": [str(words)]},
        model={"width": 32, "drop_path": 0.0, "initial_std": 0.1},
        recognizer={"width": 64, "hidden": 128, "encoder_hidden": 64, "dropout": 0.0, "length": 12},
        augment={"chain": "severity_0", "overrides": ["identity=1"]},
        optimizer={"lr": 3e-3, "warmup_samples": 160, "weight_decay": 0.0},
        train={"total_samples": 16 * 150, "micro_batch_size": 16, "global_batch_size": 16},
        valid={"every_steps": 50, "rule": "all"},
    )  # fmt: skip
    ((finished, best),) = run_ranks(1, learn, config)
    assert finished and best >= 0.9
    trained = recognizers.read(tmp_path / "run")
    assert trained.about["accuracy"] == best
    with LmdbReader(words) as reader:
        numbers = range(1, len(reader) + 1)
        readings = Reader(trained).read([reader.image(number) or b"" for number in numbers])
        right = [reading.text == reader.label(number) for number, reading in zip(numbers, readings, strict=True)]  # type: ignore[union-attr]
    assert sum(right) / len(right) == pytest.approx(best)


def several(configs: list[FineTuning], count: int) -> list[list[dict[str, float]]]:
    """Figures of some steps of each run, and of a validation, one after the other in the same processes."""
    results = []
    for config in configs:
        found = begin(Recognition(config))
        results.append([train_step(found, logged=True).figures for _ in range(count)])
        results[-1].append(found.task.validate())
        found.close()
    return results


def test_ranks_stages_and_micro_batches_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """With dropout, stochastic depth and augmentation: all are drawn by the sample, and the loss is over all tokens.

    Nor do they change a validation, of a number of words that ranks cannot share evenly.
    """
    odd = written(tmp_path / "odd", 37)

    def configs(*variants: tuple[int, int]) -> list[FineTuning]:
        return [
            replace(
                tuned(
                    tiny, tmp_path / f"{micro}_{stage}", train={"micro_batch_size": micro}, data={"valid": [str(odd)]}
                ),
                deepspeed=stage_file(tmp_path, stage),
            )
            for micro, stage in variants
        ]

    ((whole, cut),) = run_ranks(1, several, configs((8, 1), (2, 1)), 6)
    shared = run_ranks(2, several, configs((4, 1), (4, 2), (2, 3)), 6)
    assert shared[1][0] == shared[0][0]
    validations = [figures.pop() for figures in (whole, cut, *shared[0])]
    for figures in validations:
        assert figures == pytest.approx(validations[0], rel=2e-3)
    stage_1, stage_2, stage_3 = shared[0]
    assert [step["loss"] for step in stage_1] == [step["loss"] for step in stage_2]
    assert len({step["loss"] for step in whole}) == 6
    for name in ("loss", "grad_norm"):
        expected = [step[name] for step in whole]
        for other in (cut, stage_1, stage_3):
            assert [step[name] for step in other] == pytest.approx(expected, rel=2e-4), name


def command(recipe: Path, tiny: Tiny, run_dir: Path, *more: str) -> list[str]:
    arguments = ["--config", str(recipe), "--run_dir", str(run_dir), "--data.train", str(tiny.lmdb)]
    return [sys.executable, "-m", "ccd_train", "finetune", *arguments, "--data.valid", str(tiny.shards), *more]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_killed_it_ends_as_if_undisturbed(tiny: Tiny, recipe: Path, tmp_path: Path) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    share = ("--data.fraction", "0.5")
    assert live(quiet, command(recipe, tiny, quiet, *share)) == 0
    live(killed, command(recipe, tiny, killed, *share), lambda: len(metrics(killed)) >= 11, signal.SIGKILL)
    assert live(killed, command(recipe, tiny, killed, *share)) == 0
    assert [line["step"] for line in losses(killed)] == list(range(1, 21))
    assert without_time(losses(killed)) == without_time(losses(quiet))
    one, other = recognizers.read(killed), recognizers.read(quiet)
    assert one.about == other.about
    assert all(torch.equal(one.state[name], other.state[name]) for name in other.state)
    assert json.loads((quiet / "outcome.json").read_text())["outcome"] == "finished"
    counts = json.loads((quiet / "labels.json").read_text())
    assert counts["valid"] == {
        "words": tiny.samples, "labels": tiny.samples, "empty": 0, "cut": 0, "unknown": 0, "characters": {},
        "trimmed": 0, "bare": 0,
    }  # fmt: skip
    assert counts["train"]["words"] < tiny.samples
    result = subprocess.run(
        command(recipe, tiny, quiet, *share, "--data.charset", "36"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "belongs to another run" in result.stderr and "charset" in result.stderr


def without_time(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def starts(configs: list[FineTuning]) -> list[dict[str, Tensor]]:
    """The weights with which runs begin."""
    results = []
    for config in configs:
        found = begin(Recognition(config))
        results.append({name: value.detach().clone() for name, value in found.engine.student.state_dict().items()})
        found.close()
    return results


def pretrain_a_step(config: Any, folder: Path) -> None:
    found = begin(Pretraining(config))
    train_step(found, logged=False)
    found.save()
    weights.write_export(folder, open_weights(found.run_dir), {})
    found.close()


def test_init_takes_the_teachers_backbone(tiny: Tiny, tmp_path: Path) -> None:
    """From a pretraining run, an export and an official checkpoint; and from recognisers, ours and official ones."""
    run_ranks(1, pretrain_a_step, small(tiny, tmp_path / "pretraining"), tmp_path / "export")
    official = {"model": {"width": 32, "depth": 7, "heads": 2, "taps": [2, 4, 6]}}
    sizes = {"layers": 2, "width": 64, "heads": 4, "hidden": 48, "encoder_hidden": 64, "length": 25}
    inits: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "pretraining", {}),
        (tmp_path / "export", {}),
        (GOLDEN / "official_layout.pth", official),
        (GOLDEN / "recognizer_official_layout.pth", official | {"recognizer": sizes}),
        (tmp_path / "recognizer", {}),
    ]
    charset = read_charset("DICT90")
    first = tuned(tiny, tmp_path / "run")
    torch.manual_seed(7)
    network = Recognizer(first.model, first.recognizer, charset.classes)
    ours = recognizers.Trained(first.model, first.recognizer, charset, network.state_dict(), {}, "a test")
    recognizers.write(tmp_path / "recognizer" / recognizers.FILE, ours)
    configs = [tuned(tiny, tmp_path / f"run{i}", init=str(path), **more) for i, (path, more) in enumerate(inits)]
    (found,) = run_ranks(1, starts, configs)
    for begun, (path, more) in zip(found[:3], inits[:3], strict=True):
        teacher = open_weights(path, 2 if more else None).teacher
        backbone = [name for name in begun if name.startswith("vit.")]
        assert len(backbone) > 30 and all(torch.equal(begun[name], teacher[name]) for name in backbone), path
    whole = recognizers.read(GOLDEN / "recognizer_official_layout.pth", None, 2, 4)
    for begun, state in ((found[3], whole.state), (found[4], ours.state)):
        assert begun.keys() == state.keys() and all(torch.equal(begun[name], state[name]) for name in state)


def refusals(configs: list[FineTuning]) -> list[str]:
    messages = []
    for config in configs:
        try:
            config.check()
            begin(Recognition(config)).close()
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_bad_input_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "unlabelled") as writer:
        writer.add(crop(1))
    (tmp_path / "empty").mkdir()
    written(tmp_path / "evaluation" / "benchmark" / "SVT", 3)
    with LmdbWriter(tmp_path / "korean") as writer:
        writer.add(b"not looked at", "나바차")
    trained = recognizers.read(GOLDEN / "recognizer_official_layout.pth", None, 2, 4)
    recognizers.write(tmp_path / "recognizer" / recognizers.FILE, trained)
    nano = read_recipe("vit_nano", Config).model
    student, teacher = (network(nano).state_dict() for network in (Student, Teacher))
    weights.write_export(tmp_path / "nano", weights.Weights(nano, teacher, student, "here"), {})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": {"train": [str(tmp_path / "unlabelled")]}}, "--data.train .*unlabelled: no word here has a label"),
        ({"data": {"valid": [str(tmp_path / "unlabelled")]}}, "--data.valid .*unlabelled: no word here has a label"),
        ({"data": {"train": [str(tmp_path / "empty")]}}, "--data.train .*empty: an empty folder"),
        ({"data": {"valid": [str(tmp_path)]}}, "--data.valid .*benchmark.*neither training nor validation"),
        (
            {"data": {"valid": [str(tmp_path / "korean")]}},
            "--data.valid .*korean: rule lower_alnum leaves nothing of 1 of 1 labels .* --valid.rule all",
        ),
        ({"data": {"train": [str(tiny.lmdb), str(tiny.shards)]}}, "--data.train: .* are the same; name each set once"),
        ({"data": {"charset": "37"}}, "charset 37: no such name"),
        ({"data": {"fraction": 0.0}}, "data.fraction = 0.0: must lie in"),
        ({"init": None}, "init = None: name weights"),
        ({"init": str(tmp_path / "nothing")}, "nothing: no such file or folder"),
        (
            {"init": str(GOLDEN / "official_layout.pth")},
            "another network .*model.width: 32 → 16.*no recipe has its size",
        ),
        ({"init": str(tmp_path / "nano")}, r"another network .*model.width: 48 → 16.*; take --config recognizer_nano$"),
        ({"init": str(tmp_path / "recognizer")}, "--init .*another network .*recognizer.layers: 2 → 1"),
        ({"model": {"heads": 3}}, "model.heads = 3: must divide"),
    ]
    configs = [tuned(tiny, tmp_path / f"run{number}", **changes) for number, (changes, _) in enumerate(cases)]
    (messages,) = run_ranks(1, refusals, configs)
    for message, (_, expected) in zip(messages, cases, strict=True):
        assert message and "\n" not in message
        with pytest.raises(UserError, match=expected):
            raise UserError(message)
    assert not any((config.run_dir / "identity.json").exists() for config in configs if config.run_dir)


def two_lives(config: FineTuning) -> list[tuple[int, int, bool, str]]:
    """Of each its last step, that of its newest checkpoint, whether it finished, and what is said of that."""
    ends = []
    for _ in range(2):
        found = begin(Recognition(config))
        finished = train(found, None)
        saved = checkpoint.newest(found.run_dir)
        found.close()
        assert saved is not None
        ends.append((found.progress.step, checkpoint.step_of(saved), finished, found.task.remarks()))
    return ends


def test_it_ends_when_patience_does_and_stays_ended(tiny: Tiny, tmp_path: Path) -> None:
    """At a learning rate of 0 no validation is better than the first."""
    config = tuned(
        tiny, tmp_path / "run", optimizer={"lr": 0.0, "final_lr": 0.0}, valid={"every_steps": 2, "patience": 2}
    )
    (ends,) = run_ranks(1, two_lives, config)
    assert [end[:3] for end in ends] == [(6, 6, True), (6, 6, True)]
    assert all(said.startswith("; no better validation in 2 (--valid.patience); 0.00% of") for *_, said in ends)
    assert not any("next to nothing" in said for *_, said in ends), "it was not trained to the end of its schedule"


def test_a_recogniser_that_reads_next_to_nothing_says_so(tiny: Tiny, tmp_path: Path) -> None:
    """A whole schedule at a learning rate of 0."""
    config = tuned(
        tiny, tmp_path / "run", optimizer={"lr": 0.0, "final_lr": 0.0}, train={**RECIPE["train"], "total_samples": 16}
    )
    (ends,) = run_ranks(1, two_lives, config)
    assert all(said.endswith("reads next to nothing: docs/finetuning.md, How much it takes") for *_, said in ends)


def pieces(whole: FineTuning, cut: FineTuning) -> list[tuple[int, float, int]]:
    """Where a run stands after 6 steps, done at once and in lives of a step; and how many were exported."""
    found = []
    for config, lives in ((whole, [6]), (cut, range(1, 7))):
        for last in lives:
            run = begin(Recognition(replace(config, max_steps=last)))
            train(run, None)
            run.close()
            assert (run.run_dir / BEST).exists()
        found.append((run.progress.step, run.task.best.score, run.task.best.stale))
    return found


def test_stopping_at_a_step_does_not_try_the_patience(tiny: Tiny, tmp_path: Path) -> None:
    """The validation at --max-steps is one that an undisturbed run does not make."""
    whole, cut = (
        tuned(
            tiny, tmp_path / name, optimizer={"lr": 0.0, "final_lr": 0.0}, valid={"every_steps": 3, "patience": 3},
            train={"total_samples": 160},
        )
        for name in ("whole", "cut")
    )  # fmt: skip
    ((one, other),) = run_ranks(1, pieces, whole, cut)
    assert one == other and one[0] == 6 and one[2] == 1


def resumed(configs: list[FineTuning]) -> list[tuple[float, str]]:
    """The kept accuracy of each life, and what it says of its first weights; its export is damaged afterwards."""
    seen = []
    for config in configs:
        run = begin(Recognition(config))
        seen.append((run.task.best.kept, run.task.init))
        if len(seen) == 1:
            train_step(run, logged=True)
            run.task.judge(0.5)
            run.save()
        run.close()
        if len(seen) == 2:
            os.truncate(run.run_dir / BEST, 100)
    return seen


def test_a_damaged_export_is_made_anew_and_the_first_weights_stay_known(tiny: Tiny, tmp_path: Path) -> None:
    first = tuned(tiny, tmp_path / "run", valid={"every_steps": 1})
    later = replace(first, init=Path("/some/where/else"))
    ((began, whole, damaged),) = run_ranks(1, resumed, [first, later, later])
    assert (began, whole, damaged) == ((-1.0, "scratch"), (0.5, "scratch"), (-1.0, "scratch"))


def measures(configs: list[FineTuning], broken: Path) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Best and kept accuracy of three lives; and a validation on words of which some images cannot be read."""
    seen = []
    for number, config in enumerate(configs):
        run = begin(Recognition(config))
        if number == 0:
            train_step(run, logged=True)
            run.task.judge(0.5)
            run.save()
            shutil.rmtree(run.run_dir / "export")
            (run.run_dir / "export").write_text("in the way, as a full disk is")
            run.task.judge(0.75)
            (run.run_dir / "export").unlink()
            run.task.judge(0.75)
        seen.append((run.task.best.score, run.task.best.kept))
        run.close()
    run = begin(Recognition(replace(configs[0], run_dir=configs[0].run_dir / "other")))  # type: ignore[operator]
    run.task.valid, _ = open_words([broken], run.task.charset, 25, option="data.valid")
    for fragment in run.engine.fragments:
        if fragment.name == "decoder.classifier.bias":
            fragment.master.data[run.task.charset.end] = 100.0  # every word is read as nothing
    figures = run.task.validate()
    run.close()
    return seen, figures


def test_a_best_is_the_best_by_one_measure(tiny: Tiny, tmp_path: Path) -> None:
    """What cannot be written is tried again; another rule, which must be allowed, starts anew."""
    config = tuned(tiny, tmp_path / "run", valid={"every_steps": 1})
    other = replace(config, valid=replace(config.valid, rule="all"), resume=replace(config.resume, allow_change=True))
    with LmdbWriter(tmp_path / "broken") as writer:
        for number in range(16):  # more than a training takes
            writer.add(render(5, number, fonts=()).image if number < 4 else b"broken", "!")  # nothing, by the rule
    ((seen, figures),) = run_ranks(1, measures, [config, config, other], tmp_path / "broken")
    assert seen == [(0.75, 0.75), (0.5, 0.75), (-1.0, -1.0)]
    assert (figures["valid_lower_alnum"], figures["valid_unreadable"]) == (0.25, 12)
    assert figures["valid_loss"] == pytest.approx(50, abs=5)  # of the 4: "!" costs 100, the end 0


@pytest.mark.parametrize("name", [name for name in recipes(FineTuning) if name.startswith("recognizer_")])
def test_recipes_are_possible_and_fit_a_pretraining(name: str) -> None:
    config = replace(read_recipe(name, FineTuning), run_dir=Path("run"), init=Path("scratch"))
    theirs = read_recipe(name.replace("recognizer", "vit"), Config).model
    for size in (*BACKBONE, "initial_std", "contrast_std", "drop_path"):
        assert getattr(config.model, size) == getattr(theirs, size)
    replace(config, data=replace(config.data, train=(Path("a"),), valid=(Path("b"),))).check()


def test_the_recipe_is_the_official_one() -> None:
    """Dino/configs/CCD_vision_model_ARD.yaml of the official code, with 2.78 M words in an epoch."""
    config = read_recipe("recognizer_small", FineTuning)
    assert config == FineTuning()
    assert (config.optimizer.lr, config.optimizer.final_lr, config.optimizer.weight_decay) == (5e-4, 1e-6, 0.05)
    assert config.train.total_samples == 35 * config.optimizer.warmup_samples == 35 * 2_780_000
    assert config.train.global_batch_size == 288 and config.recognizer.length == 25
    assert (config.model.width, config.model.depth, config.model.heads) == (384, 12, 6)
    assert SMALL["model"]["width"] == RECIPE["model"]["width"]  # a pretraining's backbone fits into these tests' runs


@pytest.mark.slow
def test_the_measurement_of_what_pretraining_is_for_runs(tmp_path: Path) -> None:
    """All of it on a handful of words; again, when nothing is done twice; and from that pretraining elsewhere."""
    script = CHECKOUT / "tests" / "benchmarks" / "pretraining_pays.py"
    first, second = tmp_path / "first", tmp_path / "second"

    def measure(*arguments: str | Path) -> str:
        command = [sys.executable, str(script), "--smoke", "--threads", "1", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False)
        assert result.returncode == 0, result.stderr
        return result.stderr

    assert "data.train" in measure("--out", first)
    assert "data.train" not in measure("--out", first)
    measure("--out", second, "--pretrained", first / "pretraining")
    assert not (second / "pretraining").exists()
    for folder in (first, second):
        rows = json.loads((folder / "pretraining_pays.json").read_text())["rows"]
        sets = {row["set"] for row in rows}
        assert "rendered" in sets and len(rows) == 6 * len(sets)
        assert (folder / "pretraining_pays.md").read_text().count("100% = 400") == len(sets)
        assert cv2.imread(str(folder / "pretraining_pays.png")).shape[1] > 1000
