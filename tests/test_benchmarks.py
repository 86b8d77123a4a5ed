"""A benchmark is known by its name, its size and its place, and nothing is trained on it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest
from crops import crop, write_words
from pages import CHECKOUT

from ccd_train.config.pretraining import Config, Data
from ccd_train.data.benchmarks import BENCHMARKS, PUBLISHED, candidates, recognise
from ccd_train.data.records import LmdbWriter
from ccd_train.data.shards import read_manifest
from ccd_train.errors import UserError
from ccd_train.reports.benchmarks import GROUPS, find_sets, not_averaged
from ccd_train.tasks.pretrain.task import Pretraining
from data_tools import convert


@pytest.mark.parametrize(
    ("folder", "records", "name"),
    [
        ("parseq/IIIT5k", 3000, "IIIT5k_3000"),
        ("mmocr/IIIT5K", 3000, "IIIT5k_3000"),
        ("iiit5k_3000", 3000, "IIIT5k_3000"),
        ("SVT", 647, "SVT"),
        ("svt_test", 647, "SVT"),
        ("svt/test", 647, "SVT"),
        ("IC13", 857, "IC13_857"),
        ("IC13", 1015, "IC13_1015"),
        ("icdar_2013", 1095, "IC13_1095"),
        ("icdar2013_857.lmdb", 857, "IC13_857"),
        ("IC15", 1811, "IC15_1811"),
        ("icdar2015", 2077, "IC15_2077"),
        ("svt-p", 645, "SVTP"),
        ("ct80", 288, "CUTE80"),
        ("CUTE", 288, "CUTE80"),
        ("COCOv1.4", 9825, "COCOText"),
        ("Total-Text", 2201, "TotalText"),
        ("OST/heavy", 2416, "HOST"),
        ("u14m/curve", 2426, "curve"),
        # parts of a benchmark, too: by the folder, by the name, or beside sets that are for tests only
        ("test/IIIT5k", 4, "IIIT5k_3000"),
        ("evaluation/benchmark/SVT", 4, "SVT"),
        ("evaluation/benchmark/of_its_own", 4, "of_its_own"),
        ("IC15_1811", 4, "IC15_1811"),
        ("CUTE80", 4, "CUTE80"),
        ("Union14M-Benchmarks/general", 4, "general"),
    ],
)
def test_a_benchmark_is_known_as_every_project_calls_it(folder: str, records: int, name: str) -> None:
    found = recognise(PurePosixPath("/data") / folder, records)
    assert found is not None and (found.name, found.certain) == (name, True)


def test_what_lies_beside_sets_for_tests_only_is_one_of_them() -> None:
    path = PurePosixPath("/data/parseq/IC13")
    assert recognise(path, 4, ["IC15", "SVT"]) == ("IC13_857", False, "4 words, not as published")
    assert recognise(path, 4, ["IC15", "SVTP"]) == ("IC13_857", True, "beside SVTP")


@pytest.mark.parametrize(
    ("folder", "records"), [("val/SVT", 257), ("val/IIIT5k", 2000), ("IC13", 848), ("IC15", 4468), ("COCO", 40_000)]
)
def test_a_name_alone_is_a_suspicion(folder: str, records: int) -> None:
    found = recognise(PurePosixPath("/data") / folder, records)
    assert found is not None and not found.certain


@pytest.mark.parametrize(
    ("folder", "records"),
    [
        ("1.SVT", 257),
        ("2.IIIT", 2000),
        ("svt/train", 257),
        ("IIIT5k_2000", 2000),
        ("general", 30),
        ("curve", 5),
        ("MJ", 9),
    ],
)
def test_others_are_not_suspected(folder: str, records: int) -> None:
    assert recognise(PurePosixPath("/data") / folder, records) is None


def test_every_name_leads_to_its_benchmark() -> None:
    assert all(one in candidates(name) for one in BENCHMARKS for name in (one.name, *one.aliases))
    assert all(name in PUBLISHED for sets in GROUPS.values() for name in sets)


def test_the_page_lists_every_benchmark() -> None:
    page = (CHECKOUT / "docs/evaluation.md").read_text(encoding="utf8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE))
    expected = {}
    for one in BENCHMARKS:
        sizes = " or ".join(f"{size:,}" for size in one.sizes) or "–"
        expected[one.name] = f"{sizes} | {', '.join(one.aliases) or '–'}"
    assert rows == expected


def converted(out: Path, *arguments: object) -> list[str]:
    """The names of the sources."""
    assert convert.main([*map(str, arguments), "--out", str(out), "--name", "w", "--workers", "1"]) == 0
    return [source.name for source in read_manifest(out).sources]


def test_a_conversion_leaves_benchmarks_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data_lmdb"
    write_words(root / "training" / "ST", 5)
    write_words(root / "validation" / "1.SVT", 4)
    write_words(root / "val" / "SVT", 3, seed=1)
    write_words(root / "evaluation" / "benchmark" / "SVT", 3, seed=2)
    write_words(root / "more" / "CUTE80", 3, seed=3)
    names = converted(tmp_path / "without", "--src", root)
    assert names == ["data_lmdb/training/ST", "data_lmdb/val/SVT", "data_lmdb/validation/1.SVT"]
    said = capsys.readouterr().out
    assert "evaluation/benchmark/SVT: the benchmark SVT (in evaluation/benchmark): left out" in said
    assert "more/CUTE80: the benchmark CUTE80" in said
    assert "val/SVT: bears the name of the benchmark SVT (3 words, not as published): taken" in said
    assert len(converted(tmp_path / "with", "--src", root, "--with-benchmarks")) == 5
    with pytest.raises(UserError, match=r"nothing but benchmarks.*--with-benchmarks"):
        converted(tmp_path / "none", "--src", root / "evaluation")


def test_pretraining_refuses_shards_of_a_benchmark(tmp_path: Path) -> None:
    write_words(tmp_path / "data" / "ST", 5)
    write_words(tmp_path / "data" / "test" / "IIIT5k", 3, seed=1)
    converted(tmp_path / "shards", "--src", tmp_path / "data", "--with-benchmarks")
    with pytest.raises(UserError, match=r"data/test/IIIT5k\): a benchmark; neither training nor validation"):
        start_pretraining(tmp_path / "shards")


def test_pretraining_refuses_a_corpus_that_is_given_twice(tmp_path: Path) -> None:
    write_words(tmp_path / "ST", 5)
    for name in ("one", "other"):
        converted(tmp_path / name, "--src", tmp_path / "ST")
    with pytest.raises(UserError, match=r"--data.shards: .*one \(ST\) and .*other \(ST\) are the same"):
        start_pretraining(tmp_path / "one", tmp_path / "other")


def start_pretraining(*shards: Path) -> None:
    Pretraining(Config(data=Data(shards=shards))).open()


def test_sets_to_measure_on_are_found_by_any_name(tmp_path: Path) -> None:
    for name, records in {"IIIT5K": 2, "svt": 2, "IC13": 3, "icdar_2015": 2, "SVTP": 2, "ct80": 2, "mine": 2}.items():
        write_words(tmp_path / name, records)
    names = [one.name for one in find_sets(tmp_path)]
    assert names == ["IIIT5k_3000", "SVT", "IC13_857", "IC15_1811", "SVTP", "CUTE80", "mine"]


def test_of_two_with_one_name_that_of_the_published_size_has_it(tmp_path: Path) -> None:
    image = crop(1)
    for name, records in {"test/SVT": 647, "val/SVT": 3}.items():
        with LmdbWriter(tmp_path / name) as writer:
            for _ in range(records):
                writer.add(image, "a")
    assert [(one.name, one.path.parent.name) for one in find_sets(tmp_path)] == [("SVT", "test"), ("val/SVT", "val")]


def test_an_average_that_is_missing_is_explained() -> None:
    six_small = ["IIIT5k_3000", "SVT", "IC13_857", "IC15_1811", "SVTP", "CUTE80"]
    lines = not_averaged(six_small)
    assert lines[0] == "regular: not printed, no IC13_1015 here"
    assert not [line for line in lines if line.startswith(("irregular", "six", "occluded", "union14m"))]
    assert "six, small IC13: not printed, no IIIT5k_3000 here" in not_averaged(six_small[1:])
    assert not not_averaged(["of my own"])
