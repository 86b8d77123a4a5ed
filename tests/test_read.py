"""`ccd-train read`: text and confidence of plain image files, and every image that cannot be read by its name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import words
from conftest import Tiny
from PIL import Image

from ccd_train.commands import read
from ccd_train.errors import FINISHED, REFUSED, UserError
from ccd_train.tasks.recognize.reading import Reader, Reading

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.write(tmp_path_factory.mktemp("export"))


@pytest.fixture()
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """Five images in two folders, and a file that is none."""
    for number, data in enumerate(words.images(tiny.lmdb, 5)):
        path = tmp_path / "images" / ("below" if number > 2 else "") / f"{number}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_a_line_for_every_image(export: Path, folder: Path, tiny: Tiny, capsys: Output) -> None:
    assert read.main(["--weights", str(export), str(folder)]) == FINISHED
    expected = words.texts(words.small(), words.images(tiny.lmdb, 5))
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(Path(path).name, text) for path, text, _ in lines] == [
        (f"{number}.JPG", text) for number, text in enumerate(expected)
    ]
    assert all(0 <= float(confidence) <= 1 for _, _, confidence in lines)


def test_json_lines_hold_the_confidence_of_every_character(export: Path, folder: Path, capsys: Output) -> None:
    assert read.main(["--weights", str(export), str(folder / "0.JPG"), "--json"]) == FINISHED
    record = json.loads(capsys.readouterr().out)
    assert record.keys() == {"image", "text", "confidence", "characters"}
    assert len(record["characters"]) == len(record["text"]) > 0
    assert record["confidence"] <= math.prod(record["characters"]) * 1.001


def test_images_that_cannot_be_read_are_named_and_counted(export: Path, folder: Path, capsys: Output) -> None:
    whole = (folder / "1.JPG").read_bytes()
    (folder / "1.JPG").write_bytes(whole[: len(whole) // 3][:40])
    (folder / "2.JPG").write_bytes(b"")
    assert read.main(["--weights", str(export), str(folder)]) == FINISHED
    output = capsys.readouterr()
    assert [Path(line.split("\t")[0]).name for line in output.out.splitlines()] == ["0.JPG", "3.JPG", "4.JPG"]
    complaints = output.err.splitlines()
    assert [line.split(": ")[0] for line in complaints[:2]] == [str(folder / "1.JPG"), str(folder / "2.JPG")]
    assert complaints[2:] == [
        "2 of 5 images cannot be read",
        "left out, as they are no images or hidden: 1 × .txt",
    ]


def test_with_json_an_unreadable_image_has_a_record_too(export: Path, folder: Path, capsys: Output) -> None:
    (folder / "2.JPG").write_bytes(b"no image")
    assert read.main(["--weights", str(export), str(folder), "--json"]) == FINISHED
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(record["image"]).name for record in records] == [f"{number}.JPG" for number in range(5)]
    assert [("error" in record) for record in records] == [False, False, True, False, False]


def test_nothing_that_can_be_read_is_a_failure(export: Path, folder: Path) -> None:
    assert read.main(["--weights", str(export), str(folder / "notes.txt")]) == REFUSED


def test_every_kind_of_pixels_is_read(export: Path, tmp_path: Path, capsys: Output) -> None:
    grey = np.tile(np.arange(96, dtype=np.uint8), (24, 1))
    kinds = {"grey": grey, "rgba": np.dstack([grey] * 4), "deep": grey.astype(np.uint16) * 256, "dot": grey[:1, :1]}
    for name, pixels in kinds.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), pixels)
    assert read.main(["--weights", str(export), str(tmp_path)]) == FINISHED
    assert len(capsys.readouterr().out.splitlines()) == len(kinds)


def test_a_photo_on_its_side_is_turned_upright(export: Path, folder: Path, capsys: Output) -> None:
    upright = Image.open(folder / "0.JPG").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    upright.save(folder / "plain.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    names = [str(folder / f"{name}.png") for name in ("plain", "turned")]
    assert read.main(["--weights", str(export), *names, "--json"]) == FINISHED
    plain, turned = (json.loads(line)["characters"] for line in capsys.readouterr().out.splitlines())
    assert plain == pytest.approx(turned, abs=2e-6)


def test_a_folder_means_what_its_files_mean_one_by_one(export: Path, folder: Path, capsys: Output) -> None:
    """By content, whatever the name says; what is not tried is counted."""
    photo = Image.open(folder / "0.JPG").convert("RGB")
    for suffix in ("avif", "gif", "tiff", "webp", "bmp", "png", "jpeg", "ppm"):
        photo.save(folder / f"a.{suffix}")
        (folder / f"a.{suffix}").rename(folder / f"{suffix}_inside")
    for name, like in (("x.jfif", "0.JPG"), ("x.JPE", "0.JPG"), ("y.txt", "0.JPG"), ("page.jpg", "notes.txt")):
        (folder / name).write_bytes((folder / like).read_bytes())
    for name in ("._0.JPG", ".thumbs/0.JPG", "__MACOSX/0.JPG", "data.mdb"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7" + bytes(99))
    assert read.main(["--weights", str(export), str(folder)]) == FINISHED
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 5 + 8 + 3
    complaints = output.err.splitlines()
    assert complaints[0].startswith(f"{folder / 'page.jpg'}: cannot be read") and len(complaints) == 3
    assert complaints[2] == "left out, as they are no images or hidden: 3 × .jpg, 1 × .mdb, 1 × .txt"


def test_a_line_stays_a_line_whatever_the_name(export: Path, folder: Path, capsys: Output) -> None:
    names = {"new\nline.png": r"new\nline.png", "a\tb.png": r"a\tb.png", "sep\u2028.png": r"sep\u2028.png"}
    for name in names:
        (folder / name).write_bytes((folder / "0.JPG").read_bytes())
    (folder / "bad\n.png").touch()
    assert read.main(["--weights", str(export), str(folder)]) == FINISHED
    output = capsys.readouterr()
    lines = [line.split("\t") for line in output.out.split("\n")[:-1]]
    assert {len(line) for line in lines} == {3} and set(names.values()) <= {Path(line[0]).name for line in lines}
    assert r"bad\n.png: cannot be read" in output.err
    assert read.main(["--weights", str(export), str(folder), "--json"]) == FINISHED
    assert names.keys() <= {Path(json.loads(line)["image"]).name for line in capsys.readouterr().out.split("\n")[:-1]}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_names_that_are_not_utf8_can_be_printed(export: Path, folder: Path, arguments: list[str]) -> None:
    os.rename(folder / "0.JPG", os.fsencode(folder) + b"/\xff.JPG")
    command = [sys.executable, "-m", "ccd_train", "read", "--weights", str(export), str(folder), *arguments]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=strict, check=True)
    last = done.stdout.splitlines()[-1]
    name = json.loads(last)["image"] if arguments else last.split("\t")[0]
    assert Path(name).name == "\\udcff.JPG"


def test_a_batch_reads_as_its_images_alone(tiny: Tiny) -> None:
    reader, contents = Reader(words.small()), words.images(tiny.lmdb, 6)
    contents[2] = b"damaged"
    batch = reader.read(contents)
    assert not isinstance(batch[2], Reading)
    for place in (0, 5):
        alone, among = reader.read([contents[place]])[0], batch[place]
        assert isinstance(alone, Reading)
        assert isinstance(among, Reading)
        assert alone.text == among.text
        assert alone.confidence == pytest.approx(among.confidence, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an image or a folder"),
        (["missing.png"], "missing.png: no such file"),
        (["x" * 300], "x: File name too long; name an image"),
        (["empty"], "empty: no image in or below this folder"),
        (["notes.txt", "--charset", "37"], "charset 37: no such name"),
        (["notes.txt", "--charset", "DICT90"], "reads charset 62 .* not charset DICT90"),
        (["notes.txt", "--heads", "0"], "heads = 0"),
    ],
)
def test_what_cannot_be_done_is_refused(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=message):
        read.main(["--weights", str(export), *arguments])


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ccd_train", "read", "--weights", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == REFUSED
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
