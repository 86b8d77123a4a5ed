"""What `ccd-train evaluate` says of a network of a pixel task: a table, the same as JSON, and a page of the worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ccd_train.config.verbs import EvaluateOptions
from ccd_train.errors import UserError
from ccd_train.files import replace_file, write_json
from ccd_train.reports.evaluation import make_folder
from ccd_train.reports.mistakes import embedded, whole
from ccd_train.reports.pixels import Measure, Outcome, averages, find_parts, open_painter, score, warnings
from ccd_train.tasks.pixels.sheets import as_rgb
from ccd_train.weights.pixels import TrainedPixels


def evaluate(options: EvaluateOptions) -> None:
    """Scores every set, prints the table and writes the three files. Where a set is damaged, those before it come
    first, and then the UserError."""
    assert options.data is not None
    trained, painter, measure, sha256 = open_painter(options)
    chosen = find_parts(options.data, options.sets, measure)
    folder = options.folder()
    make_folder(folder)
    done: list[Outcome] = []
    damage: UserError | None = None
    for name, source in chosen.items():
        try:
            done.append(score(painter, measure, name, source, options))
        except UserError as error:  # the sets before it may be long work
            damage = error
            break
    if done:
        publish(folder, trained, sha256, measure, done)
    if damage is not None:
        raise damage


def table(trained: TrainedPixels | None, sha256: str, measure: Measure, outcomes: Sequence[Outcome]) -> str:
    """Everything that makes the figures comparable, as Markdown."""
    names = list(outcomes[0].scores)
    lines = [
        f"| set | pictures | {' | '.join(names)} | left out | sha256 |",
        f"| --- | ---: | {' | '.join('---:' for _ in names)} | ---: | --- |",
    ]
    for one in outcomes:
        figures = " | ".join(_figure(name, one.scores[name]) for name in names)
        lines.append(f"| {one.name} | {one.pictures:,} | {figures} | {len(one.left_out)} | {one.hash[:12]} |")
    for group, kinds in averages(outcomes).items():
        for kind, values in kinds.items():
            figures = " | ".join(_figure(name, values.get(name)) for name in names)
            lines.append(f"| {group}, {kind} average | | {figures} | | |")
    weights = f"{trained.origin} (sha256 {sha256[:12]})" if trained else "none: bicubic"
    lines += ["", f"- weights: {weights}", *(f"- {note}" for note in measure.notes())]
    lines += [f"- warning: {warning}" for warning in warnings(outcomes)]
    return "\n".join(lines) + "\n"


def record(trained: TrainedPixels | None, sha256: str, measure: Measure, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The same as plain values, with those of each picture."""
    return {
        "task": measure.settings.__class__.__name__ if trained is None else trained.task,
        "weights": trained.origin if trained else "bicubic",
        "weights_sha256": sha256,
        "about": trained.about if trained else {},
        "reading": measure.reading,
        "headline": measure.headline,
        "sets": [
            {
                "name": one.name, "pictures": one.pictures, "hash": one.hash, "scores": _finite(one.scores),
                "left_out": one.left_out, "values": one.values,
            }
            for one in outcomes
        ],
        "averages": {
            group: {kind: _finite(values) for kind, values in kinds.items()}
            for group, kinds in averages(outcomes).items()
        },
        "notes": measure.notes(),
        "warnings": warnings(outcomes),
    }  # fmt: skip


def publish(
    folder: Path, trained: TrainedPixels | None, sha256: str, measure: Measure, outcomes: Sequence[Outcome]
) -> None:
    """Prints the table and writes the three files. UserError where they cannot be written."""
    text = table(trained, sha256, measure, outcomes)
    print(text, flush=True)
    try:
        replace_file(folder / "table.md", text.encode())
        write_json(folder / "table.json", record(trained, sha256, measure, outcomes))
        replace_file(folder / "errors.html", page(trained.origin if trained else "bicubic", measure, outcomes))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another --out") from None
    print(f"{folder}: table.md, table.json, errors.html", flush=True)


def page(origin: str, measure: Measure, outcomes: Sequence[Outcome]) -> bytes:
    """The worst pictures: input, output, truth and difference."""
    title = f"Worst pictures of {origin}"
    parts = [f"<h1>{escape(title)}</h1>", "<p>From above: input, output, truth, difference.</p>"]
    for one in outcomes:
        parts.append(f"<h2>{escape(one.name)}</h2>\n<p>The worst {len(one.worst)} of {one.pictures:,} pictures.</p>")
        items = []
        for bad in one.worst:
            pictures = "<br>".join(embedded(as_rgb(picture)) for picture in bad.pictures)
            said = f"{-bad.badness:.2f} dB" if measure.headline == "psnr" else f"IoU {-bad.badness:.3f}"
            items.append(f"<li>{pictures}<br><b>{escape(bad.caption)}</b> <small>{-bad.place:,}, {said}</small></li>")
        parts.append("<ol>\n" + "\n".join(items) + "\n</ol>")
    return whole(title, parts)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "empty_in_both":
        return f"{value:.0f}"
    return f"{value:.2f}" if "psnr" in name or name == "gain" else f"{value:.4f}"


def _finite(values: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}
