"""The front door of ccd-train, ccd-data and ccd-submit: --help, --version, and the verb that is meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ccd_train import __version__
from ccd_train.errors import UserError, did_you_mean


def choose(program: str, about: str, verbs: Mapping[str, str], words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that a command line names, and the words after it.

    --help, which no words at all mean too, and --version are answered here and end the program. UserError for a verb
    that is none.
    """
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(about)
        print("\n".join(f"  {key:10} {text}" for key, text in verbs.items()))
        raise SystemExit(0)
    if name == "--version":
        print(f"{program} {__version__}")
        raise SystemExit(0)
    if name not in verbs:
        remedy = did_you_mean(name, verbs) or f"; there are {', '.join(verbs)}"
        raise UserError(f"{program} {name}: no such verb{remedy}")
    return name, list(words[1:])
