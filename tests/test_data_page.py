"""Every command of docs/data.md, typed on a miniature of the tree that the page describes."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ccd_train.config import Config
from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.data.shards import read_manifest
from ccd_train.data.synthetic import Word, render
from ccd_train.options import parse

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
LEAVES = [
    *(f"data_lmdb/training/label/synth/MJ/MJ_{part}" for part in ("train", "valid", "test")),
    "data_lmdb/training/label/synth/ST",
    "data_lmdb/training/URD/OCR-CC",
    *(
        f"data_lmdb/training/ARD/Openimages/{part}"
        for part in ("train_1", "train_2", "train_5", "train_f", "validation")
    ),
    "data_lmdb/training/ARD/TextOCR",
    "data_lmdb/evaluation/benchmark/SVT",
    *(f"Union14M-U/{part}_lmdb" for part in ("book32", "cc", "openvino")),
    *(f"Union14M-L-LMDB-Filtered/train_{part}" for part in ("easy", "hard")),
]
SLICES = 8


def commands() -> list[list[str]]:
    """The page's commands in order, each as its words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lexer_lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lexer_lines if line.strip()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's folders, with a few words in each LMDB; the first of OCR-CC is also in the benchmark."""
    root = tmp_path_factory.mktemp("tree")
    words: Iterator[Word] = (render(3, index, ()) for index in range(10_000))
    leaked = next(words)
    for leaf in LEAVES:
        with LmdbWriter(root / leaf) as writer:
            for word in (leaked if "OCR-CC" in leaf or "benchmark" in leaf else next(words), next(words), next(words)):
                writer.add(word.image, None if "URD" in leaf else word.label)
    with LmdbReader(root / "data_lmdb/training/URD/OCR-CC") as images:
        folder = root / "data_lmdb/Mask/URD/OCR-CC"
        with LmdbWriter(folder) as writer:
            for number in range(1, 4):
                writer.add(images.image(number) or b"", mask=leaked.mask)
    return root


def test_every_command_of_the_page_works(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    typed = commands()
    assert len(typed) > 20
    for words in typed:
        if words[0] == "ccd-data":
            run_tool(words[1:])
        elif words[0] == "sbatch":
            slices = shlex.split(words[words.index("--wrap") + 1])
            for number in range(SLICES):
                run_tool([word.replace("$SLURM_ARRAY_TASK_ID", str(number)) for word in slices[1:]])
        else:
            assert words[:2] == ["ccd-train", "pretrain"], words
            settings = parse(Config, words[2:], "ccd-train pretrain")
            settings.check()
            assert all(folder.is_dir() for folder in settings.data.shards)
            assert settings.data.exclude is None or settings.data.exclude.is_file()
    assert read_manifest(tree / "shards/mj").samples == 9 and read_manifest(tree / "shards/openimages").samples == 15
    assert len((tree / "overlap/exclude.jsonl").read_text().splitlines()) == 1


def run_tool(words: list[str]) -> None:
    """A ccd-data command in this process, made small."""
    verb, arguments = words[0], words[1:]
    if verb == "synth":
        arguments[arguments.index("--num-samples") + 1] = "8"
    if verb == "convert" and "--slice" in arguments:
        arguments += ["--samples-per-shard", "1"]
        out = Path(arguments[arguments.index("--out") + 1])
        arguments[arguments.index("--out") + 1] = f"{out}_sliced"
    if verb == "merge":
        arguments = [f"{arguments[0]}_sliced"]
    if verb in ("synth", "convert", "overlap"):
        arguments += ["--workers", "1"]
    assert importlib.import_module(f"data_tools.{verb}").main(arguments) == 0, words
