"""What this program imports of DeepSpeed: quietly, and with its complaints about a user's file as one line."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ccd_train.errors import UserError


def start(
    student: nn.Module, optimizer: torch.optim.Optimizer, content: dict[str, Any], name: str, verbose: bool
) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimiser. `name`: of the file with the settings. UserError for what DeepSpeed refuses."""
    deepspeed = _import_deepspeed(verbose)
    from deepspeed.runtime.config import DeepSpeedConfigError

    with contextlib.redirect_stdout(sys.stderr if verbose else io.StringIO()):  # it prints what it found
        try:
            engine, wrapped, _, _ = deepspeed.initialize(
                model=student, optimizer=optimizer, config=content, dist_init_required=False
            )
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"]))
            raise UserError(f"--deepspeed {name}: {place}: {wrong['msg']}; mend that setting") from None
        except DeepSpeedConfigError as error:
            raise UserError(f"--deepspeed {name}: {' '.join(str(error).split())}; remove that setting") from None
    return engine, wrapped


class Files:
    """DeepSpeed's checkpoint engine of this run: keeps what is to be written in memory, for checkpoint.py to write.

    So no rank meets a full disk between DeepSpeed's barriers, where the others would wait for it.
    """

    def __init__(self) -> None:
        self.contents: dict[str, memoryview] = {}

    def create(self, info: Any) -> None:
        self.contents = {}

    def save(self, state_dict: Any, path: str) -> None:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        self.contents[Path(path).name] = buffer.getbuffer()

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_file(Path(path), map_location)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is made by checkpoint.py."""

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, data_parallel_rank: int) -> bool:
        return data_parallel_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


def read_file(path: Path, map_location: Any = None, mmap: bool = False) -> Any:
    """One of a checkpoint's files. It runs no code: beside tensors only a few of DeepSpeed's plain classes are made.

    UserError for a file that holds anything else, which none of ours does.
    """
    if "deepspeed" not in sys.modules:
        _import_deepspeed(verbose=False)
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path}: not loaded, because it could run code ({found[1] if found else 'an unknown pickle'}); "
            "no checkpoint of ours holds that: do not use it"
        ) from None


def _import_deepspeed(verbose: bool) -> Any:
    """DeepSpeed, without its chatter unless `verbose`: it has a logger of its own and warns of its calls into torch."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from deepspeed.utils import logger

    for speaker in (logger, *logger.handlers):
        speaker.setLevel(logging.INFO if verbose else logging.WARNING)
    # On CPUs it would compile an all-reduce through shared memory at the first start. gloo needs no compiler, leaves
    # nothing behind when it is killed, and does not wait for ever for a rank that is gone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
