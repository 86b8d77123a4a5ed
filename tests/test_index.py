"""Tars of other tools become a corpus without being touched, or are refused with the reason."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from crops import REAL, contents, crop, mask

from ccd_train.data.shards import ROW, Corpus, read_manifest, write_manifest
from ccd_train.errors import UserError
from data_tools import index, verify


def write_foreign(folder: Path, shards: int = 2, samples: int = 20) -> None:
    """Shards as webdataset's own writer makes them: float times, so a pax header before every member."""
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/f-%03d.tar", maxcount=samples, verbose=0) as writer:
        for number in range(shards * samples):
            sample = {"__key__": f"set.1/{number:04d}", "jpg": crop(number), "txt": f"größe{number}", "json": {"n": 1}}
            writer.write(sample | ({"mask.png": mask(number)} if number % 2 else {}))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_tars_of_webdataset(tmp_path: Path, workers: str) -> None:
    folder = tmp_path / "foreign"
    write_foreign(folder)
    before = contents(folder)
    assert index.main([str(folder), "--workers", workers]) == 0
    assert {name: data for name, data in contents(folder).items() if name in before} == before
    corpus = Corpus.open(folder)
    assert (corpus.num_samples, read_manifest(folder).name) == (40, "foreign")
    for number in range(40):
        place = corpus.locate(number)
        assert corpus.key(*place) == f"set.1/{number:04d}"
        expected = (crop(number), f"größe{number}".encode(), mask(number) if number % 2 else None)
        assert corpus.read(*place) == expected
    assert verify.main([str(folder), "--deep", "--workers", "1"]) == 0
    with pytest.raises(UserError, match=r"has a manifest\.json already"):
        index.main([str(folder)])


def test_samples_that_cannot_be_used_get_no_row(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "README", b"hello")
        add(tar, "1.index", b"1")
        add(tar, "1.png", crop(1, ".png"))
        add(tar, "2.txt", b"no image")
        add(tar, "3.jpg", crop(3)[:200])
        add(tar, "4.jpg", crop(4))
        add(tar, "4.png", crop(4, ".png"))
        add(tar, "5.jpg", crop(5))
        add(tar, "5.txt", b"\xff")
        add(tar, "6.jpeg", crop(6))
    with pytest.raises(UserError, match="4 of 6 samples are refused"):
        index.main([str(tmp_path)])
    assert index.main([str(tmp_path), "--max-refused", "0.9", "--name", "mine"]) == 0
    manifest, corpus = read_manifest(tmp_path), Corpus.open(tmp_path)
    assert manifest.refused == {"ambiguous": 1, "label": 1, "missing": 1, "truncated": 1}
    assert [corpus.key(0, row) for row in range(corpus.num_samples)] == ["1", "6"]
    assert corpus.read(0, 1) == (crop(6), None, None)
    assert verify.main([str(tmp_path), "--deep", "--workers", "1"]) == 0


def test_a_key_belongs_to_its_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in webdataset: what several tars share is worth a note, what one tar has twice is refused."""
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}/1.jpg": crop(1), "same/2.jpg": crop(2)})
    assert index.main([str(tmp_path)]) == 0
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "note: key same/2 is there 2 times: a.tar at byte" in printed and "4 samples in 2 shards, all intact" in printed
    )

    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for number in (1, 2, 3, 1):
            add(tar, f"{number}.jpg", crop(number))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"1 of 8 samples .*1 ambiguous; the first: c\.tar, 1: its key is at byte 0"):
        index.main([str(tmp_path)])
    assert index.main([str(tmp_path), "--max-refused", "0.2"]) == 0
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0


def test_joined_tars_are_read_to_their_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first in (0, 10):
        write_tar(tmp_path / f"{first}.tar", {f"{first + number}.jpg": crop(number) for number in range(10)})
    joined = (tmp_path / "0.tar").read_bytes() + (tmp_path / "10.tar").read_bytes()
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "both.tar").write_bytes(joined)
    assert index.main([str(tmp_path / "j")]) == 0
    corpus = Corpus.open(tmp_path / "j")
    assert [corpus.key(0, row) for row in range(corpus.num_samples)] == [str(number) for number in range(20)]
    assert verify.main([str(tmp_path / "j"), "--deep", "--workers", "1"]) == 0
    end = len(joined) // 2
    (tmp_path / "0.tar").write_bytes(joined[:end] + b"x" * 512 + bytes(1024))
    with pytest.raises(UserError, match=rf"0\.tar: a header .* at byte {end}; copy it again"):
        index.main([str(tmp_path)])


def test_an_index_of_part_of_a_tar_is_no_longer_intact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as one of an earlier version made of joined tars."""
    write_tar(tmp_path / "a.tar", {f"{number}.jpg": crop(number) for number in range(6)})
    assert index.main([str(tmp_path)]) == 0
    manifest = read_manifest(tmp_path)
    rows = (tmp_path / "a.offsets").read_bytes()[: 4 * ROW.itemsize]
    (tmp_path / "a.offsets").write_bytes(rows)
    shard = replace(manifest.shards[0], samples=4, last=4, offsets_sha256=hashlib.sha256(rows).hexdigest())
    write_manifest(tmp_path, replace(manifest, shards=[shard], sources=[replace(manifest.sources[0], records=4)]))
    assert verify.main([str(tmp_path), "--workers", "1"]) == 1
    assert "a.tar: 6 samples in the tar, of which 4 were looked at; index it again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [("{}.label", ".label"), ("{}.gt.txt", ".gt.txt"), ("{}.CLS", ".cls"), ("._{}.jpg", "without a key")],
)
def test_members_that_are_left_out_are_counted(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {number: {f"{number}.jpg": crop(number), name.format(number): b"word"} for number in range(10)}
    write_tar(tmp_path / "a.tar", {key: data for sample in members.values() for key, data in sample.items()})
    assert index.main([str(tmp_path), "--workers", "1"]) == 0
    assert f"10 samples in 1 shard, 0.0 MB; left out: 10 × {kind}\n" in capsys.readouterr().out.replace(
        "0.1 MB", "0.0 MB"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [f"img v1.2/word.{n:03d}.jpg" for n in range(8)],
            r"word: no \.jpg.*, but 8 whose .* \(\.000\.jpg\): the key ends",
        ),
        (["1.input.jpg", "1.outputs.txt"], r"1: no \.jpg.*, but 1 whose names go on before it \(\.input\.jpg\)"),
        (["1.txt", "2.txt"], r"2 of 2 samples are refused \(2 missing; the first: a\.tar, 1: no \.jpg"),
        ([], "no samples in 1 tars; give tars with"),
        (["README", "._1.jpg"], r"no samples in 1 tars \(left out: 2 × without a key\)"),
    ],
)
def test_where_no_sample_is_found_it_is_said_why(tmp_path: Path, names: list[str], message: str) -> None:
    write_tar(tmp_path / "a.tar", {name: crop(1) for name in names})
    with pytest.raises(UserError, match=message):
        index.main([str(tmp_path), "--workers", "1", "--max-refused", "1"])
    assert not list(tmp_path.glob("*.offsets")) and not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_named(tmp_path: Path, kind: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": crop(1), "1.txt": b"one"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, target in (("2.jpg", "1.jpg"), ("2.txt", "1.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        add(tar, "3.jpg", crop(3))
    with pytest.raises(UserError, match=r"a\.tar, 2: no \.jpg.*, but 1 × \.jpg \(a link\): make the tar with --deref"):
        index.main([str(tmp_path)])
    assert index.main([str(tmp_path), "--max-refused", "0.5"]) == 0
    assert "left out: 1 × .jpg (a link), 1 × .txt (a link)" in capsys.readouterr().out
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0


def test_an_empty_tar_beside_full_ones_is_taken(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {})
    write_tar(tmp_path / "b.tar", {"1.jpg": crop(1)})
    assert index.main([str(tmp_path)]) == 0
    assert verify.main([str(tmp_path), "--workers", "1"]) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_read_only_tars_are_indexed_elsewhere(tmp_path: Path, workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that does not allow files with the offsets' names stands for one that cannot be written to."""
    tars, out = tmp_path / "tars", tmp_path / "out"
    write_foreign(tars)
    for name in ("f-000", "f-001"):
        (tars / f"{name}.offsets").mkdir()
    before = contents(tars)
    with pytest.raises(UserError, match=r"cannot be read, or .* not be written to .* name another folder with --out"):
        index.main([str(tars), "--workers", workers])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert index.main(["tars", "--out", "out", "--workers", workers]) == 0
        (out / "manifest.json").rename(out / "before.json")
    (out / "before.json").rename(out / "manifest.json")
    assert {name: data for name, data in contents(tars).items() if not name.startswith(".")} == before
    monkeypatch.chdir("/")
    assert Corpus.open(out).num_samples == 40 and (read_manifest(out).name) == "tars"
    assert verify.main([str(out), "--deep", "--workers", workers]) == 0
    (tars / "f-000.tar").rename(tars / "moved.tar")
    with pytest.raises(UserError, match=r"f-000\.tar \(missing\)"):
        Corpus.open(out)
    (tars / "moved.tar").rename(tars / "f-000.tar")
    (out / "manifest.json").unlink()
    (out / "f-000.tar").unlink()
    (out / "f-000.tar").touch()
    with pytest.raises(UserError, match=r"f-000\.tar: is there already, and is no link to"):
        index.main([str(tars), "--out", str(out), "--workers", workers])


@pytest.mark.parametrize(("suffix", "pack"), [("bz2", bz2.compress), ("xz", lzma.compress), ("gz", gzip.compress)])
def test_compressed_tars_are_named_as_such(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    write_tar(tmp_path / "whole", {"1.jpg": crop(1)})
    for name in ("a.tar", f"a.tar.{suffix}"):  # whatever its name says
        (tmp_path / name).write_bytes(pack((tmp_path / "whole").read_bytes()))
        with pytest.raises(UserError, match=rf"{name}: compressed with {'bzip2|xz|gzip'} \(1 compressed .*unpack it"):
            index.main([str(tmp_path)])
        (tmp_path / name).unlink()
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(500))
    with pytest.raises(UserError, match="compressed with zstd"):
        index.main([str(tmp_path)])


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz"])
def test_a_compressed_tar_that_was_unpacked_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": crop(1)})
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert index.main([str(tmp_path), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{name}: not read; it is compressed, and a.tar stands beside it" in printed and "1 sample" in printed


def test_what_cannot_be_indexed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar files here"):
        index.main([str(tmp_path)])
    with pytest.raises(UserError, match="no such folder"):
        index.main([str(tmp_path / "nowhere")])
    write_foreign(tmp_path / "f")
    whole = (tmp_path / "f" / "f-001.tar").read_bytes()
    (tmp_path / "f" / "f-001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"f-001\.tar: .* at byte \d+; copy it again"):
        index.main([str(tmp_path / "f")])
    (tmp_path / "f" / "f-001.tar").write_bytes(gzip.compress(whole))  # whatever its name says
    with pytest.raises(UserError, match=r"f-001\.tar: compressed with gzip"):
        index.main([str(tmp_path / "f")])


@pytest.mark.skipif(not REAL.exists(), reason="real tars are not here")
def test_real_lines_are_refused_while_compressed_and_indexed_after(tmp_path: Path) -> None:
    packed = (REAL / "ocroline_lines.tgz").read_bytes()
    (tmp_path / "lines.tgz").write_bytes(packed)
    with pytest.raises(UserError, match=r"lines\.tgz: compressed with gzip .*unpack it"):
        index.main([str(tmp_path)])
    (tmp_path / "lines.tgz").unlink()
    (tmp_path / "lines.tar").write_bytes(gzip.decompress(packed))
    assert index.main([str(tmp_path), "--check", "decode"]) == 0
    corpus = Corpus.open(tmp_path)
    assert corpus.num_samples == 40 and all(corpus.read(0, row)[1] for row in range(40))
    assert verify.main([str(tmp_path), "--deep", "--workers", "1"]) == 0
