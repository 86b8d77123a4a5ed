"""Recognisers in files: exports and official checkpoints come back as they were; everything else is refused by name."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from ccd_train.commands import export
from ccd_train.config import pretraining as config
from ccd_train.config import recognition as finetuning
from ccd_train.config.recognition import FineTuning
from ccd_train.data.charset import Charset, read_charset
from ccd_train.errors import UserError
from ccd_train.models.recognizer import Recognizer
from ccd_train.tasks.recognize.start import start_from
from ccd_train.weights import backbone as weights
from ccd_train.weights import recognizer as recognizers
from ccd_train.weights.recognizer import Trained

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = GOLDEN / "recognizer_official_layout.pth"
META: dict[str, Any] = json.loads((GOLDEN / "recognizer_meta.json").read_text(encoding="utf8"))
HEADS = {"heads": META["num_heads"], "decoder_heads": META["n_head"]}
SIZES = finetuning.ReadingHead(layers=1, width=16, heads=2, hidden=8, encoder_hidden=8)
MODEL = config.Model(width=16, depth=6, heads=2)


@pytest.fixture()
def trained() -> Trained:
    torch.manual_seed(1)
    charset = read_charset("36")
    network = Recognizer(MODEL, SIZES, charset.classes)
    return Trained(MODEL, SIZES, charset, network.state_dict(), {"step": 7}, "memory")


@pytest.fixture()
def folder(trained: Trained, tmp_path: Path) -> Path:
    recognizers.write(tmp_path / "run" / "export" / recognizers.FILE, trained)
    return tmp_path / "run"


def official() -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(OFFICIAL, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("place", ["", "export", f"export/{recognizers.FILE}"])
def test_an_export_comes_back_as_it_was(folder: Path, trained: Trained, place: str) -> None:
    found = recognizers.read(folder / place)
    assert (found.model, found.sizes, found.charset, found.about) == (MODEL, SIZES, trained.charset, {"step": 7})
    assert found.state.keys() == trained.state.keys()
    assert all(torch.equal(tensor, trained.state[name]) for name, tensor in found.state.items())
    assert not found.network().training


def test_a_fine_tuning_begins_with_an_export_of_any_name(folder: Path, trained: Trained, tmp_path: Path) -> None:
    path = (folder / "export" / recognizers.FILE).rename(tmp_path / "reader.safetensors")
    network = Recognizer(MODEL, SIZES, trained.charset.classes)
    start_from(FineTuning(init=path, model=MODEL, recognizer=SIZES), trained.charset, network)
    assert all(torch.equal(tensor, trained.state[name]) for name, tensor in network.state_dict().items())


def test_the_charset_of_an_export_is_its_own(folder: Path) -> None:
    assert recognizers.read(folder, read_charset("36")).charset.name == "36"
    with pytest.raises(UserError, match=r"reads charset 36 \(36 characters\), not charset DICT90 \(90 characters\)"):
        recognizers.read(folder, read_charset("DICT90"))


def test_weights_of_another_width_are_named(folder: Path, trained: Trained) -> None:
    wider = Trained(config.Model(width=32, depth=6, heads=2), SIZES, trained.charset, trained.state, {}, "memory")
    recognizers.write(folder / "export" / recognizers.FILE, wider)
    with pytest.raises(UserError, match=r"16 instead of .*32.*; and \d+ more$") as refusal:
        recognizers.read(folder)
    assert "\n" not in str(refusal.value)


def test_an_official_checkpoint_tells_its_charset_by_its_classes() -> None:
    found = recognizers.read(OFFICIAL, **HEADS)
    assert found.charset.characters == "".join(META["charset"][:-3])
    assert recognizers.read(OFFICIAL, found.charset, **HEADS).charset == found.charset


@pytest.mark.parametrize("name", ["36", "62"])
def test_an_official_checkpoint_refuses_another_charset(name: str) -> None:
    with pytest.raises(UserError, match=f"92 classes, but charset {name} "):
        recognizers.read(OFFICIAL, read_charset(name), **HEADS)


def test_heads_that_shapes_do_not_tell_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"backbone has width 32; .* --heads N"):
        recognizers.read(OFFICIAL)
    with pytest.raises(UserError, match=r"--heads 5 does not divide its backbone's width 32; give a divisor"):
        recognizers.read(OFFICIAL, heads=5)
    with pytest.raises(UserError, match=r"--decoder_heads 5 does not divide its decoder's width"):
        recognizers.read(OFFICIAL, heads=HEADS["heads"], decoder_heads=5)


def test_what_does_not_fit_an_official_recognizer_is_named(tmp_path: Path) -> None:
    checkpoint = official()
    net = checkpoint["net"]
    net["module.decoder.classifier.bias"] = net["module.decoder.classifier.bias"][1:]
    net["module.extra"] = net.pop("module.encoder.fc2.bias")
    torch.save(checkpoint, tmp_path / "odd.pth")
    with pytest.raises(UserError) as refusal:
        recognizers.read(tmp_path / "odd.pth", **HEADS)
    message = str(refusal.value)
    assert "3 tensors do not fit" in message
    assert "encoder.fc2.bias is missing" in message
    assert "extra has no place" in message
    assert "decoder.classifier.bias is 91 instead of 92" in message


def test_classes_of_no_named_charset_need_a_file(tmp_path: Path) -> None:
    checkpoint = official()
    for name in ("classifier.weight", "classifier.bias", "trg_word_emb.weight"):
        checkpoint["net"][f"module.decoder.{name}"] = checkpoint["net"][f"module.decoder.{name}"][2:]
    path = tmp_path / "ninety.pth"
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="90 classes, like none of 36, 62, DICT90; name it: --charset FILE"):
        recognizers.read(path, **HEADS)
    characters = "".join(META["charset"][:88])
    assert recognizers.read(path, Charset(characters), **HEADS).charset.characters == characters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": {}, "teacher": {}}, "no 'net' of tensors in it .it holds student, teacher."),
        ({"net": {"a": 1}}, "no 'net' of tensors"),
        ({"net": {3: torch.zeros(1)}}, "no 'net' of tensors"),
        ({"net": {}}, "backbone.pos_embed is missing"),
        ({"net": Path("x")}, "could run code"),
    ],
)
def test_checkpoints_that_are_no_recognizer_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        recognizers.read(tmp_path / "other.pth")


def test_a_pretraining_is_not_a_recognizer(tmp_path: Path) -> None:
    weights.write_export(tmp_path, weights.read(GOLDEN / "official_layout.pth", META["num_heads"]), {})
    with pytest.raises(UserError, match=r"no recogniser here .*; of a pretraining make one with ccd-train finetune"):
        recognizers.read(tmp_path)
    with pytest.raises(UserError, match=r"no recogniser .its format is 'pt'.; .* ccd-train finetune"):
        recognizers.read(tmp_path / "teacher.safetensors")


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recogniser here"):
        recognizers.read(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        recognizers.read(tmp_path / "missing")


def test_a_damaged_export_is_refused(folder: Path) -> None:
    path = folder / "export" / recognizers.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        recognizers.read(path)


def test_a_damaged_file_is_not_taken_for_something_else(folder: Path, trained: Trained, tmp_path: Path) -> None:
    path = folder / "export" / recognizers.FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"recognizer\.safetensors: cannot be read .* copy it again"):
        start_from(FineTuning(init=path), trained.charset, trained.network())
    with pytest.raises(UserError, match="cannot be read"):
        export.main(["--weights", str(path), "--out", str(tmp_path / "out")])
    assert not recognizers.is_recognizer(tmp_path / "missing.safetensors")


def test_an_export_without_its_description_is_refused(folder: Path) -> None:
    path = folder / "export" / recognizers.FILE
    save_file(load_file(path), path, metadata={"format": recognizers.FORMAT, "model": "{"})
    with pytest.raises(UserError, match="its description is damaged"):
        recognizers.read(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("charset", None),
        ("charset", ["x", 3]),
        ("charset", ["x"]),
        ("charset", [None, "abc"]),
        ("charset", ["x", ""]),
        ("charset", ["x", "abca"]),
        ("about", []),
        ("model", None),
        ("recognizer", 3),
    ],
)
def test_an_export_whose_description_makes_no_sense_is_refused(folder: Path, name: str, value: Any) -> None:
    path = folder / "export" / recognizers.FILE
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | {name: json.dumps(value)})
    with pytest.raises(UserError, match=name) as refusal:
        recognizers.read(path)
    assert "\n" not in str(refusal.value)


def test_an_export_that_cannot_be_written_is_refused(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        recognizers.write(tmp_path / "file" / recognizers.FILE, trained)


def test_the_same_recogniser_gives_the_same_bytes(tmp_path: Path) -> None:
    """safetensors writes its metadata in the order of a hash map, which differs from run to run."""
    trained = recognizers.read(GOLDEN / "recognizer_official_layout.pth", None, 2, 4)
    contents = set()
    for number in range(8):  # the chance that five names come in one order eight times is 120⁻⁷
        recognizers.write(tmp_path / f"{number}.safetensors", trained)
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1
    back = recognizers.read(tmp_path / "0.safetensors")
    assert all(torch.equal(back.state[name], value) for name, value in trained.state.items())


def test_what_fits_is_kept_for_other_letters_and_longer_words(
    folder: Path, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    """No tensor depends on the length; of another charset only the letters' own tensors begin anew."""
    path, charset = folder / "export", read_charset("62")
    network = Recognizer(MODEL, replace(SIZES, length=60), charset.classes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config_ = FineTuning(init=path, model=MODEL, recognizer=replace(SIZES, length=60))
    with caplog.at_level(logging.WARNING):
        start_from(config_, charset, network)
    fresh = ("decoder.embedding.", "decoder.classifier.")
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(fresh) else trained.state[name]), name
    assert "begin at random, the rest is kept" in caplog.text
