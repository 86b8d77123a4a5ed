"""Compiles what DeepSpeed would compile at a run's first start, where it looks like a hang.

    python -m launch.operators

On CPUs that is the communication operator, about two minutes; on GPUs this project's optimiser needs none. torch keeps
the result under TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions: with a shared home, once for a cluster.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

OPERATOR = "deepspeed_shm_comm"


def main() -> int:
    if torch.cuda.is_available():
        return 0
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    start = None if any(root.glob(f"**/{OPERATOR}.so")) else time.monotonic()
    if start is not None:
        print("compiling DeepSpeed's communication operator for CPUs, once (about 2 minutes) …", flush=True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that there is no other
    from deepspeed.accelerator import get_accelerator  # seconds to import

    get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    if start is not None:
        print(f"compiled in {time.monotonic() - start:.0f} s, under {root}")
    return 0


if __name__ == "__main__":
    main()
