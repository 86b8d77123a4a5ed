"""Writes the weights of a run for others, or turns weights from one form into the other.

    ccd-train export RUN                                      RUN/export: safetensors and their sizes, as config.json
    ccd-train export RUN --step 40000 --out FOLDER            those of an older checkpoint
    ccd-train export RUN --out ccd.pth                        an official checkpoint
    ccd-train export official.pth --out FOLDER                the official weights in our form
    ccd-train export RUN --format backbone --out vit.safetensors
                                                              the ViT alone, under the names that timm uses

Of a recogniser (a fine-tuning run, an export of one, or an official fine-tuned .pth):

    ccd-train export RUN --out recognizer.safetensors                 weights, sizes and charset in one file
    ccd-train export RUN --format onnx --out recognizer.onnx          from pixels to tokens, for onnxruntime
    ccd-train export RUN --format torchscript --out recognizer.pt     likewise, for torch without this package

Exported is what every verb takes as --weights (which may be written here as well): a run folder (its newest complete
checkpoint, or a fine-tuning's best), one checkpoint folder of a run, an export, or an official .pth.
"""

from __future__ import annotations

from dataclasses import replace

from ccd_train.config.options import parse
from ccd_train.config.run import require
from ccd_train.config.verbs import Export
from ccd_train.errors import FINISHED


def main(argv: list[str]) -> int:
    options = parse(Export, argv, "ccd-train export")  # before torch is imported: --help is quick
    if options.source is not None:
        require(options.weights is None, "--weights", options.weights, f"is {options.source} already; name one of them")
        options = replace(options, weights=options.source)
    options.check()
    from ccd_train.reports.exports import export

    print(export(options))
    return FINISHED
