"""Evaluation images among the training crops: found when equal or re-encoded, and left out of the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from ccd_train.data.masks import decode_rgb
from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.data.shards import Corpus
from ccd_train.errors import UserError
from data_tools import convert, overlap
from data_tools.likeness import BITS, Index, digest, perceptual_hash
from data_tools.words import render
from tests.conftest import Tiny

EQUAL, ENCODED, SCALED = range(1, 11), range(11, 21), range(21, 31)  # records of the corpus in the evaluation set


@pytest.fixture(scope="module")
def evaluation(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 crops of the corpus, as they are, encoded again and scaled, after 25 words that it does not hold."""
    folder = tmp_path_factory.mktemp("evaluation") / "set"
    with LmdbReader(tiny.lmdb) as reader, LmdbWriter(folder) as writer:
        for index in range(25):
            writer.add(render(99, index, ()).image)
        for number in (*EQUAL, *ENCODED, *SCALED):
            data = reader.image(number) or b""
            image = decode_rgb(data)[..., ::-1]
            if number in SCALED:
                image = cv2.resize(image, (image.shape[1] * 3 // 2, image.shape[0] * 3 // 2))
            writer.add(
                data if number in EQUAL else cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 70])[1].tobytes()
            )
    return folder


def records(out: Path) -> dict[int, str]:
    """Record number of each training crop found → how it was found."""
    lines = [json.loads(line) for line in (out / "overlap.jsonl").read_text().splitlines()]
    return {int(line["key"].rpartition("/")[2]): line["how"] for line in lines}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_crops_of_the_evaluation_set_are_found_and_no_others(
    tiny: Tiny, evaluation: Path, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny.shards), "--against", str(evaluation), "--out", str(tmp_path), "--workers", workers]
    assert overlap.main(arguments) == 0
    found = records(tmp_path)
    assert {number for number, how in found.items() if how == "equal bytes"} == set(EQUAL)
    assert set(found) <= {*EQUAL, *ENCODED, *SCALED} and len(found) >= 28
    printed = capsys.readouterr().out
    assert f"{len(found)} of 55 images are in the training data; 10 crops are equal" in printed
    assert (cv2.imread(str(tmp_path / "overlap.png")) is not None) and "--data.exclude" in printed


def test_the_list_keeps_them_out_of_the_training(tiny: Tiny, evaluation: Path, tmp_path: Path) -> None:
    overlap.main([str(tiny.shards), "--against", str(evaluation), "--out", str(tmp_path), "--workers", "1"])
    rest = Corpus.open(tiny.shards, exclude=tmp_path / "exclude.jsonl")
    found = records(tmp_path)
    keys = {int(rest.key(*rest.locate(i)).rpartition("/")[2]) for i in range(rest.num_samples)}
    assert len(keys) == 240 - len(found) and not keys & set(found)


def test_shards_and_image_files_can_be_evaluation_sets(tiny: Tiny, evaluation: Path, tmp_path: Path) -> None:
    shards, files = tmp_path / "shards", tmp_path / "files" / "below"
    convert.main(["--src", str(evaluation), "--out", str(shards), "--name", "evaluation", "--workers", "1"])
    files.mkdir(parents=True)
    with LmdbReader(tiny.lmdb) as reader:
        for number in EQUAL:
            (files / f"{number}.jpg").write_bytes(reader.image(number) or b"")
    for source, expected in ((shards, {*EQUAL}), (files.parent, {*EQUAL})):
        overlap.main([str(tiny.shards), "--against", str(source), "--out", str(tmp_path / "out"), "--distance", "0"])
        assert expected <= set(records(tmp_path / "out"))


def test_all_that_lies_in_a_folder_is_compared(
    tiny: Tiny, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture beside the LMDBs does not stand for the folder, whatever it is called; what is no picture is named."""
    tree, flat = tmp_path / "tree", cv2.imencode(".png", np.full((20, 60), 128, np.uint8))[1].tobytes()
    shutil.copytree(evaluation, tree / "lmdb")
    convert.main(["--src", str(tiny.lmdb), "--out", str(tree / "shards"), "--name", "s", "--workers", "1"])
    for name, data in (
        ("table.png", flat),
        ("no_suffix", render(99, 30, ()).image),
        ("README.md", b"no"),
        ("a.png", b""),
    ):
        (tree / name).write_bytes(data)
    (tree / "nowhere").symlink_to("there")
    capsys.readouterr()
    overlap.main([str(tiny.shards), "--against", str(tree), "--out", str(tmp_path / "out"), "--distance", "0"])
    printed = capsys.readouterr().out
    assert f"{tree}: 240 of 297 images are in the training data; 240 crops are equal" in printed
    assert f"{tree}: looked at 55 in LMDBs, 240 in shards, 2 in files" in printed
    assert f"{tree}: 1 cannot be decoded or show nothing: compared by their bytes alone" in printed
    assert f"{tree}: left out, as they are no pictures: 1 × .md, 1 × .png, 1 × nowhere" in printed


def test_a_crop_in_two_sets_counts_for_both(
    tiny: Tiny, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal bytes in both, or equal in one and encoded again in the other."""
    second = tmp_path / "second"
    with LmdbReader(tiny.lmdb) as reader, LmdbWriter(second) as writer:
        writer.add(render(99, 31, ()).image)
        for number in (*EQUAL[:4], *ENCODED[:3]):
            writer.add(reader.image(number) or b"")
    overlap.main([str(tiny.shards), "--against", str(evaluation), str(second), "--out", str(tmp_path / "out")])
    lines = [json.loads(line) for line in (tmp_path / "out" / "overlap.jsonl").read_text().splitlines()]
    for number, of_first in ((1, "equal bytes"), (11, "bits differ")):
        of_both = [line for line in lines if int(line["key"].rpartition("/")[2]) == number]
        assert [line["evaluation"].rpartition(":")[0] for line in of_both] == [str(evaluation), str(second)]
        assert of_first in of_both[0]["how"] and of_both[1]["how"] == "equal bytes"
    printed = capsys.readouterr().out
    assert f"{second}: 7 of 8 images are in the training data; 7 crops are equal, 0 alike" in printed
    crops = {line["key"] for line in lines}
    assert Corpus.open(tiny.shards, exclude=tmp_path / "out" / "exclude.jsonl").num_samples == 240 - len(crops)


def test_several_corpora_give_one_list(tiny: Tiny, evaluation: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    convert.main(["--src", str(evaluation), "--out", str(other), "--name", "other", "--workers", "1"])
    arguments = [str(tiny.shards), str(other), "--against", str(evaluation), "--out", str(tmp_path), "--workers", "1"]
    overlap.main(arguments)
    rest = Corpus.open([tiny.shards, other], exclude=tmp_path / "exclude.jsonl")
    assert rest.num_samples <= 240 - 28


def test_a_clean_corpus_gives_empty_lists(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LmdbWriter(tmp_path / "clean") as writer:
        writer.add(render(99, 0, ()).image)
        writer.add(b"cannot be decoded")
    overlap.main([str(tiny.shards), "--against", str(tmp_path / "clean"), "--out", str(tmp_path), "--workers", "1"])
    printed = capsys.readouterr().out
    assert "0 of 2 images" in printed and "1 cannot be decoded or show nothing" in printed
    assert Corpus.open(tiny.shards, exclude=tmp_path / "exclude.jsonl").num_samples == 240


def test_unreadable_crops_are_counted(
    tiny: Tiny, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny.shards, tmp_path / "rotten")
    corpus = Corpus.open(tmp_path / "rotten")
    with open(corpus.paths[3], "r+b") as tar:
        tar.seek(int(corpus.places(3)[-1]["image"]) + 30)
        tar.write(b"rot")
    overlap.main([str(tmp_path / "rotten"), "--against", str(evaluation), "--workers", "1"])
    assert "1 crops could not be read" in capsys.readouterr().out


def test_wrong_wishes_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for against, distance, word in (
        (tmp_path / "no", "12", "no such folder"),
        (tmp_path, "12", "no LMDB, shards or pictures here or below"),
        (tmp_path, "99", "63"),
    ):
        with pytest.raises(UserError, match=word):
            overlap.main([str(tiny.shards), "--against", str(against), "--distance", distance])


def test_the_hash_ignores_brightness_and_sees_another_word() -> None:
    word = decode_rgb(render(1, 5, ()).image)

    def hashed(image: np.ndarray) -> np.ndarray:
        found = perceptual_hash(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
        assert found is not None
        return found

    def bits(one: np.ndarray, other: np.ndarray) -> int:
        return int(np.bitwise_count(hashed(one) ^ hashed(other)).sum())

    assert bits(word, np.rint(word * 0.7 + 40).astype(np.uint8)) <= 4
    assert bits(word, cv2.GaussianBlur(word, (0, 0), 0.8)) <= overlap.DISTANCE
    assert bits(word, decode_rgb(render(1, 6, ()).image)) > 30
    assert perceptual_hash(cv2.imencode(".png", np.full((20, 60), 128, np.uint8))[1].tobytes()) is None
    assert perceptual_hash(b"no image") is None


def test_the_index_finds_the_nearest_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    known = rng.integers(0, 2**63, (50, 2), dtype=np.uint64)
    asked = rng.integers(0, 2**63, (20, 2), dtype=np.uint64)
    asked[3] = known[17] ^ np.uint64(5)  # two bits in each half
    index = Index.build([digest(bytes([n])) for n in range(60)], {n + 10: row for n, row in enumerate(known)})
    images, differences = index.nearest(asked)
    for hashed, image, count in zip(asked.tolist(), images.tolist(), differences.tolist(), strict=True):
        by_hand = [sum((a ^ b).bit_count() for a, b in zip(hashed, row, strict=True)) for row in known.tolist()]
        assert count == min(by_hand) == by_hand[image - 10]
    assert images[3] == 27 and differences[3] == 4
    assert index.numbers[digest(bytes([42]))] == 42
    assert Index.build([], {}).nearest(asked)[1].tolist() == [BITS] * 20
