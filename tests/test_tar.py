"""Our own tar reader against Python's, on archives of all kinds; broken ones are refused with the place."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from crops import REAL

from data_tools.tar import BadTar, ShardWriter, directory_of, read_members, read_samples

NAMES = ["short.txt", "d/" * 60 + "long.png", "é" * 80 + ".jpg", "x" * 200 + ".mask.png", "a/" + "y" * 99 + ".txt"]


def write(path: Path, format: int, mtime: float) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for i, name in enumerate(NAMES):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = i * 300, mtime  # type: ignore[assignment]  # webdataset gives a float too
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link" * 50)
        link.type, link.linkname = tarfile.SYMTYPE, "z" * 150
        tar.addfile(link)
        last = tarfile.TarInfo("last.txt")
        last.size = 1
        tar.addfile(last, io.BytesIO(b"!"))


@pytest.mark.parametrize("mtime", [0, 1234567890.5])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_where_tarfile_says(tmp_path: Path, format: int, mtime: float) -> None:
    path = tmp_path / "a.tar"
    write(path, format, mtime)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar if not m.isdir()]
    with open(path, "rb") as file:
        members = list(read_members(file))
    assert [(m.name, m.header, m.place, m.size) for m in members] == expected
    assert [m.name for m in members if m.link] == ["link" * 50] and len(expected) == len(NAMES) + 2


def test_cut_and_damaged_tars_are_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, tarfile.PAX_FORMAT, 0.5)
    whole = path.read_bytes()
    with open(path, "rb") as file:
        end = max(member.place for member in read_members(file)) + 512
    for cut in [*range(0, end, 300), end]:
        path.write_bytes(whole[:cut])
        with open(path, "rb") as file, pytest.raises(BadTar, match=r"at byte \d+"):
            list(read_members(file))
    for place in range(0, end, 29):
        changed = bytearray(whole)
        changed[place] ^= 0x24
        path.write_bytes(changed)
        with open(path, "rb") as file:
            try:
                assert len(list(read_members(file))) <= len(NAMES) + 2
            except BadTar as error:
                assert error.place <= place


def test_samples_are_neighbours_of_one_key(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    names = [
        "1.index",
        "1.png",
        "1.txt",
        "2.JPG",
        "README",
        "._2.jpg",
        "d.x/3.jpeg",
        "d.x/3.mask.png",
        "4.jpg",
        "4.png",
        "5.txt",
    ]
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    with open(path, "rb") as file:
        keyless: Counter[str] = Counter()
        samples = [(s.key, sorted(s.members), s.repeated) for s in read_samples(file, keyless)]
    assert keyless == {"without a key": 2}
    assert samples == [
        ("1", ["image", "label"], False),
        ("2", ["image"], False),
        ("d.x/3", ["image", "mask"], False),
        ("4", ["image"], True),
        ("5", ["label"], False),
    ]


def test_directories_fit_into_a_header_and_stay_apart(tmp_path: Path) -> None:
    assert directory_of("a b/1.SVT/ä") == "a b/1.SVT/ä".encode()
    long = ["x" * 156, "x" * 157, "ü" * 100, "d/" * 90 + "e", "line\nbreak"]
    directories = [directory_of(name) for name in long]
    assert len(set(directories)) == 5
    for directory in directories:
        assert len(directory) <= 155 and min(directory) >= 32 and directory.decode() and b"~/" not in directory


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "a.tar", b"d") as writer:
        writer.add(1, "jpg", os.urandom(3_000_000), None, None)
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not REAL.exists(), reason="real tars are not here")
def test_a_tar_of_another_tool(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "lines.tar"
    path.write_bytes(gzip.decompress((REAL / "ocroline_lines.tgz").read_bytes()))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    with open(path, "rb") as file:
        assert [(m.name, m.place, m.size) for m in read_members(file)] == expected
