"""Several ranks on this machine: real processes, real gloo."""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ccd_train import distributed

PATIENCE = 240.0  # seconds for the slowest rank
PRELOADED = ["ccd_train.tasks.choice", "ccd_train.training.library"]  # imported once, not for every rank: 5 s of work


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, importable by name, returns on each of `world_size` ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = context.Queue()
    processes = [
        context.Process(
            target=_rank,
            args=(rank, world_size, port, dict(os.environ), results, function, arguments),
            daemon=False,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found: dict[int, Any] = {}
        while len(found) < world_size:
            rank, value, failure = results.get(timeout=PATIENCE)
            assert failure is None, f"rank {rank}:\n{failure}"
            found[rank] = value
    except queue.Empty:
        raise AssertionError(
            f"no answer within {PATIENCE:.0f} s from ranks {set(range(world_size)) - set(found)}"
        ) from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == world_size else 0)
            process.kill()
    return [torch.load(io.BytesIO(found[rank]), weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # that of the server is from its start
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        distributed.initialize(PATIENCE)
        value = io.BytesIO()  # as bytes: tensors would travel as handles that die with their process
        torch.save(function(*arguments), value)
        results.put((rank, value.getvalue(), None))
        distributed.finalize()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
