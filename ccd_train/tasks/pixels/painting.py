"""Networks of the pixel tasks at work: what `evaluate`, `segment` and `upscale` share."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.models.pixels import text_share
from ccd_train.weights.pixels import TrainedPixels


class Painter:
    """A network on this process's device. Without one it gives back what it is given: the route's bicubic."""

    def __init__(self, trained: TrainedPixels | None) -> None:
        cv2.setNumThreads(1)
        self._device = distributed.device()
        self._network = None if trained is None else trained.network().to(self._device)
        self._logits = trained is not None and trained.logits
        self._masks = trained is not None and trained.head.channels == 1

    @torch.no_grad()
    def paint(self, images: np.ndarray) -> Tensor:
        """uint8 [B, 32, 128, 3] → float32 [B, C, 32, 128] on the CPU: shares of text, or unclipped pictures."""
        given = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 255
        if self._network is None:
            return given.cpu()
        output: Tensor = self._network(given)
        return (text_share(output, self._logits) if self._masks else output).cpu()
