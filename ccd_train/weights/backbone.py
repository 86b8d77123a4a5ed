"""The networks of a pretraining in files: exports of ours, official checkpoints, and the ViT alone.

An export is a folder with `config.json`, `teacher.safetensors` and `student.safetensors`. An official checkpoint is a
`.pth` with `teacher` and `student`. The ViT alone is one file under timm's names. Whatever does not fit is named and
refused, NaN as well. Nothing read here can run code.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ccd_train.config.options import to_dict
from ccd_train.config.pretraining import Model
from ccd_train.config.stored import from_stored
from ccd_train.errors import UserError
from ccd_train.files import replace_file, write_json
from ccd_train.models.ccd import Student, Teacher
from ccd_train.models.vit import VisionTransformer, build_backbone
from ccd_train.weights.official import (
    EMBEDDING,
    OFFICIAL_TAPS,
    OFFICIAL_UNUSED,
    depth_of,
    from_official,
    heads_of,
    official_name,
    official_sizes,
    to_official,
)
from ccd_train.weights.tensors import (
    State,
    is_named,
    is_safetensors,
    is_torch,
    read_safetensors,
    read_tensors,
    refuse_infinite,
    refuse_misfits,
    refuse_strange,
    shapes_of,
    some,
    unwrapped,
)
from ccd_train.weights.writing import serialize, unwritable, write_whole

NETWORKS: dict[str, type[Student] | type[Teacher]] = {"teacher": Teacher, "student": Student}
FORMAT = "ccd_train weights 1"
CONFIG = "config.json"
TEACHER = "teacher.safetensors"
BACKBONE_SIZES = ("width", "depth", "heads")  # in the metadata of a backbone by itself
OFFICIAL_BESIDE = re.compile(r"^backbone\.norm_seg\.")  # in the official backbone, but for the segmentation head
BACKBONE_PREFIX = re.compile(r"^backbone\.")  # without it the official names are timm's
LARGEST_RESIDUAL = 1e-3  # of an exported position embedding, relative to its own length


@dataclass(frozen=True)
class Weights:
    """The two networks of a pretraining, on the CPU in float32, and the sizes they have."""

    model: Model
    teacher: State
    student: State
    origin: str
    """Where they come from, for messages."""

    def __post_init__(self) -> None:
        for name in NETWORKS:
            refuse_infinite(getattr(self, name), f"{self.origin}: {name}")

    @property
    def backbone(self) -> Backbone:
        """The teacher's ViT."""
        return backbone_of(self.teacher, self.model.heads, self.origin)


@dataclass(frozen=True)
class Backbone:
    """A ViT by itself, on the CPU in float32: all that fine-tuning starts from."""

    width: int
    depth: int
    heads: int
    state: State
    """By our names, without the norms of the taps, which belong to the segmentation head."""
    origin: str

    def network(self) -> VisionTransformer:
        """The ViT, in evaluation mode; it returns tokens and no taps."""
        vit = _vit(self.width, self.depth, self.heads)
        vit.load_state_dict(self.state)
        return vit.eval()


def read(path: Path, heads: int | None = None) -> Weights:
    """An export (its folder or teacher.safetensors in it) or an official checkpoint. Raises UserError.

    heads: the attention heads of an official checkpoint whose width is not 64 a head, which its tensors do not tell.
    """
    if is_torch(path):
        return _of_official(read_tensors(path), heads, path)
    folder = path.parent if path.suffix == ".safetensors" else path
    if (folder / CONFIG).is_file():
        if path not in (folder, folder / TEACHER):  # another file would be taken for the teacher
            raise UserError(f"{path}: only {TEACHER} or its folder stand for an export; give one of them")
        return read_export(folder)
    if path.is_file() and not is_safetensors(path):
        raise refuse_strange(path)
    what = "a ViT alone, which --init of finetune takes" if path.is_file() else f"no weights here (no {CONFIG})"
    raise UserError(f"{path}: {what}; give a run folder, an export folder or an official .pth")


def read_backbone(path: str | Path, heads: int | None = None) -> Backbone:
    """The ViT of any file of weights: what `read` takes, one network of an official checkpoint, an exported ViT, or a
    student's tensors by our own names, as DeepSpeed's zero_to_fp32.py writes them. Raises UserError.
    """
    path = Path(path)
    if is_torch(path):
        return _of_tensors(read_tensors(path), heads, path)
    if not is_safetensors(path) or path.name == TEACHER:
        return read(path, heads).backbone
    tensors, metadata = read_safetensors(path, "export the backbone again")
    if all(metadata.get(name, "").isdigit() for name in BACKBONE_SIZES):
        vit = _vit(*(int(metadata[name]) for name in BACKBONE_SIZES))
        names = {name: BACKBONE_PREFIX.sub("", official_name(f"vit.{name}")) for name in vit.state_dict()}
        wanted = {names[name]: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
        refuse_misfits(wanted, tensors, str(path))
        ours = {f"vit.{name}": tensors[names[name]] for name in names}
        return backbone_of(ours, int(metadata["heads"]), str(path))
    return _of_tensors(tensors, heads, path)


def backbone_of(network: State, heads: int, origin: str) -> Backbone:
    """The ViT in a network's tensors by our names, `vit.…`. UserError if they are not those of one."""
    whole = {name.removeprefix("vit."): tensor.float() for name, tensor in network.items() if name.startswith("vit.")}
    state = {name: tensor for name, tensor in whole.items() if not name.startswith("tap_norms.")}
    embedding = state.get("position_embedding")
    if embedding is None or embedding.dim() != 3:
        raise UserError(
            f"{origin}: no position embedding [1, N, D] of a ViT; it holds {some(list(state)) or 'nothing'}"
        )
    width, depth = embedding.shape[2], depth_of(state)
    refuse_misfits(shapes_of(partial(_vit, width, depth, heads)), state, origin)
    refuse_infinite(state, origin)
    return Backbone(width, depth, heads, state, origin)


def write_export(folder: Path, weights: Weights, about: dict[str, Any]) -> None:
    """Writes an export; `about` (plain values) is kept in config.json beside the sizes: step, samples and the like.

    config.json goes first and comes last, so that half an export is none. UserError where it cannot be written.
    """
    description = {"format": FORMAT, "model": to_dict(weights.model), "about": about}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        for name in NETWORKS:
            state = getattr(weights, name)
            # not save_file, whose files only their owner may read
            replace_file(folder / f"{name}.safetensors", serialize(state, {"format": "pt"}))
        write_json(folder / CONFIG, description)
    except OSError as error:
        raise unwritable(folder, error) from None


def read_export(folder: Path) -> Weights:
    """What write_export wrote. Raises UserError."""
    file = folder / CONFIG
    try:
        description = json.loads(file.read_text(encoding="utf8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export the weights again") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{file}: not the description of an export (format {FORMAT!r}); is this the right folder?")
    model = from_stored(Model, description.get("model"), str(file), "model.")
    model.check()
    states = {}
    for name, kind in NETWORKS.items():
        path = folder / f"{name}.safetensors"
        states[name], _ = read_safetensors(path, "export the weights again")
        refuse_misfits(shapes_of(partial(kind, model)), states[name], str(path))
    return Weights(model, states["teacher"], states["student"], str(folder))


def write_official(path: Path, weights: Weights, lossy: bool = False) -> float:
    """Writes an official checkpoint; returns the relative residual of its position embeddings, the larger of the two.

    UserError where something is lost and `lossy` is not set: a residual above 0.001, or taps that differ from blocks
    2, 4, 6, from which the official segmentation head reads; and always where there are fewer than 6 blocks. Left out:
    `segmentation.conv_mla`, which never runs.
    """
    if weights.model.depth < max(OFFICIAL_TAPS):
        raise UserError(
            f"{weights.origin}: the official code needs {max(OFFICIAL_TAPS)} blocks or more, this network has "
            f"{weights.model.depth}; export it in our own form (--out FOLDER)"
        )
    if weights.model.taps != OFFICIAL_TAPS and not lossy:
        raise UserError(
            f"{weights.origin}: its segmentation head reads blocks {weights.model.taps}, the official one reads "
            f"{OFFICIAL_TAPS} and would segment wrongly (the backbone is not affected); --lossy writes it nevertheless"
        )
    checkpoint, residual = {}, 0.0
    for name in NETWORKS:
        official, lost = to_official(getattr(weights, name), weights.model.width)
        residual = max(residual, lost)
        checkpoint[name] = {f"module.{key}": tensor for key, tensor in official.items()}
    if residual > LARGEST_RESIDUAL and not lossy:
        raise UserError(
            f"{weights.origin}: no 16×16 position embedding gives its 8×32 one; the closest is off by {residual:.2%} "
            f"of its length (at most {LARGEST_RESIDUAL:.1%} passes); --lossy writes it nevertheless"
        )
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(path, buffer.getvalue())
    return residual


def write_backbone(path: Path, found: Backbone) -> None:
    """Writes a ViT alone, one file under timm's names. UserError if it cannot be written."""
    tensors = {BACKBONE_PREFIX.sub("", official_name(f"vit.{name}")): value for name, value in found.state.items()}
    sizes = {name: str(getattr(found, name)) for name in BACKBONE_SIZES}
    write_whole(path, serialize(tensors, {"format": "pt", **sizes}))


def _of_official(checkpoint: dict[Any, Any], heads: int | None, path: Path) -> Weights:
    missing = [name for name in NETWORKS if not isinstance(checkpoint.get(name), dict)]
    if missing:
        held = some(list(map(str, checkpoint))) or "nothing"
        alone = "; the backbone of one network is enough for finetune --init" if len(missing) == 1 else ""
        raise UserError(f"{path}: no {' and no '.join(missing)} in it (it holds {held}){alone}")
    states = {name: unwrapped(checkpoint[name], f"{path}: {name}") for name in NETWORKS}
    model = official_sizes(states["student"], heads, str(path))
    model.check()
    converted = {
        name: from_official(states[name], shapes_of(partial(kind, model)), official_name, OFFICIAL_UNUSED, str(path))
        for name, kind in NETWORKS.items()
    }
    return Weights(model, converted["teacher"], converted["student"], str(path))


def _of_tensors(checkpoint: dict[Any, Any], heads: int | None, path: Path) -> Backbone:
    """The ViT in what a file holds: the teacher's, else the student's, or tensors by our own names."""
    network = next((checkpoint[name] for name in NETWORKS if isinstance(checkpoint.get(name), dict)), None)
    if network is not None:
        tensors = {name: value for name, value in unwrapped(network, str(path)).items() if name.startswith("backbone.")}
        official = {name: value for name, value in tensors.items() if not OFFICIAL_BESIDE.search(name)}
        embedding = official.get("backbone.pos_embed")
        if embedding is None or embedding.dim() != 3:
            raise UserError(f"{path}: no backbone.pos_embed [1, N, D] in it; not an official CCD checkpoint")
        width, depth, number = embedding.shape[2], depth_of(official), heads_of(embedding.shape[2], heads, str(path))
        wanted = shapes_of(partial(_vit, width, depth, number))
        state = from_official(
            official,
            {f"vit.{name}": shape for name, shape in wanted.items()},
            official_name,
            OFFICIAL_UNUSED,
            str(path),
        )
        return backbone_of(state, number, str(path))
    flat = unwrapped({name: value for name, value in checkpoint.items() if is_named(name, value)}, str(path))
    if EMBEDDING not in flat:
        held = some(list(map(str, checkpoint))) or "nothing"
        raise UserError(f"{path}: no teacher, no student, and no ViT of ours in it (it holds {held})")
    return backbone_of(flat, heads_of(flat[EMBEDDING].shape[-1], heads, str(path)), str(path))


def _vit(width: int, depth: int, heads: int) -> VisionTransformer:
    return build_backbone(Model(width=width, depth=depth, heads=heads), taps=())
