"""What a pretraining's checkpoints hold for others: its student, its teacher and the centre."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from ccd_train.config.options import read_recipe, recipes, to_dict
from ccd_train.config.pixels import PixelTuning
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.run import refuse_other
from ccd_train.config.stored import from_stored
from ccd_train.errors import UserError
from ccd_train.training import checkpoint
from ccd_train.weights import backbone
from ccd_train.weights.backbone import Backbone, Weights
from ccd_train.weights.tensors import load

TEACHER = "teacher.safetensors"
BACKBONE = ("width", "depth", "heads")  # settings of the model that are those of the pretraining
CENTER = "center"  # beside the teacher's weights


def open_weights(path: Path, heads: int | None = None) -> Weights:
    """Weights from a run folder (newest complete checkpoint), a checkpoint folder, an export or an official .pth.

    Raises UserError for anything else, and for files that do not fit together.
    """
    found = checkpoint.locate(path)
    return backbone.read(path, heads) if found is None else _of_checkpoint(found)


def open_backbone(path: Path, heads: int | None = None) -> Backbone:
    """The ViT to fine-tune: the teacher's of a run or an export, or any file that `read_backbone` takes."""
    found = checkpoint.locate(path)
    return backbone.read_backbone(path, heads) if found is None else _of_checkpoint(found).backbone


def read_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{"teacher": …, "student": …}: fp32 weights and buffers by name, from any ZeRO stage and number of ranks."""
    teacher = safetensors.torch.load_file(folder / TEACHER)
    teacher.pop(CENTER)
    return {"teacher": teacher, "student": checkpoint.read_network(folder)}


def start_from(path: Path, config: Config, student: nn.Module) -> None:
    """Gives a new run the student's weights of another one. Raises UserError if the networks differ."""
    found = open_weights(path, config.model.heads)
    # what stochastic depth leaves out, what stands still and how it began are no matter of the weights
    free = ("drop_path", "freeze_gain", "initial_std", "contrast_std")
    refuse_other("model", path, to_dict(found.model), to_dict(config.model), "give the model's own settings", free)
    load(student, found.student, found.origin)


def take_backbone(path: Path, found: Backbone, config: FineTuning | PixelTuning, vit: nn.Module) -> None:
    """Gives a new fine-tuning the ViT that --init names. Raises UserError if their sizes differ."""
    theirs = {name: getattr(found, name) for name in BACKBONE}
    refuse_other("model", path, theirs, of_backbone(to_dict(config.model)), remedy_of(theirs, type(config)))
    load(vit, found.state, found.origin)


def remedy_of(sizes: dict[str, object], kind: type[FineTuning | PixelTuning]) -> str:
    """Names the recipes of this kind whose backbone has these sizes."""
    fit = [name for name in recipes(kind) if of_backbone(to_dict(read_recipe(name, kind).model)) == sizes]
    return (
        f"take --config {' or '.join(fit)}" if fit else "no recipe has its size: give it by --model.width and the like"
    )


def of_backbone(model: dict[str, object]) -> dict[str, object]:
    """The settings of a model that every fine-tuning shares with its pretraining."""
    return {name: model[name] for name in BACKBONE}


def _of_checkpoint(path: Path) -> Weights:
    if not (path / TEACHER).is_file():
        raise UserError(f"{path}: no teacher, so no pretraining; what a fine-tuning has learnt is in its folder export")
    settings = checkpoint.read_state(path)["settings"]
    model = from_stored(Config, settings, str(path / "state.json")).model
    networks = read_weights(path)
    teacher, student = (
        {name: tensor.detach() for name, tensor in networks[network].items()} for network in ("teacher", "student")
    )
    return Weights(model, teacher, student, str(path))
