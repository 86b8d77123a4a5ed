"""torchrun for our wrappers: without its tracebacks, and patient when it is told to stop.

    python -m launch.torchrun --standalone --nproc_per_node 2 -m ccd_train pretrain …       torchrun's own options

torchrun passes a signal on to its workers, kills them after 30 s, and ends with a traceback of its own whatever they
did. A worker that saves may need longer, and what it did is in `outcome.json`.
"""

from __future__ import annotations

import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

SHUTDOWN_SECONDS = 600


def main(argv: list[str]) -> int:
    """0 if all workers of this machine ended with 0, else 1."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's choice, without its five lines about it
    try:
        run(parse_args(argv))
    except (SignalException, ChildFailedError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
