"""LMDBs as they come: written here, written by other tools, broken."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

import lmdb
import pytest
from crops import crop

from ccd_train.data.records import LmdbReader, LmdbWriter, find_lmdbs
from ccd_train.errors import UserError

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


def write_raw(path: Path, entries: dict[bytes, bytes]) -> Path:
    """An LMDB with just these keys."""
    path.mkdir(parents=True)
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "words") as writer:
        writer.add(b"one", "eins", b"mask")
        writer.add(b"two", None, None)
        writer.add(b"three", "größe", None)
    with LmdbReader(tmp_path / "words") as reader:
        assert len(reader) == 3
        assert [reader.image(i) for i in (1, 2, 3, 4)] == [b"one", b"two", b"three", None]
        assert [reader.label(i) for i in (1, 2, 3)] == ["eins", None, "größe"]
        assert [reader.mask(i) for i in (1, 2, 3)] == [b"mask", None, None]
        assert reader.has("label") and reader.has("mask")


def test_a_map_that_is_full_grows_without_loss(tmp_path: Path) -> None:
    image = os.urandom(100_000)
    with LmdbWriter(tmp_path / "words") as writer:
        for number in range(1, 1501):  # 150 MB into a first map of 64 MB
            writer.add(number.to_bytes(4, "big") + image)
    reader = LmdbReader(tmp_path / "words")
    assert len(reader) == 1500
    assert all((reader.image(i) or b"")[:4] == i.to_bytes(4, "big") for i in range(1, 1501))


def test_two_readers_and_a_forked_and_a_pickled_one_agree(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "words") as writer:
        writer.add(b"one")
    first, second = LmdbReader(tmp_path / "words"), LmdbReader(tmp_path / "words")
    assert first.image(1) == second.image(1) == pickle.loads(pickle.dumps(first)).image(1) == b"one"
    first.close()
    assert second.image(1) == b"one"
    child = os.fork()
    if child == 0:
        os._exit(0 if second.image(1) == b"one" and LmdbReader(tmp_path / "words").image(1) == b"one" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_writer_that_fails_leaves_an_lmdb_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), LmdbWriter(tmp_path / "words") as writer:
        for number in range(2000):
            writer.add(b"x")
            1 // (1500 - number)
    with pytest.raises(UserError, match=r"no num-samples key .*still being written"):
        len(LmdbReader(tmp_path / "words"))
    with pytest.raises(UserError, match="here already"):
        LmdbWriter(tmp_path / "words")


def numbered(**kinds: Iterable[int]) -> dict[bytes, bytes]:
    """An LMDB's content with these numbers of each kind."""
    entries = {f"{kind}-{number:09d}".encode(): b"x" for kind, numbers in kinds.items() for number in numbers}
    return entries | {b"num-samples": b"%d" % max(kinds["image"])}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({b"label-000000001": b"x", b"num-samples": b"1"}, "labels but no images"),
        ({b"num-samples": b"0"}, r"no image-%09d keys \(it is empty\)"),
        ({b"00000007": b"x", b"00000008": b"x"}, r"no image-%09d keys \(its first keys are '00000007', '00000008'\)"),
        ({b"mask-000000001": b"x", b"num-samples": b"1"}, "these are masks .* as --mask-src"),
        ({b"image-000000001": b"x", b"nSamples": b"1"}, "nSamples, which says '1'; store it as num-samples"),
        (numbered(label=range(2), image=range(1, 3)), "its labels count from 0 and its images from 1: each image"),
        (numbered(mask=range(2), image=range(1, 3)), "its masks count from 0 and its images from 1: each image"),
        (numbered(label=range(1, 9), image=range(1, 3)), "labels go on to number 8, but its last image is number 2"),
        (numbered(mask=range(1, 9), image=range(1, 3)), "masks go on to number 8, but its last image is number 2"),
        (numbered(label=[2], image=[1, 2]) | {b"label-000000002": crop(1)}, "label-000000002 holds a picture"),
        ({b"image-000000001": b"x"}, "no num-samples key"),
        ({b"image-000000001": b"x", b"num-samples": b"2"}, "num-samples says '2' but the last image is number 1"),
        ({b"image-000000001": b"x", b"image-000000002": b"x", b"num-samples": b"1"}, "the last image is number 2"),
        ({b"image-000000001": b"x", b"num-samples": b"\xffmany"}, "num-samples says"),
        ({b"image-000000000": b"x", b"num-samples": b"1"}, "count from 0"),
        ({b"image-1": b"x", b"num-samples": b"1"}, "not of the form image-%09d"),
    ],
)
def test_lmdbs_that_are_not_whole_are_refused(tmp_path: Path, entries: dict[bytes, bytes], message: str) -> None:
    reader = LmdbReader(write_raw(tmp_path / "words", entries))
    with pytest.raises(UserError, match=message):
        len(reader)


def test_folders_that_are_no_lmdb_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no LMDB here"):
        LmdbReader(tmp_path).image(1)
    (tmp_path / "data.mdb").write_bytes(b"garbage" * 1000)
    with pytest.raises(UserError, match="cannot be opened"):
        LmdbReader(tmp_path).image(1)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, message in ((b"", "0 bytes"), (pointer, "a Git LFS pointer, .*`git lfs pull`")):
        (tmp_path / "data.mdb").write_bytes(content)
        with pytest.raises(UserError, match=message):
            LmdbReader(tmp_path).image(1)


def test_a_file_cut_short_is_refused_before_it_can_kill_us(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "words") as writer:
        for _ in range(100):
            writer.add(os.urandom(5000))
    os.truncate(tmp_path / "words" / "data.mdb", 200_000)
    with pytest.raises(UserError, match=r"cut short \(200000 bytes"):
        len(LmdbReader(tmp_path / "words"))


def test_lost_pages_are_one_line(tmp_path: Path) -> None:
    """Every branch of the tree leads to a page that is not there; its nodes begin with a page number of 48 bits."""
    with LmdbWriter(tmp_path / "words") as writer:
        for number in range(500):
            writer.add(b"image", str(number))
    file = tmp_path / "words" / "data.mdb"
    data, page_size = bytearray(file.read_bytes()), lmdb.open(str(tmp_path / "words"), readonly=True).stat()["psize"]
    for page in range(0, len(data), page_size):
        flags, lower = struct.unpack_from("<HH", data, page + 10)
        for place in range(16, lower, 2) if flags == 1 else ():  # a branch's offsets of its nodes
            (offset,) = struct.unpack_from("<H", data, page + place)
            data[page + offset : page + offset + 6] = b"\xff" * 6
    file.write_bytes(data)
    reader = LmdbReader(tmp_path / "words")
    for look in (lambda: reader.has("label"), lambda: len(reader)):
        with pytest.raises(UserError, match=r"words: damaged at .*; copy the LMDB again"):
            look()


def test_a_label_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "w", {b"image-000000001": b"x", b"label-000000001": b"\xff", b"num-samples": b"1"})
    with pytest.raises(UserError, match="label-000000001 is not UTF-8"):
        LmdbReader(path).label(1)


def test_find_lmdbs_is_sorted_follows_links_and_ends_in_a_loop(tmp_path: Path) -> None:
    for name in ("b/two", "b/one", "a"):
        write_raw(tmp_path / "tree" / name, {b"num-samples": b"0"})
    write_raw(tmp_path / "elsewhere", {b"num-samples": b"0"})
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "b" / "loop").symlink_to(tmp_path / "tree")
    found = [str(path.relative_to(tmp_path / "tree")) for path in find_lmdbs(tmp_path / "tree")]
    assert found == ["a", "b/one", "b/two", "linked"]
    with pytest.raises(UserError, match="no such folder"):
        find_lmdbs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no LMDB here or below"):
        find_lmdbs(tmp_path / "empty")


@pytest.mark.skipif(not REAL.exists(), reason="real LMDBs are not here")
def test_lmdbs_of_other_tools() -> None:
    counts = {"iiit5k_train": 2000, "mmocr_toy": 10, "bengali_non_ascii_labels": 200, "crochet_16k_pages": 186}
    for name, count in counts.items():
        with LmdbReader(REAL / name) as reader:
            assert len(reader) == count
            assert reader.image(count) and reader.label(count)
    with pytest.raises(UserError, match="labels but no images"):
        len(LmdbReader(REAL / "mmocr_toy_labels_only"))
