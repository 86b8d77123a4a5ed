"""Self-supervised Character-to-Character Distillation (Guan et al., ICCV 2023): the method on one page.

Shapes: B images, H W pixels (32×128), h w patch grid (8×32), D width, K = 26 region slots, M characters, P prototypes.

    regular, irregular = two views of the same crops; irregular = θ of another photometric chain
    tokens, taps       = student.vit(regular ‖ irregular)
    logits             = student.segmentation(taps)                    # text or background, per pixel
    regions            = components(mask) ‖ θ(components(mask))         # mask: pseudo-mask, later the student's own
    rows               = student.projection(mean of the tokens in each region that exists in both views)
    targets            = teacher.projection(the same regions of teacher.vit(regular ‖ irregular))
    loss               = cross_entropy(logits, pseudo-mask ‖ θ(pseudo-mask))
                       + ½·[CE(rows of regular → targets of irregular) + CE(rows of irregular → targets of regular)]

The teacher is the moving average of the student's ViT and projection head, so its parameters bear the same names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ccd_train import draws
from ccd_train.config.pretraining import Model
from ccd_train.gpu.replay import Replayed
from ccd_train.models.heads import ProjectionHead, SegmentationHead
from ccd_train.models.regions import MIN_PIXELS, label_regions, pool, warp_regions
from ccd_train.models.vit import build_backbone

REGULAR, IRREGULAR = 1, 2  # words that tell the two views' draws apart


PROTOTYPES = "prototypes"  # the part of the parameters that is frozen at first


class Regions(NamedTuple):
    """The characters of a batch, the same for student and teacher. (A tuple: ZeRO-3 looks for tensors in those.)"""

    ids: Tensor
    """uint8 [2B, H, W]: regions of the regular views, then of the irregular ones; 0 background, slots 1…K."""
    image: Tensor
    """int64 [M]: the image of each character that both views hold, in order."""
    slot: Tensor
    """int64 [M]: its region slot, 0…K−1."""

    def characters(self) -> int:
        """M. No wait for the device: the shape is known since the pairs were counted."""
        return len(self.image)


class StudentOutput(NamedTuple):
    segmentation_logits: Tensor
    """[2B, 2, H, W], regular views first."""
    projections: Tensor
    """float32 [2M, P]: the characters' logits in the regular view, then in the irregular one."""
    regions: Regions
    features: Tensor
    """float32 [2M, D]: what `projections` are of, detached."""


class Student(nn.Module):
    def __init__(self, model: Model, activation_checkpointing: bool = False) -> None:
        """Initial weights come from torch's global generator: seed it with torch.manual_seed before."""
        super().__init__()
        self.vit = build_backbone(
            model, taps=model.taps, drop_path=model.drop_path, activation_checkpointing=activation_checkpointing
        )
        self.segmentation = SegmentationHead(model.width, model.segmentation_width)
        self.projection = _projection(model)

    def part(self, name: str) -> str:
        """Of a parameter: the prototypes are frozen at first, and the segmentation head is what the teacher lacks."""
        if ".prototypes." in name:
            return PROTOTYPES
        return "segmentation" if name.startswith("segmentation.") else "shared"

    def forward(
        self,
        regular: Tensor,
        irregular: Tensor,
        theta: Tensor,
        pseudo_mask: Tensor,
        keys: Tensor | None = None,
        regions_from_student: bool = False,
        min_region_pixels: int = MIN_PIXELS,
    ) -> StudentOutput:
        """Views [B, 3, H, W], θ [B, 2, 3], pseudo-masks [B, H, W], draw keys int64 [B] (training only).

        regions_from_student takes the characters from the student's own segmentation of the regular view (text
        probability > 0.5), detached, instead of the pseudo-mask.
        """
        tokens, taps = self.vit(torch.cat([regular, irregular]), None if keys is None else _view_keys(keys))
        logits = self.segmentation(taps)
        mask = pseudo_mask
        if regions_from_student:
            background, text = logits[: len(regular)].detach().unbind(dim=1)
            mask = text > background
        ids = label_regions(mask, min_region_pixels)
        ids = torch.cat([ids, warp_regions(ids, theta)])
        features, valid = pool(tokens, ids)
        in_both = valid[: len(mask)] & valid[len(mask) :]
        image, slot = in_both.nonzero(as_tuple=True)  # the step's one wait for the device: M depends on the data
        regions = Regions(ids, image, slot)
        rows = _rows(features, regions)
        return StudentOutput(logits, self.projection(rows), regions, rows.detach())


class Teacher(nn.Module):
    """The student's ViT and projection head, without stochastic depth and without gradients."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.vit = build_backbone(model, taps=model.taps)
        self.projection = _projection(model)
        self.requires_grad_(False)
        self.eval()
        self._tokens = Replayed(lambda images: self.vit(images)[0])

    @torch.no_grad()
    def forward(self, regular: Tensor, irregular: Tensor, regions: Regions) -> Tensor:
        """Logits float32 [2M, P] of the student's characters: in the regular view, then in the irregular one."""
        features, _ = pool(self._tokens(torch.cat([regular, irregular])), regions.ids)
        return self.projection(_rows(features, regions))  # type: ignore[no-any-return]


def _rows(features: Tensor, regions: Regions) -> Tensor:
    """The characters' features [2M, D] out of [2B, K, D]: all of the regular view, then all of the irregular one."""
    images = len(features) // 2
    return torch.cat([features[regions.image, regions.slot], features[images + regions.image, regions.slot]])


def _view_keys(keys: Tensor) -> Tensor:
    """[B] → [2B]: stochastic depth is drawn for each view on its own."""
    return torch.cat([draws.mix(keys, REGULAR), draws.mix(keys, IRREGULAR)])


def _projection(model: Model) -> ProjectionHead:
    return ProjectionHead(
        model.width,
        model.head_hidden,
        model.head_bottleneck,
        model.prototypes,
        freeze_gain=model.freeze_gain,
        initial_std=model.initial_std,
    )
