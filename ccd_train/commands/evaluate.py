"""How well a recogniser reads: word accuracy and 1 − NED on benchmarks, in a form that others can compare.

    ccd-train evaluate --weights RUN --data data_lmdb/evaluation/benchmark                every set below the folder
    ccd-train evaluate --weights W --data DIR --sets IIIT5k_3000 SVT --rule case          some of them, another rule
    ccd-train evaluate RUN --data TextZoom/test                                           a network of a pixel task
    ccd-train evaluate bicubic --data TextZoom/test --route x2                            the input as it is, the gate

Prints a Markdown table, and writes it beside the same as JSON and a page of the worst errors (table.md, table.json,
errors.html). An image that cannot be read counts as a wrong word. Where a set turns out to be damaged only as it is
read, those before it are printed and written before the error.
"""

from __future__ import annotations

from dataclasses import replace

from ccd_train.config.options import parse
from ccd_train.config.run import require
from ccd_train.config.verbs import EvaluateOptions
from ccd_train.errors import FINISHED


def main(argv: list[str]) -> int:
    options = parse(EvaluateOptions, argv, "ccd-train evaluate")  # before torch is imported: --help is quick
    if options.source is not None:
        require(options.weights is None, "--weights", options.weights, f"is {options.source} already; name one of them")
        options = replace(options, weights=options.source)
    options.check()
    assert options.weights is not None and options.data is not None
    from ccd_train.reports import painted, pixels
    from ccd_train.weights.pixels import is_pixels

    if options.weights == pixels.BICUBIC or is_pixels(options.weights):
        painted.evaluate(options)
        return FINISHED
    from ccd_train.reports.benchmarks import find_sets, refuse_unusable
    from ccd_train.reports.evaluation import evaluate_all, make_folder, open_known, publish

    chosen = find_sets(options.data, options.sets)
    refuse_unusable(chosen)
    trained, reader, sha256 = open_known(options)
    folder = options.folder()
    make_folder(folder)
    done, damage = evaluate_all(reader, chosen, options)
    if done:
        missing = [one.name for one in chosen[len(done) :]]
        publish(folder, trained, sha256, options.rule, done, missing)
    if damage is not None:
        raise damage
    return FINISHED
