"""ccd-train finetune: teaches a pretrained backbone a task, the one that its recipe names."""

from __future__ import annotations

import logging

from ccd_train.config.options import parse
from ccd_train.config.pixels import Segmenting, Upscaling
from ccd_train.config.recognition import FineTuning


def main(argv: list[str]) -> int:
    config = parse(
        FineTuning, argv, "ccd-train finetune", Segmenting, Upscaling
    )  # before torch is imported: --help and a refusal are quick
    from ccd_train import distributed
    from ccd_train.tasks.choice import task_of
    from ccd_train.training.train import conclude, live

    logging.basicConfig(format="%(message)s", level=logging.INFO if distributed.rank() == 0 else logging.WARNING)
    distributed.end_with_launcher()
    return conclude(config.run_dir, lambda: live(task_of(config)))
