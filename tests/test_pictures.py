"""The pictures of a run: what is in them, and where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ccd_train.models.vit import VisionTransformer
from ccd_train.tasks.pretrain import gallery, pictures


def seen(count: int = 3) -> pictures.Seen:
    """Crops with a block of text on the left and one on the right; only the left one is matched."""
    masks = torch.zeros(count, 32, 128, dtype=torch.uint8)
    masks[:, 8:24, 10:30] = 1
    masks[:, 8:24, 80:100] = 2
    moved = masks.roll(5, dims=2)
    grey = torch.full((count, 3, 32, 128), 0.0)
    logits = torch.zeros(2 * count, 2, 32, 128)
    logits[:, 1] = torch.cat([masks, moved]) - 0.5
    image, slot = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    crops = torch.full((count, 3, 32, 128), 200, dtype=torch.uint8)
    return pictures.Seen(crops, masks, grey, grey, logits, torch.cat([masks, moved]), image, slot)


def cell(sheet: np.ndarray, column: int) -> np.ndarray:
    """The first row's cell of a column, at half its size: [72, 128, 3]."""
    left = column * (128 * pictures.SCALE + pictures.MARGIN) + pictures.MARGIN
    top = pictures.TITLE
    height = (64 + pictures.GAP) * pictures.SCALE
    return sheet[top : top + height : pictures.SCALE, left : left + 128 * pictures.SCALE : pictures.SCALE]


def test_a_matched_character_has_one_colour_and_a_line_and_another_region_is_grey() -> None:
    joined = cell(pictures.draw(seen()), 3)
    color = pictures.colours(np.ones((1, 1), np.uint8))[0, 0]
    lower = 32 + pictures.GAP
    assert joined[10, 12].tolist() == joined[lower + 10, 17].tolist() == color.tolist()
    assert joined[10, 82].tolist() == joined[lower + 10, 87].tolist() == pictures.GREY.tolist()
    between = np.abs(joined[32:lower].astype(int) - color).max(-1) < 60
    assert between.any(axis=1).all() and not between[:, 60:].any(), "one line crosses the gap, on the left"


def test_the_students_segmentation_is_white_where_it_sees_text() -> None:
    segmented = cell(pictures.draw(seen()), pictures.COLUMNS.index("student's segmentation"))
    assert segmented[16, 15].tolist() == [255] * 3 and segmented[16, 50].tolist() == [0] * 3


def test_no_character_at_all_can_be_drawn() -> None:
    empty = seen()
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = pictures.Seen(*(getattr(empty, n) for n in empty.__dataclass_fields__ if n not in ("image", "slot")),
                          image=nothing, slot=nothing)  # fmt: skip
    assert pictures.draw(empty).shape == pictures.draw(seen()).shape


def test_principal_components_tell_two_kinds_of_patches_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 0.01 * torch.randn(2, 256, 12, generator=generator)
    tokens[:, 128:, 4] += 1.0
    colors = gallery.components(tokens).float()
    assert colors.shape == (2, 8, 32, 3)
    assert colors[:, 4:, :, 0].min() > colors[:, :4, :, 0].max() + 50
    assert torch.equal(colors, gallery.components(tokens).float())
    one_kind = gallery.components(torch.ones(2, 256, 12))
    assert one_kind.float().std() == 0


def test_neighbours_are_the_same_character_in_other_words() -> None:
    """Three words of three slots; slot k holds class (word + k) mod 3, and the last word lacks its last slot."""
    classes = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]])
    features = torch.eye(3)[classes] + 0.01 * torch.arange(9).view(3, 3, 1)
    valid = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
    places, index, cosines = gallery.nearest(features, valid, 2)
    assert places.tolist() == valid.nonzero().tolist()
    known: Tensor = classes[valid]
    assert torch.equal(known[index[:, 0]], known)
    assert (places[index[:, 0], 0] != places[:, 0]).all()
    assert (cosines[:, 0] >= cosines[:, 1]).all() and cosines[:, 0].min() > 0.9


@pytest.mark.parametrize("text", [True, False])
def test_the_gallery_of_words(text: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (gallery.WORDS, 3, 32, 128), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(gallery.WORDS, 32, 128, dtype=torch.uint8)
    if text:
        masks[:, 4:28, 10:22] = masks[:, 4:28, 40:52] = 1
    vit = VisionTransformer(16, 3, 2, taps=(1, 2, 3)).train()
    sheets = gallery.draw(vit, gallery.fixed_words(images, masks))
    assert vit.training
    assert set(sheets) == {"patches", "neighbours"}
    assert all(sheet.dtype == np.uint8 and sheet.shape[2] == 3 for sheet in sheets.values())
    again = gallery.draw(vit, gallery.fixed_words(images, masks))
    assert all(np.array_equal(sheets[name], again[name]) for name in sheets)
