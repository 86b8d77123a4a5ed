"""Views that a thread makes ahead: the same run, and its end.

A GPU is where this pays; the thread, the order and the errors are the same without one.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from conftest import Tiny
from ranks import run_ranks
from test_engine import small, steps

from ccd_train.data.batches import Batch
from ccd_train.data.loader import Share, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.errors import TrainingError
from ccd_train.tasks.pretrain import task
from ccd_train.training.ahead import Ahead, Prepared, ahead
from ccd_train.training.run import begin


def figures(config: task.Config, threaded: bool) -> tuple[list[dict[str, float]], type, int]:
    """Of six steps; what a step takes; and our threads that are left."""
    with mock.patch.object(task, "ahead", lambda batches, make, _: Ahead(batches, make) if threaded else batches):
        run = begin(task.Pretraining(config))
        found, kind = steps(run, 6), type(next(run.batches))
        run.close()
    return found, kind, sum(thread.name.startswith("ahead") for thread in threading.enumerate())


def both(config: task.Config, folder: Path) -> list[tuple[list[dict[str, float]], type, int]]:
    return [figures(replace(config, run_dir=folder / str(threaded)), threaded) for threaded in (False, True)]


def test_views_made_ahead_change_no_figure(tiny: Tiny, tmp_path: Path) -> None:
    config = small(tiny, tmp_path, train={"global_batch_size": 8}, data={"workers": 1})  # two micro-batches a rank
    for plain, threaded in run_ranks(2, both, config, tmp_path):
        assert threaded[0] == plain[0] and len({step["loss"] for step in plain[0]}) == 6
        assert (plain[1], threaded[1]) == (Batch, Prepared)
        assert plain[2] == threaded[2] == 0


def test_the_order_the_end_and_the_count_of_damage(tiny: Tiny) -> None:
    corpus, share = Corpus.open(tiny.shards), Share(0, 40, 8, 8, 0, 1)
    order = sample_order(corpus, task.Config().data, 0)
    plain = list(loader(corpus, order, share, workers=0))
    batches = Ahead(loader(corpus, order, share, workers=0), lambda batch: (batch.sample_ids * 2,))
    found = list(batches)
    assert [batch.position for batch in found] == [batch.position for batch in plain] == [8, 16, 24, 32, 40]
    for mine, theirs in zip(found, plain, strict=True):
        assert mine.sample_ids.equal(theirs.sample_ids) and mine.images_u8.equal(theirs.images_u8)
        assert mine.made[0].equal(2 * theirs.sample_ids)
    assert batches.damaged == 0
    batches.close()


def test_an_error_reaches_the_step_that_would_have_met_it(tiny: Tiny) -> None:
    corpus = Corpus.open(tiny.shards)
    order = sample_order(corpus, task.Config().data, 0)

    def make(batch: Batch) -> tuple[()]:
        if batch.position == 24:
            raise TrainingError("here")
        return ()

    batches = Ahead(loader(corpus, order, Share(0, 40, 8, 8, 0, 1), workers=1), make)
    assert [next(batches).position for _ in range(2)] == [8, 16]
    with pytest.raises(TrainingError, match="here"):
        next(batches)
    batches.close()


def test_a_cpu_makes_them_when_they_are_wanted(tiny: Tiny) -> None:
    corpus, config = Corpus.open(tiny.shards), task.Config()
    batches = loader(corpus, sample_order(corpus, config.data, 0), Share(0, 8, 8, 8, 0, 1), workers=0)
    assert ahead(batches, lambda batch: (), config) is batches
