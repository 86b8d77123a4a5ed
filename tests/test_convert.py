"""LMDB → shards: nothing lost, nothing changed, the same bytes whoever makes them, and clear words otherwise."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import lmdb
import pytest
import webdataset
from crops import REAL, change, contents, crop, mask, small_disk, write_words

from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.data.shards import Corpus, read_manifest
from ccd_train.errors import UserError
from data_tools import convert, merge

RUN = [sys.executable, "-m", "data_tools", "convert"]


def run(*arguments: object) -> int:
    """`ccd-data convert` in this process, with one worker unless told otherwise."""
    words = [str(argument) for argument in arguments]
    return convert.main(words if "--workers" in words else [*words, "--workers", "1"])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("source") / "words", 230)


@pytest.fixture(scope="module")
def shards(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The words, converted without any disturbance: three shards of 64 and one of 38."""
    out = tmp_path_factory.mktemp("shards") / "out"
    assert run("--src", words, "--out", out, "--name", "w", "--samples-per-shard", 64) == 0
    return out


def test_every_record_is_there_unchanged(words: Path, shards: Path) -> None:
    corpus, reader = Corpus.open(shards), LmdbReader(words)
    assert corpus.num_samples == len(reader) == 230
    assert corpus.shard_samples.tolist() == [64, 64, 64, 38]
    for number in range(1, 231):
        shard, row = corpus.locate(number - 1)
        assert corpus.key(shard, row) == f"words/{number:09d}"
        assert corpus.read(shard, row) == (reader.image(number), reader.label_bytes(number), None)


def test_webdataset_reads_them(words: Path, shards: Path) -> None:
    files = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    reader = LmdbReader(words)
    assert [sample["__key__"] for sample in samples] == [f"words/{number:09d}" for number in range(1, 231)]
    for number, sample in enumerate(samples, 1):
        assert sample["png" if number % 3 == 0 else "jpg"] == reader.image(number)
        assert sample.get("txt") == reader.label_bytes(number)


def test_tarfile_and_tar_read_them(shards: Path) -> None:
    with tarfile.open(shards / "w-000003.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == [
            "words/000000193.jpg",
            "words/000000193.txt",
            "words/000000194.jpg",
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    listed = subprocess.run(["tar", "tf", shards / "w-000003.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == [member.name for member in members] and not listed.stderr


def test_the_manifest_tells_what_is_there(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert (manifest.name, manifest.samples, manifest.refused) == ("w", 230, {})
    assert [(s.file, s.source, s.first, s.last) for s in manifest.shards] == [
        ("w-000000.tar", "words", 1, 64),
        ("w-000001.tar", "words", 65, 128),
        ("w-000002.tar", "words", 129, 192),
        ("w-000003.tar", "words", 193, 230),
    ]
    assert sum(shard.labels for shard in manifest.shards) == 230 - 230 // 4
    assert sum(manifest.sizes["width"]) == sum(manifest.sizes["height"]) == 230
    assert manifest.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert not list(shards.glob(".*"))


def test_workers_and_slices_make_the_same_bytes(words: Path, shards: Path, tmp_path: Path) -> None:
    same = ("--src", words, "--name", "w", "--samples-per-shard", 64)
    assert run(*same, "--out", tmp_path / "two", "--workers", 2) == 0
    for part in ("2/3", "0/3", "1/3"):
        assert run(*same, "--out", tmp_path / "sliced", "--slice", part) == 0
    assert merge.main([str(tmp_path / "sliced")]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "sliced") == contents(shards)


def test_a_tree_becomes_one_corpus_with_a_directory_for_each_lmdb(tmp_path: Path) -> None:
    write_words(tmp_path / "tree" / "train_2", 30, seed=2)
    write_words(tmp_path / "tree" / "train_1" / "1.SVT", 20, seed=1)
    write_words(tmp_path / "other" / "wörter und mehr", 10, seed=3)
    out = tmp_path / "out"
    sources = ("--src", tmp_path / "tree", "--src", tmp_path / "other" / "wörter und mehr")
    assert run(*sources, "--out", out, "--name", "t", "--samples-per-shard", 25) == 0
    manifest = read_manifest(out)
    assert [source.name for source in manifest.sources] == ["tree/train_1/1.SVT", "tree/train_2", "wörter und mehr"]
    assert [shard.samples for shard in manifest.shards] == [20, 25, 5, 10]
    keys = [
        sample["__key__"] for sample in webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False)
    ]
    assert len(set(keys)) == 60
    assert keys[0] == "tree/train_1/1.SVT/000000001" and keys[-1] == "wörter und mehr/000000010"


def test_sources_of_one_name_are_told_apart_by_more_of_their_path(tmp_path: Path) -> None:
    for name in ("a/train", "b/train"):
        write_words(tmp_path / name, 5)
    assert (
        run("--src", tmp_path / "a/train", "--src", tmp_path / "b/train", "--out", tmp_path / "o", "--name", "x") == 0
    )
    assert [source.name for source in read_manifest(tmp_path / "o").sources] == ["a/train", "b/train"]
    with pytest.raises(UserError, match="given 2 times"):
        run("--src", tmp_path / "a", "--src", tmp_path / "a/train", "--out", tmp_path / "p", "--name", "x")


def test_a_source_whose_path_fits_no_tar_header_is_shortened(tmp_path: Path) -> None:
    deep = Path(*[f"ordner-mit-umlaut-ä{i:02d}" for i in range(9)])
    write_words(tmp_path / "tree" / deep, 3)
    write_words(tmp_path / "tree" / "line\nbreak", 3)
    assert run("--src", tmp_path / "tree", "--out", tmp_path / "o", "--name", "x") == 0
    files = sorted(map(str, (tmp_path / "o").glob("*.tar")))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(files, shardshuffle=False)]
    assert len(set(keys)) == 6
    assert keys[0].split("~")[1] == "tree/line_break/000000001"
    assert keys[5].split("~")[1].endswith("ordner-mit-umlaut-ä08/000000003")
    assert Corpus.open(tmp_path / "o").key(0, 0) == keys[0]


def test_names_that_are_no_text_are_literal(tmp_path: Path) -> None:
    name = os.fsdecode(b"w \xff $(touch x) {0..9}")
    write_words(tmp_path / name, 3)
    command = [*RUN, "--src", tmp_path / name, "--out", tmp_path / f"o {name}", "--name", "x"]
    ended = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "POSIX"}, cwd=tmp_path)
    assert ended.returncode == 0 and not ended.stderr
    files = sorted(map(str, (tmp_path / f"o {name}").glob("*.tar")))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(files, shardshuffle=False)]
    assert keys == [f"{name}/{number:09d}" for number in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"o {name}"])


def test_masks_come_from_the_same_lmdb_or_from_a_parallel_tree(tmp_path: Path) -> None:
    write_words(tmp_path / "with", 5, masks=True)
    assert run("--src", tmp_path / "with", "--out", tmp_path / "o1", "--name", "x") == 0
    assert Corpus.open(tmp_path / "o1").read(0, 2, ("mask",)) == (mask(3),)

    write_words(tmp_path / "training" / "X", 5)
    masks = tmp_path / "Mask" / "X"
    masks.mkdir(parents=True)
    with lmdb.open(str(masks)) as environment, environment.begin(write=True) as transaction:
        for number in (1, 2, 3, 5):  # 4 has none
            transaction.put(b"mask-%09d" % number, mask(number))
    given = ("--mask-src", tmp_path / "Mask", "--name", "x", "--max-refused", 0.5)
    assert run("--src", tmp_path / "training", "--out", tmp_path / "o2", *given) == 0
    corpus = Corpus.open(tmp_path / "o2")
    assert [corpus.read(0, row, ("mask",))[0] for row in range(4)] == [mask(number) for number in (1, 2, 3, 5)]
    assert read_manifest(tmp_path / "o2").refused == {"no mask": 1}

    shutil.copytree(tmp_path / "training", tmp_path / "all" / "training")
    shutil.copytree(tmp_path / "Mask", tmp_path / "all" / "Mask" / "training")  # inside of the source's own tree
    inside = ("--mask-src", tmp_path / "all" / "Mask", "--name", "x", "--max-refused", 0.5)
    assert run("--src", tmp_path / "all", "--out", tmp_path / "o4", *inside) == 0
    assert [source.name for source in read_manifest(tmp_path / "o4").sources] == ["all/training/X"]

    write_words(tmp_path / "training" / "Y", 5)
    with pytest.raises(UserError, match=r"no LMDB with its masks at .*Mask/Y"):
        run("--src", tmp_path / "training", "--out", tmp_path / "o3", *given)
    shutil.rmtree(tmp_path / "training" / "Y")
    with lmdb.open(str(masks)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"mask-%09d" % 6, mask(6))
    with pytest.raises(UserError, match="its masks go on to number 6, but its last image is number 5"):
        run("--src", tmp_path / "training", "--out", tmp_path / "o3", *given)
    with pytest.raises(UserError, match=r"Mask.*: these are masks .* as --mask-src"):
        run("--src", tmp_path / "all", "--out", tmp_path / "o3", "--name", "x")


def test_labels_can_be_dropped(words: Path, tmp_path: Path) -> None:
    assert run("--src", words, "--out", tmp_path / "o", "--name", "x", "--labels", "drop") == 0
    assert sum(shard.labels for shard in read_manifest(tmp_path / "o").shards) == 0
    assert Corpus.open(tmp_path / "o").read(0, 0, ("label",)) == (None,)


def test_an_empty_label_is_not_a_missing_one(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "w") as writer:
        writer.add(crop(1), "")
        writer.add(crop(2), None)
    assert run("--src", tmp_path / "w", "--out", tmp_path / "o", "--name", "x") == 0
    assert [Corpus.open(tmp_path / "o").read(0, row, ("label",)) for row in (0, 1)] == [(b"",), (None,)]


def bad_words(path: Path) -> dict[int, str]:
    """100 words of which 11 cannot be used; returns the kind of each."""
    write_words(path, 100, masks=True)
    jpeg, png = crop(1), crop(3, ".png")
    twelve_bits = jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c")
    assert twelve_bits != jpeg
    entries: dict[int, tuple[str, str, bytes | None]] = {
        10: ("image", "missing", None),
        11: ("image", "empty", b""),
        12: ("image", "not an image", b"<html>404</html>"),
        13: ("image", "truncated", jpeg[: len(jpeg) // 2]),
        14: ("image", "truncated", png[:-5]),
        15: ("image", "too small", crop(15, ".png", width=6, height=40)),
        16: ("image", "too large", crop(16, ".png", width=200, height=50)),
        17: ("image", "mode", twelve_bits),
        18: ("image", "format", b"GIF89a" + bytes(100)),
        19: ("label", "label", b"\xff\xfe"),
        20: ("mask", "mask", b"no mask"),
    }
    change(path, {f"{part}-{number:09d}": value for number, (part, _, value) in entries.items()})
    return {number: kind for number, (_, kind, _) in entries.items()}


def test_records_that_cannot_be_used_are_refused_counted_and_listed(tmp_path: Path) -> None:
    expected = bad_words(tmp_path / "w")
    options = ("--src", tmp_path / "w", "--name", "x", "--samples-per-shard", 30, "--max-pixels", 5000)
    options += ("--max-refused", 0.2)
    assert run(*options, "--out", tmp_path / "o") == 0
    manifest = read_manifest(tmp_path / "o")
    lines = [json.loads(line) for line in (tmp_path / "o" / "refused.jsonl").read_text().splitlines()]
    listed = {line["record"]: line["kind"] for line in lines}
    assert listed == expected
    assert manifest.samples == 89 and sum(manifest.refused.values()) == len(lines) == 11
    assert all(line["source"] == "w" and line["reason"] for line in lines)
    assert [shard.samples for shard in manifest.shards] == [19, 30, 30, 10]
    corpus = Corpus.open(tmp_path / "o")
    keys = [corpus.key(*corpus.locate(i)) for i in range(corpus.num_samples)]
    assert keys == [f"w/{number:09d}" for number in range(1, 101) if number not in listed]


def test_too_many_refused_records_stop_it_and_more_may_be_allowed(tmp_path: Path) -> None:
    bad_words(tmp_path / "w")
    options = ("--src", tmp_path / "w", "--name", "x", "--out", tmp_path / "o", "--samples-per-shard", 30)
    with pytest.raises(UserError, match=r"of 100 records are refused \(.*1 missing.*refused\.jsonl.*--max-refused"):
        run(*options)
    assert (tmp_path / "o" / "refused.jsonl").exists() and not (tmp_path / "o" / "manifest.json").exists()
    assert run(*options, "--max-refused", 0.2) == 0


def test_a_shard_without_any_sample_is_left_out(tmp_path: Path) -> None:
    write_words(tmp_path / "w", 30)
    change(tmp_path / "w", {f"image-{number:09d}": b"bad" for number in range(11, 21)})
    options = ("--src", tmp_path / "w", "--name", "x", "--samples-per-shard", 10, "--max-refused", 0.5)
    assert run(*options, "--out", tmp_path / "o") == 0
    assert [shard.file for shard in read_manifest(tmp_path / "o").shards] == ["x-000000.tar", "x-000002.tar"]
    assert Corpus.open(tmp_path / "o").num_samples == 20


def test_checks_can_be_stricter_or_none(tmp_path: Path) -> None:
    write_words(tmp_path / "w", 30)
    broken = bytearray(crop(3, ".png", 60, 30))
    broken[200:260] = bytes(60)  # header and end are whole, the pixels are not
    change(tmp_path / "w", {"image-000000003": bytes(broken), "image-000000004": crop(4)[:300]})
    options = ("--src", tmp_path / "w", "--name", "x", "--max-refused", 0.5)
    for check, refused in (("none", {}), ("header", {"truncated": 1}), ("decode", {"truncated": 1, "undecodable": 1})):
        assert run(*options, "--check", check, "--out", tmp_path / check) == 0
        assert read_manifest(tmp_path / check).refused == refused


def test_a_conversion_that_was_stopped_does_only_what_is_missing(words: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    options = ("--src", words, "--out", out, "--name", "w", "--samples-per-shard", 64)
    assert run(*options, "--slice", "1/2") == 0  # shards 1 and 3: as if it had been killed in between
    (out / ".w-000000.tar.123-0a1b2c3d.tmp").write_bytes(b"half a shard")
    before = {name: (out / name).stat().st_mtime_ns for name in ("w-000001.tar", "w-000003.tar")}
    assert run(*options) == 0
    assert contents(out) == contents(shards)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(*options) == 0  # finished: nothing to do
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_finished_folder_that_lost_shards_is_mended(words: Path, shards: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shards, tmp_path / "o")
    (out / "w-000001.tar").unlink()
    os.truncate(out / "w-000002.offsets", 56)
    with pytest.raises(UserError, match=r"w-000001\.tar \(missing\), w-000002\.offsets \(56 bytes instead of 3584\)"):
        Corpus.open(out)
    assert run("--src", words, "--out", out, "--name", "w", "--samples-per-shard", 64) == 0
    assert contents(out) == contents(shards)


def test_another_conversion_in_the_folder_is_refused(words: Path, shards: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shards, tmp_path / "o")
    options = ("--src", words, "--name", "w")
    with pytest.raises(UserError, match="samples_per_shard is 64, not 10000"):
        run(*options, "--out", out)
    other = write_words(tmp_path / "words", 10, seed=9)
    with pytest.raises(UserError, match=r"the source words has other contents \(230 records\)"):
        run("--src", other, "--name", "w", "--samples-per-shard", 64, "--out", out)
    assert run(*options, "--samples-per-shard", 64, "--out", tmp_path / "p", "--slice", "0/2") == 0
    with pytest.raises(UserError, match="labels is keep, not drop"):
        run(*options, "--samples-per-shard", 64, "--out", tmp_path / "p", "--slice", "1/2", "--labels", "drop")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not empty.*'thesis\.tex'"):
        run(*options, "--out", tmp_path / "q")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run(*options, "--out", tmp_path / "file" / "o")


def test_shards_of_a_source_that_was_written_to_since_are_stale(tmp_path: Path) -> None:
    """One label of many: no sample of the records would show it."""
    source, out = write_words(tmp_path / "words", 200), tmp_path / "o"
    options = ("--src", source, "--out", out, "--name", "w", "--samples-per-shard", 20)
    assert run(*options) == 0
    before = contents(out)
    facts = json.loads(before["sources.json"])
    assert facts.keys() == {"words"} and facts["words"]["entries"] == 351
    assert run(*options) == 0  # nothing to do
    moved = shutil.copytree(source, tmp_path / "elsewhere" / "words")  # at another time: a copy is as good
    assert run("--src", moved, *options[2:]) == 0
    os.utime(source / "data.mdb", (1, 1))  # another LMDB of the same size may have come in its place
    with pytest.raises(UserError, match=r"words: the source was written to since \(modified .*\): --out another"):
        run(*options)
    change(moved, {"label-000000099": b"corrected"})
    with pytest.raises(UserError, match=r"words: the source was written to since \(transaction 1 → 2"):
        run("--src", moved, *options[2:])
    assert before.items() <= contents(out).items()
    (out / "sources.json").unlink()  # a folder of an earlier version
    assert run(*options) == 0

    begun = ("--src", moved, "--out", tmp_path / "p", "--name", "w", "--samples-per-shard", 20)
    assert run(*begun, "--slice", "0/2") == 0
    change(moved, {"label-000000099": b"corrected twice"})
    with pytest.raises(UserError, match=r"words: the source was written to since"):
        run(*begun, "--slice", "1/2")
    (tmp_path / "p" / ".conversion" / "sources.json").unlink()  # begun by an earlier version
    assert run(*begun, "--slice", "1/2") == 0 and merge.main([str(tmp_path / "p")]) == 0


def test_a_second_conversion_of_the_same_slice_is_refused(words: Path, tmp_path: Path) -> None:
    options = ("--src", words, "--out", tmp_path / "o", "--name", "w", "--samples-per-shard", 64)
    assert run(*options, "--slice", "0/2") == 0
    with open(tmp_path / "o" / ".conversion" / "slice-1-of-2.lock", "wb") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="slice 1/2 into this folder is running already"):
            run(*options, "--slice", "1/2")
        with pytest.raises(UserError, match="slice 1/2 into this folder is running already"):
            run(*options)  # would finish while the slice is still at work
    assert run(*options, "--slice", "1/2") == 0
    assert merge.main([str(tmp_path / "o")]) == 0


def test_merge_names_the_slices_that_are_missing(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--src", words, "--out", tmp_path / "o", "--name", "w", "--samples-per-shard", 20)
    for part in ("0/4", "2/4"):
        assert run(*options, "--slice", part) == 0
    with pytest.raises(UserError, match=r"6 shards are missing \(w-000001\.tar is the first\).*--slice 1/4, 3/4"):
        merge.main([str(tmp_path / "o")])
    for part in ("1/4", "3/4", "2/4"):  # one of them is done again
        assert run(*options, "--slice", part) == 0
    assert merge.main([str(tmp_path / "o")]) == 0
    assert merge.main([str(tmp_path / "o")]) == 0
    assert "nothing to merge" in capsys.readouterr().out
    assert Corpus.open(tmp_path / "o").num_samples == 230
    with pytest.raises(UserError, match=r"no manifest\.json here"):
        merge.main([str(tmp_path)])


def test_more_slices_than_shards(words: Path, tmp_path: Path) -> None:
    options = ("--src", words, "--out", tmp_path / "o", "--name", "w", "--samples-per-shard", 200)
    for index in range(4):
        assert run(*options, "--slice", f"{index}/4") == 0
    assert merge.main([str(tmp_path / "o")]) == 0
    assert Corpus.open(tmp_path / "o").num_samples == 230


def test_an_lmdb_that_is_being_written_is_refused(tmp_path: Path) -> None:
    origin = convert.find_origins([write_words(tmp_path / "w", 20)], [])[0]
    origin.check_unchanged()
    change(tmp_path / "w", {"label-000000001": b"new"})
    with pytest.raises(UserError, match="being written to"):
        origin.check_unchanged()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a/b"], "--name 'a/b'"),
        (["--name", ".a"], "--name '.a'"),
        (["--slice", "3/3"], "--slice 3/3"),
        (["--slice", "one"], "--slice one"),
        (["--workers", "0"], "--workers 0: give 1 or more"),
        (["--samples-per-shard", "0"], "--samples-per-shard 0"),
        (["--max-refused", "5"], "--max-refused 5"),
        (["--src", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
    ],
)
def test_impossible_arguments(words: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("--src", words, "--out", tmp_path / "o", "--name", "w", *arguments)
    assert not (tmp_path / "o").exists()


def test_the_command_line_refuses_in_one_line_with_code_2(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*RUN, "--src", tmp_path, "--out", tmp_path / "o", "--name", "x"], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "no LMDB here or below" in ended.stderr and not ended.stdout
    ended = subprocess.run([sys.executable, "-m", "data_tools", "konvert"], capture_output=True, text=True)
    assert ended.returncode == 2 and "no such verb" in ended.stderr


def test_too_little_disk_is_said_before_it_begins(words: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "64k") as out, pytest.raises(UserError, match=r"0\.1 MB are free; make room"):
        run("--src", words, "--out", out / "o", "--name", "w")


@pytest.mark.skipif(not REAL.exists(), reason="real LMDBs are not here")
def test_real_lmdbs_convert_or_are_refused_with_a_reason(tmp_path: Path) -> None:
    counts = {"iiit5k_train": 2000, "mmocr_toy": 10, "shop_signs": 8, "bengali_non_ascii_labels": 200}
    counts["crochet_16k_pages"] = 186
    for name, count in counts.items():
        assert run("--src", REAL / name, "--out", tmp_path / name, "--name", "x", "--check", "decode") == 0
        corpus, reader = Corpus.open(tmp_path / name), LmdbReader(REAL / name)
        assert corpus.num_samples == count
        for number in range(1, count + 1):
            stored = corpus.read(0, number - 1)
            assert stored == (reader.image(number), reader.label_bytes(number), None)
    with pytest.raises(UserError, match="labels but no images"):
        run("--src", REAL / "mmocr_toy_labels_only", "--out", tmp_path / "l", "--name", "x")
    with pytest.raises(UserError, match="1 truncated"):
        run("--src", REAL / "mmocr_toy_truncated_image", "--out", tmp_path / "t", "--name", "x")
    with pytest.raises(UserError, match="no LMDB here or below"):
        run("--src", REAL / "words", "--out", tmp_path / "p", "--name", "x")
