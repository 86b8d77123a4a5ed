"""The report of a run: what is on the page, that nothing else is needed for it, and how a browser takes it."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import Browser
from conftest import Tiny
from ranks import run_ranks
from test_engine import small

from ccd_train.commands import report
from ccd_train.config.pixels import Segmenting
from ccd_train.config.pretraining import Config
from ccd_train.drawing import charts
from ccd_train.errors import UserError
from ccd_train.reports.history import read_history, read_lives
from ccd_train.reports.page import curves, overview
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.life import write_outcome
from ccd_train.training.metrics import Metrics
from ccd_train.training.run import begin
from ccd_train.training.train import train

SHARP = {"distillation": {"teacher_momentum": 0.8}}


def live(configs: list[Config]) -> None:
    for config in configs:
        run = begin(Pretraining(config))
        metrics = Metrics(run.run_dir, run.progress.step, run.last_step)
        train(run, metrics)
        metrics.close()
        run.close()
        write_outcome(run.run_dir, 0, "done")
        time.sleep(1.1)  # environment.txt knows seconds


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of two lives with pictures, an alarm and an evaluation, and a run of one life; with names to be escaped."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = folder / "first <b>&amp;", folder / "second"
    log = {"every_steps": 1, "pictures_every_steps": 3}
    config = small(tiny, first, log=log)
    configs = [replace(config, max_steps=3), replace(config, max_steps=7)]
    configs.append(replace(small(tiny, second, log=log, **SHARP), max_steps=4))
    run_ranks(1, live, configs)
    alarm = {"step": 5, "kind": "uniform collapse", "message": "<script>alert(1)</script>", "over": False}
    (first / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    (first / "evaluation").mkdir()
    (first / "evaluation" / "table.md").write_text("Rule: all\n\n| set | words |\n| --- | ---: |\n| SVT <i> | 647 |\n")
    return [first, second]


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_what_a_reader_asks_for(runs: list[Path]) -> None:
    history = read_history(runs[0])
    page = Tags(report.page([history]))
    assert history.identity["corpus"] in page.text
    for asked in ("finished: done", "distillation.scale_teacher_momentum", "torch ", "commit ", "process hours",
                  "samples per second", "SVT <i>", "647", "alert(1)", "Learning rate", "data_wait",
                  "Effective rank"):  # fmt: skip
        assert asked in page.text, asked
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 6 and all(source.startswith("data:image/png;base64,") for source in images)
    assert history.nearest_recipe.startswith("vit_")
    assert history.differences["model.prototypes"][1] == 32


def test_a_fine_tunings_accuracy_comes_first(runs: list[Path]) -> None:
    history = read_history(runs[1])
    assert "at best" not in report.page([history])
    count = len(history.metrics["step"])
    found = {name: np.r_[np.nan, np.full(count - 1, 0.25)] for name in ("valid_best", "valid_all", "valid_unreadable")}
    page = report.page([replace(history, metrics={**history.metrics, **found})])
    assert "validation words right, at best</td><td>25.00%" in page
    masks = replace(history, config=Segmenting(), metrics={**history.metrics, **found})
    costs, drawn = overview([masks]), curves([masks])
    assert "validation, at best</td><td>fg_iou 0.2500" in costs and "words" not in costs
    assert "<figcaption>Validation, at best" in drawn and "Words" not in drawn
    titles = re.findall("<figcaption>([^<]*)", page)
    assert titles[0] == "Words of the validation read right" and "valid_all" not in titles
    flat = ["Loss scale", "Skipped steps", "Damaged samples", "Images of the validation that cannot be read"]
    assert titles[titles.index(flat[0]) :][:5] == [*flat, "Step over hours since the first start"]


def test_nothing_is_fetched_and_everything_is_escaped(runs: list[Path]) -> None:
    page = Tags(report.page([read_history(path) for path in runs]))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "b<", "i>"} and "<script>alert(1)</script>" in page.text
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "url(" not in report.page([read_history(runs[1])]) and "@import" not in report.page([read_history(runs[1])])


def test_interruptions_and_resumes(runs: list[Path]) -> None:
    history = read_history(runs[0])
    assert [life.first_step for life in history.lives] == [1, 4]
    assert history.lives[0].ended < history.lives[1].started + 1
    assert 0 < history.rank_hours < 1
    page = report.page([history])
    assert page.count('class="mark"') > 5, "the second life is marked in every chart over steps"
    environment = (
        "started 2026-11-22 10:00:00 +0100\nhosts a × 8, b × 8\ndevice NVIDIA H200\ntorch 2\n\n"
        "started 2026-11-22 12:00:00 +0000\nhosts a × 8\ntorch 2\n\n"
    )
    nine = 1795338000.0  # 2026-11-22 09:00 UTC
    lives = read_lives(environment, {"step": np.array([5, 9]), "time": np.array([nine + 60, nine + 4 * 3600])})
    assert [(life.ranks, life.ended - nine, life.first_step) for life in lives] == [(16, 60, 5), (8, 14400, 9)]


def test_several_runs_are_compared(runs: list[Path], tmp_path: Path) -> None:
    page = Tags(report.page([read_history(path) for path in runs]))
    assert "distillation.teacher_momentum" in page.text and "0.8" in page.text
    assert page.text.count("second") > 5
    with pytest.raises(UserError, match="--out"):
        report.main([str(path) for path in runs])
    assert report.main([*map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").stat().st_size > 10_000


def test_what_cannot_be_reported_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        report.main([str(tmp_path / "nowhere")])
    shutil.copytree(runs[1], tmp_path / "young")
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(UserError, match="no line yet"):
        report.main([str(tmp_path / "young")])


def test_a_chart_shows_its_values() -> None:
    x = np.arange(0.0, 1000.0)
    y = np.where(x < 500, 1.0, 3.0)
    drawing = charts.chart("a & b", [charts.Line("l", x, y)], [charts.Mark(500.0, "here")])
    (points,) = re.findall(r'polyline points="([^"]+)"', drawing)
    places = np.array([[float(v) for v in pair.split(",")] for pair in points.split()])
    assert len(places) == charts.POINTS
    assert (np.diff(places[:, 0]) > 0).all()
    assert places[0, 1] > places[-1, 1], "larger values are higher up"
    mark = float(re.findall(r'class="mark" x1="([\d.]+)"', drawing)[0])
    assert abs(mark - (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2) < 2
    assert "a &amp; b" in drawing and charts.chart("empty", [charts.Line("l", x, x * np.nan)]) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.974, 0.9745), (3e-7, 4e-5), (-5.0, 12345.0), (0.0, 3e8)])
def test_ticks_are_round_and_told_apart(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 8 and low - 1e-12 <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert len({charts._label(value, found) for value in found}) == len(found)


@pytest.mark.browser
@pytest.mark.parametrize("count", [1, 2])
def test_a_browser_shows_it(runs: list[Path], tmp_path: Path, count: int) -> None:
    """No complaint in the console, no broken picture, nothing wider than the window, and a screenshot with content."""
    out = tmp_path / "report.html"
    assert report.main([*map(str, runs[:count]), "--out", str(out)]) == 0
    browser = Browser(tmp_path)
    try:
        browser.open(out)
        assert browser.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length") == 0
        assert browser.evaluate("document.images.length") >= 6
        assert browser.evaluate("document.querySelectorAll('svg polyline').length") > 15
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.screenshot(tmp_path / "page.png")
        assert browser.complaints() == []
    finally:
        browser.close()
    picture = cv2.imread(str(tmp_path / "page.png"))
    assert picture.shape[1] == 1440 and picture.shape[0] > 2000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 500
