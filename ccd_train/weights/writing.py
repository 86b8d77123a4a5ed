"""Weights on their way into a file: whole or not at all, and the same bytes for the same weights."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ccd_train.errors import UserError
from ccd_train.files import replace_file


def serialize(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file. The library writes metadata in an order that changes from run to run; here it is sorted."""
    content = save({name: tensor.contiguous() for name, tensor in state.items()}, metadata)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)  # the tensors begin at a multiple of 8
    return struct.pack("<Q", len(ordered)) + ordered + content[8 + length :]


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all, and the folders above it. UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for users when the file system will not take a file."""
    return UserError(f"{path}: cannot be written ({error}); make room, or choose another place")


def refuse_unwritable(path: Path) -> None:
    """UserError where no file can be written at this place. Makes the folders above it."""
    try:
        if path.is_dir():
            raise IsADirectoryError("a folder is there")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise unwritable(path, error) from None
