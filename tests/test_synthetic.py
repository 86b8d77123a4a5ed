"""Rendered words: deterministic, varied, and with masks that lie on the glyphs."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from typefaces import bold, hairline, letter, symbol, write_typeface

from ccd_train.data.masks import decode_mask, decode_rgb, pseudo_mask
from ccd_train.data.pixels import decode_codes
from ccd_train.data.records import LmdbReader, PairedReader
from ccd_train.errors import UserError
from data_tools import fonts, synth
from data_tools.fonts import Fonts, installed_fonts
from data_tools.words import Word, render


@pytest.fixture(scope="module")
def words() -> list[Word]:
    return [render(11, index, ()) for index in range(120)]


@pytest.fixture(scope="module")
def any_fonts(tmp_path_factory: pytest.TempPathFactory) -> Fonts:
    """What is used of a plain, a bold, a hairline, a symbol and a colour font."""
    folder = tmp_path_factory.mktemp("fonts")
    for draw in (letter, bold, hairline, symbol):
        write_typeface(folder / f"{draw.__name__}.ttf", draw)
    write_typeface(folder / "colour.ttf", tables=(b"COLR",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fonts, "FOLDERS", (str(folder),))
        found = installed_fonts()
    assert [Path(file).stem for file in found.files] == ["bold", "letter"]
    return found


def test_a_word_is_a_function_of_seed_and_index(words: list[Word]) -> None:
    assert render(11, 17, ()) == words[17]
    assert render(12, 17, ()) != words[17]
    assert len({word.image for word in words}) == len(words)


def test_words_vary_in_size_text_and_colour(words: list[Word]) -> None:
    images = [decode_rgb(word.image) for word in words]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    assert heights.min() < 25 and heights.max() > 70 and (widths / heights).max() > 4
    assert len({word.label for word in words}) > 100
    assert sum(word.label.isdigit() for word in words) > 3 and sum(word.label.isalpha() for word in words) > 50
    assert np.std([image.mean((0, 1)) for image in images], axis=0).min() > 25
    assert all(1 <= len(word.label) <= 23 and word.label.isascii() for word in words)


@pytest.mark.parametrize("kind", ["pillow", "any"])
def test_masks_lie_on_the_glyphs(kind: str, words: list[Word], any_fonts: Fonts) -> None:
    """Inside and outside of the glyphs differ in mean colour, and on most words the pseudo-mask finds the same."""
    overlaps = []
    for word in words if kind == "pillow" else [render(11, index, any_fonts.files) for index in range(120)]:
        image, mask = decode_rgb(word.image), decode_mask(word.mask)
        assert mask.shape == image.shape[:2] and 0.005 < mask.mean() < 0.75
        core = cv2.erode(mask, np.ones((2, 2), np.uint8))
        core = core if core.sum() > 0.3 * mask.sum() else mask  # strokes of a pixel leave no core
        assert np.abs(image[core == 1].mean(0) - image[mask == 0].mean(0)).max() > 12
        found = pseudo_mask(image)
        overlaps.append((found & mask).sum() / (found | mask).sum())
    assert np.median(overlaps) > 0.7


def test_pillows_own_font_is_the_last_resort() -> None:
    word = render(5, 3, ())
    assert decode_mask(word.mask).mean() > 0.02 and word == render(5, 3, ())


def test_the_verb_writes_the_same_lmdb_with_any_number_of_processes(tmp_path: Path) -> None:
    def digest(name: str, workers: int) -> str:
        arguments = ["--num-samples", "70", "--seed", "4", "--labels", "--masks", "--workers", str(workers)]
        assert synth.main(["--out", str(tmp_path / name), *arguments]) == 0
        with LmdbReader(tmp_path / name) as reader:
            assert len(reader) == 70
            records = [(reader.image(i), reader.label(i), reader.mask(i)) for i in range(1, 71)]
        assert Word(*records[0]) == render(4, 0, ()) and Word(*records[69]) == render(4, 69, ())  # type: ignore[arg-type]
        return hashlib.sha256(repr(records).encode()).hexdigest()

    assert digest("one", 1) == digest("two", 2)


def test_labels_and_masks_are_written_only_when_asked_for(tmp_path: Path) -> None:
    synth.main(["--out", str(tmp_path / "plain"), "--num-samples", "3", "--workers", "1"])
    with LmdbReader(tmp_path / "plain") as reader:
        assert reader.image(3) is not None and reader.label(1) is None and reader.mask(1) is None


def test_crops_have_the_codes_of_text_segmentation(tmp_path: Path) -> None:
    options = ["--num-samples", "5", "--seed", "4", "--layout", "crops", "--workers", "1"]
    assert synth.main(["--out", str(tmp_path / "crops"), *options]) == 0
    with LmdbReader(tmp_path / "crops") as reader:
        for number in range(1, 6):
            word, codes = render(4, number - 1, ()), decode_codes(reader.mask(number) or b"")
            assert (reader.image(number), reader.label(number)) == (word.image, word.label)
            assert codes.tolist() == (decode_mask(word.mask) * 100).tolist() and (codes == 100).any()


def test_pairs_are_the_words_and_what_is_left_of_them(tmp_path: Path) -> None:
    """Poor pictures are as large as the good ones, hold no more than half their lines, and depend on (seed, sample)."""

    def write(name: str, count: int, seed: int, workers: int) -> list[tuple[bytes | None, bytes | None, str | None]]:
        options = ["--num-samples", str(count), "--seed", str(seed), "--layout", "pairs", "--workers", str(workers)]
        assert synth.main(["--out", str(tmp_path / name), *options]) == 0
        with PairedReader(tmp_path / name) as reader:
            return [(reader.image(i), reader.partner(i), reader.label(i)) for i in range(1, len(reader) + 1)]

    pairs = write("one", 70, 4, 1)
    assert write("two", 66, 4, 2) == pairs[:66] and write("other", 1, 5, 1)[0][1] != pairs[0][1]
    errors, lost = [], []
    for index, (good, poor, label) in enumerate(pairs):
        word = render(4, index, ())
        assert (good, label) == (word.image, word.label)
        one, other = decode_rgb(good or b"").astype(float), decode_rgb(poor or b"").astype(float)
        assert one.shape == other.shape
        errors.append(((one - other) ** 2).mean())
        lost.append([np.abs(picture - _at_half(picture)).mean() for picture in (other, one)])
    assert 15 < 10 * np.log10(255**2 / np.mean(errors)) < 25  # TextZoom's bicubic has 20.35 dB
    poorer, better = np.mean(lost, axis=0)
    assert poorer < better / 3  # half the size holds all there is


def _at_half(picture: np.ndarray) -> np.ndarray:
    """What is left of a picture at half its size."""
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


def test_a_layout_has_its_own_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --labels and --masks"):
        synth.main(["--out", str(tmp_path / "a"), "--num-samples", "3", "--layout", "pairs", "--masks"])


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        synth.main(["--out", str(tmp_path), "--num-samples", "3"])
    with pytest.raises(UserError, match="at least 1"):
        synth.main(["--out", str(tmp_path / "new"), "--num-samples", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_run_leaves_no_lmdb_that_looks_whole(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "data_tools", "synth", "--out", str(tmp_path / "words"), "--num-samples", "100000"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / "words.unfinished" / "data.mdb"
    deadline = time.monotonic() + 30
    while not unfinished.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    workers = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they die with their parent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "words").exists()
    synth.main(["--out", str(tmp_path / "words"), "--num-samples", "3", "--workers", "1"])
    with LmdbReader(tmp_path / "words") as reader:
        assert len(reader) == 3
    assert not unfinished.exists()
