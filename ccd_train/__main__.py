"""ccd-train: pretrains a text recogniser without labels, and what belongs to it.

ccd-train VERB --help        (or python -m ccd_train VERB --help)
"""

from __future__ import annotations

import importlib
import sys

from ccd_train.errors import run
from ccd_train.programs import choose

VERBS = {
    "pretrain": "pretrain on shards; the same --run_dir again goes on where it stopped",
    "finetune": "teach a pretrained backbone to read, to find text or to enlarge it",
    "report": "one HTML page about a run, or several beside each other",
    "estimate": "parameters, operations, memory, traffic, images per second and days, before a run",
    "views": "draw the views, masks and regions of some samples",
    "probe": "classify characters with frozen features",
    "doctor": "look at everything that a run needs, here or on every node",
    "read": "read the words in images",
    "segment": "mark the text in pictures of words",
    "upscale": "make better pictures of poor pictures of words",
    "evaluate": "measure on benchmarks how well a network reads, segments or enlarges",
    "export": "write a run's weights for others",
}


def verb() -> int:
    name, arguments = choose("ccd-train", __doc__, VERBS, sys.argv[1:])
    return importlib.import_module(f"ccd_train.commands.{name}").main(arguments)  # type: ignore[no-any-return]


def main() -> None:
    run(verb)


if __name__ == "__main__":
    main()
