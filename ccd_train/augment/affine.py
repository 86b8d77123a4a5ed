"""How strongly the irregular view is warped. Settings only: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ccd_train.errors import UserError


@dataclass(frozen=True)
class Affine:
    """The affine that tells the irregular view from the regular one. Every range is sampled uniformly."""

    probability: float = 0.7
    """Share of the samples that are warped; the others keep θ = identity."""
    scale: tuple[float, float] = (0.6, 1.1)
    """Range of the scale, drawn for x and y each."""
    translate: float = 0.02
    """Largest shift to either side, as a share of the width for x and of the height for y."""
    rotate: float = 10.0
    """Largest rotation to either side, in degrees."""
    shear_x: float = 45.0
    """Largest shear along x, in degrees."""
    shear_y: float = 10.0
    """Largest shear along y, in degrees."""

    def check(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"affine.probability: {self.probability} is no probability; give a number from 0 to 1")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"affine.scale: {self.scale} is no range of positive scales; give LOW HIGH, as in 0.6 1.1")
        for name in ("rotate", "shear_x", "shear_y"):
            if not 0 <= getattr(self, name) < 90:
                raise UserError(f"affine.{name}: {getattr(self, name)} degrees; give a number from 0 to below 90")
        if not 0 <= self.translate <= 1:
            raise UserError(f"affine.translate: {self.translate} is no share of the image; give a number from 0 to 1")
