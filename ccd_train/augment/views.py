"""The views of a batch: photometric chains and warps, on the device that the images are on.

Every draw is a pure function of a sample's key, whatever batch the sample is in and whatever device it is on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train import distributed
from ccd_train.augment.affine import Affine
from ccd_train.augment.geometry import sample_theta, sampling_grid, warp_images
from ccd_train.augment.photometric.chain import Runner
from ccd_train.augment.photometric.tables import constant
from ccd_train.augment.severities import Augment
from ccd_train.draws import field, mix, uniform
from ccd_train.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as every ViT of this family is fed
STD = (0.229, 0.224, 0.225)
REGULAR, IRREGULAR = 1, 2  # the words that make the two views' keys from a sample's

STRAIGHT = Affine(probability=0.0)
ROTATION = Affine(probability=1.0, scale=(1.0, 1.0), translate=0.0, rotate=45.0, shear_x=0.0, shear_y=0.0)
KNOTS = 4  # of the piecewise affine, along each axis
BEND = (0.01, 0.1)  # range of the standard deviation by which knots move, as a share of width and height


@contextmanager
def exact() -> Iterator[None]:
    """Full precision whatever the caller computes in, and any kernel.

    torch's deterministic mode forbids kernels whose order of summation may vary. Here those sum whole numbers, exactly.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@dataclass(frozen=True)
class Views:
    """Two views of each sample, and the map between them.

    regular, irregular: float32 [B, 3, 32, 128], normalised. theta: float32 [B, 2, 3], identity where nothing is warped.
    """

    regular: Tensor
    irregular: Tensor
    theta: Tensor


class Augmentation:
    """Pretraining's two views. Both go through the chain; the irregular one then through θ, or through neither."""

    def __init__(self, settings: Augment, affine: Affine) -> None:
        """UserError for a chain of fine-tuning: what it bends has no θ for the masks to follow."""
        chain = settings.resolve()
        if chain.warp > 0:
            raise UserError(f"augment.chain = {settings.chain}: bends images without their masks; take a severity_…")
        self.affine = affine
        self.chain = Runner(chain)

    @torch.no_grad()
    @exact()
    def __call__(self, images_u8: Tensor, native_size: Tensor, keys: Tensor) -> Views:
        """Views of uint8 images [B, 3, 32, 128] whose crops had the native (height, width) [B, 2], keyed by int64 [B].

        `native_size` and `keys` belong on the host: on a device they cost a synchronisation each.
        """
        keys, native_size = keys.cpu(), native_size.cpu()
        theta = sample_theta(keys, native_size, self.affine)
        warped = (theta != torch.eye(2, 3)).flatten(1).any(dim=1)
        views = self.chain(
            images_u8.repeat(2, 1, 1, 1),
            torch.cat([mix(keys, REGULAR), mix(keys, IRREGULAR)]),
            torch.cat([torch.zeros_like(warped), ~warped]),
        )
        regular, irregular = views.chunk(2)
        rows, theta = (distributed.upload(table, images_u8.device) for table in (warped.nonzero()[:, 0], theta))
        if len(rows):
            irregular.index_copy_(0, rows, warp_images(irregular.index_select(0, rows), theta.index_select(0, rows)))
        normalize(views)
        return Views(regular, irregular, theta)


class WordAugmentation:
    """Fine-tuning's single, stronger view: its chain, then one of affine, piecewise affine, rotation."""

    def __init__(self, settings: Augment, affine: Affine) -> None:
        chain = settings.resolve()
        self.probability = chain.warp
        self.warps = (replace(affine, probability=1.0), STRAIGHT, ROTATION)
        self.chain = Runner(chain)

    @torch.no_grad()
    @exact()
    def __call__(self, images_u8: Tensor, native_size: Tensor, keys: Tensor) -> Tensor:
        """float32 [B, 3, 32, 128], normalised. The arguments are those of `Augmentation`."""
        keys, native_size = keys.cpu(), native_size.cpu()
        images = self.chain(images_u8, keys, torch.zeros(len(keys), dtype=torch.bool))
        rows = (uniform(keys, "warp") < self.probability).nonzero()[:, 0]
        if len(rows):
            keys, native_size = keys[rows], native_size[rows]
            kind = (uniform(keys, "warp.kind") * len(self.warps)).long()
            thetas = torch.stack([sample_theta(keys, native_size, warp) for warp in self.warps])
            theta, knots = thetas[kind, torch.arange(len(rows))], draw_knots(keys) * (kind == 1)[:, None, None, None]
            rows, theta, knots = (distributed.upload(table, images.device) for table in (rows, theta, knots))
            images.index_copy_(0, rows, bend(images.index_select(0, rows), theta, knots))
        normalize(images)
        return images


def draw_knots(keys: Tensor) -> Tensor:
    """How far the knots of a piecewise affine are moved, in normalised coordinates (x, y): float32 [B, 2, 4, 4]."""
    low, high = BEND
    deviation = low + (high - low) * uniform(keys, "warp.bend").double()
    normal: Tensor = torch.special.ndtri(field(keys, "warp.knots", 2 * KNOTS**2).double().clamp(min=2.0**-25))
    return (2 * deviation[:, None] * normal).float().view(-1, 2, KNOTS, KNOTS)


def bend(images: Tensor, theta: Tensor, knots: Tensor) -> Tensor:
    """Images [B, 3, H, W] through θ [B, 2, 3] and moved by what lies between the knots [B, 2, 4, 4]; 0 outside."""
    moved = F.interpolate(knots, size=images.shape[2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    grid = sampling_grid(theta, *images.shape[2:]) + moved
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def normalize(images: Tensor) -> None:
    """Grey levels 0–255 to ImageNet's mean 0 and deviation 1, in place."""
    mean, std = (constant(values, images.device)[:, None, None] for values in (MEAN, STD))
    images.mul_(1 / (255 * std)).sub_(mean / std)
