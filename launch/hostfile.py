"""Starts a run with DeepSpeed's launcher on the nodes of a hostfile. Called by deepspeed_pretrain.sh.

DeepSpeed joins its command into one line for a remote shell, which would split and execute what stands in the settings.
So the settings travel in a file, `RUN/launch.yaml`, whose name is the only argument.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ccd_train.config.options import describe, parse
from ccd_train.config.pretraining import Config
from ccd_train.errors import UserError, run
from launch import outcome

PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")  # what a shell leaves alone


def main(argv: list[str]) -> int:
    """The exit code of the run."""
    if not argv or not Path(argv[0]).is_file():
        raise UserError(f"hostfile {argv[0] if argv else ''}: not a file; it has a line `node1 slots=8` for every node")
    config = parse(Config, argv[1:], "ccd-train pretrain")
    config.check()
    assert config.run_dir is not None
    path = config.run_dir.resolve() / "launch.yaml"
    if not PLAIN.fullmatch(str(path)):
        raise UserError(f"--run_dir {config.run_dir}: a remote shell would split it; use letters, digits and _@+=:,./-")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(describe(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a folder you may write to") from None
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", argv[0], "--no_local_rank"]
    return outcome.main([*launcher, "--module", "ccd_train", "pretrain", "--config", str(path)])


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
