"""The losses of a run as a picture.

ccd-train curve RUN            writes RUN/pictures/loss.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from ccd_train.errors import UserError

CURVES = {"loss": (40, 40, 40), "loss_distillation": (200, 90, 20), "loss_segmentation": (30, 140, 30)}  # BGR
WIDTH, HEIGHT, MARGIN = 960, 400, 60


def read_curves(run_dir: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [N] and, by name, losses [N] of every complete line of metrics.jsonl; NaN where a line has none."""
    try:
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run_dir}/metrics.jsonl: {error.strerror}; give a run's folder") from None
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        raise UserError(f"{run_dir}/metrics.jsonl has no line yet; wait for the first logged step")
    curves = {name: np.array([line.get(name, np.nan) for line in lines], float) for name in CURVES}
    return np.array([line["step"] for line in lines]), curves


def draw(steps: np.ndarray, curves: dict[str, np.ndarray]) -> np.ndarray:
    """A chart, uint8 [H, W, 3] in BGR: losses from 0 upwards over steps, each curve named with its last value."""
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    top = max(float(np.nanmax(np.stack(list(curves.values())), initial=0.0)) * 1.05, 1e-6)
    left, right, up, down = MARGIN, WIDTH - MARGIN // 2, MARGIN, HEIGHT - MARGIN
    span = max(float(steps[-1] - steps[0]), 1.0)
    for share in np.linspace(0, 1, 6):
        y, x = round(down - share * (down - up)), round(left + share * (right - left))
        cv2.line(picture, (left, y), (right, y), (225, 225, 225), 1)
        _write(picture, f"{share * top:.2f}", (8, y + 4))
        _write(picture, f"{steps[0] + share * span:.0f}", (x - 12, down + 22))
    _write(picture, "step", (right - 30, down + 44))
    for row, (name, values) in enumerate(curves.items()):
        known = np.isfinite(values)
        if not known.any():
            continue
        x = left + (steps[known] - steps[0]) / span * (right - left)
        y = down - values[known] / top * (down - up)
        cv2.polylines(picture, [np.stack([x, y], 1).round().astype(np.int32)], False, CURVES[name], 2, cv2.LINE_AA)
        _write(picture, f"{name} {values[known][-1]:.3f}", (left + row * 280, up - 20), CURVES[name])
    return picture


def _write(picture: np.ndarray, text: str, place: tuple[int, int], color: tuple[int, int, int] = (90, 90, 90)) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, 1, cv2.LINE_AA)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ccd-train curve", description="Draws the losses of a run.")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")
    run_dir = parser.parse_args(argv).run_dir
    path = run_dir / "pictures" / "loss.png"
    picture = draw(*read_curves(run_dir))
    path.parent.mkdir(exist_ok=True)
    if not cv2.imwrite(str(path), picture):
        raise UserError(f"{path}: cannot be written; look at the folder's permissions")
    print(path)
    return 0
