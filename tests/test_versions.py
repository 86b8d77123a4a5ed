"""Run folders that earlier versions wrote: they go on, and every verb reads them.

`golden/versions/DATE.tar.xz` holds a pretraining and a recogniser of 4 steps, as the version of that day left them.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from conftest import CHECKOUT, Tiny
from ranks import run_ranks

from ccd_train.commands import export
from ccd_train.config.options import from_dict, to_dict
from ccd_train.config.run import RunConfig
from ccd_train.config.stored import read_settings
from ccd_train.reports import page
from ccd_train.reports.history import read_history
from ccd_train.tasks.choice import task_of
from ccd_train.training.run import begin
from ccd_train.training.train import train

RUNS = sorted((CHECKOUT / "tests/golden/versions").glob("*.tar.xz"))
assert RUNS, "the run folders of earlier versions are missing"
SOURCES = {"pretraining": {"shards": "shards"}, "recognizer": {"train": "lmdb", "valid": "lmdb"}}


@pytest.fixture(params=RUNS, ids=lambda path: path.name.partition(".")[0])
def version(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Both run folders of a version."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param.name.partition(".")[0]


def moved(run_dir: Path, tiny: Tiny) -> RunConfig:
    """The run's settings, on the corpus of these tests instead of its own."""
    config = read_settings(run_dir)
    data = {name: [str(getattr(tiny, place))] for name, place in SOURCES[run_dir.name].items()}
    changes = {"run_dir": str(run_dir), "max_steps": 6, "data": {**to_dict(config)["data"], **data}}
    return from_dict(type(config), {**to_dict(config), **changes}, "test")


def go_on(configs: list[RunConfig]) -> list[tuple[str, int, int]]:
    found = []
    for config in configs:
        assert config.run_dir is not None
        facts, path = task_of(config).open(), config.run_dir / "identity.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))  # only the corpus is another one
        run = begin(task_of(config))
        first = run.progress.step
        assert train(run, None)
        run.close()
        found.append((config.run_dir.name, first, run.progress.step))
    return found


def test_a_run_goes_on(version: Path, tiny: Tiny) -> None:
    configs = [moved(version / name, tiny) for name in SOURCES]
    (found,) = run_ranks(1, go_on, configs)
    assert found == [("pretraining", 4, 6), ("recognizer", 4, 6)]


def test_it_is_read(version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in SOURCES:
        history = read_history(version / name)
        assert history.metrics["step"].tolist() == [1, 2, 3, 4] and history.name in page.page([history])
        assert export.main([str(version / name), "--out", str(tmp_path / name)]) == 0
    assert (
        export.main([str(version / "pretraining"), "--format", "backbone", "--out", str(tmp_path / "v.safetensors")])
        == 0
    )
    assert (tmp_path / "v.safetensors").stat().st_size > 1000
