"""A conversion that is killed at any moment, or fills the disk, ends in the same bytes once it is restarted."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Tiny
from crops import REAL, contents, crop, small_disk

from ccd_train.data.records import PROBES, LmdbReader, LmdbWriter
from ccd_train.data.shards import Corpus
from ccd_train.errors import UserError
from data_tools import convert, merge, verify


def start(source: Path, out: Path, samples_per_shard: int) -> subprocess.Popen[bytes]:
    size = ["--samples-per-shard", str(samples_per_shard), "--workers", "2"]
    words = [sys.executable, "-m", "data_tools", "convert", "--src", source, "--out", out, "--name", "w", *size]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)


def kill_and_restart(source: Path, folder: Path, samples_per_shard: int, kills: int, longest: float) -> list[Path]:
    """Converts again and again into new folders, until so many conversions were killed; returns the folders.

    Every second time only the parent is killed: its workers must end by themselves, or leave what follows alone.
    """
    moments = random.Random(7)
    killed, outs = 0, []
    while killed < kills:
        outs.append(folder / f"out{len(outs)}")
        while True:
            conversion = start(source, outs[-1], samples_per_shard)
            while not (outs[-1] / ".conversion").exists() and conversion.poll() is None:
                time.sleep(0.005)
            try:
                conversion.wait(moments.uniform(0, longest))
                assert conversion.returncode == 0
                break
            except subprocess.TimeoutExpired:
                kill = os.kill if killed % 2 else os.killpg
                kill(conversion.pid, signal.SIGKILL)
                conversion.wait()
                killed += 1
                longest *= 1 if killed < kills else 1000  # the last one may finish
    return outs


def test_killed_conversions_end_byte_for_byte_the_same(tiny: Tiny, tmp_path: Path) -> None:
    assert start(tiny.lmdb, tmp_path / "calm", 4).wait() == 0
    outs = kill_and_restart(tiny.lmdb, tmp_path, samples_per_shard=4, kills=6, longest=0.8)
    for out in outs:
        assert contents(out) == contents(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="real LMDBs are not here")
def test_thirty_kills_lose_no_real_word(tmp_path: Path) -> None:
    source = REAL / "iiit5k_train"
    assert start(source, tmp_path / "calm", 10).wait() == 0
    reader, corpus = LmdbReader(source), Corpus.open(tmp_path / "calm")
    assert corpus.num_samples == len(reader)
    for number in range(1, len(reader) + 1):
        assert corpus.read(*corpus.locate(number - 1)) == (reader.image(number), reader.label_bytes(number), None)
    outs = kill_and_restart(source, tmp_path, samples_per_shard=10, kills=30, longest=1.5)
    for out in outs:
        assert contents(out) == contents(tmp_path / "calm")
        assert verify.main([str(out), "--deep"]) == 0


def test_a_worker_that_is_killed_ends_the_conversion_with_a_line(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "w") as writer:
        for _ in range(8_000):
            writer.add(crop(1))
    options = ["--name", "w", "--samples-per-shard", "500", "--workers", "2"]
    words = [sys.executable, "-m", "data_tools", "convert", "--src", tmp_path / "w", "--out", tmp_path / "o", *options]
    conversion = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("o/*.tar")):
        time.sleep(0.01)
    children = Path(f"/proc/{conversion.pid}/task/{conversion.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    message = conversion.communicate(timeout=30)[1]
    assert conversion.returncode == 2 and message.count("\n") == 1
    assert "a worker process was killed" in message and "goes on where it stopped" in message
    assert subprocess.run(words).returncode == 0
    assert Corpus.open(tmp_path / "o").num_samples == 8_000


def test_a_disk_that_is_full_at_the_very_end(tiny: Tiny, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        options = ["--src", str(tiny.lmdb), "--out", str(disk / "o"), "--name", "w", "--workers", "1"]
        for part in ("0/2", "1/2"):
            assert convert.main([*options, "--samples-per-shard", "100", "--slice", part]) == 0
        with contextlib.suppress(OSError), open(disk / "filler", "wb") as filler:
            while True:
                filler.write(bytes(1 << 16))
        with pytest.raises(UserError, match="No space left on device"):
            merge.main([str(disk / "o")])
        (disk / "filler").unlink()
        assert merge.main([str(disk / "o")]) == 0
        assert Corpus.open(disk / "o").num_samples == tiny.samples


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_the_conversion_goes_on_later(tmp_path: Path, workers: str) -> None:
    with LmdbWriter(tmp_path / "w") as writer:
        small = set(np.linspace(1, 640, PROBES).astype(int))  # those that the space is estimated from
        for number in range(1, 641):
            writer.add(crop(number) + bytes(0 if number in small else 20_000))
    options = ["--src", str(tmp_path / "w"), "--name", "w", "--samples-per-shard", "64", "--workers", workers]
    assert convert.main([*options, "--out", str(tmp_path / "calm")]) == 0
    with small_disk(tmp_path / "disk", "8m") as disk:
        arguments = [*options, "--out", str(disk / "o")]
        with pytest.raises(UserError, match=r"No space left on device.*goes on where it stopped"):
            convert.main(arguments)
        assert not list((disk / "o").glob(".*.tmp"))
        assert list((disk / "o").glob("*.tar"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert convert.main(arguments) == 0
        assert contents(disk / "o") == contents(tmp_path / "calm")
