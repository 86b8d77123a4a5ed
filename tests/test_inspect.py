"""The page about a folder of shards: it shows what is there, and says what could not be read."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ccd_train.data.records import LmdbWriter
from ccd_train.data.shards import Corpus
from ccd_train.errors import UserError
from ccd_train.models.regions import label_regions
from data_tools import convert, inspect
from data_tools import sheet as sheet_of
from data_tools.words import render
from tests.conftest import Tiny

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """The page's text, and whether every element is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [tag] if tag not in VOID else []
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("look")
    assert inspect.main([str(tiny.shards), "--out", str(out), "--show", "20"]) == 0
    return out


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    outline = Outline((page / "inspect.html").read_text())
    assert outline.open == []
    assert [source[:22] for source in outline.sources] == ["data:image/png;base64,"]
    assert base64.b64decode(outline.sources[0][22:]) == (page / "inspect.png").read_bytes()
    text = " ".join(outline.text)
    for part in (
        "240 in 4 shards",
        "words as one region or none",
        "with stored mask",
        "Width in pixels",
        "Width ÷ height",
        "Contrast",
        "Refused records",
    ):
        assert part in text
    assert len(re.findall(r"lmdb/\d{9}|\b\d{9}\b", text)) >= 20  # the keys of the samples shown


def test_the_sheet_shows_crop_mask_and_regions(page: Path) -> None:
    sheet = cv2.imread(str(page / "inspect.png"))
    cell = (int(128 * sheet_of.SCALE) + 8, 3 * int(32 * sheet_of.SCALE) + 16 + 8)
    assert sheet.shape[:2] == (3 * cell[1], sheet_of.COLUMNS * cell[0])  # 20 samples in rows of 8
    mask = sheet[4 + 48 : 4 + 96, 4 : 4 + 192]
    assert set(np.unique(mask)) == {0, 255}
    regions = sheet[4 + 96 : 4 + 144, 4 : 4 + 192].reshape(-1, 3)
    assert len(np.unique(regions, axis=0)) >= 2


def test_regions_are_those_of_training(tiny: Tiny) -> None:
    corpus = Corpus.open(tiny.shards)
    looks, unreadable = inspect.take_looks(corpus, 240)
    assert len(looks) == 240 and unreadable == 0
    expected = label_regions(torch.from_numpy(np.stack([sample.mask for sample in looks])))
    assert np.array_equal(np.stack([sample.regions for sample in looks]), expected.numpy())
    assert np.median([sample.overlap for sample in looks if sample.overlap is not None]) > 0.7
    assert min(sample.contrast for sample in looks) > 15 and 3 < np.mean([sample.characters for sample in looks]) < 9


def test_regions_are_judged_by_the_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 10 words every region a bar: 4 bars for 4 letters, for 5, and for 9; and one word that is a single block."""
    with LmdbWriter(tmp_path / "lmdb") as writer:
        for label in ("abcd", "ab cd", *["abcde"] * 3, *["abcdefghi"] * 4):
            writer.add(bars(4), label)
        writer.add(bars(1), "abcd")
    convert.main(["--src", str(tmp_path / "lmdb"), "--out", str(tmp_path / "s"), "--name", "s", "--workers", "1"])
    assert "10 labels" in capsys.readouterr().out
    assert inspect.main([str(tmp_path / "s")]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == (
        "words as one region or none: 10.0%; as many regions as the label has letters: 50.0% within one, 20.0% exactly"
    )
    assert "10 in 1 shard," in (tmp_path / "s/inspect.html").read_text()


def bars(count: int) -> bytes:
    """A PNG of dark bars on white, 32 × 128."""
    image = np.full((32, 128, 3), 255, np.uint8)
    for number in range(count):
        image[6:26, 10 + 28 * number : 24 + 28 * number] = 0
    return cv2.imencode(".png", image)[1].tobytes()


def test_labels_are_text_not_markup_and_refusals_are_listed(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "lmdb") as writer:
        for index in range(40):
            writer.add(render(0, index, ()).image, "<script>alert('&')</script>")
        writer.add(b"no image", "x")
    out = tmp_path / "shards"
    convert.main(["--src", str(tmp_path / "lmdb"), "--out", str(out), "--name", "odd", "--workers", "1"])
    assert inspect.main([str(out)]) == 0
    written = (out / "inspect.html").read_text()
    assert "<script" not in written and "&lt;script&gt;alert(" in written
    assert "<td>not an image</td><td>1</td>" in written


def test_what_cannot_be_read_is_counted(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny.shards, tmp_path / "rotten")
    corpus = Corpus.open(tmp_path / "rotten")
    with open(corpus.paths[1], "r+b") as tar:
        tar.seek(int(corpus.places(1)[5]["image"]) + 30)
        tar.write(b"rot")
    assert inspect.main([str(tmp_path / "rotten")]) == 0
    assert "239 samples measured, 1 unreadable" in capsys.readouterr().out


def test_impossible_wishes_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        inspect.main([str(tiny.shards), "--out", str(tmp_path / "file"), "--measure", "2"])
    with pytest.raises(UserError, match="--measure"):
        inspect.main([str(tiny.shards), "--measure", "0"])
    with pytest.raises(UserError, match="manifest"):
        inspect.main([str(tmp_path)])
