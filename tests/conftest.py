"""What all tests share: one thread each, and a small corpus that is rendered and sharded once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two cores, and equal sums in every test

import pytest

CHECKOUT = Path(__file__).parents[1]
WORDS = 240


@dataclass(frozen=True)
class Tiny:
    """A corpus of rendered words with labels and true masks: the LMDB and the two shard folders made from it."""

    lmdb: Path
    shards: Path
    samples: int


@pytest.fixture(scope="session", autouse=True)
def no_installed_fonts() -> None:
    """Words are drawn with Pillow's own font, on every machine; commands in other processes name it."""
    from data_tools import fonts

    fonts.FOLDERS = ()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all pytest workers of this run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny(shared_folder: Path) -> Tiny:
    """240 words as an LMDB and in shards of 64 samples, made by the public commands. Read only."""
    folder = shared_folder / "tiny"
    corpus = Tiny(folder / "lmdb", folder / "shards", WORDS)
    with (shared_folder / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            from data_tools import convert, synth

            size = ["--num-samples", str(WORDS), "--seed", "7", "--labels", "--masks"]
            assert synth.main(["--out", str(corpus.lmdb), *size]) == 0
            name = ["--name", "tiny", "--workers", "1", "--samples-per-shard", "64"]
            assert convert.main(["--src", str(corpus.lmdb), "--out", str(corpus.shards), *name]) == 0
            (folder / "done").touch()
    return corpus


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where SLURM is required, a SLURM test that was skipped has failed."""
    report = yield
    if report.skipped and "CCD_REQUIRE_SLURM" in os.environ and item.get_closest_marker("slurm"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but CCD_REQUIRE_SLURM is set: {report.longrepr}"
    return report
