"""Super-resolution of text images: a poor picture of a word made better (Wang et al., ECCV 2020: TextZoom)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ccd_train.config.pixels import Upscaling
from ccd_train.models import scores
from ccd_train.tasks.pixels.task import PixelTask


class Superresolution(PixelTask):
    config: Upscaling
    headline: ClassVar[str] = "psnr"
    form: ClassVar[str] = "{:.2f} dB"
    logits = False

    @property
    def reading(self) -> str:  # type: ignore[override]
        return self.config.data.route

    def target(self, targets_u8: Tensor) -> tuple[Tensor, Tensor]:
        return targets_u8.float() / 255, torch.ones_like(targets_u8, dtype=torch.bool)

    def output_u8(self, output: Tensor) -> Tensor:
        return scores.seen(output).to(torch.uint8)

    def measure(self, given: Tensor, output: Tensor, targets_u8: Tensor) -> Tensor:
        """PSNR and SSIM of each, and the PSNR of what was given."""
        alike = scores.ssim(scores.seen(output) / 255, targets_u8.float() / 255).double()
        return torch.stack([scores.psnr(output, targets_u8), alike, scores.psnr(given, targets_u8)], dim=1)

    def scores(self, rows: Tensor) -> dict[str, float]:
        psnr, ssim, before = rows.mean(0).tolist()
        return {"psnr": psnr, "ssim": ssim, "gain": psnr - before}
