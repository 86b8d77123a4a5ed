"""--log.profile_steps, the share of the hardware's peak, and what is left behind when the memory is full."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHECKOUT, Tiny

from ccd_train.config.options import parse
from ccd_train.config.pretraining import Config
from ccd_train.errors import TrainingError, UserError
from ccd_train.models import budget
from ccd_train.training import profiler, train

TOY = Path(__file__).with_name("toy.py")


def operations(path: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


@pytest.mark.parametrize(("steps", "name"), [((3, 4), "steps_3-4"), ((5, 99), "steps_5-6")])
def test_named_steps_leave_a_trace_and_no_figure_changes(
    tiny: Tiny, tmp_path: Path, steps: tuple[int, int], name: str
) -> None:
    losses = []
    for run, more in (("watched", ["--log.profile_steps", *map(str, steps)]), ("plain", [])):
        command = [
            sys.executable,
            str(TOY),
            str(tmp_path / run),
            str(tiny.shards),
            "--log.every_steps",
            "1",
            "--max_steps",
        ]
        subprocess.run([*command, "6", *more], check=True, capture_output=True, timeout=300, cwd=CHECKOUT)
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    [trace] = (tmp_path / "watched" / profiler.FOLDER).iterdir()
    assert trace.name == f"{name}.json.gz"  # a run that ends before the last step writes what it saw
    assert "aten::convolution" in operations(trace)
    assert not (tmp_path / "plain" / profiler.FOLDER).exists()


@pytest.mark.parametrize("steps", [["3"], ["5", "4"], ["0", "2"], ["1", "2", "3"]])
def test_what_is_no_pair_of_steps_is_refused(steps: list[str]) -> None:
    with pytest.raises(UserError, match=r"log.profile_steps = .*the first and the last step"):
        parse(Config, ["--log.profile_steps", *steps, "--run_dir", "x"], "x").log.check()


def test_the_share_of_the_peak_is_told_where_the_card_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.Pace(64).figures(1e12).keys() == {"samples_per_second", "data_wait"}  # a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for card, known in (("NVIDIA H100 80GB HBM3", True), ("Somebody's 9000", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        pace = train.Pace(64)
        pace.count(0.0)
        figures = pace.figures(1e12)
        assert ("of_peak" in figures) == known
    pace = train.Pace(64)
    monkeypatch.setattr(pace, "_peak", budget.GPUS["h100"].matrix_flops)
    pace.count(0.0)
    figures = pace.figures(3e12)
    assert figures["of_peak"] == pytest.approx(figures["samples_per_second"] / 64 * 3e12 / 989e12)
    assert "of_peak" not in pace.figures(None)


def test_a_full_memory_leaves_a_snapshot_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    run = SimpleNamespace(
        run_dir=tmp_path, config=SimpleNamespace(log=SimpleNamespace(wandb=None), score=""), last_step=9,
        progress=SimpleNamespace(step=4), close=lambda: None,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"out of GPU memory in step 5 .*memory_full_rank0\.pickle"), \
            train.guarded(run):  # type: ignore[arg-type]  # fmt: skip
        raise torch.OutOfMemoryError
    assert (tmp_path / profiler.FOLDER / "memory_full_rank0.pickle").read_bytes() == b"snapshot"
