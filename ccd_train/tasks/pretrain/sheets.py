"""Sheets of what a model sees in pretraining: views, masks and regions of some samples, or every operation."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from ccd_train.augment.photometric.chain import OPERATIONS, Table, parameters
from ccd_train.augment.severities import RANGES, WHOLE, Chain, Group
from ccd_train.augment.views import MEAN, STD, Augmentation
from ccd_train.config.verbs import ViewsSettings
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Share, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.draws import sample_keys
from ccd_train.models.regions import label_regions, pool, warp_regions
from ccd_train.tasks.pretrain.pictures import colours

COLUMNS = (
    "crop",
    "regular view",
    "irregular view",
    "pseudo-mask",
    "regions",
    "regions, warped",
    "characters",
    "characters, warped",
)
STRENGTHS = {"low": 0.1, "middle": 0.5, "high": 0.9}  # places within every range
SINGLE = 0.55  # brightness of a region that is a character in one view only
GAP, TITLE = 4, 16

Picture = np.ndarray


def read(settings: ViewsSettings) -> Batch:
    """The samples of the sheet, as a run would read them."""
    corpus = Corpus.open(settings.data.shards, settings.data.exclude)
    with loader(
        corpus,
        sample_order(corpus, settings.data, settings.seed),
        Share(settings.position, settings.position + settings.samples, settings.samples, settings.samples, 0, 1),
        workers=0,
        mask_mode=settings.data.mask_mode,
        max_damaged=1.0,
    ) as batches:
        return next(batches)


def samples_sheet(batch: Batch, settings: ViewsSettings) -> Picture:
    """One row per sample. A character, that is a region that both views can pool, has the same colour in both."""
    keys = sample_keys(settings.seed, batch.epochs, batch.sample_ids)
    views = Augmentation(settings.augment, settings.affine)(batch.images_u8, batch.native_size, keys)
    ids = label_regions(batch.pseudo_mask)
    warped = warp_regions(ids, views.theta)
    both = poolable(ids) & poolable(warped)
    regular, irregular = pixels(views.regular), pixels(views.irregular)
    rows = [
        [crop, one, two, np.repeat(mask[..., None] * np.uint8(255), 3, 2), colours(there), colours(then)]
        + [over(view, regions, known) for view, regions in ((one, there), (two, then))]
        for crop, one, two, mask, there, then, known in zip(
            batch.images_u8.permute(0, 2, 3, 1).numpy(),
            regular,
            irregular,
            batch.pseudo_mask.numpy(),
            ids.numpy(),
            warped.numpy(),
            both.numpy(),
            strict=True,
        )
    ]
    return grid(COLUMNS, [[""] * len(COLUMNS)] * len(rows), rows, settings.scale)


def poolable(ids: Tensor) -> Tensor:
    """Which regions of ids [B, H, W] have features: bool [B, K], as the student pools them from patches of 4 × 4."""
    patches = ids.shape[1] * ids.shape[2] // 16
    return pool(torch.zeros(len(ids), patches, 1), ids)[1]


def over(view: Picture, ids: Picture, characters: Picture) -> Picture:
    """The view, dark, under its regions: characters in full colour, other regions fainter."""
    strength = np.concatenate([[0.0], np.where(characters, 1.0, SINGLE)])[ids][..., None]
    shade = 0.35 * view + 0.65 * strength * colours(ids) * (0.4 + 0.6 * view / 255)
    return np.where(ids[..., None] > 0, shade.clip(0, 255), 0.35 * view).astype(np.uint8)


def operations_sheet(batch: Batch, settings: ViewsSettings) -> Picture:
    """One row per operation of all chains: a crop, and what becomes of it at three strengths."""
    titles = ["crop", *STRENGTHS]
    rows, names = [], []
    for number, name in enumerate(OPERATIONS):
        chosen = number % len(batch.images_u8)
        crop = batch.images_u8[chosen]
        row = [crop.permute(1, 2, 0).numpy()]
        for place in STRENGTHS.values():
            row.append(operation(name, crop, strong(settings.augment.resolve(), name, place), settings.seed + number))
        rows.append(row)
        names.append([name, *(described(name, settings.augment.resolve(), p) for p in STRENGTHS.values())])
    return grid(titles, names, rows, settings.scale)


def strong(chain: Chain, name: str, place: float) -> Chain:
    """The chain with every range of an operation narrowed to what is at `place` (0 … 1) in it, and applied for sure."""
    ranges = {}
    for parameter in parameters(name):
        full = f"{name}.{parameter}"
        if full in RANGES:
            low, high = chain.range(full)
            value = 1.0 if parameter == "probability" else low + (high - low) * place
            value = round(value) if full in WHOLE else value
            ranges[full] = (value, value)
    return replace(chain, ranges={**chain.ranges, **ranges})


def described(name: str, chain: Chain, place: float) -> str:
    """The parameters at this strength, in short."""
    narrowed = strong(chain, name, place)
    return " ".join(f"{narrowed.range(f'{name}.{p}')[0]:.4g}" for p in parameters(name) if f"{name}.{p}" in RANGES)


def operation(name: str, image_u8: Tensor, chain: Chain, seed: int) -> Picture:
    """What an operation makes of an image [3, H, W]."""
    table = Table(chain, Group("alone", 1.0, {name: 1.0}))
    keys = sample_keys(seed, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    stage = table.stage(keys, torch.zeros(1, dtype=torch.bool))
    count = table.counts[0]
    values = stage.parameters[:, :count, None, None, None].unbind(1)
    changed = OPERATIONS[name](image_u8[None].float(), stage.seeds, *values).round().clamp(0, 255)[0]
    return np.asarray(changed.permute(1, 2, 0).numpy().astype(np.uint8))


def pixels(views: Tensor) -> Picture:
    """Normalised views [B, 3, H, W] as uint8 [B, H, W, 3]."""
    levels = (views.permute(0, 2, 3, 1).numpy() * np.array(STD) + np.array(MEAN)) * 255
    return np.asarray(levels.round().clip(0, 255).astype(np.uint8))


def grid(titles: list[str] | tuple[str, ...], names: list[list[str]], rows: list[list[Picture]], scale: int) -> Picture:
    """Pictures uint8 [H, W, 3] in rows, with titles above the columns and a name above each picture that has one."""
    height, width = (side * scale for side in rows[0][0].shape[:2])
    line = GAP + height + (TITLE if any(any(row) for row in names) else 0)
    sheet = np.full((TITLE + line * len(rows) + GAP, (width + GAP) * len(titles) + GAP, 3), 255, np.uint8)
    for column, title in enumerate(titles):
        left = GAP + column * (width + GAP)
        write(sheet, title, (left, TITLE - 5), 0.42)
        for number, (row, named) in enumerate(zip(rows, names, strict=True)):
            bottom = TITLE + line * (number + 1)
            write(sheet, named[column], (left, bottom - height - 4), 0.36)
            large = cv2.resize(row[column], (width, height), interpolation=cv2.INTER_NEAREST)
            sheet[bottom - height : bottom, left : left + width] = large
    return sheet


def write(sheet: Picture, text: str, place: tuple[int, int], size: float) -> None:
    """Writes dark text into the sheet; place (x, y) is the lower left corner of its first letter."""
    cv2.putText(sheet, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, (60, 60, 60), 1, cv2.LINE_AA)
