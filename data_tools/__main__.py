"""`ccd-data VERB …`, also `python -m data_tools VERB …`."""

from __future__ import annotations

import importlib
import io
import sys

from ccd_train.errors import UserError, run

VERBS = {
    "synth": "render an LMDB of words",
    "convert": "LMDBs → shards",
    "merge": "the manifest of shards that several machines converted",
    "index": "offsets and a manifest for tars that other tools wrote",
    "verify": "check shards against their manifest",
    "inspect": "a page that shows what is in the shards",
    "overlap": "find training crops that are in an evaluation set",
}


def dispatch() -> int:
    """Runs the verb that the command line names; returns its exit code. Only that verb's module is imported."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ccd-data VERB [options]      (ccd-data VERB --help tells more)\n")
        for verb, purpose in VERBS.items():
            print(f"  {verb:<8} {purpose}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise UserError(f"ccd-data {verb}: no such verb; there are {', '.join(VERBS)}")
    return int(importlib.import_module(f"data_tools.{verb}").main(arguments[1:]))


def main() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be bytes that no encoding knows
        sys.stdout.reconfigure(errors="backslashreplace")
    run(dispatch)


if __name__ == "__main__":
    main()
