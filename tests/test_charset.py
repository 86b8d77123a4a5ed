"""Charsets by name and out of files, labels to tokens and back, and what is counted of labels that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccd_train.data.charset import LENGTH, NAMED, UNKNOWN, Charset, read_charset
from ccd_train.errors import UserError

DICT90 = read_charset("DICT90")


def test_the_named_charsets_are_the_official_ones() -> None:
    assert {name: len(set(characters)) for name, characters in NAMED.items()} == {"36": 36, "62": 62, "DICT90": 90}
    assert (DICT90.classes, DICT90.unknown, DICT90.end, DICT90.padding) == (92, 90, 91, 92)
    assert NAMED["36"] == "abcdefghijklmnopqrstuvwxyz1234567890"
    assert NAMED["62"] == "abcdefghijklmnopqrstuvwxyz1234567890ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert set(map(chr, range(33, 127))) - set(NAMED["DICT90"]) == set("^{|}")


def test_a_target_begins_ends_and_is_filled_up() -> None:
    assert DICT90.encode("aB", 6) == [91, 10, 37, 91, 92, 92]
    assert DICT90.encode("", 3) == [91, 91, 92]
    assert DICT90.encode("é", 3) == [91, 90, 91]
    assert DICT90.encode("abcd", 4) == [91, 10, 11, 12], "a label that is cut has no end"


@given(st.text(NAMED["DICT90"], max_size=LENGTH - 2))
def test_what_is_encoded_is_decoded(label: str) -> None:
    target = DICT90.encode(label)
    assert len(target) == LENGTH
    assert DICT90.decode(target[1:]) == label


def test_decoding_stops_at_the_end_and_shows_what_is_unknown() -> None:
    assert DICT90.decode([10, 90, 92, 11, 91, 12]) == f"a{UNKNOWN}b"
    assert DICT90.decode([91]) == ""


def test_a_charset_without_capitals_reads_in_lower_case() -> None:
    small, large = read_charset("36"), read_charset("62")
    assert small.encode("Ab1") == small.encode("ab1")
    assert large.encode("Ab1") != large.encode("ab1")
    assert small.tally(["Ab"]).unknown == 0


def test_labels_that_do_not_fit_are_counted() -> None:
    tally = DICT90.tally(["fine", "", "a" * 23, "a" * 24, "a b", "été"])
    assert (tally.labels, tally.empty, tally.cut, tally.unknown) == (6, 1, 1, 2)
    assert tally.characters == {" ": 1, "é": 2}
    assert tally.describe() == "6 labels: 1 empty, 1 too long (16.7%), 2 with unknown characters ('é'×2 ' '×1)"


def test_a_blank_line_inside_a_dictionary_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "dictionary.txt"
    path.write_text("a\nb\n\n1\n\n\n")
    assert read_charset(str(path)).characters == "ab1"
    assert caplog.messages == [f"{path}: line 3 is blank and no character (PaddleOCR counts it as one)"]
    caplog.clear()
    path.write_text("a\r\nb\r\n1\r\n\r\n")
    assert read_charset(str(path)).characters == "ab1" and not caplog.messages


@pytest.mark.parametrize("text", ["0\ta\n1\tb\n2\t1\n", "a\nb\n1", "\ufeffa\r\nb\r\n\r\n1\r\n", "ab1", "ab1\r\n"])
def test_a_file_is_read_in_any_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "charset.txt"
    path.write_bytes(text.encode())
    assert read_charset(str(path)) == Charset("ab1", "charset.txt")


def test_any_script_and_the_space_have_a_place(tmp_path: Path) -> None:
    path = tmp_path / "charset.txt"
    path.write_text(" \nআ\n中\n", encoding="utf8")
    assert read_charset(str(path)).characters == " আ中"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no characters"),
        (b"ab\nc\n", "line 1 is 'ab'"),
        (b"a\nb\na\n", "'a' more than once"),
        (b"aba\n", "'a' more than once"),
        (b"1\tab\n", "line 1 is .* or all characters on a single line"),
        (b"1\ta\n2\tb\n", "must count 0, 1, 2"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_are_no_charset_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "charset.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        read_charset(str(path))
    assert "\n" not in str(refusal.value)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"charset 37: .*36, 62, DICT90"):
        read_charset("37")


def test_an_accent_may_be_stored_as_one_code_point_or_as_two() -> None:
    composed, marks = Charset("caf\u00e9"), Charset("cafe\u0301")
    for label in ("caf\u00e9", "cafe\u0301"):
        assert composed.decode(composed.encode(label)[1:]) == "caf\u00e9"
        assert marks.decode(marks.encode(label)[1:]) == "cafe\u0301"
        assert not composed.tally([label]).unknown
    assert read_charset("DICT90").tally(["cafe\u0301"]).characters == {"\u0301": 1}, "as it is, where neither is known"
