"""Who takes part in a run: where every rank is, and that all have the same code and the same settings."""

from __future__ import annotations

import hashlib
import logging
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from ccd_train import distributed
from ccd_train.config.run import flatten
from ccd_train.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Presence:
    host: str
    device: str
    interface: str
    """By which this rank reaches the first one, with its address there: "ib0 10.0.0.2"."""
    code: str
    """Fingerprint of this package as it is installed on the host."""
    settings: dict[str, Any]


def introduce(settings: dict[str, Any]) -> None:
    """Logs a line for every host (all ranks together). `settings` are by name, as in options.to_dict.

    Raises UserError on all ranks where one has other code or other settings than rank 0.
    """
    gpu = torch.cuda.get_device_name(distributed.device()) if torch.cuda.is_available() else ""
    device = f"{distributed.device()} {gpu}".strip()
    mine = Presence(socket.gethostname(), device, _interface(), fingerprint(Path(__file__).parents[1]), settings)
    present: list[Presence] = distributed.gather_objects(mine)
    if distributed.rank() == 0 and len(present) > 1:
        for host in dict.fromkeys(one.host for one in present):
            here = {rank: one for rank, one in enumerate(present) if one.host == host}
            places = ", ".join(f"rank {rank} on {one.device}" for rank, one in here.items())
            log.info("%s (%s): %s", host, next(iter(here.values())).interface, places)
    for rank, one in enumerate(present):
        where = f"rank {rank} on {one.host}"
        if one.code != present[0].code:
            raise UserError(
                f"{where} has other code (ccd_train {one.code}) than rank 0 on {present[0].host} ({present[0].code}); "
                "install the same commit on both"
            )
        if one.settings != present[0].settings:
            theirs, first = flatten(one.settings), flatten(present[0].settings)
            names = [name for name in sorted(theirs | first) if theirs.get(name) != first.get(name)]
            differences = ", ".join(f"{name}: {first.get(name)} → {theirs.get(name)}" for name in names)
            raise UserError(
                f"{where} has other settings than rank 0 on {present[0].host} ({differences}); "
                "start all with the same command"
            )


@cache
def fingerprint(package: Path) -> str:
    """Of all modules and recipes in a folder; the same for the same code wherever it lies."""
    whole = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.yaml")]):
        whole.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def _interface() -> str:
    address = distributed.own_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return f"{name} {address}"
    return address
