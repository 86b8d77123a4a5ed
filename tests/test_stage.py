"""Copies on the node's own disk: verified, shared, within their space, and without influence on what is read."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ccd_train.data.loader import Batches, Share, loader
from ccd_train.data.order import Order
from ccd_train.data.shards import Corpus
from ccd_train.data.stage import Stage
from ccd_train.errors import UserError
from tests.conftest import Tiny


@pytest.fixture
def corpus(tiny: Tiny, tmp_path: Path) -> Corpus:
    """A corpus of four shards whose files may be moved away."""
    shutil.copytree(tiny.shards, tmp_path / "far")
    return Corpus.open(tmp_path / "far")


def order_of(corpus: Corpus) -> Order:
    return Order(corpus.shard_samples, 5, 1)


def load(corpus: Corpus, stage: Path | None, **options: object) -> Batches:
    settings = {"workers": 0, "stage": stage} | options
    return loader(corpus, order_of(corpus), Share(0, 480, 48, 48, 0, 1), **settings)  # type: ignore[arg-type]


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def copies(folder: Path) -> set[str]:
    return {tar.name for tar in folder.glob("[!.]*/*.tar")}


def space(corpus: Corpus, shards: int) -> int:
    """Room for the largest so many shards, in bytes."""
    stage = Stage(corpus.paths[0].parent.parent / "measure", 10**12, corpus)
    return sum(sorted(map(stage.size, range(len(corpus.shards))))[-shards:])


def test_the_whole_corpus_is_copied_and_equal(corpus: Corpus, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "near", 10**9, corpus)
    stage.run(order_of(corpus), lambda: 0)
    for shard, source in enumerate(corpus.paths):
        copy = stage.copy_of(shard)
        assert copy is not None and copy.read_bytes() == source.read_bytes()
        offsets = corpus.shards[shard].offsets_file
        assert copy.with_name(offsets).read_bytes() == source.with_name(offsets).read_bytes()
    assert not list((tmp_path / "near").glob(".unfinished*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_and_come_from_the_copies(corpus: Corpus, tmp_path: Path, workers: int) -> None:
    with load(corpus, None) as plain:
        expected = list(plain)
    near = tmp_path / "near"
    with load(corpus, near, workers=workers) as batches:
        found = list(batches)
        wait_for(lambda: len(copies(near)) == 4)
    assert not multiprocessing.active_children()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images_u8, other.images_u8) and torch.equal(one.sample_ids, other.sample_ids)
    for path in (tmp_path / "far").glob("*.tar"):
        os.truncate(path, 0)  # whoever still reads here reads nothing
    with load(corpus, near, workers=workers, max_damaged=0.0) as next_life:
        again = list(next_life)
    assert all(torch.equal(one.images_u8, other.images_u8) for one, other in zip(expected, again, strict=True))
    assert next_life.damaged == 0


def test_copies_keep_within_their_space_and_follow_the_training(corpus: Corpus, tmp_path: Path) -> None:
    near, room = tmp_path / "near", space(corpus, 2)
    order, stage, position = order_of(corpus), Stage(tmp_path / "near", room, corpus), [0]
    threading.Thread(target=stage.run, args=(order, lambda: position[0]), daemon=True).start()
    for window, start in enumerate((0, 64, 128)):
        position[0] = start + 5
        windows = order.windows(position[0])
        wanted = {corpus.shards[int(next(windows)[0])].file for _ in range(2)}
        wait_for(lambda wanted=wanted: copies(near) == wanted)  # type: ignore[misc]
        used = sum(file.stat().st_size for file in near.rglob("*") if file.is_file())
        assert used <= room, window


def test_a_copy_that_was_removed_is_read_at_its_source(corpus: Corpus, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "near", 10**9, corpus)
    sources = list(corpus.paths)
    stage.run(order_of(corpus), lambda: 0)
    stage.redirect(corpus, range(4))
    assert all(path.parent.parent == tmp_path / "near" for path in corpus.paths)
    before = corpus.read(1, 3)
    shutil.rmtree(corpus.paths[1].parent)
    stage.redirect(corpus, range(4))
    assert corpus.paths[1] == sources[1] and corpus.read(1, 3) == before


def test_a_damaged_source_is_not_copied(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open(corpus.paths[2], "r+b") as tar:
        tar.seek(5000)
        tar.write(b"rot")
    stage = Stage(tmp_path / "near", space(corpus, 3), corpus)
    thread = threading.Thread(target=stage.run, args=(order_of(corpus), lambda: 0), daemon=True)
    thread.start()
    wait_for(lambda: "not what its manifest says" in caplog.text or len(copies(tmp_path / "near")) == 3)
    assert corpus.shards[2].file not in copies(tmp_path / "near")


def test_what_a_killed_copy_left_is_removed(corpus: Corpus, tmp_path: Path) -> None:
    left = tmp_path / "near" / f".unfinished-{corpus.shards[0].sha256[:32]}"
    left.mkdir(parents=True)
    (left / corpus.shards[0].file).write_bytes(b"half")
    stage = Stage(tmp_path / "near", 10**9, corpus)
    stage.run(order_of(corpus), lambda: 0)
    assert not left.exists() and len(copies(tmp_path / "near")) == 4


def test_two_jobs_share_one_folder(corpus: Corpus, tmp_path: Path) -> None:
    """The second waits for the first, and then finds everything done."""
    stages = [Stage(tmp_path / "near", 10**9, corpus) for _ in range(2)]
    threads = [threading.Thread(target=stage.run, args=(order_of(corpus), lambda: 0)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads) and len(copies(tmp_path / "near")) == 4


def test_the_copying_process_is_ended_with_the_loader(corpus: Corpus, tmp_path: Path) -> None:
    batches = load(corpus, tmp_path / "near", stage_gb=space(corpus, 1) / 1e9)  # too little: it never is done
    next(batches)
    [copier] = multiprocessing.active_children()
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(copier.pid or 0, name)
    time.sleep(0.2)
    assert copier.is_alive()
    batches.close()
    assert not multiprocessing.active_children()


def test_impossible_stages_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="largest shard"):
        load(corpus, tmp_path / "near", stage_gb=1e-6)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.stage"):
        load(corpus, tmp_path / "file")


def test_the_plan_is_the_order_of_need(corpus: Corpus, tmp_path: Path) -> None:
    order = order_of(corpus)
    plan = Stage(tmp_path / "near", 10**9, corpus).plan(order, 70)
    needed = list(dict.fromkeys(order.at(70, 480).shards.tolist()))
    assert plan == needed and len(np.unique(plan)) == 4
