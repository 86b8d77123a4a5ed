"""What ends a life of a run, and what it may go on from."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Tiny
from test_engine import small

from ccd_train.config.options import to_dict
from ccd_train.config.run import identity
from ccd_train.config.stored import claim
from ccd_train.errors import OccupiedError, UserError
from ccd_train.training.life import Stop, environment
from ccd_train.training.train import conclude

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", ASKING)
def test_signals_only_ask_however_many_come(first: signal.Signals) -> None:
    stop = Stop(None)
    assert not stop.wanted()
    for number in (first, *ASKING, *ASKING):
        os.kill(os.getpid(), number)
    assert stop.wanted() and stop.reason() == first.name


def test_twice_the_time_of_a_save_is_kept_for_the_last_one() -> None:
    stop = Stop(max_minutes=10)
    assert not stop.wanted()
    stop.save_seconds = 299
    assert not stop.wanted()
    stop.save_seconds = 301
    assert stop.wanted() and "max-minutes" in stop.reason()


def test_the_deadline_comes_by_itself() -> None:
    stop = Stop(max_minutes=0.5 / 60)
    began = time.monotonic()
    while not stop.wanted():
        assert time.monotonic() - began < 5
    assert time.monotonic() - began > 0.4


def test_another_corpus_or_batch_is_refused_with_the_difference(tiny: Tiny, tmp_path: Path) -> None:
    config = small(tiny, tmp_path)
    assert claim(tmp_path, config, {"corpus": "one"}, 8) == 8  # a folder that nobody has
    known = identity(to_dict(config)) | {"corpus": "one", "train.global_batch_size": 8}
    (tmp_path / "identity.json").write_text(json.dumps(known))
    assert claim(tmp_path, config, {"corpus": "one"}, None) == claim(tmp_path, config, None, None) == 8
    with pytest.raises(UserError, match="seed: 0 → 5"):
        claim(tmp_path, replace(config, seed=5), None, None)
    for facts, batch, difference in (("other", 8, r"corpus: one → other"), ("one", 16, "global_batch_size: 8 → 16")):
        with pytest.raises(UserError, match=difference):
            claim(tmp_path, config, {"corpus": facts}, batch)
    allowed = replace(config, resume=replace(config.resume, allow_change=True))
    assert claim(tmp_path, allowed, {"corpus": "other"}, 16) == 16


def test_facts_that_came_later_are_not_compared_and_words_stand_for_hashes(tiny: Tiny, tmp_path: Path) -> None:
    config = small(tiny, tmp_path)
    facts = {"corpus": "one", "corpus.content": "two", "corpus.told": "a (60), b (3)"}
    known = identity(to_dict(config)) | {"train.global_batch_size": 8}
    for noted, mine, difference in (
        ({"corpus": "one"}, facts, ""),  # by an earlier version
        (facts, facts | {"corpus.told": "elsewhere (60)"}, ""),
        ({"corpus": "other"}, facts, r"\(corpus: other → one\)"),
        (
            facts,
            facts | {"corpus": "other", "corpus.told": "a (61), b (3)"},
            r"corpus: a \(60\), b \(3\) → a \(61\), b",
        ),
        (facts, facts | {"corpus.content": "other"}, r"corpus\.content: a .* → a \(60\), b \(3\), with other contents"),
    ):
        (tmp_path / "identity.json").write_text(json.dumps(known | noted))
        if difference:
            with pytest.raises(UserError, match=difference):
                claim(tmp_path, config, mine, 8)
        else:
            assert claim(tmp_path, config, mine, 8) == 8


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "commit unknown\n" in environment(["node1"])


def ends_with(error: Exception) -> Callable[[], tuple[int, str]]:
    def live() -> tuple[int, str]:
        raise error

    return live


def test_an_error_that_nobody_foresaw_is_a_failure_for_launchers(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        conclude(tmp_path, ends_with(ZeroDivisionError("by zero")))
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["code"] == 3 and outcome["message"].startswith("ZeroDivisionError: by zero")


def test_a_second_life_does_not_write_over_the_outcome_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("the first one's")
    assert conclude(tmp_path, ends_with(OccupiedError("in use"))) == 2
    assert (tmp_path / "outcome.json").read_text() == "the first one's"
    assert conclude(tmp_path, ends_with(UserError("wrong"))) == 2
    assert json.loads((tmp_path / "outcome.json").read_text())["message"] == "wrong"
