"""One HTML page about a run, or about several beside each other. It needs nothing but itself: no network, no script.

    ccd-train report RUN                     writes RUN/report.html
    ccd-train report RUN RUN --out both.html

What was run and how it differs from its recipe, the corpus, hosts and versions, curves, interruptions on the time axis,
alarms, pictures, tables of probes and evaluations, and what it cost.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from ccd_train.config.pretraining import Config
from ccd_train.drawing.charts import COLORS, Line, Mark, chart, number
from ccd_train.durations import duration
from ccd_train.models.budget import gpu_called, training_flops
from ccd_train.reports.history import History

WORDS_READ = "Words of the validation read right"
# Figures that share a chart of one run; whatever else is logged gets a chart of its own.
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (WORDS_READ, ("valid_best", "valid_lower_alnum", "valid_case", "valid_all")),
    ("Losses", ("loss", "loss_distillation", "loss_segmentation", "valid_loss")),
    ("Teacher's entropy, and KL to the student (nats)", ("teacher_entropy", "kl")),
    ("Prototypes in use", ("prototypes_used",)),
    ("Effective rank of the features", ("feature_rank",)),
    ("Deviation of the features", ("feature_std",)),
    ("Probe", ("probe_linear", "probe_knn", "probe_chance")),
    ("Learning rate", ("lr",)),
    ("Norm of the gradient before clipping", ("grad_norm",)),
    ("Samples per second", ("samples_per_second",)),
    ("Share of time waiting for data", ("data_wait",)),
    ("Characters per image", ("characters",)),
    ("Share of images without characters", ("images_without_regions",)),
)
LAST = (  # charts that come after all others
    ("Loss scale", ("loss_scale",)),
    ("Skipped steps", ("skipped_steps",)),
    ("Damaged samples", ("damaged_samples",)),
    ("Images of the validation that cannot be read", ("valid_unreadable",)),
)
HIDDEN = {"step", "samples", "epoch", "time", "regions_from_student"}
LOGARITHMIC = {"grad_norm"}
NONE = "–"  # of a figure that a run does not have
AWAY = 60.0  # seconds between two lives that are shown as an interruption


def page(runs: Sequence[History]) -> str:
    """The whole document."""
    title = "Report: " + ", ".join(run.name for run in runs)
    style = resources.files("ccd_train.reports").joinpath("page.css").read_text(encoding="utf-8")
    sections = [f"<h1>{escape(title)}</h1>", f"<p>Made {_date(time.time())}.</p>", overview(runs)]
    for run in runs:
        sections += alarms(run)
    sections += [curves(runs), settings(runs)]
    for run in runs:
        heading = f": {escape(run.name)}" if len(runs) > 1 else ""
        sections += [timeline(run, heading), tables(run, heading), pictures(run, heading), details(run, heading)]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{style}</style>'
        f"</head><body>{''.join(sections)}</body></html>\n"
    )


def overview(runs: Sequence[History]) -> str:
    """How each run stands, and what it cost."""
    columns = [_costs(run) for run in runs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    rows = [row for row in rows if set(row[1:]) != {NONE}]
    return "<h2>How it stands, and what it cost</h2>" + table(["", *(run.name for run in runs)], rows)


def _costs(run: History) -> dict[str, str]:
    last = {name: values[-1] for name, values in run.metrics.items()}
    unit = "GPU" if any(gpu in life.device for life in run.lives for gpu in ("NVIDIA", "AMD")) else "process"
    ranks = run.lives[-1].ranks if run.lives else 1
    rate, typical = run.rate, float(np.nanmedian(run.metrics["samples_per_second"]))
    best = run.metrics.get("valid_best", np.array([]))
    best, score = best[np.isfinite(best)], run.config.score
    down = sum(max(b.started - a.ended, 0) for a, b in zip(run.lives, run.lives[1:], strict=False))
    outcome = run.outcome.get("outcome", "running, or killed")
    return {
        "outcome": f"{outcome}: {run.outcome['message']}" if run.outcome else outcome,
        "steps": f"{last['step']:,.0f}",
        "samples": f"{last['samples']:,.0f}, {last['epoch']:.2f} epochs",
        "validation words right, at best": f"{best[-1]:.2%}" if len(best) and not score else NONE,
        "validation, at best": score.format(best[-1]) if len(best) and score else NONE,
        "loss, at last": number(float(last["loss"])),
        "lives": f"{len(run.lives)}; {duration(down)} between them",
        f"{unit} hours": f"{run.rank_hours:,.2f} ({duration(run.seconds)} on {ranks})",
        "samples per second": f"{rate:,.0f} overall, {rate / ranks:,.0f} per {unit}; typically {typical:,.0f}",
        "share of the hardware's limit": _share_of_limit(run, typical / ranks),
        "waiting for data": f"{np.nanmean(run.metrics['data_wait']):.1%}",
        "skipped steps, damaged samples": f"{last.get('skipped_steps', 0):.0f}, {last.get('damaged_samples', 0):.0f}",
    }


def _share_of_limit(run: History, rate: float) -> str:
    """Of the matrix units, from the arithmetic of the network and the speed of one GPU."""
    device = run.lives[-1].device if run.lives else "unknown"
    gpu = gpu_called(device)
    if gpu is None or not isinstance(run.config, Config) or "characters" not in run.metrics:
        return f"not known for {device}"
    flops = training_flops(run.config.model, float(np.nanmean(run.metrics["characters"])))
    return f"{flops * rate / gpu.matrix_flops:.1%} of {gpu.matrix_flops / 1e12:.0f} TFLOP/s ({device})"


def curves(runs: Sequence[History]) -> str:
    """One run: charts over steps, with a mark where a life began. Several: one line each, over samples."""
    named = [name for _, names in (*CHARTS, *LAST) for name in names]
    logged = dict.fromkeys(name for run in runs for name in run.metrics if name not in HIDDEN)
    groups = [*CHARTS, *((name, (name,)) for name in logged if name not in named), *LAST]
    charts = []
    for title, names in groups:
        if title == WORDS_READ and any(run.config.score for run in runs):
            title = "Validation, at best"
        if len(runs) > 1:
            for name in names:
                lines = [
                    Line(run.name, run.metrics["samples"], run.metrics[name], COLORS[index % len(COLORS)])
                    for index, run in enumerate(runs)
                    if name in run.metrics
                ]
                charts.append(chart(f"{title}: {name}" if len(names) > 1 else title, lines, unit="samples"))
            continue
        (run,) = runs
        lines = [Line(n, run.metrics["step"], run.metrics[n], COLORS[i]) for i, n in enumerate(names) if n in logged]
        marks = [Mark(life.first_step, f"resumed, {_date(life.started)}") for life in run.lives[1:]]
        charts.append(chart(title, lines, marks, log=names[0] in LOGARITHMIC))
    note = "" if len(runs) > 1 or len(runs[0].lives) < 2 else "<p>Dotted lines: the run was resumed there.</p>"
    return f'<h2>Curves</h2>{note}<div class="charts">{"".join(charts)}</div>'


def timeline(run: History, heading: str) -> str:
    """Steps over hours, with a mark at every start, and a table of the lives."""
    if "time" not in run.metrics or not run.lives:
        return ""
    origin = run.lives[0].started
    hours = (run.metrics["time"] - origin) / 3600
    lines, rows = [], []
    for number_, life in enumerate(run.lives, start=1):
        mine = (run.metrics["time"] >= life.started) & (run.metrics["time"] <= life.ended)
        if mine.any():
            x = np.concatenate([[(life.started - origin) / 3600], hours[mine]])
            y = np.concatenate([[run.metrics["step"][mine][0]], run.metrics["step"][mine]])
            lines.append(Line(f"life {number_}", x, y, COLORS[(number_ - 1) % len(COLORS)]))
        before = run.lives[number_ - 2].ended if number_ > 1 else life.started
        away = duration(life.started - before) if life.started - before > AWAY else ""
        steps = f"{run.metrics['step'][mine].max():,.0f}" if mine.any() else "nothing logged"
        rows.append([str(number_), _date(life.started), away, duration(life.ended - life.started), life.hosts, steps])
    marks = [Mark((life.started - origin) / 3600, f"started {_date(life.started)}") for life in run.lives]
    drawn = chart("Step over hours since the first start", lines, marks, unit="hours")
    head = ["life", "started", "away before", "lasted", "hosts × processes", "last logged step"]
    return f'<h2>Lives{heading}</h2><div class="charts">{drawn}</div>' + table(head, rows)


def alarms(run: History) -> list[str]:
    """A box for each alarm."""
    return [
        f'<p class="{"note" if alarm["over"] else "alarm"}"><b>{escape(run.name)}, step {alarm["step"]}:</b> '
        f"{escape(alarm['message'])}</p>"
        for alarm in run.alarms
    ]


def settings(runs: Sequence[History]) -> str:
    """What differs from the nearest recipe; for several runs, also what differs between them."""
    names = sorted({name for run in runs for name in run.differences} | _unlike(runs))
    rows = []
    for name in names:
        values = [run.settings.get(name, "–") for run in runs]
        recipe = next((run.differences[name][0] for run in runs if name in run.differences), values[0])
        rows.append([name, _value(recipe), *map(_value, values)])
    recipes = ", ".join(dict.fromkeys(run.nearest_recipe for run in runs))
    head = ["setting", f"recipe {recipes}", *(run.name for run in runs)]
    corpus = [[run.name, *_corpus(run)] for run in runs]
    shown = table(head, rows) if rows else f"<p>All settings are those of the recipe {escape(recipes)}.</p>"
    return (
        f"<h2>What was run</h2><h3>Corpus</h3>{table(['run', 'data', 'hash', 'global batch'], corpus)}"
        f"<h3>Settings that are not those of the nearest recipe, {escape(recipes)}</h3>{shown}"
    )


def _unlike(runs: Sequence[History]) -> set[str]:
    every = {name for run in runs for name in run.settings} - {"run_dir"}
    return {name for name in every if len({_value(run.settings.get(name)) for run in runs}) > 1}


def _corpus(run: History) -> list[str]:
    data = [value for name, value in run.settings.items() if name in ("data.shards", "data.train")]
    hashes = [str(value) for name, value in run.identity.items() if "." not in name and _is_hash(value)]
    return [", ".join(map(_value, data)), ", ".join(hashes) or "–", str(run.identity.get("train.global_batch_size"))]


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 32


def tables(run: History, heading: str) -> str:
    """Evaluations, from their Markdown."""
    parts = [f"<h3>{escape(place)}</h3>{markdown(text)}" for place, text in run.tables().items()]
    return f"<h2>Evaluations{heading}</h2>" + "".join(parts) if parts else ""


def markdown(text: str) -> str:
    """Tables and lines of text, the only Markdown that our tables have."""
    parts: list[str] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if set("".join(cells)) - set("-: "):
                rows.append(cells)
            continue
        if rows:
            parts.append(table(rows[0], rows[1:]))
            rows = []
        if line.strip():
            parts.append(f"<p>{escape(line.lstrip('# '))}</p>")
    return "".join(parts)


def pictures(run: History, heading: str) -> str:
    """The first and the newest picture of each kind."""
    figures = []
    for name, found in run.pictures().items():
        for step, path in dict.fromkeys([found[0], found[-1]]):
            data = base64.b64encode(path.read_bytes()).decode()
            caption = f"{escape(name)}, step {step:,}"
            figures.append(
                f'<figure class="picture"><figcaption>{caption}</figcaption>'
                f'<img alt="{caption}" src="data:image/png;base64,{data}"></figure>'
            )
    return f'<h2>Pictures{heading}</h2><div class="pictures">{"".join(figures)}</div>' if figures else ""


def details(run: History, heading: str) -> str:
    """All settings and, of the last life, hosts and versions."""
    rows = [[name, _value(value)] for name, value in run.settings.items()]
    life = run.lives[-1] if run.lives else None
    versions = [] if life is None else [f"hosts {life.hosts}", f"device {life.device}", *life.versions]
    return (
        f"<h2>Where{heading}</h2><pre>{escape(chr(10).join(versions))}</pre>"
        f"<details><summary>All settings{heading}</summary>{table(['setting', 'value'], rows)}</details>"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Rows below a head, as HTML; what they hold is escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(item)}" for name, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
