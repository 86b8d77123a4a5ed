"""The affine θ of the irregular view: how it is drawn, and how images, masks and points go through it.

One convention everywhere. A pixel is the centre of its square: column x of an image W wide lies at the normalised
coordinate (2x + 1)/W − 1, so the image spans [−1, 1] from edge to edge (torch's align_corners=False). A plain resize
leaves normalised coordinates alone, which is why θ can be composed at a crop's native size and used at 32×128. θ maps
the output's normalised coordinates to the input's, as torch's affine_grid takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train import draws
from ccd_train.augment.affine import Affine

WARPED = 0.1  # a warped mask covers a pixel where its bilinear sample exceeds this (official CCD)


def sample_theta(keys: Tensor, native_size: Tensor, affine: Affine) -> Tensor:
    """θ float32 [B, 2, 3] from draw keys int64 [B] and the crops' native (height, width) [B, 2] before the resize."""

    def draw(name: str, low: float, high: float) -> Tensor:
        return draws.uniform(keys, f"affine.{name}").double().mul(high - low).add(low)

    def angle(name: str, limit: float) -> Tensor:
        return torch.deg2rad(draw(name, -limit, limit))

    forward = compose(
        scale_x=draw("scale_x", *affine.scale),
        scale_y=draw("scale_y", *affine.scale),
        rotation=angle("rotate", affine.rotate),
        shear_x=angle("shear_x", affine.shear_x),
        shear_y=angle("shear_y", affine.shear_y),
    )
    shift_x = draw("translate_x", -affine.translate, affine.translate)
    shift_y = draw("translate_y", -affine.translate, affine.translate)
    theta = normalize(forward, torch.stack([shift_x, shift_y], dim=-1), native_size)
    warped = draws.uniform(keys, "affine.probability") < affine.probability
    identity = torch.eye(2, 3, device=keys.device).expand_as(theta)
    return torch.where(warped[:, None, None], theta, identity)


def compose(*, scale_x: Tensor, scale_y: Tensor, rotation: Tensor, shear_x: Tensor, shear_y: Tensor) -> Tensor:
    """The linear map input → output [B, 2, 2] in native pixels about the centre; angles [B] in radians.

    The y-shear comes first, then scale, rotation and x-shear in one matrix as scikit-image's AffineTransform (before
    0.19) composes them: that is what imgaug 0.4, and so the official recipe, applies. Its shears keep lengths
    (sine and cosine instead of a tangent): a 45° x-shear also flattens by cos 45°.
    """
    zero, one = torch.zeros_like(rotation), torch.ones_like(rotation)
    y_shear = torch.stack([shear_y.cos(), zero, shear_y.sin(), one], dim=-1).unflatten(-1, (2, 2))
    tilted = rotation + shear_x
    rest = torch.stack(
        [scale_x * rotation.cos(), -scale_y * tilted.sin(), scale_x * rotation.sin(), scale_y * tilted.cos()], dim=-1
    ).unflatten(-1, (2, 2))
    return torch.bmm(rest, y_shear)


def normalize(forward: Tensor, shift: Tensor, native_size: Tensor) -> Tensor:
    """θ float32 [B, 2, 3] from the map input → output in native pixels [B, 2, 2] and a shift [B, 2] (x, y).

    The shift is a share of the width and of the height. native_size [B, 2] holds (height, width).
    """
    half = native_size.flip(-1).to(forward) / 2  # half the width and half the height: pixels per normalised unit
    linear = forward * half[:, None, :] / half[:, :, None]  # now normalised → normalised
    inverse = _inverse(linear)
    offset = -torch.bmm(inverse, (2 * shift.to(forward))[:, :, None])
    return torch.cat([inverse, offset], dim=-1).float()


def sampling_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Where each output pixel reads, in normalised input coordinates: [B, H, W, 2] (x, y)."""
    return F.affine_grid(theta, [theta.shape[0], 1, height, width], align_corners=False)


def warp_images(images: Tensor, theta: Tensor) -> Tensor:
    """Images [B, 3, H, W] through θ: bilinear, 0 outside."""
    grid = sampling_grid(theta.to(images.dtype), *images.shape[-2:])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def warp_masks(masks: Tensor, theta: Tensor) -> Tensor:
    """Masks [B, H, W] (bool or 0/1) through θ: bool, true where the bilinear sample exceeds 0.1."""
    return warp_images(masks[:, None].to(theta.dtype), theta)[:, 0] > WARPED


def _inverse(matrices: Tensor) -> Tensor:
    """Of [B, 2, 2]. torch's own waits for the device, to look for singular ones; there are none here."""
    (a, b), (c, d) = (row.unbind(-1) for row in matrices.unbind(-2))
    adjugate: Tensor = torch.stack([d, -b, -c, a], dim=-1).unflatten(-1, (2, 2))
    return adjugate / (a * d - b * c)[:, None, None]
