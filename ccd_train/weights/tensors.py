"""Tensors in files of any origin, read by content, checked, and never run.

torch.save writes a zip archive, whatever the file is called (`.pth`, `.pt`, `checkpoint.pth.tar`, `pytorch_model.bin`);
safetensors begins with the length of a JSON header. Wrappers put words before the names of tensors: `module.`
(DistributedDataParallel), `_orig_mod.` (torch.compile); they are taken off.
"""

from __future__ import annotations

import argparse
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ccd_train.errors import UserError

State = dict[str, Tensor]
# Classes that are data alone: DINO and its forks keep their options beside the tensors.
PLAIN: list[Any] = [argparse.Namespace]
NAMED = 5  # tensors that an error names
WRAPPERS = ("module.", "_orig_mod.")
# What the readers of zip, pickle and torch raise for damaged content.
DAMAGE = (
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, OverflowError),
    *(UnpicklingError, struct.error, zipfile.BadZipFile),
)


def is_torch(path: Path) -> bool:
    """Whether torch.save wrote this file."""
    return path.is_file() and zipfile.is_zipfile(path)


def is_safetensors(path: Path) -> bool:
    """Whether this file looks like safetensors: a length, then JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size


def refuse_strange(path: Path) -> UserError:
    """The error for a file that holds no weights in any form, with what it seems to be."""
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip().lower()
    except OSError as error:
        return UserError(
            f"{path}: cannot be read ({error.strerror}); give a run folder, an export, or an official .pth"
        )
    if start.startswith(b"version https://git-lfs"):
        return UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        return UserError(f"{path}: a web page, not the file itself; download it again")
    if path.suffix == ".safetensors":
        return UserError(f"{path}: cannot be read (no header of safetensors at its start); copy it again")
    return UserError(
        f"{path}: not a checkpoint of torch ≥ 1.6, or cut short; copy it again, or save it with a newer torch"
    )


def read_tensors(path: Path) -> dict[Any, Any]:
    """What a .pth file holds, read without running anything in it. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not is_torch(path):
        raise refuse_strange(path)
    try:
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            raise UserError(
                f"{path}: TorchScript, which is for torch.jit.load; give the run it comes from, or its .safetensors"
            )
        with torch.serialization.safe_globals(PLAIN):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if unsafe:
                raise UserError(
                    f"{path}: holds {', '.join(unsafe)}, which could run code and is not read; where you trust it, "
                    "load it and save its tensors alone"
                )
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: damaged ({reason}); copy it again") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not an official CCD checkpoint")
    return checkpoint


def read_safetensors(path: Path, remedy: str) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError, which ends in the remedy."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None


def unwrapped(tensors: dict[Any, Any], origin: str) -> State:
    """Tensors under their names, without what wrappers put before these. Raises UserError for anything else."""
    odd = [repr(name) for name, item in tensors.items() if not is_named(name, item)]
    if odd:
        raise UserError(f"{origin}: {some(odd)}: no tensors with names; give a checkpoint of weights")
    return {_bare(name): tensor for name, tensor in tensors.items()}


def _bare(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")


def some(texts: list[str], between: str = ", ") -> str:
    """The first few of a list, and how many more there are."""
    more = f"{between}and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return between.join(texts[:NAMED]) + more


def refuse_infinite(state: State, origin: str) -> None:
    """UserError names the first tensor that holds NaN or an infinity: such weights compute nothing."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{origin}: {name} holds NaN or infinite values; take an older checkpoint")


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
        raise UserError(f"{origin}: {len(problems)} tensors do not fit this model: {some(problems, '; ')}")


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors by name, without their memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def load(network: nn.Module, state: State, origin: str) -> None:
    """Loads every tensor of the state into the network; UserError lists what does not fit."""
    wanted = network.state_dict()
    refuse_misfits({name: tuple(tensor.shape) for name, tensor in wanted.items()}, state, origin)
    network.load_state_dict(state)


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    return "×".join(map(str, shape)) if math.prod(shape) != 1 or shape else "a number"
