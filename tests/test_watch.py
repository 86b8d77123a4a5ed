"""A rank that dies or hangs: the others end within the timeout and name it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import Tiny
from test_engine import SMALL
from test_resume import metrics

TIMEOUT = 15


@pytest.mark.parametrize(
    ("number", "lost"),
    [
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 0),  # which keeps the store, too
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),  # as a power cut: the store answers no more
    ],
)
def test_the_other_rank_names_the_one_that_is_lost(
    tiny: Tiny, tmp_path: Path, number: signal.Signals, lost: int
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(SMALL | {"distributed": {"timeout": TIMEOUT}}))
    run_dir = tmp_path / "run"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "ccd_train", "pretrain", "--config", str(recipe), "--run_dir", str(run_dir)]
        command += ["--data.shards", str(tiny.shards), "--train.total_samples", "1000000"]
        ranks.append(subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True))
    try:
        limit = time.monotonic() + 300
        while len(metrics(run_dir)) < 3:
            assert time.monotonic() < limit and all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        ranks[lost].send_signal(number)
        began = time.monotonic()
        errors = ranks[1 - lost].communicate(timeout=TIMEOUT + 60)[1]
        assert time.monotonic() - began < TIMEOUT + 20
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[1 - lost].returncode == 75
    assert f"no sign of life from rank {lost} on" in errors and socket.gethostname() in errors and "step" in errors
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["outcome"] == "unfinished" and f"rank {lost}" in outcome["message"]
