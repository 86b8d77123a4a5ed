"""What a run will take, before it runs: parameters, operations, memory, traffic, images per second, days.

    ccd-train estimate --config vit_small --gpus 8 --gpu h200
    ccd-train estimate --config vit_small --gpu h200 --train.micro_batch_size 256 --table     1 to 1,024 GPUs, Markdown

From formulas (budget.py), with the assumptions that docs/performance.md lists; no GPU is needed.
"""

from __future__ import annotations

from ccd_train.config.options import parse
from ccd_train.config.verbs import EstimateSettings
from ccd_train.reports.estimation import describe, table


def main(argv: list[str]) -> int:
    settings = parse(EstimateSettings, argv, "ccd-train estimate")
    settings.check()
    print(table(settings) if settings.table else describe(settings))
    return 0
