"""What a run tells while it runs: one line on a terminal, plain lines elsewhere, and nothing from libraries."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from conftest import Tiny
from test_engine import SMALL

from ccd_train.config.options import parse
from ccd_train.config.pixels import Upscaling
from ccd_train.config.pretraining import Config
from ccd_train.durations import duration
from ccd_train.errors import UserError
from ccd_train.tasks.pretrain.health import Alarm
from ccd_train.training.metrics import Metrics


def figures(step: int) -> dict[str, float]:
    return {"step": step, "samples": 32 * step, "epoch": 0.5, "loss": 4.25, "samples_per_second": 16, "data_wait": 0.07}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (59.7, "1 min"),
        (61, "1 min"),
        (3600, "1 h 0 min"),
        (12000, "3 h 20 min"),
        (360000, "4 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_plain_line_says_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, 0, 100)
    metrics.write(figures(40))
    metrics.write(figures(42))  # too soon for another line
    metrics.write(figures(100))
    metrics.close()
    lines = capsys.readouterr().err.splitlines()
    told = "step 40/100, 1,280 samples, epoch 0.50, loss 4.2500, 16 samples/s, 7% waiting for data, 2 min left"
    assert re.fullmatch(r"\d\d:\d\d:\d\d (.*)", lines[0])[1] == told
    assert len(lines) == 2 and lines[1][9:].startswith("step 100/100") and lines[1].endswith("0 s left")
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [40, 42, 100]


def test_every_validation_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, 0, 100)
    metrics.write(figures(40))
    metrics.write({**figures(42), "valid_best": 0.123})
    metrics.write(figures(44))
    metrics.write(figures(100))
    metrics.close()
    _, second, last = capsys.readouterr().err.splitlines()
    assert "step 42/100" in second and second.endswith(", 12.3% right at best (step 42)")
    assert "step 100/100" in last and last.endswith(", 12.3% right at best (step 42)")


def test_a_score_that_is_no_share_of_words_is_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, 0, 100, score=Upscaling.score)
    metrics.write({**figures(42), "valid_best": 28.583})
    metrics.close()
    assert capsys.readouterr().err.rstrip().endswith("left, psnr 28.58 dB at best (step 42)")


def test_a_later_life_drops_alarms_beyond_its_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, 100)
    for step in (10, 30):
        metrics.alarm(Alarm(step, "uniform collapse", "flat"))
    metrics.close()
    Metrics(tmp_path, 20, 100).close()
    (line,) = (tmp_path / "alarms.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 10


def test_wandb_without_its_package_is_one_line() -> None:
    with pytest.raises(UserError, match=r"log\.wandb = mine: the package is not installed: pip install wandb"):
        parse(Config, ["--log.wandb", "mine"], "test").log.check()


def test_a_terminal_shows_one_line_and_v_lets_libraries_speak(tiny: Tiny, tmp_path: Path) -> None:
    """On a terminal of its own: the line is rewritten in place; without -v nothing but our own lines is there."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    settings = ["--config", str(recipe), "--data.shards", str(tiny.shards), "--max-steps", "4", "--run_dir"]
    command = [sys.executable, "-m", "ccd_train", "pretrain", *settings]
    quiet = on_terminal([*command, str(tmp_path / "a")])
    loud = on_terminal([*command, str(tmp_path / "b"), "-v"])
    lines = [line.strip() for line in re.split(r"[\r\n]+", quiet) if line.strip()]
    assert lines[0] == "starting from the beginning" and lines[-1].startswith("finished: 4 steps"), quiet
    assert all(line.startswith("step ") for line in lines[1:-1]), quiet
    told = r"step 4/4 .* 8 samples, epoch 0\.03, loss \S+, \d+ samples/s, \d+% waiting for data, 0 s left"
    assert re.fullmatch(told, lines[-2]), quiet
    assert "DeepSpeed" not in quiet and "Warning" not in quiet
    assert "DeepSpeed" in loud


def on_terminal(command: list[str]) -> str:
    """What a program prints on a terminal of 200 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    assert process.wait(timeout=60) == 0, text.decode()
    os.close(master)
    return text.decode()
