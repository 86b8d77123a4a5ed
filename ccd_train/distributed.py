"""Ranks and collectives. The only module that reads rank variables; everything works in a single process too."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from ccd_train.errors import MissingRanksError, UserError

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number; before `initialize`, the one that the launcher gave it."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes train on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))  # the latter: DeepSpeed


def device() -> torch.device:
    """This rank's device: its GPU where there are any, else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def upload(table: Tensor, to: torch.device | None = None) -> Tensor:
    """A tensor of the host on a device, by default this rank's, without waiting for what the device is doing."""
    to = to or device()
    return table if to.type == "cpu" else table.pin_memory().to(to, non_blocking=True)


def end_with_launcher() -> None:
    """Has this process told to stop (SIGTERM) when the launcher that started it is killed: no rank goes on alone.

    Linux only; a process that was started without a launcher goes on, as under nohup.
    """
    if "RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def initialize(timeout_seconds: float) -> None:
    """Joins the process group that torchrun, srun or the deepspeed launcher described; alone, makes one of its own.

    A process that has joined already stays as it is. Raises UserError where the description is incomplete or its port
    is taken.
    """
    if dist.is_initialized():
        return
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if len(missing) == len(RANK_VARIABLES):
        _refuse_tasks_of_slurm()
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    elif missing:
        raise UserError(
            f"environment: {', '.join(missing)} not set although {_first_set()} is; "
            "start with torchrun (launch/torchrun_pretrain.sh), or unset all of them to run alone"
        )
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank()} has no GPU: this machine shows {torch.cuda.device_count()}; "
                "start fewer processes per node or ask for more GPUs"
            )
        torch.cuda.set_device(device())
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store = _meet(timeout)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            # NCCL ends a process without a word when its time is over; a run's own watch should speak before that
            timeout=timeout + timedelta(minutes=2) if torch.cuda.is_available() else timeout,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            device_id=device() if torch.cuda.is_available() else None,
        )
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if _port_is_taken(error):
            raise UserError(
                f"{address}: the port is in use here; set MASTER_PORT (torchrun: --master-port) to a free one"
            ) from None
        raise UserError(
            f"{address}: rank {os.environ['RANK']} cannot reach it ({_first_line(error)}); "
            "check MASTER_ADDR, MASTER_PORT and the firewall"
        ) from None


def _refuse_tasks_of_slurm() -> None:
    """UserError if srun started several tasks and no launcher told them of each other: each would train alone."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in os.environ and tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"task {int(os.environ['SLURM_PROCID']) + 1} of {tasks} of SLURM, but no launcher tells it of the others; "
            "start with launch/torchrun_pretrain.sh, one task a node, or with srun --ntasks=1 to train in one process"
        )


def _meet(timeout: timedelta) -> Store:
    """The store in which all ranks have said that they are there. Raises MissingRanksError with their names.

    torch's own way in counts the ranks, but cannot say who they are.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    keeper = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun keeps it
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    whole = TCPStore(address, port, ranks, keeper, timeout, wait_for_workers=False)
    store = PrefixStore(f"ccd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", whole)
    store.set(f"present/{rank()}", socket.gethostname())
    end, missing = time.monotonic() + timeout.total_seconds(), set(range(ranks))
    while missing := {number for number in missing if not store.check([f"present/{number}"])}:
        if time.monotonic() > end:
            here = [f"{n} on {store.get(f'present/{n}').decode()}" for n in sorted(set(range(ranks)) - missing)]
            store.set("given up", f"{', '.join(map(str, sorted(missing)))} of {ranks} (there: {', '.join(here)})")
        if store.check(["given up"]):
            lost = store.get("given up").decode()
            time.sleep(2 if keeper else 0)  # the others want to read it too
            raise MissingRanksError(
                f"rank {rank()} on {socket.gethostname()}: within {timeout.total_seconds():.0f} s there was nothing of "
                f"rank {lost}; look at the log of the missing, or raise --distributed.timeout"
            )
        time.sleep(0.05)
    return store


def own_address() -> str:
    """The address by which this process reaches the first rank's host."""
    return address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def address_towards(host: str, port: int) -> str:
    """The address by which this machine goes to another. Raises socket.gaierror where that has no address."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # nothing is sent: UDP only chooses the way
        return str(probe.getsockname()[0])


def joined() -> bool:
    """Whether this process has met the others."""
    return dist.is_initialized()


def finalize() -> None:
    """Leaves the process group, if this process has joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Adds the tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank (small control data only: it is pickled between our own processes)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """A user error of any rank within becomes one on all ranks, so that none waits for one that has refused."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = error
    first: UserError | None = next((found for found in gather_objects(mine) if found is not None), None)
    if first is not None:
        raise first


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _first_set() -> str:
    return next(name for name in RANK_VARIABLES if name in os.environ)


def _port_is_taken(error: Exception) -> bool:
    return "EADDRINUSE" in str(error) or os.strerror(errno.EADDRINUSE).lower() in str(error).lower()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
