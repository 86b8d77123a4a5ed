"""The loader: each sample once, the same for any workers and ranks; damage, signals, and an end without orphans."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ccd_train.config.pretraining import Data
from ccd_train.data.batches import Batch, BatchReader
from ccd_train.data.loader import Batches, Share, loader, sample_order
from ccd_train.data.masks import decode_mask, decode_rgb, pseudo_mask, resize_image, resize_mask
from ccd_train.data.order import Mixture, Order
from ccd_train.data.shards import Corpus, Exclusion, read_manifest, write_exclusions
from ccd_train.errors import TrainingError, UserError
from tests.conftest import Tiny

GLOBAL = 72  # does not divide the corpus: batches cross the borders of epochs
MICRO = {1: 36, 2: 12, 3: 24, 4: 18, 8: 9}  # world size → micro batch size; several micro-steps a step for 1, 2 and …


@pytest.fixture(scope="module")
def corpus(tiny: Tiny) -> Corpus:
    return Corpus.open(tiny.shards)


def load(corpus: Corpus, start: int = 0, end: int = 3 * 240, **options: object) -> Batches:
    rank, world_size = int(options.pop("rank", 0)), int(options.pop("world_size", 1))  # type: ignore[call-overload]
    whole = int(options.pop("batch", 0))  # type: ignore[call-overload]
    share = Share(start, end, whole or GLOBAL, whole or MICRO[world_size], rank, world_size)
    order = options.pop("order", Order(corpus.shard_samples, 5, 2))
    return loader(corpus, order, share, **{"workers": 0} | options)  # type: ignore[arg-type]


def steps(corpus: Corpus, start: int, end: int, world_size: int, workers: int = 0) -> list[list[int]]:
    """The sample ids of each step, over all ranks, sorted."""
    found: dict[int, list[int]] = {}
    counts = set()
    for rank in range(world_size):
        with load(corpus, start, end, rank=rank, world_size=world_size, workers=workers) as batches:
            own = list(batches)
        counts.add(len(own))
        for batch in own:
            found.setdefault(batch.position, []).extend(batch.sample_ids.tolist())
    assert len(counts) == 1  # every rank has the same number of micro-steps
    return [sorted(found[position]) for position in sorted(found)]


def equal(one: Batch, other: Batch) -> bool:
    tensors = ("images_u8", "pseudo_mask", "native_size", "sample_ids", "epochs")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return same and (one.position, one.damaged, one.labels) == (other.position, other.damaged, other.labels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_each_sample_comes_once_an_epoch(corpus: Corpus, world_size: int, workers: int) -> None:
    found = steps(corpus, 0, 720, world_size, workers)
    assert [len(step) for step in found] == [GLOBAL] * 10
    assert Counter(sample for step in found for sample in step) == dict.fromkeys(range(240), 3)


@pytest.mark.parametrize("world_size", [8, 3, 1])
def test_a_run_goes_on_at_another_number_of_ranks(corpus: Corpus, world_size: int) -> None:
    whole = steps(corpus, 0, 720, 1)
    assert steps(corpus, 0, 288, 4) + steps(corpus, 288, 720, world_size) == whole


def test_a_resume_repeats_the_very_batches(corpus: Corpus) -> None:
    with load(corpus) as batches:
        whole = list(batches)
    with load(corpus, start=5 * GLOBAL, workers=1) as batches:
        rest = list(batches)
    assert len(rest) == len(whole) - 10 and all(map(equal, rest, whole[10:]))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(corpus: Corpus, workers: int) -> None:
    with load(corpus) as alone, load(corpus, workers=workers) as helped:
        pairs = list(zip(alone, helped, strict=True))
    assert len(pairs) == 20 and all(equal(one, other) for one, other in pairs)


def test_a_batch_holds_what_the_masks_module_makes_of_the_sample(corpus: Corpus) -> None:
    batch = next(load(corpus, start=240))
    assert batch.images_u8.shape == (36, 3, 32, 128) and batch.images_u8.is_contiguous()
    assert batch.epochs.tolist() == [1] * 36 and batch.position == 240 + GLOBAL
    for i, sample in enumerate(batch.sample_ids.tolist()):
        data = corpus.read(*corpus.locate(sample), ("image",))[0]
        assert data is not None
        image = decode_rgb(data)
        assert tuple(batch.native_size[i]) == image.shape[:2]
        assert np.array_equal(batch.images_u8[i].permute(1, 2, 0), resize_image(image))
        assert np.array_equal(batch.pseudo_mask[i], resize_mask(pseudo_mask(image)))


def test_stored_masks_and_labels(corpus: Corpus, tiny: Tiny) -> None:
    batch = next(load(corpus, mask_mode="stored", with_labels=True))
    for i, sample in enumerate(batch.sample_ids.tolist()):
        label, mask = corpus.read(*corpus.locate(sample), ("label", "mask"))
        assert label is not None and batch.labels[i] == label.decode()
        assert mask is not None and np.array_equal(batch.pseudo_mask[i], resize_mask(decode_mask(mask)))


def test_what_the_shards_do_not_hold_is_refused_at_the_start(tiny: Tiny, tmp_path: Path) -> None:
    from data_tools import convert, synth

    synth.main(["--out", str(tmp_path / "lmdb"), "--num-samples", "5", "--workers", "1"])
    convert.main(["--src", str(tmp_path / "lmdb"), "--out", str(tmp_path / "bare"), "--name", "bare", "--workers", "1"])
    bare = Corpus.open(tmp_path / "bare")
    with pytest.raises(UserError, match=r"masks.*mask_mode otsu"):
        load(bare, mask_mode="stored")
    with pytest.raises(UserError, match="labels"):
        load(bare, with_labels=True)


def test_a_batch_moves_as_a_whole(corpus: Corpus) -> None:
    batch = next(load(corpus))
    assert equal(batch.to("cpu"), batch)
    assert batch.to("meta").images_u8.device.type == "meta" and batch.to("meta").position == batch.position


def test_the_trainers_random_numbers_are_left_alone(corpus: Corpus) -> None:
    before = torch.random.get_rng_state()
    with load(corpus, workers=1) as batches:
        next(batches)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("world_size", "micro", "expected"),
    [(1, 8, [(0, 8)]), (2, 4, [(4, 8)]), (2, 2, [(2, 8), (6, 8)]), (4, 2, [(2, 8)])],
)
def test_the_positions_of_rank_1(world_size: int, micro: int, expected: list[tuple[int, int]]) -> None:
    share = Share(0, 9, 8, micro, min(1, world_size - 1), world_size)
    assert [share.place(i) for i in range(len(expected))] == expected
    assert len(share) == 2 * len(expected)  # position 8 needs a second step


def damage(folder: Path, tiny: Tiny, rows: list[int], shard: int = 0) -> Corpus:
    """A copy of the corpus in which some images of a shard have a wrong byte."""
    shutil.copytree(tiny.shards, folder)
    corpus = Corpus.open(folder)
    with open(corpus.paths[shard], "r+b") as tar:
        for row in rows:
            tar.seek(int(corpus.places(shard)[row]["image"]) + 20)
            byte = tar.read(1)[0]
            tar.seek(-1, os.SEEK_CUR)
            tar.write(bytes([byte ^ 0xFF]))
    return corpus


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_replaced_by_the_next_that_can_be_used(
    tmp_path: Path, tiny: Tiny, corpus: Corpus, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows 3 and 4 are damaged: both become row 5; the last row becomes the first. Every epoch, every rank."""
    last = int(corpus.shard_samples[0]) - 1
    broken = damage(tmp_path / "broken", tiny, [3, 4, last])
    stand_ins = {3: 5, 4: 5, last: 0}
    with caplog.at_level(logging.WARNING), load(broken, workers=workers, max_damaged=1.0) as batches:
        found = list(batches)
    with load(corpus) as batches:
        intact = {
            int(i): image for batch in batches for i, image in zip(batch.sample_ids, batch.images_u8, strict=True)
        }
    for batch in found:
        for sample, image in zip(batch.sample_ids.tolist(), batch.images_u8, strict=True):
            assert torch.equal(image, intact[stand_ins.get(sample, sample)])
    assert batches.damaged == 0 and sum(len(batch.damaged) for batch in found) == 3 * (2 + 1 + 1)  # 3 → 4 → 5
    warnings = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(warnings) == 3 and all(broken.shards[0].file in line for line in warnings)
    assert any(broken.key(0, 3) in line for line in warnings)


def test_too_much_damage_ends_the_run(tmp_path: Path, tiny: Tiny) -> None:
    broken = damage(tmp_path / "broken", tiny, list(range(12)))
    with load(broken, max_damaged=0.01) as batches, pytest.raises(TrainingError, match=r"max_damaged = 0\.01") as error:
        list(batches)
    assert "\n" not in str(error.value) and broken.shards[0].file in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_without_a_good_sample_ends_the_run(tmp_path: Path, tiny: Tiny, workers: int) -> None:
    broken = damage(tmp_path / "broken", tiny, list(range(64)), shard=1)
    with (
        load(broken, workers=workers, max_damaged=1.0) as batches,
        pytest.raises(TrainingError, match="none of its 64"),
    ):
        list(batches)
    assert not multiprocessing.active_children()


def test_a_shard_cut_short_under_the_reader_counts_as_damage(tmp_path: Path, tiny: Tiny) -> None:
    shutil.copytree(tiny.shards, tmp_path / "cut")
    cut = Corpus.open(tmp_path / "cut")
    os.truncate(cut.paths[0], int(cut.places(0)[60]["image"]) + 5)
    with load(cut, end=240, max_damaged=1.0) as batches:
        found = list(batches)
    assert sum(len(batch.damaged) for batch in found) >= 4


def test_a_file_system_that_comes_back_is_waited_for(tmp_path: Path, tiny: Tiny, corpus: Corpus) -> None:
    shutil.copytree(tiny.shards, tmp_path / "away")
    away = Corpus.open(tmp_path / "away")
    order = Order(away.shard_samples, 5, 2)
    hidden = away.paths[0].with_suffix(".hidden")
    away.paths[0].rename(hidden)
    with pytest.raises(TrainingError, match="cannot be read"):
        BatchReader(away, order, "otsu", patience=(0.01,)).batch(0, 240, 240)
    back = threading.Timer(0.2, hidden.rename, (away.paths[0],))
    back.start()
    batch = BatchReader(away, order, "otsu", patience=(0.5, 2.0)).batch(0, 240, 240)
    assert equal(batch, BatchReader(corpus, order, "otsu").batch(0, 240, 240))


def test_excluded_samples_never_come(tmp_path: Path, tiny: Tiny, corpus: Corpus) -> None:
    manifest = read_manifest(tiny.shards)
    banned = [
        Exclusion(manifest.hash, corpus.shards[s].file, r, corpus.key(s, r)) for s, r in ((0, 0), (0, 9), (2, 63))
    ]
    write_exclusions(tmp_path / "exclude.jsonl", banned)
    rest = Corpus.open(tiny.shards, exclude=tmp_path / "exclude.jsonl")
    assert rest.num_samples == 237 and rest.hash != corpus.hash
    with load(rest, end=237 * 2, batch=79, with_labels=True) as batches:
        found = list(batches)
    assert Counter(i for batch in found for i in batch.sample_ids.tolist()) == dict.fromkeys(range(237), 2)
    forbidden = {entry.key for entry in banned}
    assert not forbidden & {rest.key(*rest.locate(i)) for i in range(237)}


def test_corpora_are_joined_or_mixed_by_weight(tiny: Tiny, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny.shards, other)
    folders = (tiny.shards, other)
    both = Corpus.open(folders)
    joined = sample_order(both, Data(shards=folders, window_shards=2), 0)
    assert isinstance(joined, Order)
    assert np.array_equal(np.sort(joined.at(0, 480).sample_ids), np.arange(480))
    mixed = sample_order(both, Data(shards=folders, window_shards=2, weights=(3.0, 1.0)), 0)
    assert isinstance(mixed, Mixture)
    with load(both, end=14_400, order=mixed, batch=1440) as batches:
        ids = torch.cat([next(batches).sample_ids for _ in range(2)])
    assert 0.7 < float((ids < 240).float().mean()) < 0.8
    assert int(torch.bincount(ids[ids < 240]).min()) >= 8  # 2,160 draws: every sample of the first about 9 times


TRAINER = """
import sys, time
from ccd_train.data.loader import Share, loader
from ccd_train.data.order import Order
from ccd_train.data.shards import Corpus
import multiprocessing
corpus = Corpus.open(sys.argv[1])
batches = loader(corpus, Order(corpus.shard_samples, 5, 2), Share(0, 10**9, 8, 8, 0, 1), workers=2)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if sys.argv[2] == "exit":
    raise SystemExit(5)
for batch in batches:
    time.sleep(0.02)
    print(batch.position, flush=True)
"""


def start_trainer(tiny: Tiny, ending: str) -> tuple[subprocess.Popen[str], list[int]]:
    program = [sys.executable, "-c", TRAINER, str(tiny.shards), ending]
    trainer = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert trainer.stdout is not None
    return trainer, [int(word) for word in trainer.stdout.readline().split()]


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(processes: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


def test_workers_ignore_signals_and_die_with_the_trainer(tiny: Tiny) -> None:
    trainer, workers = start_trainer(tiny, "run")
    assert len(workers) == 2 and trainer.stdout is not None
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        for worker in workers:
            os.kill(worker, name)
    before = int(trainer.stdout.readline())
    while int(trainer.stdout.readline()) < before + 8 * 20:  # more than was made before the signals
        assert trainer.poll() is None
    assert all(map(alive, workers))
    trainer.kill()
    trainer.wait()
    assert gone(workers, within=3)


def test_a_program_that_ends_without_closing_ends_at_once(tiny: Tiny) -> None:
    trainer, workers = start_trainer(tiny, "exit")
    assert trainer.wait(timeout=10) == 5
    assert len(workers) == 2 and gone(workers, within=1)


def test_a_worker_that_is_killed_ends_the_run_with_a_line(corpus: Corpus) -> None:
    with load(corpus, end=10**6, workers=1) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        time.sleep(0.1)  # nothing is raised here, in the middle of the trainer's own work
        with pytest.raises(TrainingError, match="was killed") as error:
            list(batches)
    assert "\n" not in str(error.value)


def test_closing_stops_the_processes(corpus: Corpus) -> None:
    batches = load(corpus, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    started = time.perf_counter()
    batches.close()
    assert not multiprocessing.active_children() and time.perf_counter() - started < 2
    assert list(batches) == []
