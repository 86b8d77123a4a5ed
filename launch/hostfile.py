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

HOST = re.compile(r"\S+\s+slots=[1-9][0-9]*")
PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")  # what a shell leaves alone


def check_hostfile(path: Path | None) -> None:
    """Refuses what DeepSpeed's launcher would answer with a traceback."""
    form = "it has a line `node1 slots=8` for every node"
    if path is None or not path.is_file():
        raise UserError(f"hostfile {path or ''}: not a file; {form}")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    entries = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, start=1)]
    entries = [(number, text) for number, text in entries if text]
    hosts: list[str] = []
    for number, text in entries:
        if not HOST.fullmatch(text):
            raise UserError(f"hostfile {path}: line {number} is {text!r}; {form}")
        hosts.append(text.split()[0])
        if hosts.count(hosts[-1]) > 1:
            raise UserError(f"hostfile {path}: line {number} names {hosts[-1]} again; {form}")
    if not hosts:
        raise UserError(f"hostfile {path}: no host in it; {form}")


def main(argv: list[str]) -> int:
    """The exit code of the run."""
    check_hostfile(Path(argv[0]) if argv else None)
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
