"""Networks of the pixel tasks in files: one safetensors file, whose metadata hold the task, the sizes and the settings
that its scores depend on. A run keeps its best one in the folder `export`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccd_train.config.options import to_dict
from ccd_train.config.pixels import SEGMENT, SUPERRESOLVE, MaskHead, PictureHead
from ccd_train.config.pretraining import Model
from ccd_train.config.run import require
from ccd_train.config.stored import from_stored
from ccd_train.errors import UserError
from ccd_train.models.pixels import PixelNetwork
from ccd_train.weights.tensors import State, is_safetensors, load, read_safetensors, refuse_infinite
from ccd_train.weights.writing import serialize, write_whole

FILE = "pixels.safetensors"
FORMAT = "ccd_train pixels 1"
PLACES = (FILE, f"export/{FILE}")  # in an export and in a run folder
HEADS: dict[str, type[MaskHead | PictureHead]] = {
    SEGMENT: MaskHead,
    SUPERRESOLVE: PictureHead,
}
_REMEDY = "make one with ccd-train finetune --config segmenter_small or upscaler_small"


@dataclass(frozen=True)
class TrainedPixels:
    """Weights, on the CPU in float32, and what is needed to use them."""

    task: str
    model: Model
    """Only the backbone's sizes in it count."""
    head: MaskHead | PictureHead
    reading: str
    """What effects count as (segmentation), or the route of the input (super-resolution)."""
    state: State
    about: dict[str, Any]
    """Plain values: step, samples and the like."""
    origin: str
    """Where it comes from, for messages."""

    def __post_init__(self) -> None:
        refuse_infinite(self.state, self.origin)

    @property
    def logits(self) -> bool:
        """Whether the network says logits of text."""
        return isinstance(self.head, MaskHead) and self.head.loss == "bce"

    def network(self) -> PixelNetwork:
        """The network with these weights, in evaluation mode. UserError lists what does not fit."""
        network = PixelNetwork(self.model, self.head)
        load(network, self.state, self.origin)
        return network.eval()


def write(path: Path, trained: TrainedPixels) -> None:
    """Writes an export, whole or not at all. Raises UserError where it cannot be written."""
    described = {"model": to_dict(trained.model), "head": to_dict(trained.head), "about": trained.about}
    metadata = {name: json.dumps(value) for name, value in described.items()}
    metadata |= {"format": FORMAT, "task": trained.task, "reading": trained.reading}
    write_whole(path, serialize(trained.state, metadata))


def find(path: Path) -> Path:
    """The file of an export, of its folder or of a run folder. UserError where there is none."""
    if path.is_file():
        return path
    found = next((path / place for place in PLACES if (path / place).is_file()), None)
    if found is None:
        raise UserError(f"{path}: no {FILE} here: a run has one from its first validation on; {_REMEDY}")
    return found


def is_pixels(path: Path) -> bool:
    """Whether there is a network of a pixel task here, or the run of one. UserError for a damaged file."""
    if is_safetensors(path):
        return read_safetensors(path, "copy it again, or export it again")[1].get("format") == FORMAT
    return any((path / place).is_file() for place in PLACES)


def read(path: Path) -> TrainedPixels:
    """From a run folder (its best) or an export (file or folder). Raises UserError."""
    path = find(path)
    if not is_safetensors(path):
        raise UserError(f"{path}: no export of a pixel task; {_REMEDY}")
    state, metadata = read_safetensors(path, "export the network again")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: no network of a pixel task (its format is {metadata.get('format')!r}); {_REMEDY}")
    try:
        values = {name: json.loads(metadata[name]) for name in ("model", "head", "about")}
        task, reading = metadata["task"], metadata["reading"]
        kind = HEADS[task]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its description is damaged ({error}); export the network again") from None
    model = from_stored(Model, values["model"], str(path), "model.")
    head = from_stored(kind, values["head"], str(path), "head.")
    head.check()
    for heads, name in ((model.heads, "model.heads"), (head.heads, "head.heads")):
        require(heads >= 1 and model.width % heads == 0, name, heads, f"no divisor of the width in {path}")
    return TrainedPixels(task, model, head, reading, state, values["about"], str(path))
