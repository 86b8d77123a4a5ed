"""Fonts: what draws nothing legible is left out, and the same fonts draw the same words wherever they lie."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont
from typefaces import ALL, bold, hairline, letter, symbol, write_typeface

from ccd_train.data.records import LmdbReader
from ccd_train.errors import UserError
from data_tools import fonts, synth
from data_tools.words import open_font


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fonts of each kind, as a machine may have them."""
    folder = tmp_path_factory.mktemp("fonts")
    for draw in (letter, bold, hairline, symbol):
        write_typeface(folder / draw.__name__ / f"{draw.__name__}.ttf", draw)
    write_typeface(folder / "colour.ttf", tables=(b"COLR",))
    write_typeface(folder / "digits.ttf", characters=ALL[:10])
    write_typeface(folder / "blank.ttf", lambda character: letter(character) * 0)
    write_typeface(folder / "no_percent.otf", characters=ALL.replace("%", ""))
    (folder / "broken.ttf").write_bytes(b"no font")
    return folder


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fonts, "FOLDERS", (str(folder), str(folder / "not there")))
    return folder


def drawn(out: Path, *arguments: str | Path) -> list[bytes | None]:
    """Images and masks of 20 words that `ccd-data synth` renders."""
    size = ["--num-samples", "20", "--masks", "--workers", "1"]
    assert synth.main(["--out", str(out), *size, *map(str, arguments)]) == 0
    with LmdbReader(out) as reader:
        return [read(number) for number in range(1, 21) for read in (reader.image, reader.mask)]


def test_what_draws_nothing_legible_is_left_out(installed: Path) -> None:
    found = fonts.installed_fonts()
    assert [face.name[0] for face in found.faces] == ["bold", "letter"]
    assert {Path(file).stem: why for file, why in found.left_out.items()} == {
        "hairline": "hairline",
        "symbol": "symbol",
        "colour": "colour",
        "digits": "lacking Latin letters",
        "blank": "lacking Latin letters",
        "no_percent": "lacking Latin letters",
        "broken": "not scalable",
    }


def test_the_command_says_which_fonts_it_uses(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(tmp_path / "words")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "drawing with 2 fonts: bold, letter"
    assert printed[1].startswith("7 left out: lacking Latin letters 3, ")
    record = tmp_path / "words" / "fonts.txt"
    subprocess.run(["sha256sum", "--check", "--strict", record], check=True, stdout=subprocess.DEVNULL)
    lines = record.read_text().splitlines()
    bold_file = installed / "bold" / "bold.ttf"
    assert lines[0] == f"{hashlib.sha256(bold_file.read_bytes()).hexdigest()}  {bold_file}"
    assert f"# left out, hairline: {installed / 'hairline' / 'hairline.ttf'}" in lines and len(lines) == 9


def test_the_same_fonts_draw_the_same_words_wherever_they_lie(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither folder nor file name, nor order, nor a second copy, nor what is installed changes a picture."""
    files = [folder / "letter" / "letter.ttf", folder / "bold" / "bold.ttf"]
    named = drawn(tmp_path / "one", "--fonts", *files)
    copies = [tmp_path / "z.ttf", tmp_path / "a.otf", tmp_path / "a2.otf"]
    for file, copy in zip([files[1], files[0], files[0]], copies, strict=True):
        shutil.copy(file, copy)
    assert drawn(tmp_path / "copies", "--fonts", *copies) == named
    monkeypatch.setattr(fonts, "FOLDERS", (str(folder),))
    assert drawn(tmp_path / "installed") == named
    assert drawn(tmp_path / "both", "--fonts", *files) == named
    assert drawn(tmp_path / "bold", "--fonts", files[1]) != named


def test_without_an_installed_font_pillows_own_is_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fonts, "FOLDERS", ())
    words = drawn(tmp_path / "none")
    assert capsys.readouterr().out.startswith(f"drawing with {fonts.PILLOWS_OWN}\n")
    assert (tmp_path / "none" / "fonts.txt").read_text() == f"# {fonts.PILLOWS_OWN}\n"
    monkeypatch.setattr(fonts, "FOLDERS", (str(folder),))
    assert drawn(tmp_path / "named", "--fonts", "pillow") == words


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hairline/hairline.ttf", r"nothing legible \(hairline\); name another one"),
        ("symbol/symbol.ttf", "symbol"),
        ("colour.ttf", "colour"),
        ("broken.ttf", "not scalable"),
        ("missing.ttf", "no such file; name font files, or pillow alone"),
    ],
)
def test_a_named_font_that_cannot_be_used_is_refused(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        drawn(tmp_path / "words", "--fonts", folder / "bold" / "bold.ttf", folder / name)
    assert f"--fonts {folder / name}: " in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [1, 3, 10])
def test_the_width_of_a_stroke_is_measured(width: int) -> None:
    line = np.zeros((200, 200), np.uint8)
    line[10:190, 50 : 50 + width] = 255
    line[10:190, 100 : 100 + width] = 255
    assert fonts.stroke(line) == pytest.approx(width, rel=0.06)


def test_letters_in_their_own_places_are_letters() -> None:
    drawn_by_pillow = [fonts._bitmap(open_font("", 30), one) for one in fonts.LETTERS]
    assert fonts.likeness(drawn_by_pillow) > 0.95
    assert fonts.likeness(drawn_by_pillow[5:] + drawn_by_pillow[:5]) < fonts.LEAST_LIKENESS


def test_letters_are_set_without_raqm(folder: Path) -> None:
    """Raqm rounds widths otherwise, and is there only where fribidi is installed."""
    for file in ("", str(folder / "bold" / "bold.ttf")):
        assert open_font(file, 20).layout_engine == ImageFont.Layout.BASIC
