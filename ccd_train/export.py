"""Writes the weights of a run for others, or turns weights from one form into the other.

    ccd-train export --weights RUN                            RUN/export: safetensors and their sizes, as config.json
    ccd-train export --weights RUN --out ccd.pth              an official checkpoint
    ccd-train export --weights official.pth --out FOLDER      the official weights in our form

--weights takes what every verb takes: a run folder (its newest complete checkpoint), one checkpoint folder of a run,
an export, or an official .pth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccd_train import checkpoint, weights
from ccd_train.config import require
from ccd_train.errors import UserError
from ccd_train.options import parse

RECIPE = ("augment", "affine", "distillation", "optimizer")  # sections that go with exported weights


@dataclass(frozen=True)
class Export:
    weights: Path | None = None
    """A run folder, a checkpoint folder, an export, or an official .pth."""
    out: Path | None = None
    """Where to: a folder, or a .pth file for the official layout; None: `export` in the run folder."""
    heads: int | None = None
    """Attention heads of an official .pth whose width is not 64 per head."""
    lossy: bool = False
    """Write the official layout although something of the network has no place in it."""

    def check(self) -> None:
        require(self.weights is not None, "weights", None, "name what to export: --weights RUN")
        require(self.heads is None or self.heads >= 1, "heads", self.heads, "must be 1 or more")
        assert self.weights is not None
        if self.out is None and not (self.weights / "checkpoints").is_dir():
            raise UserError(f"--weights {self.weights} is not a run folder: say where to write with --out")


def about(path: Path) -> dict[str, Any]:
    """Where in its run a checkpoint stands, and the recipe, without a path; empty for weights that are not a run's."""
    found = checkpoint.newest(path) if (path / "checkpoints").is_dir() else path
    if found is None or not (found / checkpoint.COMPLETE).is_file():
        return {}
    state = checkpoint.read_state(found)
    recipe = {name: state["settings"][name] for name in RECIPE}
    return {name: state[name] for name in ("step", "samples", "seed", "corpus", "global_batch_size")} | recipe


def main(argv: list[str]) -> int:
    options = parse(Export, argv, "ccd-train export")
    options.check()
    assert options.weights is not None
    found = checkpoint.open_weights(options.weights, options.heads)
    out = options.out or options.weights / "export"
    if out.suffix in (".pth", ".pt"):
        residual = weights.write_official(out, found, options.lossy)
        print(f"{out}: official layout; its position embedding is off by {residual:.2g} of its length")
        return 0
    weights.write_export(out, found, about(options.weights))
    print(f"{out}: teacher.safetensors, student.safetensors, {weights.CONFIG}")
    return 0
