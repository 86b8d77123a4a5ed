"""θ: what it composes, and that images, masks and points all go where it says."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccd_train.augment.affine import Affine
from ccd_train.augment.geometry import compose, normalize, sample_theta, warp_images, warp_masks
from ccd_train.errors import UserError

HEIGHT, WIDTH = 32, 128
SIZES = torch.tensor([[48, 160], [20, 50], [31, 250], [64, 64]])  # native (height, width)
ALWAYS = Affine(probability=1.0)


def map_points(points: Tensor, theta: Tensor, height: int, width: int) -> Tensor:
    """Where points [B, N, 2] (x, y), in pixels of the H×W input, land in the output: [B, N, 2] in pixels."""
    half = torch.tensor([width, height], dtype=torch.float64, device=points.device) / 2
    normalized = (points.double() + 0.5) / half - 1
    linear, offset = theta[:, :, :2].double(), theta[:, :, 2].double()
    landed = torch.bmm(normalized - offset[:, None, :], torch.linalg.inv(linear).transpose(1, 2))
    return (landed + 1).mul(half).sub(0.5)


def thetas(count: int, affine: Affine = ALWAYS) -> Tensor:
    keys = torch.arange(count) * 7_919 + 13
    return sample_theta(keys, SIZES[torch.arange(count) % len(SIZES)], affine)


def dots(points: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """One soft dot per image at points [B, 2] (x, y): [B, 3, H, W]. σ = 4 px, as an affine may shrink it to a third."""
    x, y = torch.arange(width), torch.arange(height)[:, None]
    square = (x - points[:, 0, None, None]) ** 2 + (y - points[:, 1, None, None]) ** 2
    return torch.exp(-square / 32)[:, None].expand(-1, 3, -1, -1).float()


def centers(images: Tensor) -> Tensor:
    """The centre of mass (x, y) of each image's first channel."""
    weight = images[:, 0].double()
    total = weight.sum(dim=(1, 2))
    x = (weight * torch.arange(images.shape[-1])).sum(dim=(1, 2)) / total
    y = (weight * torch.arange(images.shape[-2])[:, None]).sum(dim=(1, 2)) / total
    return torch.stack([x, y], dim=1)


def test_a_dot_lands_where_theta_says() -> None:
    """Within 0.05 px, wherever the whole dot stays inside; 400 draws of the recipe's ranges, four native shapes."""
    theta = thetas(400)
    start = torch.stack([torch.linspace(50, 78, 400), torch.linspace(13, 18, 400).flip(0)], dim=1)
    wanted = map_points(start[:, None], theta, HEIGHT, WIDTH)[:, 0]
    # Sampled without a border: in the middle of a canvas that is three times as large, under the same pixel grid.
    canvas = dots(start + torch.tensor([WIDTH, HEIGHT]), 3 * HEIGHT, 3 * WIDTH)
    landed = centers(warp_large(canvas, theta)) - torch.tensor([WIDTH, HEIGHT])
    distance = (landed - wanted).norm(dim=1)
    assert distance.max() < 0.05


def warp_large(canvas: Tensor, theta: Tensor) -> Tensor:
    """The same map on a canvas of three times the size about the same centre: normalised offsets shrink to a third."""
    return warp_images(canvas, torch.cat([theta[:, :, :2], theta[:, :, 2:] / 3], dim=2))


def test_dots_drawn_at_native_size_land_alike_after_the_resize() -> None:
    """Warping the native crop and resizing equals resizing and warping by θ: the aspect ratio is in θ."""
    native = torch.tensor([[64, 128], [64, 512], [96, 96]])
    keys = torch.tensor([3, 4, 5])
    theta = sample_theta(keys, native, Affine(probability=1.0, scale=(0.8, 1.0), shear_x=30))
    for index, (height, width) in enumerate(native.tolist()):
        point = torch.tensor([[width * 0.52, height * 0.48]])
        native_point = map_points(point[None], theta[index : index + 1], height, width)[0, 0]
        scale = torch.tensor([WIDTH / width, HEIGHT / height])
        resized_point = map_points(((point + 0.5) * scale - 0.5)[None], theta[index : index + 1], HEIGHT, WIDTH)[0, 0]
        assert ((native_point + 0.5) * scale - 0.5 - resized_point).norm() < 1e-4


def test_a_shear_acts_in_native_pixels() -> None:
    """45° in the crop is 45° in the crop, whatever its shape; in the 32×128 image the slope follows the aspect."""
    angle, none = torch.tensor([math.pi / 4] * 2), torch.zeros(2)
    forward = compose(scale_x=none + 1, scale_y=none + 1, rotation=none, shear_x=angle, shear_y=none)
    native = torch.tensor([[32, 128], [32, 64]])  # 4:1 and 2:1
    theta = normalize(forward, torch.zeros(2, 2), native)
    up = torch.tensor([[[64.0, 16.0], [64.0, 6.0]]]).expand(2, -1, -1)  # 10 px up in 32×128
    landed = map_points(up, theta, HEIGHT, WIDTH)
    step = landed[:, 1] - landed[:, 0]
    sine = math.sin(math.pi / 4)
    assert step[0].tolist() == pytest.approx([10 * sine, -10 * sine], abs=1e-4)
    assert step[1].tolist() == pytest.approx([20 * sine, -10 * sine], abs=1e-4)  # 2:1 is stretched twofold along x


def test_rotation_and_scale_and_shift() -> None:
    quarter, one = torch.tensor([math.pi / 2]), torch.ones(1)
    forward = compose(scale_x=2 * one, scale_y=one, rotation=quarter, shear_x=0 * one, shear_y=0 * one)
    theta = normalize(forward, torch.tensor([[0.1, 0.25]]), torch.tensor([[100, 100]]))
    center, right = torch.tensor([[[49.5, 49.5], [59.5, 49.5]]]), [49.5 + 10.0, 49.5 + 25.0 + 20.0]
    landed = map_points(center, theta, 100, 100)[0]
    assert landed[0].tolist() == pytest.approx([59.5, 74.5], abs=1e-4)  # shifted by 10 % and 25 %
    assert landed[1].tolist() == pytest.approx(right, abs=1e-4)  # 10 px right, doubled, turned down


def test_the_y_shear_comes_first() -> None:
    """(1, 0) is sheared to (cos, sin) before x is scaled; scaling first would double both."""
    one, angle = torch.ones(1), torch.tensor([0.3])
    forward = compose(scale_x=2 * one, scale_y=one, rotation=0 * one, shear_x=0 * one, shear_y=angle)
    assert forward[0, :, 0].tolist() == pytest.approx([2 * math.cos(0.3), math.sin(0.3)])


def test_images_go_through_theta_as_through_opencv() -> None:
    """cv2.warpAffine with the same map: equal within its own rounding (its bilinear weights are multiples of 1/32)."""
    random = np.random.default_rng(0)
    image = cv2.GaussianBlur(random.uniform(0, 255, (HEIGHT, WIDTH, 3)).astype(np.float32), (5, 5), 0)
    for theta in thetas(12):
        corners = torch.tensor([[[0.0, 0.0], [WIDTH - 1.0, 0.0], [0.0, HEIGHT - 1.0]]])
        landed = map_points(corners, theta[None], HEIGHT, WIDTH)[0]
        matrix = cv2.getAffineTransform(corners[0].numpy(), landed.numpy().astype(np.float32))
        expected = cv2.warpAffine(image, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
        ours = warp_images(torch.from_numpy(image).permute(2, 0, 1)[None], theta[None])[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - expected).max() < 6
        assert np.abs(ours - expected).mean() < 0.3


def test_masks_cover_what_their_image_samples_above_a_tenth() -> None:
    masks = torch.rand(20, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) > 0.6
    theta = thetas(20)
    sampled = warp_images(masks[:, None].float(), theta)[:, 0]
    assert torch.equal(warp_masks(masks, theta), sampled > 0.1)
    assert torch.equal(warp_masks(masks.to(torch.uint8), theta), sampled > 0.1)


def test_the_identity_changes_nothing() -> None:
    theta = thetas(8, Affine(probability=0.0))
    assert torch.equal(theta, torch.eye(2, 3).expand(8, -1, -1))
    images = torch.rand(8, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(warp_images(images, theta), images, rtol=0, atol=1e-5)


def test_a_share_of_the_samples_is_warped() -> None:
    theta = thetas(4000, Affine())
    warped = (theta != torch.eye(2, 3)).flatten(1).any(dim=1).float().mean()
    assert abs(float(warped) - 0.7) < 0.03


def test_the_draws_fill_their_ranges() -> None:
    """Scales come back out of θ where nothing else is drawn."""
    alone = Affine(probability=1.0, translate=0.02, rotate=0, shear_x=0, shear_y=0)
    forward = torch.linalg.inv(thetas(4000, alone)[:, :, :2])
    for scale in (forward[:, 0, 0], forward[:, 1, 1]):
        assert scale.min() < 0.605
        assert scale.max() > 1.095
        assert ((scale > 0.599) & (scale < 1.101)).all()
    assert abs(np.corrcoef(forward[:, 0, 0], forward[:, 1, 1])[0, 1]) < 0.05


def test_theta_does_not_depend_on_the_batch() -> None:
    keys = torch.arange(10) * 31
    native = torch.tensor([[40, 100]]).expand(10, -1)
    together = sample_theta(keys, native, ALWAYS)
    apart = torch.cat([sample_theta(keys[i : i + 1], native[i : i + 1], ALWAYS) for i in range(10)])
    assert torch.equal(together, apart)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 3000), st.integers(1, 3000))
def test_every_theta_is_finite_and_invertible(key: int, height: int, width: int) -> None:
    theta = sample_theta(torch.tensor([key]), torch.tensor([[height, width]]), ALWAYS)
    assert theta.isfinite().all()
    assert abs(float(torch.linalg.det(theta[0, :, :2].double()))) > 0.1


@pytest.mark.parametrize(
    ("affine", "named"),
    [
        (Affine(probability=1.2), "affine.probability"),
        (Affine(scale=(0.0, 1.0)), "affine.scale"),
        (Affine(scale=(1.2, 1.0)), "affine.scale"),
        (Affine(shear_x=90.0), "affine.shear_x"),
        (Affine(rotate=-1.0), "affine.rotate"),
        (Affine(translate=1.5), "affine.translate"),
    ],
)
def test_impossible_settings_are_refused_by_name(affine: Affine, named: str) -> None:
    with pytest.raises(UserError, match=named):
        affine.check()
    Affine().check()
