"""Writes the weights of a run for others, or turns weights from one form into the other.

    ccd-train export RUN                                      RUN/export: safetensors and their sizes, as config.json
    ccd-train export RUN --step 40000 --out FOLDER            those of an older checkpoint
    ccd-train export RUN --out ccd.pth                        an official checkpoint
    ccd-train export official.pth --out FOLDER                the official weights in our form
    ccd-train export RUN --format backbone --out vit.safetensors
                                                              the ViT alone, under the names that timm uses

Of a recogniser (a fine-tuning run, an export of one, or an official fine-tuned .pth):

    ccd-train export RUN --out recognizer.safetensors                 weights, sizes and charset in one file
    ccd-train export RUN --format onnx --out recognizer.onnx          from pixels to tokens, for onnxruntime
    ccd-train export RUN --format torchscript --out recognizer.pt     likewise, for torch without this package

Exported is what every verb takes as --weights (which may be written here as well): a run folder (its newest complete
checkpoint, or a fine-tuning's best), one checkpoint folder of a run, an export, or an official .pth.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ccd_train.config.options import parse
from ccd_train.config.run import require
from ccd_train.errors import FINISHED, UserError
from ccd_train.tasks.pretrain.weights import open_weights
from ccd_train.tasks.recognize.reading import RecognizerSource
from ccd_train.training import checkpoint
from ccd_train.weights import backbone, portable, recognizer
from ccd_train.weights.writing import refuse_unwritable

FORMATS_OF = {  # the formats that are written into a file of this suffix
    ".onnx": ("onnx",),
    ".pt": ("torchscript", "weights"),
    ".pth": ("weights",),
    ".safetensors": ("weights", "backbone"),
}
RECIPE = ("augment", "affine", "distillation", "optimizer")  # sections that go with exported weights


@dataclass(frozen=True)
class Export(RecognizerSource):
    """Write weights for others."""

    source: Path | None = field(default=None, metadata={"positional": True})
    """What to export; --weights is another way to say it."""
    weights: Path | None = None
    """A run folder (the newest complete checkpoint, or a fine-tuning's best), a checkpoint folder, an export, or an
    official .pth; of a pretraining or of a recogniser."""
    step: int | None = None
    """The complete checkpoint of this step, of a pretraining's run folder; None: the newest."""
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
        there = self.weights.exists()
        require(there, "weights", self.weights, "no such file or folder; name a run, a checkpoint, an export or a .pth")
        if self.out is None and (self.format != "weights" or not (self.weights / "checkpoints").is_dir()):
            what = f"--format {self.format}" if self.format != "weights" else f"--weights {self.weights} is no run: it"
            raise UserError(f"{what} needs a place: say where to write with --out")
        suffix = self.out.suffix if self.out is not None else ""
        fitting = FORMATS_OF.get(suffix, (self.format,))
        if self.format not in fitting:
            raise UserError(
                f"{self.out}: a {suffix} file is for --format {' or '.join(fitting)}, not for --format {self.format}; "
                "give that one, or another --out"
            )


def at_step(run_dir: Path, step: int) -> Path:
    """The complete checkpoint of a step of a run. UserError names those that there are."""
    steps = [path for path in (run_dir / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdigit()]
    complete = sorted(checkpoint.step_of(path) for path in steps if (path / checkpoint.COMPLETE).is_file())
    if step not in complete:
        there = f"there are {', '.join(map(str, complete))}" if complete else "there are none"
        raise UserError(f"--step {step}: {run_dir} has no complete checkpoint of that step; {there}")
    return run_dir / "checkpoints" / checkpoint.step_name(step)


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
    if options.source is not None:
        require(options.weights is None, "--weights", options.weights, f"is {options.source} already; name one of them")
        options = replace(options, weights=options.source)
    options.check()
    assert options.weights is not None
    chosen = options.weights if options.step is None else at_step(options.weights, options.step)
    if recognizer.is_recognizer(chosen):
        return _export_recognizer(options)
    if options.format in ("onnx", "torchscript"):
        raise UserError(f"{options.weights}: no recogniser, which --format {options.format} is for; fine-tune it first")
    found = open_weights(chosen, options.heads)
    out = options.out or options.weights / "export"
    if options.format == "backbone":
        backbone.write_backbone(out, found.teacher, found.model)
        print(f"{out}: the teacher's ViT")
    elif out.suffix in (".pth", ".pt"):
        residual = backbone.write_official(out, found, options.lossy)
        print(f"{out}: official layout; its position embedding is off by {residual:.2g} of its length")
    elif out.suffix == ".safetensors":
        raise UserError(f"{out}: a pretraining fills a folder; give one, or --format backbone for its ViT in one file")
    else:
        backbone.write_export(out, found, about(chosen))
        print(f"{out}: teacher.safetensors, student.safetensors, {backbone.CONFIG}")
    return FINISHED


def _export_recognizer(options: Export) -> int:
    trained = options.open()
    assert options.weights is not None
    out = options.out or options.weights / "export"
    what, note = f"the recogniser of {trained.origin}, {len(trained.charset.characters)} characters", ""
    if options.format == "onnx":
        refuse_unwritable(out)  # not only after minutes of work
    if options.format == "backbone":
        backbone.write_backbone(out, trained.state, trained.model)
        what = f"the ViT of the recogniser of {trained.origin}"
    elif options.format == "onnx":
        checked = portable.write_onnx(out, trained)
        note = "; reads as the live model" if checked else "; NOT checked against the live model: no onnxruntime here"
    elif options.format == "torchscript":
        portable.write_torchscript(out, trained)
    elif out.suffix in (".pth", ".pt"):
        raise UserError(
            f"{out}: a recogniser is not written in the official layout; give a .safetensors or a folder, "
            "or --format torchscript with a .pt"
        )
    else:
        out = out if out.suffix == ".safetensors" else out / recognizer.FILE
        recognizer.write(out, trained)
    print(f"{out}: {what}{note}")
    return FINISHED
