"""Text segmentation: which pixels of a word crop are text (Xu et al., CVPR 2021: TextSeg)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ccd_train.config.pixels import Segmenting
from ccd_train.data.pixels import IGNORED
from ccd_train.models import scores
from ccd_train.models.pixels import text_share
from ccd_train.tasks.pixels.task import PixelTask


class Segmentation(PixelTask):
    config: Segmenting
    headline: ClassVar[str] = "fg_iou"
    form: ClassVar[str] = "{:.4f}"

    @property
    def reading(self) -> str:  # type: ignore[override]
        return self.config.data.effects

    @property
    def logits(self) -> bool:  # type: ignore[override]
        return self.config.segmenter.loss == "bce"

    def target(self, targets_u8: Tensor) -> tuple[Tensor, Tensor]:
        return (targets_u8 == 1).float(), targets_u8 != IGNORED

    def output_u8(self, output: Tensor) -> Tensor:
        return (text_share(output, self.logits) > 0.5).to(torch.uint8)

    def measure(self, given: Tensor, output: Tensor, targets_u8: Tensor) -> Tensor:
        """The four counts."""
        truth = targets_u8[:, 0]
        return scores.count(self.output_u8(output)[:, 0] == 1, truth == 1, truth == IGNORED)

    def scores(self, rows: Tensor) -> dict[str, float]:
        return {
            "fg_iou": scores.fg_iou(rows) or 0.0,  # no text held out was refused at the start
            "f_score": scores.f_score(rows),
            "iou_of_images": float(scores.iou_of_images(rows).mean()),
        }
