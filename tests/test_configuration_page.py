"""docs/configuration.md is what the dataclasses say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccd_train.config import reference
from ccd_train.config.options import option_names
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.texts import help_texts

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    remedy = "python -m ccd_train.config.reference > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == reference.page(), remedy


@pytest.mark.parametrize("kind", [Config, FineTuning])
def test_every_setting_is_there_with_its_help(kind: type) -> None:
    rows = {line.split("`")[1]: line for line in reference.page().splitlines() if line.startswith("| `")}
    assert set(option_names(kind)) <= rows.keys()
    empty = [name for name, row in rows.items() if not row.rsplit("|", 2)[1].strip()]
    assert not empty, f"no help text: {', '.join(empty)}"
    assert help_texts(kind)["seed"] in rows["seed"]
