"""Writes the weights of a run for others, or turns weights from one form into the other.

    ccd-train export --weights RUN                            RUN/export: safetensors and their sizes, as config.json
    ccd-train export --weights RUN --out ccd.pth              an official checkpoint
    ccd-train export --weights official.pth --out FOLDER      the official weights in our form
    ccd-train export --weights RUN --format backbone --out vit.safetensors
                                                              the ViT alone, under the names that timm uses

Of a recogniser (a fine-tuning run, an export of one, or an official fine-tuned .pth):

    ccd-train export --weights RUN --out recognizer.safetensors                 weights, sizes and charset in one file
    ccd-train export --weights RUN --format onnx --out recognizer.onnx          from pixels to tokens, for onnxruntime
    ccd-train export --weights RUN --format torchscript --out recognizer.pt     likewise, for torch without this package

--weights takes what every verb takes: a run folder (its newest complete checkpoint, or a fine-tuning's best), one
checkpoint folder of a run, an export, or an official .pth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ccd_train import checkpoint, portable, recognizers, weights
from ccd_train.errors import FINISHED, UserError
from ccd_train.options import parse
from ccd_train.reading import Source

RECIPE = ("augment", "affine", "distillation", "optimizer")  # sections that go with exported weights


@dataclass(frozen=True)
class Export(Source):
    """Write weights for others."""

    out: Path | None = None
    """Where to: a folder, or a file where one file is written (.pth: the official layout); None: `export` in the run
    folder."""
    format: Literal["weights", "backbone", "onnx", "torchscript"] = "weights"
    """All the weights in our own form, the ViT alone, or a recogniser from pixels to tokens."""
    lossy: bool = False
    """Write the official layout although something of the network has no place in it."""

    def check(self) -> None:
        super().check()
        assert self.weights is not None
        if self.out is None and (self.format != "weights" or not (self.weights / "checkpoints").is_dir()):
            what = f"--format {self.format}" if self.format != "weights" else f"--weights {self.weights} is no run: it"
            raise UserError(f"{what} needs a place: say where to write with --out")


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
    if recognizers.is_recognizer(options.weights):
        return _export_recognizer(options)
    if options.format in ("onnx", "torchscript"):
        raise UserError(f"{options.weights}: no recogniser, which --format {options.format} is for; fine-tune it first")
    found = checkpoint.open_weights(options.weights, options.heads)
    out = options.out or options.weights / "export"
    if options.format == "backbone":
        weights.write_backbone(out, found.teacher, found.model)
        print(f"{out}: the teacher's ViT")
    elif out.suffix in (".pth", ".pt"):
        residual = weights.write_official(out, found, options.lossy)
        print(f"{out}: official layout; its position embedding is off by {residual:.2g} of its length")
    else:
        weights.write_export(out, found, about(options.weights))
        print(f"{out}: teacher.safetensors, student.safetensors, {weights.CONFIG}")
    return FINISHED


def _export_recognizer(options: Export) -> int:
    trained = options.open()
    assert options.weights is not None
    out, note = options.out or options.weights / "export", ""
    if options.format == "backbone":
        weights.write_backbone(out, trained.state, trained.model)
    elif options.format == "onnx":
        checked = portable.write_onnx(out, trained)
        note = "; reads as the live model" if checked else "; NOT checked against the live model: no onnxruntime here"
    elif options.format == "torchscript":
        portable.write_torchscript(out, trained)
    elif out.suffix in (".pth", ".pt"):
        raise UserError(f"{out}: a recogniser is not written in the official layout; give a .safetensors or a folder")
    else:
        out = out if out.suffix == ".safetensors" else out / recognizers.FILE
        recognizers.write(out, trained)
    print(f"{out}: the recogniser of {trained.origin}, {len(trained.charset.characters)} characters{note}")
    return FINISHED
