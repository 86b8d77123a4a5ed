"""Labelled words out of LMDBs and shards: the share is the same everywhere, and what is odd is counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Tiny
from crops import REAL, change, crop, write_words
from ranks import run_ranks

from ccd_train.data.charset import LENGTH, Tally, read_charset
from ccd_train.data.loader import Share, loader
from ccd_train.data.order import Order
from ccd_train.data.records import LmdbWriter
from ccd_train.data.words import Words, open_words
from ccd_train.errors import UserError
from data_tools import convert

DICT90 = read_charset("DICT90")
ASKED = ["--with-benchmarks", "--name", "b", "--workers", "1"]


def words_of(*folders: Path, fraction: float = 1.0, seed: int = 0) -> tuple[Words, Tally]:
    return open_words(list(folders), DICT90, LENGTH, option="data.train", seed=seed, fraction=fraction)


def content(words: Words) -> set[tuple[bytes | None, ...]]:
    """Image and label of every word."""
    return {
        words.read(shard, row, ("image", "label"))
        for shard, samples in enumerate(words.shard_samples.tolist())
        for row in range(samples)
    }


def shares(folders: list[Path], fraction: float) -> tuple[str, set[tuple[bytes | None, ...]], Tally]:
    words, tally = words_of(*folders, fraction=fraction)
    return words.hash + words.content, content(words), tally


def test_lmdbs_and_shards_give_the_same_words(tiny: Tiny) -> None:
    from_lmdb, from_shards = words_of(tiny.lmdb)[0], words_of(tiny.shards)[0]
    assert content(from_lmdb) == content(from_shards)
    both = words_of(tiny.lmdb, tiny.shards)[0]
    assert both.num_samples == 2 * tiny.samples == from_lmdb.num_samples + from_shards.num_samples


def test_all_that_lies_in_a_folder_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    """Beside LMDBs the shards, too; and what else is there is named."""
    write_words(tmp_path / "mix" / "lmdb", 20)
    (tmp_path / "mix" / "shards").symlink_to(tiny.shards)
    (tmp_path / "mix" / "words.csv").touch()
    words = words_of(tmp_path / "mix")[0]
    assert words.num_samples == tiny.samples + 15
    assert words.not_read == "1 × .csv"
    assert content(words) == content(words_of(tmp_path / "mix" / "lmdb", tiny.shards)[0])


@pytest.mark.parametrize("kind", ["lmdb", "shards"])
def test_a_share_is_the_same_on_any_number_of_ranks(tiny: Tiny, kind: str) -> None:
    folders = [getattr(tiny, kind)]
    ((alone, words, tally),) = run_ranks(1, shares, folders, 0.25)
    for other, others_words, others_tally in run_ranks(2, shares, folders, 0.25):
        assert (other, others_words, others_tally) == (alone, words, tally)
    assert 0.15 * tiny.samples < len(words) < 0.35 * tiny.samples
    assert content(words_of(*folders, fraction=0.1)[0]) < words < content(words_of(*folders)[0])
    assert content(words_of(*folders, fraction=0.25, seed=1)[0]) != words


def test_a_share_does_not_depend_on_the_order_or_the_place_of_folders(tiny: Tiny, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(tiny.shards)
    one, other = words_of(tiny.lmdb, tiny.shards, fraction=0.2)[0], words_of(moved, tiny.lmdb, fraction=0.2)[0]
    assert content(one) == content(other) and one.num_samples == other.num_samples


def test_what_is_odd_about_labels_is_counted(tmp_path: Path) -> None:
    labels = ["word", "", None, "wörd", "x" * 23, "x" * 24, "two words"]
    with LmdbWriter(tmp_path / "MJ" / "MJ_train") as writer:
        for number, label in enumerate(labels):
            writer.add(crop(number), label)
    words, tally = words_of(tmp_path)
    assert words.num_samples == 5
    assert (tally.labels, tally.empty, tally.cut, tally.unknown) == (7, 2, 1, 2)
    assert tally.characters == {"ö": 1, " ": 1}


def test_one_label_of_many_changes_the_content(tmp_path: Path) -> None:
    """Neither the number of records nor a sample of them shows it."""
    write_words(tmp_path / "one", 200)
    before = words_of(tmp_path / "one")[0]
    assert before.told == "one (150)"
    before.close()
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "one")
    change(tmp_path / "one", {"label-000000099": b"corrected"})
    after, copied = words_of(tmp_path / "one")[0], words_of(tmp_path / "two" / "one")[0]
    assert (after.hash, after.told) == (before.hash, before.told) and after.content != before.content
    assert copied.content == before.content


def test_labels_ride_with_their_images(tiny: Tiny) -> None:
    words = words_of(tiny.lmdb, fraction=0.5)[0]
    order = Order(words.shard_samples, 0, 16)
    count, known = words.num_samples, content(words)
    with loader(words, order, Share(0, count, count, count, 0, 1), workers=0, with_labels=True) as batches:
        batch = next(batches)
    read = [words.read(0, row, ("image", "label"))[1] for row in batch.sample_ids.tolist()]
    assert [label.decode() for label in read if label] == list(batch.labels)
    assert len(known) == count and len(set(batch.sample_ids.tolist())) == count


def test_a_missing_image_is_replaced_and_counted(tmp_path: Path) -> None:
    write_words(tmp_path / "words", 4)
    change(tmp_path / "words", {"image-000000002": None})
    words = words_of(tmp_path)[0]
    order = Order(words.shard_samples, 0, 16)
    with loader(words, order, Share(0, 3, 3, 3, 0, 1), workers=0, with_labels=True) as batches:
        batch = next(batches)
    assert len(batch.replaced) == 1 and len(batch.damaged) == 1 and "words 000000002: " in batch.damaged[0]
    assert "wörd2" not in batch.labels


@pytest.mark.parametrize(("below", "given"), [("SVT", "benchmark"), ("SVT", "."), ("SVT", "benchmark/SVT")])
def test_a_benchmark_is_refused(tmp_path: Path, below: str, given: str) -> None:
    root = tmp_path / "data_lmdb" / "evaluation"
    write_words(root / "benchmark" / below, 3)
    with pytest.raises(UserError, match="a benchmark; neither training nor validation"):
        words_of(root / given)


def test_a_benchmark_in_shards_or_behind_a_link_is_refused(tmp_path: Path) -> None:
    benchmark = tmp_path / "evaluation" / "benchmark"
    write_words(benchmark / "SVT", 3)
    write_words(benchmark / "CUTE80", 3)
    assert convert.main([*ASKED, "--src", str(benchmark), "--out", str(tmp_path / "shards")]) == 0
    assert convert.main([*ASKED, "--src", str(benchmark / "CUTE80"), "--out", str(tmp_path / "alone")]) == 0
    (tmp_path / "validation").symlink_to(benchmark / "SVT")
    write_words(tmp_path / "mine" / "CUTE80", 3)
    for folder in ("shards", "alone", "validation", "mine"):
        with pytest.raises(UserError, match="a benchmark"):
            words_of(tmp_path / folder)


def test_a_name_alone_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PARSeq's `val` is named after the benchmarks, and holds their training splits."""
    for name in ("IC13", "IC15", "IIIT5k", "SVT"):
        write_words(tmp_path / "val" / name, 3)
    assert words_of(tmp_path / "val")[0].num_samples == 12
    assert "val/SVT: bears the name of the benchmark SVT, but has 3 words, not as published: taken" in caplog.text


def test_what_two_folders_hold_is_refused_for_training(tmp_path: Path) -> None:
    lmdb, shards, linked = write_words(tmp_path / "words", 4), tmp_path / "shards", tmp_path / "linked"
    linked.symlink_to(lmdb)
    convert.main(["--src", str(lmdb), "--out", str(shards), "--name", "w", "--workers", "1"])
    for folders in ([lmdb, lmdb], [lmdb, shards], [shards, shards], [linked, lmdb]):
        with pytest.raises(UserError, match=r"--data.train: .* and .* are the same; name each set once"):
            open_words(folders, DICT90, LENGTH, option="data.train", each_once=True)
    assert open_words([shards], DICT90, LENGTH, option="data.valid")[0].sources == words_of(lmdb)[0].sources


def test_blanks_at_the_ends_are_no_part_of_a_word(tmp_path: Path) -> None:
    labels = ["one\n", " two", "three\r\n", "\ufefffour", "five\u3000", "s i x", "\t", "seven"]
    with LmdbWriter(tmp_path / "words") as writer:
        for number, label in enumerate(labels):
            writer.add(crop(number), label)
    words, tally = words_of(tmp_path / "words")
    assert (tally.trimmed, tally.empty, tally.unknown, words.num_samples) == (6, 1, 1, 7)
    assert "6 with blanks at their ends" in tally.describe()
    with loader(
        words, Order(words.shard_samples, 0, 1), Share(0, 7, 7, 7, 0, 1), workers=0, with_labels=True
    ) as batches:
        assert set(next(batches).labels) == {"one", "two", "three", "four", "five", "s i x", "seven"}


def test_words_that_are_too_long_may_be_left_out(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "words") as writer:
        for number, label in enumerate(["abc", "abcd", "abcde", "ab"]):
            writer.add(crop(number), label)
    cut, tally = open_words([tmp_path], DICT90, 5, option="data.train")
    assert (cut.num_samples, tally.cut) == (4, 2) and "2 too long (50.0%)" in tally.describe()
    kept, tally = open_words([tmp_path], DICT90, 5, option="data.train", leave_out_long=True)
    assert (kept.num_samples, tally.cut) == (2, 2)
    with pytest.raises(UserError, match=r"every label has more than the 1 characters .* --recognizer.length"):
        open_words([tmp_path], DICT90, 3, option="data.train")


def test_sets_without_labels_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "words") as writer:
        writer.add(crop(1))
    convert.main(["--src", str(tmp_path / "words"), "--out", str(tmp_path / "shards"), "--name", "w", "--workers", "1"])
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("words", "no word here has a label"),
        ("shards", "no word here has a label"),
        ("empty", "an empty folder"),
        ("nothing", "no such folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            words_of(tmp_path / folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="none of its words fall into"):
        words_of(write_words(tmp_path / "few", 3), fraction=1e-9)


@pytest.mark.skipif(not (REAL / "iiit5k_train").is_dir(), reason="no real words beside the checkout")
def test_a_tenth_of_real_words() -> None:
    words, tally = words_of(REAL / "iiit5k_train", fraction=0.1)
    assert 140 < words.num_samples == tally.labels < 260
    assert all(np.diff(rows).min() > 0 for rows in words._rows)
