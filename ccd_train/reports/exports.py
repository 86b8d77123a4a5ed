"""What `ccd-train export` writes: the weights of a pretraining or of a recogniser, in the form that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ccd_train.config.verbs import Export
from ccd_train.errors import UserError
from ccd_train.tasks.pretrain.weights import open_backbone, open_weights
from ccd_train.tasks.recognize.reading import open_recognizer
from ccd_train.training import checkpoint
from ccd_train.weights import backbone, pixels, portable, recognizer
from ccd_train.weights.writing import refuse_unwritable

RECIPE = ("augment", "affine", "distillation", "optimizer")  # sections that go with exported weights


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


def export(options: Export) -> str:
    """Writes what the checked options ask for; returns a line that says what and where. UserError if it cannot be."""
    assert options.weights is not None
    chosen = options.weights if options.step is None else at_step(options.weights, options.step)
    if pixels.is_pixels(chosen):
        return _pixels(options, chosen)
    return _recognizer(options) if recognizer.is_recognizer(chosen) else _pretraining(options, chosen)


def _pixels(options: Export, chosen: Path) -> str:
    trained = pixels.read(chosen)
    out, note = options.out or chosen / "export", ""
    if options.format == "backbone":
        backbone.write_backbone(out, backbone.backbone_of(trained.state, trained.model.heads, trained.origin))
    elif options.format == "onnx":
        refuse_unwritable(out)
        checked = portable.write_onnx(out, trained)
        note = "; says what the live model says" if checked else "; NOT checked: no onnxruntime here"
    elif options.format == "torchscript":
        portable.write_torchscript(out, trained)
    elif out.suffix in (".pth", ".pt"):
        raise UserError(f"{out}: give a .safetensors or a folder, or --format torchscript with a .pt")
    else:
        out = out if out.suffix == ".safetensors" else out / pixels.FILE
        pixels.write(out, trained)
    return f"{out}: the network of {trained.origin}, which learnt to {trained.task}{note}"


def _pretraining(options: Export, chosen: Path) -> str:
    assert options.weights is not None
    if options.format in ("onnx", "torchscript"):
        raise UserError(f"{options.weights}: no recogniser, which --format {options.format} is for; fine-tune it first")
    out = options.out or options.weights / "export"
    if options.format == "backbone":
        backbone.write_backbone(out, open_backbone(chosen, options.heads))
        return f"{out}: the ViT of {chosen}"
    found = open_weights(chosen, options.heads)
    if out.suffix in (".pth", ".pt"):
        residual = backbone.write_official(out, found, options.lossy)
        return f"{out}: official layout; its position embedding is off by {residual:.2g} of its length"
    if out.suffix == ".safetensors":
        raise UserError(f"{out}: a pretraining fills a folder; give one, or --format backbone for its ViT in one file")
    backbone.write_export(out, found, about(chosen))
    return f"{out}: teacher.safetensors, student.safetensors, {backbone.CONFIG}"


def _recognizer(options: Export) -> str:
    trained = open_recognizer(options)
    assert options.weights is not None
    out = options.out or options.weights / "export"
    what, note = f"the recogniser of {trained.origin}, {len(trained.charset.characters)} characters", ""
    if options.format == "onnx":
        refuse_unwritable(out)  # not only after minutes of work
    if options.format == "backbone":
        backbone.write_backbone(out, backbone.backbone_of(trained.state, trained.model.heads, trained.origin))
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
    return f"{out}: {what}{note}"
