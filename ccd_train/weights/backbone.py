"""Weights in files: official checkpoints in and out, and our own exports.

An export is a folder with `config.json`, `teacher.safetensors` and `student.safetensors`. An official checkpoint is a
`.pth` with `teacher` and `student`, whose names begin with `module.` (the wrapper of its training loop). The ViT
alone is one file under timm's names. Whatever does not fit is listed by name and refused. Nothing read here can run
code.

The position embedding is the one tensor that the two do not share. The official code stores a 16×16 grid and resizes
it to 8×32 on every forward pass; ours is the 8×32 grid itself. In: the resize is done once, exactly. Out: a 16×16 grid
whose resize comes closest, because the resize maps onto a space half as large.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ccd_train.config.options import to_dict
from ccd_train.config.pretraining import Model
from ccd_train.config.stored import from_stored
from ccd_train.errors import UserError
from ccd_train.files import replace_file, write_json
from ccd_train.models.ccd import Student, Teacher
from ccd_train.models.vit import GRID, VisionTransformer
from ccd_train.weights.writing import serialize, unwritable, write_whole

State = dict[str, Tensor]
NETWORKS: dict[str, type[Student] | type[Teacher]] = {"teacher": Teacher, "student": Student}
FORMAT = "ccd_train weights 1"
CONFIG = "config.json"
NAMED = 5  # tensors that an error names
TEACHER = "teacher.safetensors"

BACKBONE_SIZES = ("width", "depth", "heads")  # in the metadata of a backbone by itself
BACKBONE_PREFIX = re.compile(r"^backbone\.")  # without it the official names are timm's
OFFICIAL_TAPS = (2, 4, 6)
OFFICIAL_HEAD_WIDTH = 64  # width / heads of the official tiny, small and base
OFFICIAL_GRID = 16
EMBEDDING = "vit.position_embedding"
LARGEST_RESIDUAL = 1e-3  # of an exported position embedding, relative to its own length
# What the readers of zip, pickle and torch raise for damaged content.
DAMAGE = (
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, OverflowError),
    *(UnpicklingError, struct.error, zipfile.BadZipFile),
)

# Ours → official, in this order. The digits in nn.Sequential stand for the layers at these places.
OFFICIAL_NAMES = (
    (r"^vit\.patch_embedding\.", "backbone.patch_embed.proj."),
    (r"^vit\.position_embedding$", "backbone.pos_embed"),
    (r"^vit\.tap_norms\.", "backbone.norm_seg."),
    (r"^vit\.", "backbone."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.projection\.", ".attn.proj."),
    (r"(\.blocks\.\d+\.mlp)\.0\.", r"\1.fc1."),
    (r"(\.blocks\.\d+\.mlp)\.2\.", r"\1.fc2."),
    (r"^projection\.prototypes\.direction$", "head.last_layer.weight_v"),
    (r"^projection\.prototypes\.gain$", "head.last_layer.weight_g"),
    (r"^projection\.", "head."),
    (r"^segmentation\.branches\.0\.", "segmentation.mlahead.head2."),
    (r"^segmentation\.branches\.1\.", "segmentation.mlahead.head3."),
    (r"^segmentation\.branches\.2\.", "segmentation.mlahead.head4."),
    (r"^segmentation\.upsampling\.([01])\.", r"segmentation.unpool1.\1."),
    (r"^segmentation\.upsampling\.3\.", "segmentation.unpool2.0."),
    (r"^segmentation\.upsampling\.4\.", "segmentation.unpool2.1."),
    (r"^segmentation\.classifier\.", "segmentation.cls."),
    (r"\.running_variance$", ".running_var"),
)
# In official checkpoints, but without effect on any output of the official code.
OFFICIAL_UNUSED = re.compile(r"^backbone\.cls_token$|^segmentation\.conv_mla\.|\.num_batches_tracked$")


@dataclass(frozen=True)
class Weights:
    """The two networks of a pretraining, on the CPU in float32, and the sizes they have."""

    model: Model
    teacher: State
    student: State
    origin: str
    """Where they come from, for messages."""


def read(path: Path, heads: int | None = None) -> Weights:
    """An export (its folder or teacher.safetensors in it) or an official checkpoint (.pth). Raises UserError.

    heads: the attention heads of an official checkpoint whose width is not 64 a head, which its tensors do not tell.
    """
    if path.suffix in (".pth", ".pt"):
        return read_official(path, heads)
    folder = path.parent if path.suffix == ".safetensors" else path
    if (folder / CONFIG).is_file():
        if path not in (folder, folder / TEACHER):  # another file would be taken for the teacher
            raise UserError(f"{path}: only {TEACHER} or its folder stand for an export; give one of them")
        return read_export(folder)
    raise UserError(f"{path}: no weights here; give an export folder (with {CONFIG}) or an official .pth file")


def load(network: nn.Module, state: State, origin: str) -> None:
    """Loads every tensor of the state into the network; UserError lists what does not fit."""
    wanted = network.state_dict()
    refuse_misfits({name: tuple(tensor.shape) for name, tensor in wanted.items()}, state, origin)
    network.load_state_dict(state)


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
        try:
            states[name] = load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); export the weights again") from None
        refuse_misfits(shapes_of(partial(kind, model)), states[name], str(path))
    return Weights(model, states["teacher"], states["student"], str(folder))


def read_official(path: Path, heads: int | None = None) -> Weights:
    """An official checkpoint as ours. Tensors that the official forward pass never uses are left behind."""
    checkpoint = read_tensors(path)
    missing = [name for name in NETWORKS if not isinstance(checkpoint.get(name), dict)]
    if missing:
        held = ", ".join(map(str, checkpoint)) or "nothing"
        raise UserError(
            f"{path}: no {' and no '.join(missing)} in it (it holds {held}); not an official CCD checkpoint"
        )
    odd = [f"{name}: {key!r}" for name in NETWORKS for key, item in checkpoint[name].items() if not is_named(key, item)]
    if odd:
        raise UserError(f"{path}: {', '.join(odd)}: no tensors with names; not an official CCD checkpoint")
    states = {
        name: {key.removeprefix("module."): tensor for key, tensor in checkpoint[name].items()} for name in NETWORKS
    }
    model = _official_sizes(states["student"], heads, path)
    model.check()
    converted = {
        name: from_official(states[name], shapes_of(partial(kind, model)), official_name, OFFICIAL_UNUSED, str(path))
        for name, kind in NETWORKS.items()
    }
    return Weights(model, converted["teacher"], converted["student"], str(path))


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
        state = dict(getattr(weights, name))
        state[EMBEDDING], lost = official_embedding(state[EMBEDDING])
        residual = max(residual, lost)
        official = {official_name(key): tensor for key, tensor in state.items()}
        official["backbone.cls_token"] = torch.zeros(1, 1, weights.model.width)
        for key in [key for key in official if key.endswith(".running_mean")]:
            official[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
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


def write_backbone(path: Path, state: State, model: Model) -> None:
    """Writes the ViT of a state alone, one file under timm's names. UserError where it cannot be written."""
    names = {name: BACKBONE_PREFIX.sub("", official_name(name)) for name in state if name.startswith("vit.")}
    tensors = {official: state[name] for name, official in names.items() if "norm_seg" not in official}
    sizes = {name: str(getattr(model, name)) for name in BACKBONE_SIZES}
    write_whole(path, serialize(tensors, {"format": "pt", **sizes}))


def read_backbone(path: str | Path) -> VisionTransformer:
    """The ViT of a file that write_backbone wrote, in evaluation mode; it returns tokens and no taps. UserError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, official = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the backbone again") from None
    if not all(metadata.get(name, "").isdigit() for name in BACKBONE_SIZES):
        raise UserError(
            f"{path}: not a backbone (no {', '.join(BACKBONE_SIZES)}); see ccd-train export --format backbone"
        )
    vit = VisionTransformer(*(int(metadata[name]) for name in BACKBONE_SIZES), taps=())
    names = {name: BACKBONE_PREFIX.sub("", official_name(f"vit.{name}")) for name in vit.state_dict()}
    wanted = {names[name]: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    refuse_misfits(wanted, official, str(path))
    vit.load_state_dict({name: official[names[name]] for name in names})
    return vit.eval()


def official_name(name: str) -> str:
    """The official name, without `module.`, of a tensor of ours."""
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def resize_embedding(official: Tensor) -> Tensor:
    """[1, 256, D] on a 16×16 grid → [1, 256, D] on the 8×32 grid, as the official forward pass does it.

    Bicubic, with DINO's 0.1 added to the wanted sizes before the scale factors are computed, which torch then uses.
    """
    factors = [(size + 0.1) / OFFICIAL_GRID for size in GRID]
    square = official.float().unflatten(1, (OFFICIAL_GRID, OFFICIAL_GRID)).permute(0, 3, 1, 2)
    return F.interpolate(square, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)


def official_embedding(ours: Tensor) -> tuple[Tensor, float]:
    """The shortest least-squares inverse of `resize_embedding`, and what is lost: ‖resize(it) − ours‖ / ‖ours‖."""
    cells = OFFICIAL_GRID**2
    resize = resize_embedding(torch.eye(cells)[None])[0].double()  # linear: its columns are the resized unit grids
    official = (torch.linalg.pinv(resize, rtol=1e-6) @ ours[0].double())[None].float()
    lost = (resize_embedding(official) - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return official, float(lost)


def read_tensors(path: Path) -> dict[Any, Any]:
    """What a .pth file holds, read without running anything in it. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a checkpoint of torch ≥ 1.6, or cut short; copy it again, or save it with a newer torch"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            raise UserError(
                f"{path}: TorchScript, which is for torch.jit.load; give the run it comes from, or its .safetensors"
            )
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if unsafe:
            raise UserError(
                f"{path}: holds {', '.join(unsafe)}, which could run code and is not read; where you trust it, load it "
                "and save its tensors alone"
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: damaged ({reason}); copy it again") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not an official CCD checkpoint")
    return checkpoint


def is_named(name: object, item: object) -> bool:
    """Whether something in a file is a tensor under a name."""
    return isinstance(name, str) and torch.is_tensor(item)


def refuse_misfits(wanted: dict[str, tuple[int, ...]], found: State, origin: str) -> None:
    """UserError counts the tensors that are missing, have no place or another shape, and names the first of them."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place" for name in found if name not in wanted]
    problems += [
        f"{name} is {_size(found[name].shape)} instead of {_size(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise UserError(f"{origin}: {len(problems)} tensors do not fit this model: {'; '.join(problems[:NAMED])}{more}")


def from_official(
    official: State,
    wanted: dict[str, tuple[int, ...]],
    name_of: Callable[[str], str],
    unused: re.Pattern[str],
    origin: str,
) -> State:
    """A network's official tensors, without those that are unused, as ours; `wanted` are our names and shapes."""
    used = {name: tensor for name, tensor in official.items() if not unused.search(name)}
    refuse_misfits({name_of(name): shape for name, shape in wanted.items()}, used, origin)
    state = {name: used[name_of(name)].float() for name in wanted}
    state[EMBEDDING] = resize_embedding(state[EMBEDDING])
    return state


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors by name, without their memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def _official_sizes(student: State, heads: int | None, path: Path) -> Model:
    """The sizes that the shapes of an official student tell."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        tensor = student.get(name)
        if tensor is None or tensor.dim() != dimensions:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UserError(f"{path}: student's {name} {found}; not an official CCD checkpoint")
        return tuple(tensor.shape)

    width = shape("backbone.pos_embed", 3)[2]
    if heads is None and width % OFFICIAL_HEAD_WIDTH:
        raise UserError(f"{path}: its width {width} is not 64 a head; say how many attention heads it has: --heads N")
    blocks = {int(match[1]) for name in student if (match := re.match(r"backbone\.blocks\.(\d+)\.", name))}
    prototypes, bottleneck = shape("head.last_layer.weight_v", 2)
    gain = student.get("head.last_layer.weight_g")
    return Model(
        width=width,
        depth=max(blocks, default=-1) + 1,
        heads=heads or width // OFFICIAL_HEAD_WIDTH,
        taps=OFFICIAL_TAPS,
        segmentation_width=shape("segmentation.mlahead.head2.0.weight", 4)[0],
        head_hidden=shape("head.mlp.0.weight", 2)[0],
        head_bottleneck=bottleneck,
        prototypes=prototypes,
        freeze_gain=gain is not None and bool((gain == 1).all()),
    )


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    return "×".join(map(str, shape)) if math.prod(shape) != 1 or shape else "a number"
