"""Rate and memory of `ccd-data convert`, beside webdataset's ShardWriter on the same records.

    python tests/benchmarks/conversion.py [--records 200000] [--rounds 3]      rates, as ratios of neighbours in time
    python tests/benchmarks/conversion.py --records 1000000 --memory           the most memory of any process

The records are rendered words, filled up to 5.5 KB (the mean of photographed crops) by a comment, with labels. The
webdataset loop reads the same LMDB and writes 10,000 samples a shard, without hashes, offsets, checks or fsync. The
conversions are whole commands, the interpreter's start included. On a slow disk two processes wait for it: use
--folder /dev/shm to see the processors alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset
from tqdm import tqdm

from ccd_train.data.records import LmdbReader, LmdbWriter
from data_tools import verify
from data_tools.words import render

DISTINCT = 1000
MEAN_BYTES = 5500


def write_lmdb(path: Path, records: int) -> None:
    words = [render(1, index, ()) for index in range(DISTINCT)]
    fill = MEAN_BYTES - sum(len(word.image) for word in words) // DISTINCT - 4
    comment = b"\xff\xfe" + (fill + 2).to_bytes(2, "big") + os.urandom(fill)  # a JPEG segment after the start marker
    images = [word.image[:2] + comment + word.image[2:] for word in words]
    with LmdbWriter(path) as writer:
        for number in tqdm(range(records), desc="LMDB", disable=None):
            writer.add(images[number % DISTINCT], words[number % DISTINCT].label)


def command(source: Path, out: Path, workers: int) -> list[str]:
    options = ["--src", str(source), "--out", str(out), "--name", "words", "--workers", str(workers)]
    return [sys.executable, "-m", "data_tools", "convert", *options]


def convert_in(source: Path, out: Path, workers: int) -> None:
    subprocess.run(command(source, out, workers), check=True, stdout=subprocess.DEVNULL)


def webdataset_in(source: Path, out: Path) -> None:
    out.mkdir()
    with (
        LmdbReader(source) as reader,
        webdataset.ShardWriter(f"{out}/words-%06d.tar", maxcount=10_000, verbose=0) as tar,
    ):
        for number in range(1, len(reader) + 1):
            key = f"{source.name}/{number:09d}"
            tar.write({"__key__": key, "jpg": reader.image(number), "txt": reader.label(number)})


def rates(source: Path, folder: Path, records: int, rounds: int) -> None:
    ways: dict[str, Callable[[Path], None]] = {
        "webdataset": lambda out: webdataset_in(source, out),
        "1 process": lambda out: convert_in(source, out, 1),
        "2 processes": lambda out: convert_in(source, out, 2),
    }
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            out = folder / "out"
            os.sync()
            start = time.perf_counter()
            way(out)
            measured[name].append(records / (time.perf_counter() - start))
            if name == "1 process":
                assert verify.main([str(out)]) == 0
            shutil.rmtree(out)
    for name, values in measured.items():
        print(f"{name:12} {statistics.median(values):8,.0f} records/s")
    for name, base, bar in (("1 process", "webdataset", 2.0), ("2 processes", "1 process", 1.7)):
        ratios = [mine / other for mine, other in zip(measured[name], measured[base], strict=True)]
        print(f"{name} / {base}: {statistics.median(ratios):.2f} (bar {bar}; {', '.join(f'{r:.2f}' for r in ratios)})")


def memory(source: Path, folder: Path, records: int) -> None:
    """Converts with 2 processes, and prints the highest resident memory that any process had."""
    start = time.perf_counter()
    conversion = subprocess.Popen(command(source, folder / "out", 2))
    highest: dict[int, int] = {}
    while conversion.poll() is None:
        for process in [conversion.pid, *children(conversion.pid)]:
            highest[process] = max(highest.get(process, 0), peak(process))
        time.sleep(0.1)
    assert conversion.returncode == 0
    print(f"{records / (time.perf_counter() - start):,.0f} records/s with 2 processes")
    listed = ", ".join(f"{size / 1e6:.0f}" for size in highest.values())
    print(f"most memory of a process: {max(highest.values()) / 1e6:.0f} MB (bar 300; each: {listed} MB)")


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def peak(process: int) -> int:
    """The highest resident memory so far in bytes, mapped pages of files included."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of rates")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder); some 20 KB a record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "lmdb"
        write_lmdb(source, options.records)
        if options.memory:
            memory(source, Path(folder), options.records)
        else:
            rates(source, Path(folder), options.records, options.rounds)


if __name__ == "__main__":
    main()
