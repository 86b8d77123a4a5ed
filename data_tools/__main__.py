"""ccd-data: LMDBs to webdataset shards, and looks at what is in them.

ccd-data VERB --help        (or python -m data_tools VERB --help)
"""

from __future__ import annotations

import importlib
import io
import sys

from ccd_train.errors import run
from ccd_train.programs import choose

VERBS = {
    "synth": "render an LMDB of words",
    "convert": "LMDBs → shards",
    "merge": "the manifest of shards that several machines converted",
    "index": "offsets and a manifest for tars that other tools wrote",
    "crops": "word crops with masks from TextSeg's release",
    "verify": "check shards against their manifest",
    "inspect": "a page that shows what is in the shards",
    "overlap": "find training crops that are in an evaluation set",
}


def verb() -> int:
    """Runs the verb that the command line names; returns its exit code. Only that verb's module is imported."""
    name, arguments = choose("ccd-data", __doc__, VERBS, sys.argv[1:])
    return int(importlib.import_module(f"data_tools.{name}").main(arguments))


def main() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be bytes that no encoding knows
        sys.stdout.reconfigure(errors="backslashreplace")
    run(verb)


if __name__ == "__main__":
    main()
