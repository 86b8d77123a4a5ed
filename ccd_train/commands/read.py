"""Reads the words in images.

    ccd-train read --weights RUN word.png other.jpg       path, text and confidence, a line each
    ccd-train read --weights RUN FOLDER --json            every image in and below a folder, as JSON lines

An image is one word, as detectors crop them. In a folder, a file is an image by its content or by its name; hidden ones
are not tried, and what is left out is counted. Tabs and line breaks in names are escaped, but for --json. Images that
cannot be read are named on the error output and counted; the exit code is 2 if none could be read.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ccd_train.config.options import parse
from ccd_train.config.verbs import ReadOptions
from ccd_train.errors import FINISHED, REFUSED

if TYPE_CHECKING:
    from ccd_train.tasks.recognize.reading import Reading

_BREAKS = re.compile(r"[\t\v\f\r\n\x1c-\x1e\x85\u2028\u2029]")  # what would divide a line or its columns


def main(argv: list[str]) -> int:
    options = parse(ReadOptions, argv, "ccd-train read")  # before torch is imported: --help is quick
    options.check()
    from ccd_train.data.trees import count_kinds
    from ccd_train.tasks.recognize.images import find_images, readings
    from ccd_train.tasks.recognize.reading import Reader, open_recognizer

    paths, left_out = find_images(options.images)
    unreadable = 0
    for path, reading in readings(Reader(open_recognizer(options)), paths):
        if isinstance(reading, str):
            unreadable += 1
            print(f"{_escaped(path)}: cannot be read ({reading})", file=sys.stderr)
        if options.json:
            print(json.dumps(_record(path, reading), ensure_ascii=False))
        elif not isinstance(reading, str):
            print(f"{_escaped(path)}\t{reading.text}\t{reading.confidence:.3f}")
    if unreadable:
        print(f"{unreadable} of {len(paths)} images cannot be read", file=sys.stderr)
    if left_out:
        print(f"left out, as they are no images or hidden: {count_kinds(left_out)}", file=sys.stderr)
    return REFUSED if unreadable == len(paths) else FINISHED


def _name(path: Path) -> str:
    """The path as it can be printed: bytes in it that are not UTF-8 as \\udcXX."""
    return str(path).encode(errors="backslashreplace").decode()


def _escaped(path: Path) -> str:
    """The same on one line and in one column."""
    return _BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), _name(path))


def _record(path: Path, reading: Reading | str) -> dict[str, object]:
    if isinstance(reading, str):
        return {"image": _name(path), "error": reading}
    return {
        "image": _name(path),
        "text": reading.text,
        "confidence": round(reading.confidence, 6),
        "characters": [round(confidence, 6) for confidence in reading.characters],
    }
