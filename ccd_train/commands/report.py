"""ccd-train report: one HTML page about a run, or several beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from ccd_train.errors import UserError
from ccd_train.files import replace_file
from ccd_train.reports.history import read_history
from ccd_train.reports.page import page


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ccd-train report", description="One HTML page about a run, or several.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page; left out: RUN/report.html, for several runs needed")
    arguments = parser.parse_args(argv)
    if arguments.out is None and len(arguments.runs) > 1:
        raise UserError("--out: several runs are compared in a page of their own; name it: --out compared.html")
    out = arguments.out or arguments.runs[0] / "report.html"
    text = page([read_history(path) for path in arguments.runs])
    try:
        replace_file(out, text.encode())
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose another --out") from None
    print(out)
    return 0
