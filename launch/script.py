"""A batch script for one run or corpus, made from a template of this folder that people can also edit by hand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources

from ccd_train.errors import UserError


def directive(option: str, value: str | None) -> str:
    """One `#SBATCH` line, with the value quoted as sbatch unquotes it. None: the option stands alone."""
    if value is None:
        return f"#SBATCH --{option}"
    if "\n" in value:
        raise UserError(f"--{option} {value!r}: no line break may stand in a #SBATCH line")
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return f"#SBATCH --{option}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'


def render(template: str, options: Mapping[str, str | None], lines: Mapping[str, str]) -> str:
    """The template with other `#SBATCH` lines, and with other assignments.

    `lines` maps the beginning of a line of the template, such as "hook()", to the line that takes its place.
    """
    text = resources.files("launch").joinpath(template).read_text(encoding="utf-8")
    rows = text.splitlines()
    first = next(index for index, row in enumerate(rows) if row.startswith("#SBATCH"))
    rows = [row for row in rows if not row.lstrip("#").startswith("SBATCH")]
    rows[first:first] = [directive(option, value) for option, value in options.items()]
    for beginning, line in lines.items():
        places = [index for index, row in enumerate(rows) if row.startswith(beginning)]
        assert len(places) == 1, f"{template}: {len(places)} lines begin with {beginning!r}"
        rows[places[0]] = line
    return "\n".join(rows) + "\n"


def array(name: str, values: Sequence[str]) -> str:
    """`name=(…)` in bash, every value literal."""
    return f"{name}=({' '.join(map(shlex.quote, values))})"
