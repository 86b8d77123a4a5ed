"""How a program ends: exit codes, the errors that users see, and the one place that prints them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

FINISHED = 0
REFUSED = 2  # a user's error: nothing was done, nothing was lost
FAILED = 3  # training itself went wrong; starting again would not help
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: start me again


class UserError(Exception):
    """Something that the user can mend. One line: what is wrong, where, and the remedy. Ends with exit code 2."""


class MissingRanksError(UserError):
    """Ranks did not come to the start. A training run ends as unfinished: the next start may find them."""


class OccupiedError(UserError):
    """Another life is going on in the run folder: nothing there is this life's to write."""


class TrainingError(Exception):
    """Training cannot go on (non-finite losses, collapse, a rank lost). One line. Ends with exit code 3."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that it resembles, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def run(verb: Callable[[], int]) -> NoReturn:
    """Runs a command-line verb and exits with its code; user errors become one line on stderr."""
    try:
        code = verb()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = REFUSED
    except TrainingError as error:
        print(f"failed: {error}", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:  # the reader (head, less) has gone; not an error of ours
        sys.stderr.close()
        code = FINISHED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
