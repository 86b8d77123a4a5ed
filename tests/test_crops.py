"""Word crops with masks: what is cut, what is left out and named, and the same bytes however often it was killed."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from crops import REAL, small_disk
from PIL import Image
from textseg import SIZE, save, write_picture, write_release, write_slices

from ccd_train.data.masks import decode_rgb
from ccd_train.data.records import LmdbReader
from ccd_train.errors import UserError
from data_tools import crops, textseg
from data_tools.polygons import rectangle_about, turn_upright

BLANK = np.zeros((SIZE[1], SIZE[0]), np.uint8)
Records = list[tuple[bytes | None, bytes | None, bytes | None]]


def cut(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Runs the verb; the record that it leaves."""
    assert crops.main([str(source), str(out), "--workers", "1", *options]) == 0
    content: dict[str, Any] = json.loads((out / "crops.json").read_text())
    return content


def records(lmdb: Path) -> Records:
    with LmdbReader(lmdb) as reader:
        return [(reader.image(i), reader.mask(i), reader.label_bytes(i)) for i in range(1, len(reader) + 1)]


def everything(out: Path) -> dict[str, Any]:
    """What must not depend on workers or kills."""
    found: dict[str, Any] = {name: (out / name).read_bytes() for name in ("crops.json", "findings.jsonl")}
    assert sorted(path.name for path in out.iterdir()) == ["crops.json", "findings.jsonl", "test", "train", "val"]
    return found | {split: records(out / split) for split in ("train", "val", "test")}


def findings(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]


def codes(data: bytes | None) -> np.ndarray:
    image = Image.open(io.BytesIO(data or b""))
    assert image.mode == "L" and image.format == "PNG"
    return np.asarray(image)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "TextSeg")


def annotation(release: Path, picture: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((release / f"annotation/{picture}_anno.json").read_text())
    return content


@pytest.mark.real
@pytest.mark.skipif(not (REAL / "textseg_like").exists(), reason="the sample is not here")
def test_the_sample_is_cut_as_its_makers_say(tmp_path: Path) -> None:
    splits = cut(REAL / "textseg_like", tmp_path / "out")["splits"]
    told = {split: [found[key] for key in ("words", "crops", "left_out")] for split, found in splits.items()}
    assert told == {"train": [30, 28, {"no text": 1, "too small": 1}], "val": [7, 7, {}], "test": [15, 15, {}]}
    assert [found["noted"].get("clipped", 0) for found in splits.values()] == [2, 0, 1]
    assert [found["codes"]["100"] for found in splits.values()] == [14_727, 4_022, 7_275]  # all there is of words
    (short,) = (one for one in findings(tmp_path / "out") if one["kind"] == "no characters" and one["kept"])
    assert short["picture"] == "a00005"
    kept = cut(REAL / "textseg_like", tmp_path / "kept", "--keep-empty")["splits"]
    assert kept["train"]["crops"] == 30 and kept["train"]["noted"]["too small"] == 1
    slices = cut(REAL / "textseg_like/word_crops", tmp_path / "slices")["splits"]
    assert {split: found["crops"] for split, found in slices.items()} == {"train": 12, "val": 7, "test": 12}
    one, other = records(tmp_path / "out/test")[0], records(tmp_path / "slices/test")[0]
    assert ((codes(one[1]) == 100) == (codes(other[1]) == 100)).mean() > 0.99  # a JPEG mask is nearly the mask


def test_a_box_is_a_slice_of_picture_and_mask(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(release, tmp_path / "out")
    image = cv2.imread(str(release / "image/a00001.jpg"))[..., ::-1]
    mask = cv2.imread(str(release / "semantic_label/a00001_maskfg.png"), cv2.IMREAD_UNCHANGED)
    for word, (picture, coded, label) in zip(
        annotation(release, "a00001").values(), records(tmp_path / "out/train")[:3], strict=True
    ):
        x, y = word["bbox"][::2], word["bbox"][1::2]
        place = np.s_[max(min(y), 0) : max(y), max(min(x), 0) : max(x)]
        assert (codes(coded) == mask[place]).all() and set(np.unique(codes(coded))) >= {0, 100}
        assert decode_rgb(picture or b"").shape == image[place].shape
        assert np.abs(decode_rgb(picture or b"").astype(int) - image[place]).mean() < 4
        assert label == word["text"].encode()
    said = capsys.readouterr().out
    assert "masks of semantic_label, words of annotation" in said
    assert "cannot be compared with published ones" in said and "train: 6 pictures, 18 words: 18 crops" in said


def test_upright_turns_a_word_and_leaves_a_straight_one_alone(release: Path, tmp_path: Path) -> None:
    cut(release, tmp_path / "box")
    cut(release, tmp_path / "upright", "--shape", "upright")
    boxes, turned = records(tmp_path / "box/train"), records(tmp_path / "upright/train")
    words = [
        word for picture in sorted(release.glob("annotation/*")) for word in json.loads(picture.read_text()).values()
    ]
    for number, (word, box, one) in enumerate(zip(words, boxes, turned, strict=False)):
        inside = min(word["bbox"]) >= 0 and max(word["bbox"][::2]) <= SIZE[0] and max(word["bbox"][1::2]) <= SIZE[1]
        if number % 3 == 1:
            assert codes(one[1]).shape[0] < codes(box[1]).shape[0]  # the word, not the box about it
            rows = (codes(one[1]) == 100).any(1)
            assert rows.mean() > 0.5
        elif inside:
            assert codes(one[1]).tolist() == codes(box[1]).tolist() and one[0] == box[0]


@pytest.mark.parametrize("degrees", [0, 30, 80, 130, 180, 250, 300])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_turned_word_is_read_from_its_first_corner(degrees: int, mirrored: bool) -> None:
    """Four colours in the quarters of a word, which is turned in the picture, and comes back as it was."""
    word = np.zeros((40, 80, 3), np.uint8)
    word[:20, :40], word[:20, 40:], word[20:, 40:], word[20:, :40] = (
        (250, 0, 0),
        (0, 250, 0),
        (0, 0, 250),
        (250, 250, 0),
    )
    turn = cv2.getRotationMatrix2D((39.5, 19.5), -degrees, 1) + np.array([[0, 0, 60], [0, 0, 80]])
    picture = cv2.warpAffine(word, turn, (200, 200))
    polygon = np.array([[0, 0], [80, 0], [80, 40], [0, 40]]) - 0.5
    polygon = polygon @ turn[:, :2].T + turn[:, 2] + 0.5
    listed = np.roll(polygon[::-1], 1, axis=0) if mirrored else polygon
    upright, mask = turn_upright(picture, np.full((200, 200), 100, np.uint8), rectangle_about(listed), 255)
    assert abs(upright.shape[0] - 40) <= 1 and abs(upright.shape[1] - 80) <= 1 and set(np.unique(mask)) == {100}
    for row, column, colour in (
        (10, 20, (250, 0, 0)),
        (10, 60, (0, 250, 0)),
        (30, 60, (0, 0, 250)),
        (30, 20, (250, 250, 0)),
    ):
        assert np.abs(upright[row, column].astype(int) - colour).max() < 8


def test_a_polygon_of_more_corners_is_turned_by_half_a_right_angle_at_most() -> None:
    outline = [[0, 20], [40, 0], [80, 10], [120, 60], [80, 60], [20, 40]]
    rectangle = rectangle_about(np.array(outline, np.float64))
    along = rectangle[1] - rectangle[0]
    assert along[0] > 0 and abs(along[1]) <= along[0]


def test_beyond_the_picture_an_upright_crop_is_ignored(release: Path, tmp_path: Path) -> None:
    words = annotation(release, "a00001")
    words["1"]["bbox"] = [-20, 40, 40, 44, 38, 62, -22, 58]
    save(release, "a00001", words={"annotation": words})
    cut(release, tmp_path / "out", "--shape", "upright", "--keep-empty")
    mask = codes(records(tmp_path / "out/train")[1][1])
    assert set(np.unique(mask[:, :18])) == {255} and 255 not in mask[:, 26:]


def test_a_polygon_many_times_the_picture_is_not_turned(release: Path, tmp_path: Path) -> None:
    _words(release, bbox=[10, 10, 90_000, 10, 90_000, 90, 10, 90])
    found = cut(release, tmp_path / "upright", "--shape", "upright")["splits"]["train"]
    assert found["left_out"] == {"polygon": 1}
    assert cut(release, tmp_path / "box")["splits"]["train"]["noted"]["clipped"] >= 1


def _palette(release: Path) -> None:
    image = Image.fromarray(BLANK).convert("P")
    image.save(release / "semantic_label/a00002_maskfg.png")


def _words(release: Path, **changes: Any) -> None:
    words = annotation(release, "a00002")
    words["1"] = {key: value for key, value in (words["1"] | changes).items() if value is not None}
    save(release, "a00002", words={"annotation": words})


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str, int]] = {  # what is done, kind, reason, crops lost
    "no picture": (lambda r: (r / "image/a00002.jpg").unlink(), "missing", "image/a00002.jpg: no such file", 3),
    "no mask": (lambda r: (r / "semantic_label/a00002_maskfg.png").unlink(), "missing", "maskfg.png: no such", 3),
    "no words": (lambda r: (r / "annotation/a00002_anno.json").unlink(), "missing", "anno.json: no such", 3),
    "half a picture": (
        lambda r: (r / "image/a00002.jpg").write_bytes((r / "image/a00002.jpg").read_bytes()[:900]),
        "picture", "image/a00002.jpg: JPEG that ends after 900 bytes", 3,
    ),
    "half a mask": (
        lambda r: (r / "semantic_label/a00002_maskfg.png").write_bytes(
            (r / "semantic_label/a00002_maskfg.png").read_bytes()[:120]),
        "mask", "semantic_label/a00002_maskfg.png: ", 3,
    ),
    "another code": (
        lambda r: save(r, "a00002", codes=BLANK + np.uint8(17)),
        "mask", "semantic_label/a00002_maskfg.png: code 17 in the mask", 3,
    ),
    "three channels": (
        lambda r: save(r, "a00002", codes=np.repeat(BLANK[..., None], 3, 2)), "mask", "3 channels", 3),
    "a palette": (_palette, "mask", "a palette", 3),
    "another size": (
        lambda r: save(r, "a00002", codes=BLANK[:50, :70]), "mask size", "70×50 pixels, its picture has 160×96", 3),
    "no JSON": (lambda r: (r / "annotation/a00002_anno.json").write_text("{"), "annotation", "no JSON", 3),
    "a list": (lambda r: (r / "annotation/a00002_anno.json").write_text("[1]"), "annotation", "not an object", 3),
    "far away": (lambda r: _words(r, bbox=[500, 10, 540, 10, 540, 30, 500, 30]), "outside", "columns 500 to 540", 1),
    "a line": (lambda r: _words(r, bbox=[10, 10, 40, 10, 40, 10, 10, 10]), "no area", "without area", 1),
    "a word for a polygon": (lambda r: _words(r, bbox="here"), "polygon", "no list of x and y: here", 1),
    "not a number": (lambda r: _words(r, bbox=[1, 2, float("nan"), 4, 5, 6, 7, 8]), "polygon", "no polygon", 1),
    "a huge number": (lambda r: _words(r, bbox=[10**400] * 8), "polygon", "no list of x and y", 1),
    "no polygon": (lambda r: _words(r, bbox=None), "polygon", "no 'bbox' in its annotation, but 'text', 'char'", 1),
    "three rows": (lambda r: _words(r, bbox=[10, 10, 90, 10, 90, 13, 10, 13]), "too small", "80×3 pixels", 1),
    "bare ground": (lambda r: save(r, "a00002", codes=BLANK), "no text", "code 100", 3),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("shape", ["box", "upright"])
def test_what_cannot_be_used_is_counted_and_named(
    damage: str, shape: str, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, kind, reason, lost = DAMAGES[damage]
    spoil(release)
    found = cut(release, tmp_path / "out", "--shape", shape)["splits"]["train"]
    assert found["crops"] == 18 - lost and found["left_out"].keys() == {kind}
    named = [one for one in findings(tmp_path / "out") if not one["kept"]]
    assert len(named) == found["left_out"][kind] and reason in named[0]["reason"]
    assert {(one["split"], one["picture"], one["kind"]) for one in named} == {("train", "a00002", kind)}
    assert f"left out: {len(named)} {kind} (the first: {kind}: a00002" in capsys.readouterr().out
    assert len(records(tmp_path / "out/train")) == 18 - lost


def test_odd_words_are_kept_and_named(release: Path, tmp_path: Path) -> None:
    words = annotation(release, "a00002")
    del words["0"]["char"], words["1"]["text"]
    save(release, "a00002", words={"annotation": words})
    assert (
        cut(release, tmp_path / "out")["splits"]["train"]["noted"].items()
        >= {"no characters": 1, "no label": 1}.items()
    )
    assert [label for _, _, label in records(tmp_path / "out/train")[3:6]] == [b"w020", None, b"w022"]


def test_where_nothing_is_left_it_ends_with_code_2(release: Path, tmp_path: Path) -> None:
    shutil.rmtree(release / "semantic_label")
    (release / "semantic_label").mkdir()
    command = [sys.executable, "-m", "data_tools", "crops", release, tmp_path / "out", "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "not a single crop is left" in result.stderr
    assert len(findings(tmp_path / "out")) == 11
    for picture in range(1, 12):
        write_picture(release, f"a{picture:05d}")
    assert cut(release, tmp_path / "out")["splits"]["train"]["crops"] == 18  # the folder is as good as empty


def test_a_split_without_a_crop_has_no_lmdb(release: Path, tmp_path: Path) -> None:
    for picture in ("a00007", "a00008"):
        (release / f"image/{picture}.jpg").unlink()
    assert cut(release, tmp_path / "out")["splits"]["val"]["crops"] == 0
    assert sorted(path.name for path in tmp_path.glob("out/*")) == ["crops.json", "findings.jsonl", "test", "train"]
    assert cut(release, tmp_path / "out")["splits"]["val"]["left_out"] == {"missing": 2}


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, "split.json: missing"),
        ("[1]", "not of the form"),
        ("{", "cannot be read"),
        ('{"train": ["a00001"], "test": ["a00001"]}', "names 1 pictures twice"),
        ('{"train": ["../a00001"]}', "no name of a picture"),
        ('{"../train": ["a00001"]}', "not of the form"),
        ('{"train": "a00001"}', "not of the form"),
    ],
)
def test_splits_that_cannot_be_used(split: str | None, message: str, release: Path, tmp_path: Path) -> None:
    (release / "split.json").unlink()
    if split is not None:
        (release / "split.json").write_text(split)
    with pytest.raises(UserError, match=message):
        crops.main([str(release), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_loaders_folders_and_the_older_masks_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = write_release(tmp_path / "TextSeg", words="bpoly_label")
    (release / "semantic_label").rename(release / "semantic_label_v1")
    assert cut(release, tmp_path / "out")["masks"] == "semantic_label_v1"
    assert (
        "masks of semantic_label_v1 (that of the first paper's figures), words of bpoly_label"
        in capsys.readouterr().out
    )
    shutil.rmtree(release / "bpoly_label")
    with pytest.raises(UserError, match="without annotation or bpoly_label"):
        crops.main([str(release), str(tmp_path / "other")])


def test_folders_of_ssm_stay_what_they_are(tmp_path: Path) -> None:
    slices = write_slices(tmp_path / "data/image_slice")
    (slices / "test/mask/w_1_mask.jpg").unlink()
    found = cut(tmp_path / "data", tmp_path / "out")["splits"]
    assert [found[split]["crops"] for split in ("train", "val", "test")] == [2, 2, 1]
    assert found["test"]["left_out"] == {"missing": 1}
    image, mask, label = records(tmp_path / "out/train")[0]
    assert image == (slices / "train_all/train/image/w_0.jpg").read_bytes() and label is None
    grey = cv2.imread(str(slices / "train_all/train/mask/w_0_mask.jpg"), cv2.IMREAD_GRAYSCALE)
    assert codes(mask).tolist() == np.where(grey >= 128, 100, 0).tolist() and len(np.unique(grey)) > 2
    with pytest.raises(UserError, match="have no polygons; leave it out"):
        crops.main([str(slices), str(tmp_path / "other"), "--shape", "upright"])


def test_folders_that_are_neither(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.txt").write_text("a")
    with pytest.raises(UserError, match=r"neither TextSeg's release .* it holds 1 × \.txt"):
        crops.main([str(tmp_path / "words"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="no such folder"):
        crops.main([str(tmp_path / "nowhere"), str(tmp_path / "out")])


def test_a_folder_of_something_else_is_left_alone(release: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        crops.main([str(release), str(tmp_path / "mine")])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    cut(release, tmp_path / "out")
    with pytest.raises(UserError, match="shape is box, not upright"):
        crops.main([str(release), str(tmp_path / "out"), "--shape", "upright"])
    write_picture(release, "a00099")
    (release / "annotation/a00099_anno.json").rename(release / "annotation/a00001_anno.json")
    with pytest.raises(UserError, match="fingerprint is"):
        crops.main([str(release), str(tmp_path / "out")])
    everything(tmp_path / "out")


def test_what_is_lost_is_made_again(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(release, tmp_path / "out")
    before = everything(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/train")
    cut(release, tmp_path / "out")
    assert everything(tmp_path / "out") == before
    (tmp_path / "out/val/data.mdb").unlink()
    cut(release, tmp_path / "out")
    assert everything(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out/train")
    monkeypatch.setattr(textseg, "JPEG_QUALITY", 50)
    for _ in range(2):
        with pytest.raises(UserError, match=r"made again, it is not what crops\.json says"):
            cut(release, tmp_path / "out")


def test_what_another_run_has_half_forgotten_is_not_taken(release: Path, tmp_path: Path) -> None:
    cut(release, tmp_path / "out")
    stale = tmp_path / "new/.crops"
    shutil.copytree(tmp_path / "out/val", stale / "train")
    (stale / "train.json").write_text(
        json.dumps(json.loads((tmp_path / "out/crops.json").read_text())["splits"]["val"])
    )
    cut(release, tmp_path / "new")
    assert everything(tmp_path / "new") == everything(tmp_path / "out")


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    release = write_release(tmp_path / "TextSeg", {"train": 40, "val": 3, "test": 20})
    cut(release, tmp_path / "one")
    cut(release, tmp_path / "two", "--workers", "2")
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_killed_at_any_moment_it_ends_in_the_same_records(tmp_path: Path) -> None:
    release = write_release(tmp_path / "TextSeg", {"train": 150, "val": 60, "test": 100})
    (release / "image/a00160.jpg").unlink()
    cut(release, tmp_path / "calm")
    expected = everything(tmp_path / "calm")
    moments, killed, resumed, out = random.Random(5), 0, 0, tmp_path / "out"
    while killed < 8:
        command = [sys.executable, "-m", "data_tools", "crops", release, out, "--workers", "1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while not (out / ".crops/plan.json").exists() and process.poll() is None:
            time.sleep(0.005)
        try:
            process.wait(moments.uniform(0, 0.5) if killed < 7 else 60)
            assert process.returncode == 0
            assert everything(out) == expected
            shutil.rmtree(out)
            killed += killed >= 7
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            resumed += (out / ".crops/train.json").exists()
            assert not (out / "crops.json").exists() or everything(out) == expected
    assert resumed


def test_a_full_disk_is_one_line_and_it_goes_on_later(tmp_path: Path) -> None:
    release = write_release(tmp_path / "TextSeg", {"train": 60, "val": 10, "test": 10})
    cut(release, tmp_path / "calm")
    with small_disk(tmp_path / "disk", "160k") as disk:
        with pytest.raises(UserError, match=r"cannot be written .*make room"):
            crops.main([str(release), str(disk / "out"), "--workers", "1"])
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        cut(release, disk / "out")
        assert everything(disk / "out") == everything(tmp_path / "calm")
