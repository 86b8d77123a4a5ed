"""Looks at everything that a run needs, on this machine or on every node, before hours of queue are spent on it.

    ccd-train doctor                                                               this machine
    ccd-train doctor --config vit_small --run_dir RUN --data.shards SHARDS         and what this run needs, and one step
    torchrun … -m ccd_train doctor --nodes --config …                              a table for every node

Settings are those of `ccd-train pretrain`. Ends with 1 if a run would fail. The step is a real one, with a checkpoint,
in RUN/doctor, which is removed again.
"""

from __future__ import annotations

import socket

from ccd_train.config.options import parse
from ccd_train.config.verbs import Examined
from ccd_train.errors import FINISHED

WOULD_FAIL = 1


def main(argv: list[str]) -> int:
    config = parse(Examined, argv, "ccd-train doctor")  # before torch is imported: --help is quick
    from ccd_train import distributed
    from ccd_train.tasks.pretrain.checkup import accelerators, all_reduce, disks, limits, one_step, table, versions

    mine = versions() + accelerators() + limits() + disks(config)
    distributed.initialize(config.distributed.timeout)
    mine += all_reduce()
    hosts = dict(distributed.gather_objects((socket.gethostname(), mine)))
    talks = distributed.rank() == 0
    shown = hosts if config.nodes else {socket.gethostname(): mine}
    failing = {host: findings for host, findings in hosts.items() if any(finding.fatal for finding in findings)}
    if talks:
        print("\n".join(table(host, findings) for host, findings in (shown | failing).items()), flush=True)
    step = [] if failing else one_step(config)
    if talks and step:
        print(table("all ranks", step), flush=True)
    distributed.finalize()
    return WOULD_FAIL if failing or any(finding.fatal for finding in step) else FINISHED
