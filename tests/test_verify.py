"""`ccd-data verify` finds every kind of damage, names the place, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from crops import write_words

from ccd_train.data.shards import ROW, Corpus, Manifest, read_manifest, read_offsets, write_manifest
from ccd_train.errors import UserError
from data_tools import convert, verify


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 words with masks in four shards."""
    base = tmp_path_factory.mktemp("verify")
    write_words(base / "w", 40, masks=True)
    options = ["--name", "x", "--samples-per-shard", "10", "--workers", "1"]
    assert convert.main(["--src", str(base / "w"), "--out", str(base / "o"), *options]) == 0
    return base / "o"


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def findings(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What verify prints about a damaged folder."""
    capsys.readouterr()
    assert verify.main([str(folder), "--workers", "1", *options]) == 1
    return capsys.readouterr().out


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("options", [[], ["--deep"], ["--workers", "2"]])
def test_good_shards_are_good(shards: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(shards), *options]) == 0
    assert "40 samples in 4 shards, all intact" in capsys.readouterr().out


def test_a_flipped_byte_is_traced_to_its_member(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = Corpus.open(copy).places(2)
    for part, name in (("image", "w/000000023.jpg"), ("label", "w/000000023.txt"), ("mask", "w/000000023.mask.png")):
        place = int(places[2][part])
        flip(copy / "x-000002.tar", place + 3)
        found = findings(copy, capsys)
        assert f"x-000002.tar: {name} at byte {place}: damaged (its CRC-32 differs)" in found
        assert "another sha256" in found and found.count("\n") == 2
        flip(copy / "x-000002.tar", place + 3)
    assert verify.main([str(copy), "--workers", "1"]) == 0


def test_a_flipped_byte_in_a_header_or_the_padding(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = int(Corpus.open(copy).places(1)[4]["header"])
    flip(copy / "x-000001.tar", place + 4)
    assert f"a header with a wrong checksum at byte {place}" in findings(copy, capsys)
    flip(copy / "x-000001.tar", place + 4)
    flip(copy / "x-000001.tar", (copy / "x-000001.tar").stat().st_size - 1)
    assert "x-000001.tar" in findings(copy, capsys)


def test_files_that_are_missing_cut_or_strange(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "x-000000.tar").unlink()
    (copy / "x-000001.offsets").unlink()
    os.truncate(copy / "x-000002.tar", 5000)
    os.truncate(copy / "x-000003.offsets", 5 * ROW.itemsize + 3)
    shutil.copy(copy / "x-000003.tar", copy / "y.tar")
    found = findings(copy, capsys)
    assert "x-000000.tar: x-000000.tar is missing" in found
    assert "x-000001.tar: x-000001.offsets is missing" in found
    assert "x-000002.tar: 5000 bytes with another sha256" in found
    assert "x-000003.tar: x-000003.offsets: 283 bytes instead of 560" in found
    assert "w/000000036 at byte" in found and "is in no row of the offsets" in found
    assert "y.tar: not in the manifest" in found


def test_rows_that_point_elsewhere(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.array(read_offsets(copy / "x-000000.offsets"))
    rows[3]["label"] += 512
    rows[5]["header"] -= 512
    rows.tofile(copy / "x-000000.offsets")
    found = findings(copy, capsys)
    assert "x-000000.offsets: another sha256" in found
    assert "w/000000004 at byte" in found and "its label is not where the offsets say" in found
    assert "where no sample begins" in found and "w/000000006 at byte" in found


def rewrite(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Writes a manifest that agrees with itself but not with the folder."""
    write_manifest(folder, change(read_manifest(folder)))


def test_gaps_and_overlaps_of_the_records(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(copy, lambda m: replace(m, shards=[m.shards[0], *m.shards[2:]]))
    found = findings(copy, capsys)
    assert (
        "w: 10 of 40 records are neither in a shard nor refused" in found
        and "x-000001.tar: not in the manifest" in found
    )
    shutil.copy(copy / "x-000000.offsets", copy / "z.offsets")
    shutil.copy(copy / "x-000000.tar", copy / "z.tar")
    rewrite(copy, lambda m: replace(m, shards=[*m.shards, replace(m.shards[0], file="z.tar")]))
    found = findings(copy, capsys)
    assert "z.tar: records 1 to 10 of w are in two shards" in found
    assert "key w/000000001 is there 2 times: x-000000.tar at byte 0, z.tar at byte 0" in found


def test_the_list_of_refused_records_must_fit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"source": "w", "record": 3, "kind": "truncated", "reason": "cut"}
    (copy / "refused.jsonl").write_text(json.dumps(entry) + "\n")
    assert "{'truncated': 1} does not fit the manifest's {}" in findings(copy, capsys)
    (copy / "refused.jsonl").write_text("nonsense\n")
    assert "refused.jsonl: cannot be read" in findings(copy, capsys)


def test_images_that_were_broken_from_the_start_are_found_by_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crops import change, crop

    broken = bytearray(crop(3, ".png", 60, 30))
    broken[300:330] = bytes(30)
    write_words(tmp_path / "w", 20)
    change(tmp_path / "w", {"image-000000003": bytes(broken)})
    options = ["--name", "x", "--workers", "1"]
    assert convert.main(["--src", str(tmp_path / "w"), "--out", str(tmp_path / "o"), *options]) == 0
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0
    found = findings(tmp_path / "o", capsys, "--deep")
    assert "x-000000.tar: w/000000003.png at byte" in found and "undecodable" in found and found.count("\n") == 1


def test_a_changed_manifest_is_damage_and_a_missing_one_an_error(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = asdict(read_manifest(copy)) | {"samples": 41}
    (copy / "manifest.json").write_text(json.dumps(stored))
    assert "do not fit its shards" in findings(copy, capsys)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json here"):
        verify.main([str(copy)])


def test_much_damage_is_summed_up(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "x-000000.offsets").write_bytes(os.urandom(10 * ROW.itemsize))
    assert findings(copy, capsys).count("\n") <= 21
