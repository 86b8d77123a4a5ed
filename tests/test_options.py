"""Settings: where they come from, what is refused, and what is written down."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from ccd_train.config.options import (
    describe,
    from_dict,
    option_names,
    parse,
    read_recipe,
    recipes,
    to_dict,
)
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.run import flatten, identity
from ccd_train.config.texts import help_texts
from ccd_train.config.verbs import Export
from ccd_train.errors import UserError


def read(*argv: str) -> Config:
    return parse(Config, argv, "test")


def test_command_line_over_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {micro_batch_size: 12, total_samples: 777}\n")
    config = read(
        "--config", str(recipe), "--train.micro-batch-size", "5", "--data.shards", "a", "b c", "--max-steps=9"
    )
    assert config.train.micro_batch_size == 5
    assert config.train.total_samples == 777
    assert config.train.max_bad_steps == Config().train.max_bad_steps
    assert config.data.shards == (Path("a"), Path("b c"))
    assert config.max_steps == 9


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it as it is behind `=`, and nobody expands it in a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run_dir: ~/runs/a\n")
    config = read("--config=~/mine.yaml", "--data.shards=~/shards")
    assert (config.run_dir, config.data.shards) == (tmp_path / "runs/a", (tmp_path / "shards",))
    with pytest.raises(UserError, match=r"data.shards = ~nobody-here/x: there is no such home folder"):
        read("--data.shards", "~nobody-here/x")


def test_official_constants() -> None:
    """METHOD of the paper and of its implementation, in samples."""
    small = read_recipe("vit_small", Config)
    assert (small.model.width, small.model.depth, small.model.heads) == (384, 12, 6)
    assert (small.model.head_hidden, small.model.head_bottleneck, small.model.prototypes) == (2048, 256, 65536)
    assert small.model.taps == (2, 4, 6) and small.model.drop_path == 0.1 and not small.model.freeze_gain
    d, o = small.distillation, small.optimizer
    assert (d.student_temperature, d.teacher_temperature, d.center_momentum) == (0.1, 0.04, 0.9)
    assert (d.teacher_momentum, d.student_regions_after, d.min_region_pixels) == (0.9995, 30_000_000, 30)
    assert (o.lr, o.final_lr, o.warmup_samples, o.freeze_last_layer_samples) == (5e-4, 1e-6, 10_000_000, 1_000_000)
    assert (o.weight_decay, o.final_weight_decay, o.clip_gradient, o.betas) == (0.04, 0.4, 3.0, (0.9, 0.999))
    assert small.train.total_samples == 96_000_000
    tiny, base = read_recipe("vit_tiny", Config), read_recipe("vit_base", Config)
    assert (tiny.model.width, tiny.model.heads) == (192, 3)
    assert (base.model.width, base.model.heads, base.model.freeze_gain) == (512, 8, True)
    assert base.train.micro_batch_size == 48


@pytest.mark.parametrize("name", recipes(Config))
def test_recipes_are_possible_and_survive_writing(name: str) -> None:
    config = from_dict(Config, {**to_dict(read_recipe(name, Config)), "run_dir": "r"}, "test")
    for section in fields(config):
        value = getattr(config, section.name)
        if is_dataclass(value) and section.name != "data":  # a recipe names no shards
            value.check()  # type: ignore[attr-defined]
    assert from_dict(Config, yaml.safe_load(describe(config)), "written") == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "vit_smal"], "--config vit_smal: no such recipe; there are .*vit_small"),
        (["--config", "no.yaml"], "no.yaml: no such file"),
        (["--config"], "--config: a recipe or a file must follow"),
        (["--train.micro_batch", "3"], "unknown option --train.micro_batch; did you mean train.micro_batch_size"),
        (["--nonsense"], "unknown option --nonsense"),
        (["--train.micro_batch_size", "many"], "^--train.micro_batch_size = many: must be a whole number$"),
        (["--data.mask_mode", "guess"], "^--data.mask_mode = guess: must be one of otsu, kmeans, stored$"),
        (["--train.compile", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_a_command_line_is_refused_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(*argv)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {mikro_batch_size: 3}",
            r"mine.yaml: unknown setting train.mikro_batch_size; did you mean micro_batch_",
        ),
        ("trian: {}", "unknown setting trian; did you mean train"),
        ("global: {name: x}", "unknown setting global; this is a file of the official code: take a recipe"),
        ("train: {micro_batch_size: many}", "mine.yaml: train.micro_batch_size = many: must be a whole number"),
        ("train: 3", "train. must be a mapping"),
        ("- a", "the file must be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_a_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read("--config", str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.micro_batch_size", 0), ("train.total_samples", 0), ("train.global_batch_size", 0), ("train.threads", 0),
        ("train.max_bad_steps", 0), ("model.heads", 5), ("model.width", 0), ("model.drop_path", 1.0),
        ("model.taps", [3, 2, 1]), ("model.taps", [2, 4, 99]), ("distillation.student_temperature", 0),
        ("distillation.teacher_momentum", 1.5), ("distillation.min_region_pixels", 0), ("optimizer.lr", -1.0),
        ("optimizer.final_lr", 1.0), ("optimizer.betas", [0.9, 1.0]), ("optimizer.clip_gradient", -1.0),
        ("log.every_steps", 0), ("checkpoint.every_steps", 0), ("checkpoint.keep", 0), ("distributed.timeout", 0),
        ("data.workers", -1), ("data.window_shards", 0), ("data.max_damaged", 2.0), ("affine.probability", 1.5),
        ("augment.chain", "severity_9"), ("max_steps", 0), ("max_minutes", 0.0), ("run_dir", None), ("data.shards", []),
        ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_by_name(setting: str, value: Any) -> None:
    values: dict[str, Any] = {"run_dir": "r", "data": {"shards": ["s"]}}
    section, _, name = setting.rpartition(".")
    if section:
        values.setdefault(section, {})[name] = value
    else:
        values[name] = value
    config = from_dict(Config, values, "test")
    with pytest.raises(UserError, match=re.escape(setting)) as caught:
        config.check()
    assert "\n" not in str(caught.value)


def test_print_config_shows_every_field_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read("--config", "vit_small", "--print_config")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert flatten(yaml.safe_load(text)) == flatten(to_dict(read_recipe("vit_small", Config)))
    assert text.count("# ") >= len(option_names(Config))


def test_every_field_has_a_help_text() -> None:
    def missing(kind: type) -> list[str]:
        texts, found = help_texts(kind), []
        for item in fields(kind):  # type: ignore[arg-type]
            default = item.default_factory() if callable(item.default_factory) else item.default
            if is_dataclass(default):
                found += missing(type(default))
            elif not texts.get(item.name):
                found.append(f"{kind.__name__}.{item.name}")
        return found

    assert missing(Config) == []


def test_no_option_is_a_prefix_of_one_of_torchruns() -> None:
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    ours = ["--config", "--print_config", *(f"--{name}" for name in option_names(Config))]
    clashes = [
        (mine, other)
        for mine in {variant for name in ours for variant in (name, name.replace("_", "-"))}
        for other in theirs
        if other.startswith(mine)
    ]
    assert clashes == []


def test_identity_leaves_out_what_may_change() -> None:
    kept = identity(to_dict(read_recipe("vit_small", Config)))
    assert {"seed", "model.width", "optimizer.lr", "train.global_batch_size", "augment.chain"} <= kept.keys()
    changeable = {"run_dir", "max_steps", "max_minutes", "deepspeed", "train.micro_batch_size", "data.shards"}
    assert not kept.keys() & changeable
    assert not [name for name in kept if name.startswith(("log.", "checkpoint.", "resume.", "distributed."))]
    tuned = identity(to_dict(read_recipe("recognizer_small", FineTuning)))
    assert "valid.rule" in tuned and "valid.patience" not in tuned  # a best by another rule is no best


@pytest.mark.parametrize(
    ("kind", "name", "task"),
    [(Config, "recognizer_nano", "recognize"), (FineTuning, "vit_nano", "pretrain"), (Export, "vit_nano", "pretrain")],
)
def test_a_recipe_of_another_task_is_refused(kind: type, name: str, task: str) -> None:
    refused = rf"^--config {name}: a recipe of another task \({task}\); .*give a \.yaml file$"
    with pytest.raises(UserError, match=refused):
        parse(kind, ["--config", name], "test")


def test_settings_of_no_task_offer_no_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for kind in (Export, Config):
        with pytest.raises(SystemExit):
            parse(kind, ["--help"], "test")
        texts[kind] = capsys.readouterr().out
    assert "recipe" not in texts[Export]
    assert "vit_nano" in texts[Config] and "recognizer_nano" not in texts[Config]


def test_a_recipe_chooses_the_kind_of_its_task() -> None:
    """So `finetune` runs the task that its recipe names."""
    assert isinstance(parse(Config, ["--config", "recognizer_nano", "--seed", "4"], "test", FineTuning), FineTuning)
    assert isinstance(parse(Config, ["--config", "vit_nano"], "test", FineTuning), Config)
    with pytest.raises(UserError, match=r"there are recognizer_base, .*, vit_tiny, or give a \.yaml file"):
        parse(Config, ["--config", "nosuch"], "test", FineTuning)


def test_configs_are_laid_over_each_other(tmp_path: Path) -> None:
    """A second --config keeps what the first has said; a file may build on a recipe."""
    mine, built = tmp_path / "mine.yaml", tmp_path / "built.yaml"
    mine.write_text("optimizer: {lr: 0.25}\n")
    built.write_text("recipe: vit_nano\noptimizer: {lr: 0.25}\n")
    nano = read_recipe("vit_nano", Config)
    wanted = replace(nano, optimizer=replace(nano.optimizer, lr=0.25))
    assert nano.optimizer.lr != 0.25 and nano.model.width != Config().model.width
    assert read("--config", "vit_nano", "--config", str(mine)) == wanted
    assert read("--config", str(built)) == wanted
    assert read("--config", str(built), "--optimizer.lr", "0.5").optimizer.lr == 0.5
    assert isinstance(
        parse(Config, ["--config", str(mine), "--config", "recognizer_nano"], "test", FineTuning), FineTuning
    )
    with pytest.raises(UserError, match=r"^--config recognizer_nano: a recipe of another task"):
        parse(Config, ["--config", "vit_nano", "--config", "recognizer_nano"], "test", FineTuning)
    built.write_text("recipe: vit_nan\n")
    with pytest.raises(UserError, match=r"built\.yaml: recipe = vit_nan: no such recipe"):
        read("--config", str(built))


def test_a_command_line_is_read_as_it_is_written() -> None:
    """Dashes for underscores, switches on and off, several words, and a list that is begun twice goes on."""
    config = read(
        *[
            "--train.no-compile",
            "--log.verbose",
            "--data.shards",
            "a",
            "--data.shards",
            "b",
            "--model.taps",
            "1",
            "2",
            "3",
        ],
        *["--optimizer.lr=-1e-3", "--data.weights", "None"],
    )
    assert (config.train.compile, config.log.verbose, config.data.shards) == (False, True, (Path("a"), Path("b")))
    assert (config.model.taps, config.optimizer.lr, config.data.weights) == ((1, 2, 3), -1e-3, None)
    assert read("-v").log.verbose
    export = parse(Export, ["run", "--lossy", "--out", "x"], "test")
    assert (export.source, export.out, export.lossy) == (Path("run"), Path("x"), True)
