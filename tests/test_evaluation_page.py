"""Every command and every program of docs/evaluation.md, on the miniature that the page describes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import words

from ccd_train.commands import read
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.models.ccd import Student, Teacher
from ccd_train.weights.backbone import Weights, read_backbone, write_export
from data_tools.words import render

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
PACKAGES = {"ccd-train": "ccd_train.commands", "ccd-data": "data_tools"}
NEEDS = ("onnx", "onnxscript", "onnxruntime")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDS), reason="without the extra 'onnx'")
def test_what_the_page_says_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words.write(tmp_path / "runs" / "recognizer" / "export")
    (tmp_path / "runs" / "recognizer" / "checkpoints").mkdir()
    (tmp_path / "photos").mkdir()
    for place in ("word.png", "photos/word.png"):
        (tmp_path / place).write_bytes(render(1, 0, ()).image)
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 8
    for program, verb, *options in commands:
        assert importlib.import_module(f"{PACKAGES[program]}.{verb}").main(options) == 0, (verb, options)
    printed = capsys.readouterr().out
    (text,) = {line.split("\t")[1] for line in printed.splitlines() if line.startswith("word.png\t")}
    _, _, by_onnx, by_timm = blocks("python")
    exec(by_onnx, {})
    assert capsys.readouterr().out.strip() == text
    if importlib.util.find_spec("timm") is not None:
        made: dict[str, Any] = {"images": torch.randn(2, 3, 32, 128)}
        exec(by_timm, made)
        ours, _ = read_backbone("vit.safetensors").network()(made["images"])
        assert torch.allclose(made["tokens"], ours, atol=1e-6)


def test_the_page_reads_words_and_features_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words.write(tmp_path / "runs/recognizer")
    model = read_recipe("vit_nano", Config).model
    states = [network(model).state_dict() for network in (Teacher, Student)]
    write_export(tmp_path / "runs/first", Weights(model, states[0], states[1], "here"), {})
    (tmp_path / "word.png").write_bytes(render(1, 0, ()).image)
    by_words, by_features, *_ = blocks("python")
    exec(by_words, {})
    text, confidence = capsys.readouterr().out.split()
    assert read.main(["--weights", "runs/recognizer", "word.png"]) == 0
    assert capsys.readouterr().out == f"word.png\t{text}\t{float(confidence):.3f}\n"
    made: dict[str, Any] = {}
    exec(by_features, made)
    assert made["tokens"].shape == (1, 256, model.width) and not made["tokens"].requires_grad
