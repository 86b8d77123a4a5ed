"""Reads the words in images.

    ccd-train read --weights RUN word.png other.jpg       path, text and confidence, a line each
    ccd-train read --weights RUN FOLDER --json            every image in and below a folder, as JSON lines

An image is one word, as detectors crop them. Images that cannot be read are named on the error output and counted; the
exit code is 2 if none could be read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ccd_train.config.options import parse
from ccd_train.config.verbs import ReadOptions
from ccd_train.errors import FINISHED, REFUSED

if TYPE_CHECKING:
    from ccd_train.tasks.recognize.reading import Reading


def main(argv: list[str]) -> int:
    options = parse(ReadOptions, argv, "ccd-train read")  # before torch is imported: --help is quick
    options.check()
    from ccd_train.tasks.recognize.images import find_images, readings
    from ccd_train.tasks.recognize.reading import Reader, open_recognizer

    paths = find_images(options.images)
    unreadable = 0
    for path, reading in readings(Reader(open_recognizer(options)), paths):
        if isinstance(reading, str):
            unreadable += 1
            print(f"{_name(path)}: cannot be read ({reading})", file=sys.stderr)
        if options.json:
            print(json.dumps(_record(path, reading), ensure_ascii=False))
        elif not isinstance(reading, str):
            print(f"{_name(path)}\t{reading.text}\t{reading.confidence:.3f}")
    if unreadable:
        print(f"{unreadable} of {len(paths)} images cannot be read", file=sys.stderr)
    return REFUSED if unreadable == len(paths) else FINISHED


def _name(path: Path) -> str:
    """The path as it can be printed: bytes in it that are not UTF-8 as \\udcXX."""
    return str(path).encode(errors="backslashreplace").decode()


def _record(path: Path, reading: Reading | str) -> dict[str, object]:
    if isinstance(reading, str):
        return {"image": _name(path), "error": reading}
    return {
        "image": _name(path),
        "text": reading.text,
        "confidence": round(reading.confidence, 6),
        "characters": [round(confidence, 6) for confidence in reading.characters],
    }
