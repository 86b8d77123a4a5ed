"""Tars of other tools become a corpus without being touched, or are refused with the reason."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from crops import REAL, contents, crop, mask

from ccd_train.data.shards import Corpus, read_manifest
from ccd_train.errors import UserError
from data_tools import index, verify


def write_foreign(folder: Path, shards: int = 2, samples: int = 20) -> None:
    """Shards as webdataset's own writer makes them: float times, so a pax header before every member."""
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/f-%03d.tar", maxcount=samples, verbose=0) as writer:
        for number in range(shards * samples):
            sample = {"__key__": f"set.1/{number:04d}", "jpg": crop(number), "txt": f"größe{number}", "json": {"n": 1}}
            writer.write(sample | ({"mask.png": mask(number)} if number % 2 else {}))


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


def test_keys_that_two_tars_share_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, f"{name}/1.jpg", crop(1))
            add(tar, "same/2.jpg", crop(2))
    assert index.main([str(tmp_path)]) == 0
    assert verify.main([str(tmp_path), "--workers", "1"]) == 1
    assert "key same/2 is there 2 times: a.tar at byte" in capsys.readouterr().out


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
