"""Pairs and crops of the pixel tasks where words were expected: pretraining takes what it can use of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from crops import REAL, change, contents, crop, write_words

from ccd_train.data.records import LmdbReader, LmdbWriter, PairedReader
from ccd_train.data.shards import Corpus, read_manifest
from ccd_train.errors import UserError
from data_tools import convert, synth


def run(source: Path, out: Path, *options: str) -> int:
    return convert.main(["--src", str(source), "--out", str(out), "--name", "w", "--workers", "1", *options])


def write_pairs(path: Path, count: int = 6, seed: int = 0) -> Path:
    with LmdbWriter(path) as writer:
        for number in range(count):
            writer.add_pair(crop(seed + number), crop(500 + seed + number, ".png"), f"w{number}")
    return path


def images(folder: Path) -> list[bytes | None]:
    corpus = Corpus.open(folder)
    return [corpus.read(*corpus.locate(number))[0] for number in range(corpus.num_samples)]


def test_pairs_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    with pytest.raises(UserError, match=r"6 pairs in TextZoom's layout .*: --images hr, lr or both"):
        run(tmp_path / "pairs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wanted", ["hr", "lr", "both"])
def test_pictures_of_pairs_become_shards(wanted: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data/train1")
    write_words(tmp_path / "data/words", 5)
    assert run(tmp_path / "data", tmp_path / "out", "--images", wanted) == 0
    with PairedReader(tmp_path / "data/train1") as reader:
        expected = []
        if wanted != "lr":
            expected += [reader.image(number) for number in range(1, 7)]
        if wanted != "hr":
            expected += [reader.partner(number) for number in range(1, 7)]
    found = images(tmp_path / "out")
    assert found[: len(expected)] == expected and len(found) == len(expected) + 5
    kinds = {"hr": ["hr"], "lr": ["lr"], "both": ["hr", "lr"]}[wanted]
    names = [source.name for source in read_manifest(tmp_path / "out").sources]
    assert names == [f"data/train1/{kind}" for kind in kinds] + ["data/words"]
    before = contents(tmp_path / "out")
    assert run(tmp_path / "data", tmp_path / "out", "--images", wanted) == 0
    assert contents(tmp_path / "out") == before


def test_a_missing_partner_is_refused_and_named(tmp_path: Path) -> None:
    change(write_pairs(tmp_path / "pairs"), {"image_lr-000000003": None})
    assert run(tmp_path / "pairs", tmp_path / "out", "--images", "both", "--max-refused", "0.2") == 0
    assert len(images(tmp_path / "out")) == 11
    assert "there is no key image_lr-000000003" in (tmp_path / "out/refused.jsonl").read_text()


def test_tests_of_textzoom_and_textseg_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "zoom/train1")
    write_pairs(tmp_path / "zoom/test/easy", seed=50)
    assert synth.main(["--out", str(tmp_path / "zoom/seg/test"), "--num-samples", "3", "--layout", "crops"]) == 0
    assert run(tmp_path / "zoom", tmp_path / "out", "--images", "hr") == 0
    said = capsys.readouterr().out
    assert "test/easy: the benchmark TextZoom easy" in said and "seg/test: the benchmark TextSeg" in said
    assert [source.name for source in read_manifest(tmp_path / "out").sources] == ["zoom/train1/hr"]
    assert run(tmp_path / "zoom", tmp_path / "all", "--images", "hr", "--with-benchmarks") == 0
    assert read_manifest(tmp_path / "all").samples == 15


def test_other_files_of_the_same_authors_are_refused_by_name(tmp_path: Path) -> None:
    write_words(tmp_path / "other", 2)
    entries = {f"image-{number:09d}": None for number in (1, 2)}
    change(tmp_path / "other", {**entries, "image_HR-000000001": crop(1), "label-000000001": b"a"})
    with pytest.raises(UserError, match=re.escape("holds image_HR-%09d keys: related to TextZoom, but not its pairs")):
        run(tmp_path / "other", tmp_path / "out")


def test_poor_pictures_alone_are_no_pairs(tmp_path: Path) -> None:
    change(write_pairs(tmp_path / "pairs", 2), {f"image_hr-{number:09d}": None for number in (1, 2)})
    with pytest.raises(UserError, match="without the good ones"):
        run(tmp_path / "pairs", tmp_path / "out", "--images", "lr")


def test_words_have_no_partners(tmp_path: Path) -> None:
    write_words(tmp_path / "words", 3)
    with pytest.raises(UserError, match="--images hr: no pairs"):
        run(tmp_path / "words", tmp_path / "out", "--images", "hr")


def test_masks_for_segmentation_are_ignored_and_others_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layout, options in (("crops", ["--layout", "crops"]), ("masked", ["--labels", "--masks"])):
        assert synth.main(["--out", str(tmp_path / layout), "--num-samples", "4", *options]) == 0
        assert run(tmp_path / layout, tmp_path / "shards" / layout) == 0
        ignored = "masks for text segmentation (codes 0, 100, 200, 255): they are ignored" in capsys.readouterr().out
        assert ignored == (layout == "crops")
        shards = read_manifest(tmp_path / "shards" / layout).shards
        assert sum(shard.masks for shard in shards) == (0 if layout == "crops" else 4)
        assert sum(shard.labels for shard in shards) == 4
    with pytest.raises(UserError, match="leave out --mask-src"):
        run(tmp_path / "masked", tmp_path / "out", "--mask-src", str(tmp_path / "crops"))


def test_who_wants_words_is_told_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"these are TextZoom's pairs .* not words: an upscaler's recipe"):
        len(LmdbReader(write_pairs(tmp_path / "pairs")))


@pytest.mark.real
@pytest.mark.skipif(not (REAL / "textzoom_like").exists(), reason="the sample is not here")
def test_the_sample_of_textzoom(tmp_path: Path) -> None:
    assert run(REAL / "textzoom_like", tmp_path / "out", "--images", "both", "--check", "decode") == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.samples == 2 * 48 and not manifest.refused
    assert np.sum([shard.labels for shard in manifest.shards]) == 96
