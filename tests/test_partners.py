"""Pairs and crops under `ccd-data verify` and `inspect`: what is wrong or odd is counted and named."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from crops import REAL, change, write_words
from textseg import write_release

from ccd_train.data.records import LmdbReader, LmdbWriter, PairedReader
from ccd_train.errors import UserError
from data_tools import crops, inspect, synth, verify


def encoded(pixels: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", pixels)[1])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    assert synth.main(["--out", str(tmp_path / "data/pairs"), "--num-samples", "12", "--layout", "pairs"]) == 0
    return tmp_path / "data/pairs"


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    release = write_release(tmp_path / "TextSeg", {"train": 3, "test": 2})
    assert crops.main([str(release), str(tmp_path / "cut"), "--workers", "1"]) == 0
    return tmp_path / "cut"


def said(folder: Path, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert verify.main([str(folder)]) == code
    return capsys.readouterr().out


def test_whole_pairs_and_crops_are_intact(pairs: Path, cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "12 pairs, 12 labels" in (text := said(pairs.parent, 0, capsys)) and "; all intact" in text
    text = said(cut, 0, capsys)
    assert text.count("; all intact") == 2 and "9 crops, 9 labels" in text
    with LmdbReader(cut / "train") as reader:
        masks = [cv2.imdecode(np.frombuffer(reader.mask(n) or b"", np.uint8), 0) for n in range(1, 10)]
    assert f"100: {sum(int((mask == 100).sum()) for mask in masks):,}" in text


def test_what_is_wrong_with_pairs_is_counted_and_named(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with PairedReader(pairs) as reader:
        half = (reader.image(4) or b"")[:200]
    grey = encoded(np.full((20, 40), 9, np.uint8))
    change(
        pairs,
        {
            "image_lr-000000002": None,
            "image_hr-000000004": half,
            "image_lr-000000006": b"no picture",
            "image_lr-000000008": grey,
            "label-000000009": None,
        },
    )
    text = said(pairs, 1, capsys)
    for line in (
        "pairs: image_lr-000000002: missing\n",
        "pairs: image_lr-000000006: not an image, or cut off\n",
        "2 undecodable, 1 missing",
        "image_lr-000000008: 40×20 pixels, its good picture has ",
        "image_lr-000000008: grey",
        "1 no label",
        "label-000000009: missing",
    ):
        assert line in text
    assert "all intact" not in text


def test_pairs_beyond_the_last_one_are_missed(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(pairs, {"num-samples": b"14"})
    assert "wrong: 2 missing (the first: image_hr-000000013: missing" in said(pairs, 1, capsys)


def test_what_is_wrong_with_crops_is_counted_and_named(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LmdbReader(cut / "train") as reader:
        picture = cv2.imdecode(np.frombuffer(reader.image(1) or b"", np.uint8), 1)
    height, width = picture.shape[:2]
    change(
        cut / "train",
        {
            "mask-000000001": encoded(np.full((height, width), 17, np.uint8)),
            "mask-000000002": None,
            "mask-000000003": encoded(np.full((5, 7), 100, np.uint8)),
            "mask-000000004": encoded(np.zeros((height, width, 3), np.uint8)),
            "image-000000005": b"no picture",
        },
    )
    text = said(cut, 1, capsys)
    for line in (
        "mask-000000001: code 17 in the mask",
        "mask-000000002: missing",
        "mask-000000003: 7×5 pixels, its picture has ",
        "mask-000000004: a mask of 3 channels",
        "image-000000005: not an image",
        "train: not the crops of ",
        "wrong: 2 mask, 1 changed, 1 mask size, 1 missing, 1 undecodable",
    ):
        assert line in text
    assert text.count("; all intact") == 1


def test_any_change_of_crops_is_found(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(cut / "train", {"label-000000004": b"other"})
    assert "train: not the crops of " in said(cut, 1, capsys)
    (cut / "crops.json").unlink()
    assert said(cut, 0, capsys).count("all intact") == 2  # of crops from elsewhere nobody knows what they were


def test_a_mask_without_text_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LmdbWriter(tmp_path / "crops") as writer:
        for value in (100, 0, 255):
            writer.add(encoded(np.zeros((8, 9, 3), np.uint8)), "a", encoded(np.full((8, 9), value, np.uint8)))
    text = said(tmp_path / "crops", 0, capsys)
    assert "0: 72, 100: 72, 255: 72; noted: 2 no text (the first: mask-000000002" in text


def test_words_are_told_to_become_shards(tmp_path: Path) -> None:
    write_words(tmp_path / "words", 3)
    for look in (verify, inspect):
        with pytest.raises(UserError, match="this is an LMDB: `ccd-data convert"):
            look.main([str(tmp_path / "words")])


def test_words_beside_pairs_are_named(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_words(pairs.parent / "words", 3)
    text = said(pairs.parent, 0, capsys)
    assert "data/words: words, which become shards first: not looked at" in text and text.count("all intact") == 1


def test_the_page_shows_both_pictures(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(pairs, {"image_lr-000000002": None, "label-000000003": b"<b>&"})
    assert inspect.main([str(pairs.parent), "--out", str(tmp_path / "page"), "--show", "8"]) == 0
    assert "12 records looked at; wrong: 1 missing" in capsys.readouterr().out
    page = (tmp_path / "page/inspect.html").read_text()
    assert "image_lr-000000002: missing" in page and "<b>&" not in page and "&lt;b&gt;&amp;" in page
    sheet = cv2.imread(str(tmp_path / "page/inspect.png"))
    assert sheet.shape == (2 * 48 + 16 + 8, 8 * (192 + 8), 3)
    poor, good = (sheet[4 + top : 4 + top + 48, 4:196].astype(float) for top in (0, 48))
    assert 0 < np.abs(poor - good).mean() < 60  # the same word twice
    assert np.abs(np.diff(poor, axis=1)).mean() < np.abs(np.diff(good, axis=1)).mean()


def test_the_page_shows_the_codes_of_masks(cut: Path, tmp_path: Path) -> None:
    assert inspect.main([str(cut), "--out", str(tmp_path / "page"), "--show", "4"]) == 0
    sheet = cv2.imread(str(tmp_path / "page/inspect.png"))[..., ::-1]
    colours = {tuple(colour) for colour in sheet[4 + 48 : 4 + 96, 4:196].reshape(-1, 3).tolist()}
    assert colours >= {(24, 24, 24), (255, 255, 255), (255, 160, 40)}
    assert "9 crops, 9 labels" in (tmp_path / "page/inspect.html").read_text()


def test_where_no_record_is_whole_no_page_is_written(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "pairs") as writer:
        writer.add_pair(b"no", b"pictures", "a")
    with pytest.raises(UserError, match="none of the records can be read"):
        inspect.main([str(tmp_path / "pairs")])


@pytest.mark.real
@pytest.mark.skipif(not (REAL / "textzoom_like").exists(), reason="the sample is not here")
def test_the_sample_is_as_its_makers_say(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(REAL / "textzoom_like", 0, capsys)
    assert text.count("all intact") == 5
    assert "test/hard: 6 pairs, 6 labels, 70 to 150 pixels wide and 33 to 43 high; noted: 6 another size" in text
    assert "image_lr-000000003 and image_hr-000000003: grey" in text  # of train2
