"""torchrun for our wrappers: patient when it is told to stop, and one line instead of a traceback.

    python -m launch.torchrun --standalone --nproc_per_node 2 -m ccd_train pretrain …       torchrun's own options

torchrun passes a signal on to its workers, kills them after 30 s, and ends with a traceback of its own whatever they
did. A worker that saves may need longer, and what it did is in `outcome.json`. SIGUSR1, of which torchrun would die, is
passed on likewise, except where whoever starts it has it ignored. Where several nodes meet, each says that it is there,
so that the log shows which of them is not.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from argparse import Namespace

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import parse_args, run

from ccd_train import distributed

SHUTDOWN_SECONDS = 600


def main(argv: list[str]) -> int:
    """0 if all workers of this machine ended with 0, else 1."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's choice, without its five lines about it
    arguments = parse_args(argv)
    if signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN:
        arguments.signals_to_handle += ",SIGUSR1"
    place = meeting_place(arguments)
    node = socket.gethostname()
    try:
        if place:
            host, _, port = place.rpartition(":")
            address = distributed.address_towards(host, int(port))
            print(f"{node} ({address}): {arguments.nproc_per_node} processes, meeting at {place}", flush=True)
        run(arguments)
    except (SignalException, ChildFailedError):
        return 1
    except socket.gaierror as error:
        print(f"error: {node} cannot resolve {place} ({error.strerror}); check the host's name", file=sys.stderr)
        return 1
    except (RendezvousConnectionError, RendezvousTimeoutError):
        print(
            f"error: {node}: not all {arguments.nnodes} nodes met at {place}; those that came said so. Look at the "
            "others' logs, at the port there, and at the interfaces between the nodes (GLOO_SOCKET_IFNAME)",
            file=sys.stderr,
        )
        return 1
    except (DistNetworkError, DistStoreError) as error:
        print(f"error: {node}: {explain(error, place)}", file=sys.stderr)
        return 1
    return 0


def explain(error: Exception, place: str) -> str:
    """Why the meeting place could not be had or reached, and the remedy, as one line."""
    if "EADDRINUSE" in str(error):
        return f"the port of {place} is in use here; set MASTER_PORT (torchrun: --master-port) to a free one everywhere"
    return (
        f"no meeting at {place} ({(str(error).splitlines() or [type(error).__name__])[0]}); look at the first node's "
        "log, at MASTER_ADDR and MASTER_PORT, and at the firewall"
    )


def meeting_place(arguments: Namespace) -> str:
    """HOST:PORT where the nodes of this job meet; empty where there is one node only."""
    if arguments.standalone or arguments.nnodes in ("1", "1:1"):
        return ""
    return arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
