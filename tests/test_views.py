"""`ccd-train views`: the sheets can be read, and show what a run would see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import Tiny

from ccd_train.augment.affine import Affine
from ccd_train.augment.photometric.chain import OPERATIONS
from ccd_train.augment.severities import Augment
from ccd_train.augment.views import Augmentation
from ccd_train.commands import views
from ccd_train.config.options import parse
from ccd_train.config.verbs import ViewsSettings
from ccd_train.draws import sample_keys
from ccd_train.errors import UserError
from ccd_train.tasks.pretrain import sheets


def cell(sheet: np.ndarray, row: int, column: int, titled: bool = False) -> np.ndarray:
    """The picture [32, 128, 3] at a place of a sheet of scale 1."""
    line = 32 + sheets.GAP + (sheets.TITLE if titled else 0)
    bottom, left = sheets.TITLE + line * (row + 1), sheets.GAP + column * (128 + sheets.GAP)
    return sheet[bottom - 32 : bottom, left : left + 128]


def sheet(path: Path, words: list[str]) -> np.ndarray:
    assert views.main([*words, "--out", str(path), "--scale", "1"]) == 0
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def test_samples_are_those_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    words = ["--data.shards", str(tiny.shards), "--samples", "5", "--position", "7", "--seed", "3"]
    picture = sheet(tmp_path / "sheet.png", words)
    batch = sheets.read(parse(ViewsSettings, [*words, "--out", "x.png"], "ccd-train views"))
    made = Augmentation(Augment(), Affine())(
        batch.images_u8, batch.native_size, sample_keys(3, batch.epochs, batch.sample_ids)
    )
    crops = batch.images_u8.permute(0, 2, 3, 1).numpy()
    for row in range(5):
        assert np.array_equal(cell(picture, row, 0), crops[row])
        assert np.array_equal(cell(picture, row, 1), sheets.pixels(made.regular)[row])
        assert np.array_equal(cell(picture, row, 2), sheets.pixels(made.irregular)[row])
        assert np.array_equal(cell(picture, row, 3)[..., 0] > 0, batch.pseudo_mask[row].numpy() > 0)
    again = sheet(tmp_path / "again.png", words)
    assert np.array_equal(picture, again)


def test_characters_have_one_colour_in_both_views(tiny: Tiny, tmp_path: Path) -> None:
    words = ["--data.shards", str(tiny.shards), "--samples", "12", "--affine.probability", "1"]
    picture = sheet(tmp_path / "sheet.png", words)
    for row in range(12):
        there, then = ({tuple(pixel) for pixel in cell(picture, row, column).reshape(-1, 3)} for column in (4, 5))
        assert then <= there  # θ may lose a region, never make one
    colours = [len({tuple(pixel) for pixel in cell(picture, row, 4).reshape(-1, 3)}) for row in range(12)]
    assert max(colours) > 3


def test_every_operation_has_a_row(tiny: Tiny, tmp_path: Path) -> None:
    picture = sheet(tmp_path / "each.png", ["--data.shards", str(tiny.shards), "--samples", "4", "--each"])
    assert picture.shape[0] == sheets.TITLE + (32 + sheets.GAP + sheets.TITLE) * len(OPERATIONS) + sheets.GAP
    different = 0
    for row in range(len(OPERATIONS)):
        crop, high = (cell(picture, row, column, titled=True) for column in (0, 3))
        different += not np.array_equal(crop, high)
    assert different >= len(OPERATIONS) - 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "out"),
        (["--out", "/nowhere/sheet.png"], "/nowhere/sheet.png"),
        (["--out", "sheet.png", "--samples", "0"], "samples"),
        (["--out", "sheet.png", "--scale", "99"], "scale"),
        (["--out", "sheet.png", "--augment.overrides", "weather=2"], "weather=2"),
        (["--out", "sheet.png", "--augment.chain", "finetune_small"], "finetune_small"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tiny: Tiny, words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        views.main(["--data.shards", str(tiny.shards), *words])


def test_faint_regions_are_in_one_view_only() -> None:
    ids = np.zeros((32, 128), np.uint8)
    ids[:, :10], ids[:, 20:30] = 1, 2
    known = np.zeros(26, bool)
    known[0] = True
    shown = sheets.over(np.full((32, 128, 3), 200, np.uint8), ids, known).astype(int)
    assert shown[0, 5].max() > shown[0, 25].max() > shown[0, 50].max()
    assert torch.equal(sheets.poolable(torch.from_numpy(ids)[None])[0, :3], torch.tensor([True, True, False]))
