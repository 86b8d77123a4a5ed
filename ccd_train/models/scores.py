"""Scores of masks and of pictures, each by the name under which it is printed.

Of masks everything follows from four counts of each picture. Of pictures, `psnr` and `ssim` look at what one would see:
clipped to [0, 1] and rounded to 8 bits; `psnr_of_batches` and `psnr_ssm` are those of public code, to compare with its
tables. No score depends on how many pictures are looked at together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 1024  # of TextZoom's evaluation
HIGHEST = 100.0  # dB, of equal pictures
WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004
C1, C2 = 0.01**2, 0.03**2


def count(predicted: Tensor, truth: Tensor, ignored: Tensor) -> Tensor:
    """Counts for masks bool [B, H, W], ignored pixels left out: true and false positives, false and true negatives.

    float64 [B, 4].
    """
    seen = ~ignored
    pairs = ((predicted, truth), (predicted, ~truth), (~predicted, truth), (~predicted, ~truth))
    return torch.stack([(one & other & seen).flatten(1).sum(1) for one, other in pairs], dim=1).double()


def fg_iou(counts: Tensor) -> float | None:
    """Intersection over union of text, summed over the set [N, 4]; None where no text is, or is found.

    SHI-Labs/Rethinking-Text-Segmentation, lib/evaluate_service.py, as the next two.
    """
    tp, fp, fn, _ = counts.sum(0).tolist()
    return tp / (tp + fp + fn) if tp + fp + fn else None


def miou(counts: Tensor) -> float | None:
    """The mean of that and the background's; None where either is none."""
    text, ground = fg_iou(counts), fg_iou(counts.flip(1))
    return None if text is None or ground is None else (text + ground) / 2


def f_score(counts: Tensor) -> float:
    """F of the mean precision and the mean recall over pictures; 0 where nothing is found, or nothing is there."""
    tp, fp, fn, _ = counts.unbind(1)
    precision, recall = (float((tp / (tp + wrong).clamp(min=1)).mean()) for wrong in (fp, fn))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def f_of_images(counts: Tensor) -> Tensor:
    """F of each picture [N]; NaN where no text is and none is found."""
    tp, fp, fn, _ = counts.unbind(1)
    return 2 * tp / (2 * tp + fp + fn)


def iou_of_images(counts: Tensor) -> Tensor:
    """IoU of each picture [N]; 1 where no text is and none is found."""
    tp, fp, fn, _ = counts.unbind(1)
    union = tp + fp + fn
    return torch.where(union > 0, tp / union.clamp(min=1), 1.0)


def seen(images: Tensor) -> Tensor:
    """Pictures as they are stored: clipped to [0, 1], float64, grey levels in 0 … 255."""
    return (images.clamp(0, 1) * 255).round().double()


def psnr(images: Tensor, truth_u8: Tensor) -> Tensor:
    """dB [B] of images [B, C, H, W] in [0, 1] against uint8, on what is seen of them; at most 100."""
    errors = (seen(images) - truth_u8.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / errors)).clamp(max=HIGHEST)


def squared_errors(images: Tensor, truth_u8: Tensor) -> Tensor:
    """Mean squared error of each picture as it comes, in units of [0, 1]: float64 [B], for the next two."""
    return (images.double() - truth_u8.double() / 255).square().flatten(1).mean(1)


def psnr_of_batches(errors: Tensor, size: int = BATCH) -> float:
    """dB of the mean error [N] of each batch in order, mean over batches, also of a smaller last one.

    JasonBoy1/TextZoom, src/utils/ssim_psnr.py, and TongkunGuan/CCD. Infinite for equal pictures.
    """
    batches = [float(batch.mean()) for batch in errors.split(size)]
    return sum(-10 * math.log10(error) if error else math.inf for error in batches) / len(batches)


def psnr_ssm(errors: Tensor) -> float:
    """Mean of each picture's dB, with 1e-6 added to its error: never above 60 (FaltingsA/SSM, engine_pixel.py)."""
    return float((-10 * torch.log10(errors + 1e-6)).mean())


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity [B] of pictures [B, C, H, W] in [0, 1], the mean over pixels and channels.

    In float32, as the three public codes have it: on flat grounds their rounding is part of the figure. One picture at
    a time, so that the others do not change it.
    """
    return torch.stack([_ssim(*pair) for pair in zip(images.float().split(1), others.float().split(1), strict=True)])


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    """The value [] for a picture [1, C, H, W]."""
    mean, mean_other = _blurred(one), _blurred(other)
    variance = _blurred(one * one) - mean.square()
    variance_other = _blurred(other * other) - mean_other.square()
    covariance = _blurred(one * other) - mean * mean_other
    likeness = (2 * mean * mean_other + C1) * (2 * covariance + C2)
    spread = (mean.square() + mean_other.square() + C1) * (variance + variance_other + C2)
    return (likeness / spread).mean()


def bicubic(lr: Tensor) -> Tensor:
    """TextZoom's baseline: [B, C, h, w] in [0, 1] at twice the size, corners aligned, not clipped (its bicubic.py)."""
    return F.interpolate(lr, scale_factor=2, mode="bicubic", align_corners=True)


def _blurred(image: Tensor) -> Tensor:
    """Through a Gaussian window, zeros around."""
    place = torch.arange(WINDOW, device=image.device) - WINDOW // 2
    line = torch.exp(-(place.double() ** 2) / (2 * SIGMA**2)).float()
    line = line / line.sum()
    window = (line[:, None] * line).expand(image.shape[1], 1, -1, -1).contiguous()
    return F.conv2d(image, window, padding=WINDOW // 2, groups=image.shape[1])
