"""Marks the text in pictures of words: a mask for each, 255 where text is, at the size of the picture.

    ccd-train segment --weights RUN FOLDER --out DIR             every picture in and below a folder
    ccd-train segment --weights RUN a.png "b/*.jpg" list.json --out DIR

A picture is one word, as detectors crop them, of any size. DIR/written.json lists what was written. Pictures that
cannot be read are named on the error output and counted; the exit code is 2 if none could be read.
"""

from __future__ import annotations

from ccd_train.config.options import parse
from ccd_train.config.pixels import SEGMENT
from ccd_train.config.verbs import PaintOptions


def main(argv: list[str]) -> int:
    options = parse(PaintOptions, argv, "ccd-train segment")  # before torch is imported: --help is quick
    options.check()
    from ccd_train.tasks.pixels.files import open_task, paint_files

    return paint_files(options, open_task(options, SEGMENT))
