"""`ccd-train evaluate`: the right words are counted under each rule, beside what makes figures comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crops
import pytest
import words
from conftest import Tiny

from ccd_train.commands import evaluate
from ccd_train.config.verbs import EvaluateOptions, RecognizerSource
from ccd_train.data.benchmarks import PUBLISHED
from ccd_train.data.charset import NAMED
from ccd_train.data.records import LmdbWriter
from ccd_train.errors import UserError
from ccd_train.reports import benchmarks, evaluation
from ccd_train.reports.benchmarks import GROUPS, BenchmarkWords, find_sets, other_size
from ccd_train.reports.evaluation import Result
from ccd_train.reports.mistakes import Mistake, confusions
from ccd_train.tasks.recognize.reading import open_recognizer
from ccd_train.tasks.recognize.scoring import rules_for, same, similarity
from ccd_train.weights.recognizer import FILE, Trained

CODE = "<script>alert('é')</script>"
OFFICIAL = rules_for(NAMED["DICT90"])
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.write(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def images(tiny: Tiny) -> list[bytes]:
    return words.images(tiny.lmdb, 6)


@pytest.fixture(scope="module")
def readings(images: list[bytes]) -> list[str]:
    texts = words.texts(words.small(), images)
    assert all(text != text.swapcase() for text in texts), "these tests change the case of what is read"
    return texts


@pytest.fixture(scope="module")
def data(images: list[bytes], readings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SVT: right, right but for case, right but for punctuation, wrong, unreadable, unlabelled. own/set: all right."""
    folder = tmp_path_factory.mktemp("data")
    with LmdbWriter(folder / "benchmark" / "SVT") as writer:
        writer.add(images[0], readings[0])
        writer.add(images[1], readings[1].swapcase())
        writer.add(images[2], f"-{readings[2]}!")
        writer.add(images[3], CODE)
        writer.add(b"no image", "Word")
        writer.add(images[5])
    with LmdbWriter(folder / "own" / "set") as writer:
        for image, text in zip(images[:2], readings, strict=False):
            writer.add(image, text)
    return folder


@pytest.fixture()
def run(export: Path, data: Path, tmp_path: Path) -> Evaluate:
    def evaluated(*arguments: str) -> dict[str, Any]:
        words = ["--weights", str(export), "--data", str(data), "--out", str(tmp_path / "out"), *arguments]
        assert evaluate.main(words) == 0
        return json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf8"))

    return evaluated


@pytest.mark.parametrize(("rule", "correct"), [("lower_alnum", 3), ("case", 2), ("all", 1)])
def test_the_rule_says_which_words_are_right(run: Evaluate, rule: str, correct: int) -> None:
    found = run("--rule", rule)
    svt, own = found["sets"]
    assert (svt["name"], svt["words"], svt["correct"]) == ("SVT", 5, correct)
    assert (svt["unreadable"], svt["unlabelled"]) == (1, 1)
    assert (own["name"], own["accuracy"], own["similarity"]) == ("own/set", 1.0, 1.0)
    assert found["rule"] == rule


def test_averages_are_over_sets_and_over_words(run: Evaluate) -> None:
    (average,) = run()["averages"]
    assert (average["name"], average["words"]) == ("all", 7)
    assert average["accuracy"] == pytest.approx((3 / 5 + 1) / 2)
    assert average["accuracy_by_words"] == pytest.approx(5 / 7)


def test_the_table_says_what_makes_figures_comparable(run: Evaluate, tmp_path: Path, capsys: Any) -> None:
    found = run("--sets", "SVT")
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf8")
    assert table in capsys.readouterr().out
    assert f"| SVT | 5 | 647 | 60.00% | {found['sets'][0]['similarity']:.4f} | 1 | 1 |" in table
    assert found["sets"][0]["hash"][:12] in table
    assert found["weights_sha256"][:12] in table
    assert "charset: 62, 62 characters" in table
    assert "rule `lower_alnum`: the official rule" in table
    assert "SVT has 5 words here, not 647 as published" in table
    assert "own/set" not in table


def test_the_page_shows_the_worst_errors_first_and_runs_nothing(run: Evaluate, tmp_path: Path) -> None:
    run("--rule", "all")
    page = (tmp_path / "out" / "errors.html").read_text(encoding="utf8")
    assert "<script" not in page
    assert "http" not in page
    assert "&lt;script&gt;alert(&#x27;é&#x27;)&lt;/script&gt;" in page
    assert page.count("<li>") == 4
    assert page.count("data:image/png;base64,") == 3, "the unreadable one has no picture"
    assert "Confused most often in these: " in page
    places = [page.index(f"record {number}") for number in (5, 4, 3)]
    assert places == sorted(places), "by similarity: nothing, another word, two characters too few"


def test_the_page_says_what_is_confused_most() -> None:
    def wrong(label: str, text: str) -> Mistake:
        return Mistake(0.1, 0.9, -1, label, text, False)

    found = [wrong("b00k", "book"), wrong("T0P", "toq"), wrong("ab", "a"), wrong("x", "")]
    assert confusions(found) == "o for 0 (3), q for P (1)"
    assert confusions(found[2:]) == ""


def test_the_page_holds_as_many_errors_as_asked_for(run: Evaluate, tmp_path: Path) -> None:
    run("--errors", "1", "--rule", "all")
    page = (tmp_path / "out" / "errors.html").read_text(encoding="utf8")
    assert "The worst 1 of 4 wrong words of 5" in page
    assert page.count("<li>") == 1
    run("--errors", "0")
    assert "<li>" not in (tmp_path / "out" / "errors.html").read_text(encoding="utf8")


def test_the_batch_does_not_matter(run: Evaluate) -> None:
    small, large = run("--batch_size", "1"), run("--batch_size", "5")
    assert [one["correct"] for one in small["sets"]] == [one["correct"] for one in large["sets"]]
    assert [one["hash"] for one in small["sets"]] == [one["hash"] for one in large["sets"]]


def test_a_hash_is_of_the_words_and_not_of_the_file(images: list[bytes], tmp_path: Path) -> None:
    def hashed(name: str, labels: list[str | None], extra: bytes | None = None) -> str:
        with LmdbWriter(tmp_path / name) as writer:
            for image, label in zip(images, labels, strict=False):
                writer.add(image, label, extra)
        found = BenchmarkWords(tmp_path / name)
        assert len(list(found)) == sum(label is not None for label in labels)
        return found.hash

    first = hashed("first", ["a", "b", None])
    assert hashed("with masks", ["a", "b", None], b"mask") == first
    assert hashed("another label", ["a", "c", None]) != first
    assert hashed("shifted", ["a", None, "b"]) != first
    assert hashed("an empty label", ["a", "b", ""]) != first


def test_sets_are_found_by_their_names(images: list[bytes], tmp_path: Path) -> None:
    for name in ("benchmark/WOST", "benchmark/iiit5k_3000", "benchmark/Zoo", "benchmark/IC15_1811"):
        with LmdbWriter(tmp_path / name) as writer:
            writer.add(images[0], "a")
    names = [one.name for one in find_sets(tmp_path)]
    assert names == ["IIIT5k_3000", "IC15_1811", "WOST", "benchmark/Zoo"]
    assert [one.name for one in find_sets(tmp_path, ["WOST", "IC15_1811"])] == ["IC15_1811", "WOST"]
    assert [one.name for one in find_sets(tmp_path / "benchmark" / "Zoo")] == ["Zoo"]
    assert [one.name for one in find_sets(tmp_path / "benchmark" / "WOST")] == ["WOST"]


def test_two_sets_of_one_name_are_refused(images: list[bytes], tmp_path: Path) -> None:
    for name in ("one/SVT", "two/SVT"):
        with LmdbWriter(tmp_path / name) as writer:
            writer.add(images[0], "a")
    with pytest.raises(UserError, match="are both SVT"):
        find_sets(tmp_path)


def test_sizes_are_compared_with_the_published_ones() -> None:
    assert other_size("IC15_1811", 1811) is None
    assert other_size("COCOText", 9825) is None
    assert other_size("of my own", 3) is None
    assert "9,896 or 9,825" in (other_size("COCOText", 7026) or "")


def test_averages_over_the_usual_groups() -> None:
    results = [
        Result(name, size[0], size[0] // 2, 0.5, 0, 0, 0, 0, "")
        for name, size in PUBLISHED.items()
        if name in GROUPS["eleven"]
    ]
    results[0] = Result("IIIT5k_3000", 3000, 3000, 1.0, 0, 0, 0, 0, "")
    by_name = {average.name: average for average in evaluation.averages(results)}
    assert list(by_name) == ["regular", "irregular", "six", "occluded", "eleven", "all"]
    eleven = by_name["eleven"]
    assert eleven.words == 3000 + 647 + 1015 + 1811 + 645 + 288 + 9896 + 1572 + 2201 + 2416 + 2416
    assert eleven.accuracy == pytest.approx((1 + 10 * 0.5) / 11, abs=1e-3)
    assert eleven.similarity_by_words == pytest.approx(0.5 + 0.5 * 3000 / eleven.words)


def test_the_weighted_average_is_the_published_one() -> None:
    """With these sizes and the figures of the CCD paper (ViT-Small, ARD) for each set, its averages come out."""
    order = ("IIIT5k_3000", "SVT", "IC13_1015", "IC15_1811", "SVTP", "CUTE80", "COCOText", "CTW", "TotalText", "HOST")
    rows = {
        84.9: (98.0, 96.4, 98.3, 90.3, 92.7, 98.3, 76.7, 86.5, 91.3, 77.3, 86.0),
        78.2: (95.9, 94.1, 96.6, 87.1, 89.9, 94.1, 69.2, 81.6, 84.3, 63.4, 76.2),
        63.7: (89.3, 86.5, 88.8, 76.5, 80.1, 74.7, 54.9, 65.5, 67.8, 38.4, 55.9),
    }
    for published, row in rows.items():
        results = [
            Result(name, PUBLISHED[name][0], round(PUBLISHED[name][0] * accuracy / 100), 0.0, 0, 0, 0, 0, "")
            for name, accuracy in zip((*order, "WOST"), row, strict=True)
        ]
        (eleven,) = [average for average in evaluation.averages(results) if average.name == "eleven"]
        assert 100 * eleven.accuracy_by_words == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("street", "Street", {"lower_alnum"}),
        ("Street", "Street!", {"lower_alnum", "case"}),
        ("a b", "ab", {"lower_alnum", "case"}),
        ("中文", "中文。", {"lower_alnum", "case"}),
        ("caf\ufffd", "caf", set()),
        ("caf\ufffd", "caf\ufffd", set()),
        ("caf", "café", {"lower_alnum", "case"}),
        ("x", "x", {"lower_alnum", "case", "all"}),
    ],
)
def test_rules(text: str, label: str, right: set[str]) -> None:
    assert {name for name, rule in OFFICIAL.items() if same(text, label, rule)} == right


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("나바", "나바차", set()),
        ("나바차", "나바차!", {"lower_alnum", "case"}),
        ("ΟΔΟΣ", "οδός".replace("ό", "ο"), {"lower_alnum"}),
        ("हिन्दी", "हनद", set()),
        ("istanbul", "İstanbul", {"lower_alnum"}),
        ("cafe\u0301", "café", {"lower_alnum", "case", "all"}),
        ("٣", "٤", set()),
        ("", "", {"lower_alnum", "case", "all"}),
        ("나\ufffd", "나\ufffd", set()),
    ],
)
def test_rules_for_a_charset_with_other_letters(text: str, label: str, right: set[str]) -> None:
    """The official rules would leave nothing of most of these, and call everything right."""
    rules = rules_for("abc나바차")
    assert {name for name, rule in rules.items() if same(text, label, rule)} == right


@pytest.mark.parametrize("characters", [*NAMED.values(), "abc中文", "abc-,.!€²"])
def test_the_official_rules_stay_where_they_know_every_letter(characters: str) -> None:
    assert rules_for(characters) is OFFICIAL


def test_a_set_of_which_the_rule_leaves_nothing_is_not_scored(
    run: Evaluate, export: Path, images: list[bytes], tmp_path: Path
) -> None:
    with LmdbWriter(tmp_path / "korean") as writer:
        for label in ("나바", "차", "abc"):
            writer.add(images[0], label)
    found = run("--data", str(tmp_path / "korean"))
    assert (found["sets"][0]["accuracy"], found["averages"]) == (None, [])
    (warning,) = [line for line in found["warnings"] if "leaves nothing" in line]
    assert warning.endswith(
        "2 labels of which rule lower_alnum leaves nothing, of 3: not scored; compare every character with --rule all"
    )
    assert "| korean | 3 | – | – | – |" in (tmp_path / "out" / "table.md").read_text(encoding="utf8")
    assert run("--data", str(tmp_path / "korean"), "--rule", "all")["sets"][0]["accuracy"] == 0


def test_capitals_are_written_though_the_rule_is_of_small_letters(
    images: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "capitals.txt").write_text("İSTANBUL", encoding="utf8")
    words.write(tmp_path / "small", words.small(str(tmp_path / "capitals.txt")))
    with LmdbWriter(tmp_path / "set") as writer:
        writer.add(images[0], "İS")
    assert (
        evaluate.main(
            [*("--weights", str(tmp_path / "small"), "--data", str(tmp_path / "set")), "--out", str(tmp_path)]
        )
        == 0
    )
    assert "cannot write" not in capsys.readouterr().out


def test_blanks_at_the_ends_of_labels_do_not_count(
    run: Evaluate, images: list[bytes], readings: list[str], tmp_path: Path
) -> None:
    for name, end in (("without", ""), ("with", "\n")):
        with LmdbWriter(tmp_path / name / "set") as writer:
            writer.add(images[0], readings[0] + end)
    clean, found = (run("--rule", "all", "--data", str(tmp_path / name)) for name in ("without", "with"))
    assert (
        found["sets"][0]["accuracy"] == 1
        and "set: 1 labels had blanks at their ends, which do not count" in found["warnings"]
    )
    assert found["sets"][0]["hash"] != clean["sets"][0]["hash"], "of what is stored"


def test_similarity_is_one_less_the_normalised_edit_distance() -> None:
    assert similarity("kitten", "sitting", OFFICIAL["all"]) == pytest.approx(1 - 3 / 7)
    assert similarity("Kit-ten", "kitten", OFFICIAL["lower_alnum"]) == 1
    assert similarity("", "!", OFFICIAL["case"]) == 1, "nothing is compared with nothing"
    assert similarity("b", "abc", OFFICIAL["all"]) == pytest.approx(1 / 3)


def test_labels_of_which_nothing_is_left_are_said(
    run: Evaluate, export: Path, images: list[bytes], tmp_path: Path
) -> None:
    with LmdbWriter(tmp_path / "odd") as writer:
        writer.add(images[0], "!!!")
    words = ["--weights", str(export), "--data", str(tmp_path / "odd"), "--out", str(tmp_path / "out")]
    assert evaluate.main(words) == 0
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf8")
    assert "odd: 1 labels of which rule lower_alnum leaves nothing" in table


def test_labels_beyond_charset_and_length_are_said(
    images: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words.write(tmp_path / "small", words.small("36"))
    with LmdbWriter(tmp_path / "set") as writer:
        for label in ("ab", "Ab", "a-b", "abcde", "é"):
            writer.add(images[0], label)
    options = ["--weights", str(tmp_path / "small"), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    for rule, beyond in {"lower_alnum": 1, "case": 2, "all": 4}.items():
        assert evaluate.main([*options, "--rule", rule]) == 0
        assert f"set: {beyond} labels hold what this recogniser cannot write" in capsys.readouterr().out


def test_a_set_without_labels_is_refused(export: Path, images: list[bytes], tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "SVT") as writer:
        writer.add(images[0])
    with pytest.raises(UserError, match=r"SVT: no labels .* leave it out by --sets"):
        evaluate.main(["--weights", str(export), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label-000000001": None}, "Zoo: no labels"),
        ({"label-000000001": b"\xff"}, "Zoo: label-000000001 is not UTF-8"),
        ({"num-samples": b"3"}, "Zoo: num-samples says '3' but the last image is number 1"),
    ],
)
def test_every_set_is_looked_at_before_any_is_read(
    images: list[bytes], tmp_path: Path, changes: dict[str, bytes | None], message: str
) -> None:
    """There are no weights, which come before the first image."""
    for name in ("SVT", "Zoo"):
        with LmdbWriter(tmp_path / name) as writer:
            writer.add(images[0], "a")
    crops.change(tmp_path / "Zoo", changes)
    with pytest.raises(UserError, match=message):
        evaluate.main(["--weights", str(tmp_path), "--data", str(tmp_path)])


def test_the_place_is_looked_at_before_any_set_is_read(
    export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        evaluate.main(["--weights", str(export), "--data", str(data), "--out", str(tmp_path / "file")])


def lose_image(path: Path) -> None:
    """Damages the first of large images: the number of the page where it lies, which follows its key, leads nowhere."""
    key, file = b"image-000000001", path / "data.mdb"
    before, _, after = file.read_bytes().rpartition(key)
    file.write_bytes(before + key + b"\xff" * 6 + after[6:])


def test_what_was_read_before_the_damage_is_printed_and_kept(
    export: Path, images: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SVT", "Zoo"):
        with LmdbWriter(tmp_path / "data" / name) as writer:
            for image in images[:2]:
                writer.add(image.ljust(10_000, b"\0"), "a")
    lose_image(tmp_path / "data" / "Zoo")
    options = ["--weights", str(export), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"Zoo: damaged at image-000000001 .* copy the LMDB again"):
        evaluate.main(options)
    assert "| SVT | 2 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf8"))
    assert [one["name"] for one in found["sets"]] == ["SVT"]
    assert "without Zoo: ended by a damaged set" in found["warnings"]
    assert "warning: without Zoo" in (tmp_path / "out" / "table.md").read_text(encoding="utf8")
    assert (tmp_path / "out" / "errors.html").is_file()
    with pytest.raises(UserError, match="Zoo: damaged at"):
        evaluate.main([*options[:-1], str(tmp_path / "none"), "--sets", "Zoo"])
    assert list((tmp_path / "none").iterdir()) == [], "nothing came out"


def test_words_that_count_twice_are_said() -> None:
    def warned(*names: str) -> list[str]:
        results = [Result(name, PUBLISHED[name][0], 1, 0.5, 0, 0, 0, 0, "") for name in names]
        return evaluation.warnings(results, "all")

    (both,) = warned("IC13_857", "IC13_1015", "IC15_1811")
    assert both.startswith("average all counts the words of IC13_857 twice, which are among those of IC13_1015;")
    assert "IC15_1811 twice" in warned("IC13_857", "IC15_1811", "IC15_2077")[0]
    assert warned("IC13_857", "IC15_2077") == []


def test_what_was_read_is_printed_even_if_it_cannot_be_kept(
    export: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "table.md" / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        evaluate.main(["--weights", str(export), "--data", str(data), "--out", str(tmp_path / "out")])
    assert "| SVT | 5 |" in capsys.readouterr().out


def test_weights_that_are_replaced_while_they_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def racing(source: RecognizerSource) -> Trained:
        trained = open_recognizer(source)
        words.write(tmp_path, words.small(seed=4))
        return trained

    words.write(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="was replaced while it was read"):
        patch.setattr(evaluation, "open_recognizer", racing)
        evaluation.open_known(EvaluateOptions(weights=tmp_path))
    _, _, sha256 = evaluation.open_known(EvaluateOptions(weights=tmp_path))
    assert sha256 == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()


def test_table_and_record_bear_the_hash_of_what_was_read() -> None:
    """Whatever lies at the weights' place by then."""
    trained, results = words.small(), [Result("SVT", 2, 1, 0.5, 0, 0, 0, 0, "")]
    assert "memory (sha256 0123456789ab)" in evaluation.table(trained, "0123456789abcdef", "case", results)
    assert evaluation.record(trained, "0123456789abcdef", "case", results)["weights_sha256"] == "0123456789abcdef"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets", "SVT", "Nowhere"], "no set Nowhere; there are SVT, own/set"),
        (["--data", "missing"], "missing: no such folder"),
        (["--data", "."], "no LMDB here or below"),
        (["--batch_size", "0"], "batch_size = 0"),
        (["--rule", "none"], "rule"),
        (["--out", "file"], "cannot be written"),
        (["--weights", "."], "no recogniser here"),
    ],
)
def test_what_cannot_be_done_is_refused(
    export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message) as refusal:
        evaluate.main(["--weights", str(export), "--data", str(data), *arguments])
    assert "\n" not in str(refusal.value)


def test_without_a_place_it_goes_into_the_run_folder(data: Path, tmp_path: Path) -> None:
    words.write(tmp_path / "run" / "export")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert evaluate.main(["--weights", str(tmp_path / "run"), "--data", str(data)]) == 0
    assert {path.name for path in (tmp_path / "run" / "evaluation").iterdir()} == {
        "table.md",
        "table.json",
        "errors.html",
    }


def test_eleven_are_the_six_and_more() -> None:
    assert benchmarks.GROUPS["eleven"][:6] == GROUPS["six"]
