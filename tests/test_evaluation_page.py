"""Every command and every program of docs/evaluation.md, on the miniature that the page describes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import words

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
    first, second, third = blocks("python")
    exec(first, {})
    assert capsys.readouterr().out.strip() == text
    made = {"images": torch.randn(2, 3, 32, 128)}
    exec(second, made)
    assert made["tokens"].shape == (2, 256, words.MODEL.width)  # type: ignore[attr-defined]
    if importlib.util.find_spec("timm") is not None:
        by_timm = dict(made)
        exec(third, by_timm)
        assert torch.allclose(by_timm["tokens"], made["tokens"], atol=1e-6)  # type: ignore[arg-type,call-overload]
