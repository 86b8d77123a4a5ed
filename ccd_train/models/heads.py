"""The two heads: text segmentation from tapped features, and the projection of characters onto prototypes.

Shapes: B images, H W pixels, h w patch grid, D width, M characters, P prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccd_train.models.normalization import BatchNorm
from ccd_train.models.vit import INITIAL_STD, initialize_linear_layers

CLASSES = 2  # 0 background, 1 text


class SegmentationHead(nn.Module):
    """Three tapped features [B, D, h, w] → logits [B, 2, H, W] of background and text at the image's size."""

    def __init__(self, width: int, channels: int = 128) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 3, padding=1, bias=False),
                BatchNorm(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels // 2, 1, bias=False),
                BatchNorm(channels // 2),
                nn.ReLU(),
            )
            for _ in range(3)
        )
        self.upsampling = nn.Sequential(
            nn.ConvTranspose2d(3 * (channels // 2), channels, 4, stride=2, padding=1),
            BatchNorm(channels),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1),
            BatchNorm(channels),
            nn.ReLU(),
        )
        self.classifier = nn.Conv2d(channels, CLASSES, 3, padding=1)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        features = [branch(tap) for branch, tap in zip(self.branches, taps, strict=True)]
        return self.classifier(self.upsampling(torch.cat(features, dim=1)))  # type: ignore[no-any-return]


class PrototypeLayer(nn.Module):
    """Weight-normalised linear layer without bias: logit = gain · (direction / ‖direction‖) · x, in float32.

    `direction` and `gain` are plain parameters, not torch's parametrisation, which ZeRO-3 cannot partition. float32
    also under bf16 and autocast: a logit one bf16 step off, divided by a temperature of 0.04, is 0.1 in the exponent.
    """

    def __init__(self, bottleneck: int, prototypes: int, freeze_gain: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.gain = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not freeze_gain)
        nn.init.trunc_normal_(self.direction, std=bottleneck**-0.5)  # only its direction counts

    def forward(self, x: Tensor) -> Tensor:
        """[M, bottleneck] → [M, P]."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.gain.float() * F.normalize(self.direction.float(), dim=1)
            return F.linear(x.float(), weight)


class ProjectionHead(nn.Module):
    """DINO's head: a three-layer MLP, L2 norm, prototypes. Features [M, D] → logits float32 [M, P]; M may be 0."""

    def __init__(
        self,
        width: int,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        freeze_gain: bool = False,
        initial_std: float = INITIAL_STD,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = PrototypeLayer(bottleneck, prototypes, freeze_gain)
        initialize_linear_layers(self.mlp, initial_std)

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = self.mlp(features.to(self.prototypes.direction.dtype))
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(bottleneck.float(), dim=1)
        return self.prototypes(unit)  # type: ignore[no-any-return]
