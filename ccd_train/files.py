"""Writing files that are whole or not there, knowing them again by their hash, and having enough of them open."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

from ccd_train.errors import UserError

BLOCK = 1 << 20
OPEN_FILES = 256  # of a process that trains or reads for one: up to 128 shards, pipes, sockets, libraries


def allow_open_files() -> None:
    """Raises this process's limit of open files to what the system allows, workers inherit it.

    UserError where that is too little: with fewer, workers of the loader spin and wait for ever.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        raise UserError(
            f"only {hard} files may be open here, and a run needs up to {OPEN_FILES}; raise it: ulimit -n 4096, or in "
            "/etc/security/limits.conf"
        )
    if hard != soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Digest(NamedTuple):
    """A file's size in bytes and the sha256 of its content."""

    size: int
    sha256: str


def write_file(path: Path, content: bytes | memoryview) -> Digest:
    """Writes and fsyncs a file in one go; raises OSError where the file system will not take it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def digest(path: Path) -> Digest:
    """Of a file as it stands; raises OSError where it cannot be read."""
    sha256 = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            size += len(block)
    return Digest(size, sha256.hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Puts a new content in place of a file's old one: readers see either, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file by the value as JSON, whole or not at all."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
