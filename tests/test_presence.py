"""Ranks introduce themselves: those that do not come are named, and so are other code and other settings."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, Tiny
from ranks import run_ranks
from test_engine import small

from ccd_train import distributed
from ccd_train.config.options import to_dict
from ccd_train.errors import UserError
from ccd_train.training.presence import fingerprint, introduce


def said(settings: list[dict[str, Any]]) -> str:
    """What a rank logs, or the error that it raises."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ccd_train.training.presence")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        introduce(settings[distributed.rank()])
    except UserError as error:
        return f"error: {error}"
    return "\n".join(lines)


def test_every_rank_is_named_with_its_host_device_and_address(tiny: Tiny, tmp_path: Path) -> None:
    settings = to_dict(small(tiny, tmp_path))
    first, second = run_ranks(2, said, [settings, settings])
    assert first == f"{socket.gethostname()} (lo 127.0.0.1): rank 0 on cpu, rank 1 on cpu"
    assert second == ""


def test_other_settings_on_one_rank_are_an_error_on_all(tiny: Tiny, tmp_path: Path) -> None:
    mine, other = to_dict(small(tiny, tmp_path)), to_dict(small(tiny, tmp_path, optimizer={"lr": 0.5}))
    for error in run_ranks(2, said, [mine, other]):
        assert error.startswith(f"error: rank 1 on {socket.gethostname()} has other settings than rank 0")
        assert "(optimizer.lr: 0.01 → 0.5)" in error and "\n" not in error


def pretrain(checkout: Path, rank: int, port: int, timeout: int, tiny: Tiny, run_dir: Path) -> subprocess.Popen[str]:
    environment = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "3"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "ccd_train", "pretrain", "--config", "vit_nano", "--run_dir", str(run_dir)]
    command += ["--data.shards", str(tiny.shards), "--distributed.timeout", str(timeout)]
    return subprocess.Popen(
        command, env=os.environ | environment, cwd=checkout, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_rank_that_does_not_come_is_named(tiny: Tiny, tmp_path: Path) -> None:
    port = free_port()
    ranks = [pretrain(CHECKOUT, rank, port, 20, tiny, tmp_path) for rank in (0, 2)]
    for process in ranks:
        error = process.communicate(timeout=200)[1]
        assert process.returncode == 75
        assert "there was nothing of rank 1 of 3" in error and len(error.splitlines()) == 1
        assert f"(there: 0 on {socket.gethostname()}, 2 on {socket.gethostname()})" in error


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A checkout with another comment in one file."""
    for package in ("ccd_train", "ds_configs", "data_tools"):
        shutil.copytree(CHECKOUT / package, tmp_path / "changed" / package)
    with (tmp_path / "changed" / "ccd_train" / "losses.py").open("a") as file:
        file.write("# another\n")
    return tmp_path / "changed"


def test_other_code_on_one_host_is_an_error_on_all(tiny: Tiny, tmp_path: Path, changed: Path) -> None:
    port = free_port()
    ranks = [pretrain(changed if rank == 1 else CHECKOUT, rank, port, 100, tiny, tmp_path) for rank in range(3)]
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2, 2]
    host, code = socket.gethostname(), fingerprint(changed / "ccd_train")
    there, error = errors[0].splitlines()
    assert there == f"{host} (lo 127.0.0.1): rank 0 on cpu, rank 1 on cpu, rank 2 on cpu"
    assert error.startswith(f"error: rank 1 on {host} has other code (ccd_train {code}) than rank 0 on {host} (")


@pytest.mark.parametrize(("variable", "launcher"), [("LOCAL_WORLD_SIZE", "torchrun"), ("LOCAL_SIZE", "DeepSpeed")])
def test_every_launcher_says_how_many_processes_share_a_machine(
    variable: str, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they share its cores; deepspeed/launcher/launch.py names it otherwise than torchrun."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.local_world_size() == 1
    monkeypatch.setenv(variable, "4")
    assert distributed.local_world_size() == 4, launcher
