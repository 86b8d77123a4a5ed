"""The picture of a run's losses."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ccd_train.commands.curve import CURVES, draw, main, read_curves
from ccd_train.errors import UserError


def test_a_falling_loss_falls_in_the_picture() -> None:
    steps = np.arange(10, 110, 10)
    falling = np.linspace(4, 1, len(steps))
    unknown = np.full(len(steps), np.nan)
    picture = draw(steps, {"loss": falling, "loss_distillation": unknown, "loss_segmentation": unknown})
    rows, columns = np.nonzero((picture[60:-60, 60:-30] == CURVES["loss"]).all(-1))
    left, right = rows[columns <= columns.min() + 5].mean(), rows[columns >= columns.max() - 5].mean()
    assert left < 30 < 150 < right
    assert not (picture == CURVES["loss_distillation"]).all(-1).any()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    line = json.dumps({"step": 5, "loss": 2.0, "loss_distillation": 1.5})
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 10, "lo')
    steps, curves = read_curves(tmp_path)
    assert steps.tolist() == [5]
    assert curves["loss"].tolist() == [2.0]
    assert np.isnan(curves["loss_segmentation"]).all()
    assert main([str(tmp_path)]) == 0
    assert cv2.imread(str(tmp_path / "pictures/loss.png")).shape == (400, 960, 3)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
        read_curves(tmp_path)
