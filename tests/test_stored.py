"""Settings of other versions: a later setting has its default there, one that is gone is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ccd_train.config.options import describe, read_recipe, to_dict
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.run import identity
from ccd_train.config.stored import differences, read_settings
from ccd_train.errors import UserError

KINDS = {"vit_nano": Config, "recognizer_nano": FineTuning}


@pytest.mark.parametrize("recipe", KINDS)
def test_a_run_goes_on_whatever_settings_came_since(recipe: str) -> None:
    """Each setting in turn is one that the version before did not have, with the default that it has today."""
    config = KINDS[recipe]()
    mine = identity(to_dict(config)) | {"corpus": "abc"}
    for name in identity(to_dict(config)):
        assert differences({key: value for key, value in mine.items() if key != name}, mine, type(config)) == []


def test_a_setting_that_came_since_counts_as_its_default() -> None:
    mine = identity(to_dict(Config())) | {"distillation.sinkhorn_rounds": 3}
    known = {name: value for name, value in mine.items() if name != "distillation.sinkhorn_rounds"}
    assert differences(known, mine, Config) == ["distillation.sinkhorn_rounds: 0 → 3"]
    gone = known | {"distillation.koleo": 0.1, "distillation.sinkhorn_rounds": 3}
    assert differences(gone, mine, Config) == ["distillation.koleo: 0.1 → unknown to this version"]
    assert differences(known | {"corpus": "a"}, mine | {"corpus": "b"}, Config) != []


@pytest.mark.parametrize("recipe", KINDS)
def test_settings_of_a_newer_version_are_read_and_named(
    recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_recipe(recipe, KINDS[recipe])  # type: ignore[type-var]
    text = describe(config) + "\nnovelty: {strength: 3}\n"
    (tmp_path / "config.yaml").write_text(text.replace("model:\n", "model:\n  backbone: other\n"))
    with caplog.at_level(logging.WARNING):
        assert read_settings(tmp_path) == config
    assert "unknown here: model.backbone, novelty.strength" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not readable as YAML"), (b"a: [", "not readable as YAML"), (b"model: 3", "of no task that"),
        (b"- a", "of no task that"), (b"distillation: 3", "must be a mapping"), (b"", "of no task that"),
        (b"distillation: {min_region_pixels: many}", "must be a whole number"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_settings(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_settings(tmp_path / "nothing")
