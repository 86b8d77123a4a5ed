"""A small release in TextSeg's layout: noise with words of a few bars each, whose polygons lie about the bars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZE = (160, 96)  # width and height of a picture
SPLITS = {"train": 6, "val": 2, "test": 3}
WORDS = 3  # of a picture


def write_release(root: Path, splits: dict[str, int] = SPLITS, words: str = "annotation") -> Path:
    """Pictures of three words each, one of them turned; numbered over all splits from a00001."""
    for folder in ("image", "semantic_label", words):
        (root / folder).mkdir(parents=True)
    listed, number = {}, 0
    for split, count in splits.items():
        listed[split] = [f"a{number + place:05d}" for place in range(1, count + 1)]
        number += count
        for picture in listed[split]:
            write_picture(root, picture, words)
    (root / "split.json").write_text(json.dumps(listed))
    return root


def write_picture(root: Path, picture: str, words: str = "annotation") -> None:
    rng = np.random.default_rng(int(picture[1:]))
    image = cv2.GaussianBlur(rng.integers(100, 256, (SIZE[1], SIZE[0], 3), np.uint8), (0, 0), 2)
    codes = np.zeros(image.shape[:2], np.uint8)
    annotation = {}
    for word in range(WORDS):
        turn = float(rng.uniform(5, 20)) if word == 1 else 0.0
        polygon = _polygon((int(rng.integers(40, 120)), 16 + 32 * word), (int(rng.integers(30, 60)), 14), turn)
        bars = [_between(polygon, first, first + 0.12) for first in np.arange(0.1, 0.9, 0.2)]
        for bar in bars:
            cv2.fillConvexPoly(codes, np.rint(bar).astype(np.int32), 200, cv2.LINE_8)
            cv2.fillConvexPoly(codes, np.rint(bar - [1, 0]).astype(np.int32), 100, cv2.LINE_8)
        annotation[str(word)] = {
            "text": f"w{picture[-2:]}{word}",
            "bbox": np.rint(polygon).astype(int).ravel().tolist(),
            "char": {"0": {"text": "w", "bbox": np.rint(bars[0]).astype(int).ravel().tolist(), "mask_value": 1}},
        }
    image[codes == 100] = rng.integers(0, 60, 3)
    codes[-6:, -20:] = 255
    save(root, picture, image=image, codes=codes, words={words: annotation})


def save(
    root: Path,
    picture: str,
    image: np.ndarray | None = None,
    codes: np.ndarray | None = None,
    words: dict[str, Any] | None = None,
) -> None:
    """Replaces what is given of a picture."""
    if image is not None:
        cv2.imwrite(str(root / f"image/{picture}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    if codes is not None:
        cv2.imwrite(str(root / f"semantic_label/{picture}_maskfg.png"), codes)
    for folder, content in (words or {}).items():
        (root / folder / f"{picture}_anno.json").write_text(json.dumps(content))


def write_slices(root: Path) -> Path:
    """Word crops in the folders of FaltingsA/SSM: two each, with JPEG masks."""
    for folder in ("train_all/train", "train_all/val", "test"):
        for kind in ("image", "mask"):
            (root / folder / kind).mkdir(parents=True)
        for number in range(2):
            rng = np.random.default_rng(number)
            mask = np.zeros((20, 60), np.uint8)
            mask[4:16, 8:20] = mask[4:16, 30:44] = 255
            image = np.where(mask[..., None] > 0, 30, rng.integers(150, 250, (20, 60, 3))).astype(np.uint8)
            cv2.imwrite(str(root / folder / f"image/w_{number}.jpg"), image)
            cv2.imwrite(str(root / folder / f"mask/w_{number}_mask.jpg"), mask, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return root


def _polygon(center: Sequence[int], size: tuple[int, int], degrees: float) -> np.ndarray:
    """float64 [4, 2], clockwise from the top left."""
    half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array(size) / 2
    turn = np.deg2rad(degrees)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return half @ matrix.T + np.array(center)


def _between(polygon: np.ndarray, first: float, last: float) -> np.ndarray:
    """The part of a polygon from one share of its width to another, less a margin above and below."""
    top_left, top_right, bottom_right, bottom_left = polygon
    edges = [
        (top_left + share * (top_right - top_left), bottom_left + share * (bottom_right - bottom_left))
        for share in (first, last)
    ]
    return np.array([
        edges[0][0] * 0.8 + edges[0][1] * 0.2, edges[1][0] * 0.8 + edges[1][1] * 0.2,
        edges[1][0] * 0.2 + edges[1][1] * 0.8, edges[0][0] * 0.2 + edges[0][1] * 0.8,
    ])  # fmt: skip
