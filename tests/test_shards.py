"""The manifest and the corpus: samples at any position, lists of exclusions, and damage that is noticed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from crops import contents, write_words

from ccd_train.data.records import LmdbReader
from ccd_train.data.shards import (
    ROW,
    Corpus,
    DamagedManifestError,
    DamagedSampleError,
    Exclusion,
    Manifest,
    Shard,
    Source,
    read_manifest,
    read_offsets,
    split_name,
    write_exclusions,
    write_manifest,
)
from ccd_train.errors import UserError
from data_tools import convert


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shard folders: 50 words in shards of 20, and 30 words in shards of 16."""
    base = tmp_path_factory.mktemp("corpora")
    for name, count, size in (("a", 50, 20), ("b", 30, 16)):
        write_words(base / f"{name}_lmdb", count, seed=count, masks=True)
        options = ["--name", name, "--samples-per-shard", str(size), "--workers", "1"]
        assert convert.main(["--src", str(base / f"{name}_lmdb"), "--out", str(base / name), *options]) == 0
    return [base / "a", base / "b"]


def test_a_corpus_of_two_folders_counts_through(folders: list[Path]) -> None:
    corpus = Corpus.open(folders)
    assert corpus.num_samples == 80
    assert corpus.shard_samples.tolist() == [20, 20, 10, 16, 14]
    assert corpus.first_sample.tolist() == [0, 20, 40, 50, 66]
    assert [corpus.locate(i) for i in (0, 19, 20, 49, 50, 79)] == [(0, 0), (0, 19), (1, 0), (2, 9), (3, 0), (4, 13)]
    readers = {
        "a_lmdb": LmdbReader(folders[0].with_name("a_lmdb")),
        "b_lmdb": LmdbReader(folders[1].with_name("b_lmdb")),
    }
    for sample in range(80):
        source, number = corpus.key(*corpus.locate(sample)).split("/")
        reader = readers[source]
        expected = (reader.image(int(number)), reader.label_bytes(int(number)), reader.mask(int(number)))
        assert corpus.read(*corpus.locate(sample)) == expected
        assert corpus.read(*corpus.locate(sample), ("mask", "image")) == (expected[2], expected[0])


def test_the_hash_names_samples_and_order_but_not_the_place(folders: list[Path], tmp_path: Path) -> None:
    moved = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    assert Corpus.open(moved).hash == Corpus.open(folders).hash
    assert len({Corpus.open(f).hash for f in (folders, folders[::-1], folders[:1], folders[1:])}) == 4


def test_offsets_are_rows_that_stand_alone(folders: list[Path]) -> None:
    with open(folders[0] / "a-000001.offsets", "rb") as file:
        file.seek(7 * ROW.itemsize)
        row = np.fromfile(file, ROW, count=1)[0]
    tar = (folders[0] / "a-000001.tar").read_bytes()
    reader = LmdbReader(folders[0].with_name("a_lmdb"))
    assert tar[row["image"] : row["image"] + row["image_size"]] == reader.image(28)
    assert tar[row["mask"] : row["mask"] + row["mask_size"]] == reader.mask(28)
    assert row["label"] == row["label_size"] == 0  # every fourth word has no label
    assert len(read_offsets(folders[0] / "a-000002.offsets")) == 10


def test_it_may_be_pickled_and_forked_and_closed(folders: list[Path]) -> None:
    corpus = Corpus.open(folders)
    expected = corpus.read(3, 5)
    assert pickle.loads(pickle.dumps(corpus)).read(3, 5) == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if corpus.read(3, 5) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    corpus.prefetch(3)
    corpus.close()
    assert corpus.read(3, 5) == expected


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    write_words(tmp_path / "w", 140)
    options = ["--name", "x", "--samples-per-shard", "1", "--workers", "1"]
    assert convert.main(["--src", str(tmp_path / "w"), "--out", str(tmp_path / "o"), *options]) == 0
    corpus, reader = Corpus.open(tmp_path / "o"), LmdbReader(tmp_path / "w")
    before = len(os.listdir("/proc/self/fd"))
    for shard in [*range(140), *range(140)]:
        assert corpus.read(shard, 0, ("image",)) == (reader.image(shard + 1),)
    assert len(os.listdir("/proc/self/fd")) - before <= 260
    corpus.close()


def test_excluded_samples_are_gone_and_the_rest_keeps_its_order(folders: list[Path], tmp_path: Path) -> None:
    whole = Corpus.open(folders)
    hashes = [read_manifest(folder).hash for folder in folders]
    left_out = [0, 19, 25, *range(40, 50), 79]  # 40–49 are all of a shard
    entries = []
    for sample in left_out:
        shard, row = whole.locate(sample)
        corpus_hash = hashes[0 if shard < 3 else 1]
        entries.append(Exclusion(corpus_hash, whole.shards[shard].file, row, whole.key(shard, row)))
    write_exclusions(tmp_path / "list", entries)
    corpus = Corpus.open(folders, exclude=tmp_path / "list")
    kept = [sample for sample in range(80) if sample not in left_out]
    assert corpus.num_samples == len(kept) == 66
    assert 0 not in corpus.shard_samples
    for sample, original in enumerate(kept):
        place, before = corpus.locate(sample), whole.locate(original)
        assert corpus.key(*place) == whole.key(*before) and corpus.read(*place) == whole.read(*before)
    assert corpus.hash != whole.hash
    with pytest.raises(UserError, match="make the list again"):
        Corpus.open(folders[1], exclude=tmp_path / "list")
    places = [place for place in map(whole.locate, range(80)) if place[0] < 3]
    everything = [Exclusion(hashes[0], whole.shards[shard].file, row, whole.key(shard, row)) for shard, row in places]
    write_exclusions(tmp_path / "list", everything)
    with pytest.raises(UserError, match=f"{tmp_path}/list: leaves out every sample of {folders[0]}; give another list"):
        Corpus.open(folders[0], exclude=tmp_path / "list")
    (tmp_path / "list").write_text("a-000001.tar 5\n")
    with pytest.raises(UserError, match="no list of exclusions"):
        Corpus.open(folders, exclude=tmp_path / "list")


def test_damage_is_noticed_when_a_sample_is_read(folders: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "a")
    corpus = Corpus.open(folder)
    places = corpus.places(1)
    with open(folder / "a-000001.tar", "r+b") as tar:
        tar.seek(int(places[3]["image"]) + 20)
        byte = tar.read(1)
        tar.seek(-1, os.SEEK_CUR)
        tar.write(bytes([byte[0] ^ 4]))
        tar.truncate(int(places[19]["image"]) + 10)
    with pytest.raises(
        DamagedSampleError, match=r"a-000001\.tar, byte \d+: the image of 'a_lmdb/000000024' is damaged"
    ):
        corpus.read(1, 3)
    with pytest.raises(DamagedSampleError, match="a_lmdb/000000040"):
        corpus.read(1, 19)
    assert corpus.read(1, 3, ("label",)) == Corpus.open(folders[0]).read(1, 3, ("label",))
    assert corpus.read(1, 4) == Corpus.open(folders[0]).read(1, 4)


def test_manifests_that_cannot_be_trusted(folders: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "a")
    text = (folder / "manifest.json").read_text()
    stored = json.loads(text)
    stored["shards"][0]["samples"] -= 1
    escaping = json.loads(text)
    escaping["shards"][0]["file"] = "../a-000000.tar"
    damaged = ["", "[]", "{}", text[:-40], json.dumps(stored), json.dumps(escaping), text.replace('"first"', '"frist"')]
    for content in damaged:
        (folder / "manifest.json").write_text(content)
        with pytest.raises(DamagedManifestError):
            read_manifest(folder)
    (folder / "manifest.json").write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="format 9, but this version reads 1"):
        read_manifest(folder)
    for missing in (tmp_path, tmp_path / "nowhere", folder / "manifest.json"):
        with pytest.raises(UserError, match=r"no manifest\.json here"):
            Corpus.open(missing)
    with pytest.raises(UserError, match="no shard folder given"):
        Corpus.open([])


def test_what_was_named_in_the_place_of_shards_is_said(folders: list[Path], tmp_path: Path) -> None:
    write_words(tmp_path / "tree" / "lmdb", 3)
    (tmp_path / "parent" / "deep").mkdir(parents=True)
    for folder in folders:
        (tmp_path / "parent" / "deep" / folder.name).symlink_to(folder)
    for name, content in (("lit", '{"chunks": []}'), ("mds", '{"shards": [], "version": 2}'), ("tables", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(content)
    (tmp_path / "tables" / "a.parquet").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.tar").touch()
    for named, message in (
        (tmp_path / "tree" / "lmdb", "this is an LMDB: `ccd-data convert --src"),
        (tmp_path / "tree", "1 LMDBs are below: `ccd-data convert --src"),
        (tmp_path / "parent", rf"{len(folders)} folders of shards are below: name them \(.*{folders[0].name}"),
        (tmp_path / "foreign", "1 tars of another tool: `ccd-data index"),
        (tmp_path / "foreign" / "a.tar", "a tar: name its folder"),
        (tmp_path / "lit", "this is a folder of LitData"),
        (tmp_path / "mds", r"this is a folder of MosaicML Streaming \(MDS\)"),
        (tmp_path / "tables", r"what it holds is 1 × \.json, 1 × \.parquet"),
        (tmp_path / "shards" / "{000..007}.tar", "a pattern or an address: name the folder"),
        (tmp_path / "shards" / "*.tar", "a pattern or an address: name the folder"),
        (Path("pipe:cat a.tar"), "a pattern or an address: name the folder"),
        (Path("s3://bucket/a.tar"), "a pattern or an address: name the folder"),
        (tmp_path / "nothing", "give a folder that `ccd-data convert` finished"),
    ):
        with pytest.raises(UserError, match=rf"no manifest\.json here; {message}"):
            Corpus.open(named)


def test_a_manifest_returns_as_it_was_written(folders: list[Path], tmp_path: Path) -> None:
    manifest = read_manifest(folders[0])
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert contents(tmp_path)["manifest.json"] == contents(folders[0])["manifest.json"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000001.jpg", ("000001", "jpg")),
        ("1.SVT/000001.jpg", ("1.SVT/000001", "jpg")),
        ("a.b/c.d/7.mask.png", ("a.b/c.d/7", "mask.png")),
        ("./7.txt", ("./7", "txt")),
        ("._7.jpg", ("._7.jpg", "")),
        ("README", ("README", "")),
    ],
)
def test_member_names_divide_as_in_webdataset(name: str, parts: tuple[str, str]) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == parts
    assert base_plus_ext(name) == (parts if parts[1] else (None, None))


def test_a_corpus_of_twenty_million_samples_opens_in_a_second(tmp_path: Path) -> None:
    shards = []
    for i in range(2000):
        shards.append(
            Shard(f"x-{i:06d}.tar", "s", 1 + i * 10_000, (1 + i) * 10_000, 10_000, 0, 0, 1 << 25, "0" * 64, "0" * 64)
        )
        for name, size in ((shards[-1].file, 1 << 25), (shards[-1].offsets_file, 10_000 * ROW.itemsize)):
            with open(tmp_path / name, "wb") as file:
                file.truncate(size)  # sparse
    write_manifest(tmp_path, Manifest("x", {}, [Source("s", 20_000_000, "")], shards, {}, {}))
    start = time.perf_counter()
    corpus = Corpus.open(tmp_path)
    assert time.perf_counter() - start < 1
    assert corpus.num_samples == 20_000_000


def test_the_converter_loads_neither_torch_nor_opencv() -> None:
    check = "import sys, data_tools.convert, data_tools.verify; sys.exit(bool({'torch', 'cv2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
