"""How the commands of the pages are tried: on a miniature of the tree that they speak of, with miniature networks.

A page is typed in order into a copy of the tree that the README leaves behind: `data_lmdb`, `words` (an LMDB with
labels), `word.png`, `photos`, `shards/ocr-cc`, `runs/first`, and `runs/recognizer`, which is not trained. `TRIED` says
how each command is run; what cannot be run here is in `NOT_HERE`, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from pages import CHECKOUT, OPTION, Command, called, commands
from textseg import write_release
from words import write as write_recognizer

from ccd_train import distributed
from ccd_train.commands import finetune, pretrain
from ccd_train.config.options import parse, to_dict
from ccd_train.config.pixels import Segmenting, Upscaling
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.run import RunConfig
from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.errors import FINISHED
from ccd_train.tasks.choice import task_of
from ccd_train.training.life import write_outcome
from ccd_train.training.train import live
from data_tools.words import Word, render
from launch import submit

LEAVES = [
    *(f"data_lmdb/training/label/synth/MJ/MJ_{part}" for part in ("train", "valid", "test")),
    "data_lmdb/training/label/synth/ST",
    "data_lmdb/training/URD/OCR-CC",
    *(
        f"data_lmdb/training/ARD/Openimages/{part}"
        for part in ("train_1", "train_2", "train_5", "train_f", "validation")
    ),
    "data_lmdb/training/ARD/TextOCR",
    *(f"data_lmdb/validation/{part}" for part in ("1.SVT", "2.IIIT")),
    *(f"data_lmdb/evaluation/benchmark/{part}" for part in ("SVT", "IIIT5k_3000")),
    *(f"Union14M-U/{part}_lmdb" for part in ("book32", "cc", "openvino")),
    *(f"Union14M-L-LMDB-Filtered/train_{part}" for part in ("easy", "hard")),
]
LABELLED = "words"
ENOUGH = 48  # words of which a probe finds some whose letters are regions of their own
SLICES = 8
MINIATURE: dict[str, dict[str, Any]] = {
    "model": {
        "width": 16, "depth": 3, "heads": 2, "taps": (1, 2, 3), "segmentation_width": 4,
        "head_hidden": 16, "head_bottleneck": 8, "prototypes": 16,
    },
    "recognizer": {"layers": 1, "width": 16, "heads": 2, "hidden": 16, "encoder_hidden": 16},
    "data": {"workers": 0},
    "log": {"every_steps": 1, "pictures_every_steps": 0, "wandb": None},
}  # fmt: skip

NOT_HERE = {
    "git clone": "the network",
    "cd": "into the clone",
    "python3": "makes .venv, as launch/set_up.sh does",
    "pip": "the network; launch/set_up.sh installs the same",
    "pre-commit": "a package of its own, from the network",
    ".": "activates .venv",
    "bash launch/quickstart.sh": "minutes: tests/test_quickstart.py types it",
    "bash launch/test.sh": "it is what runs this",
    "python -m": "pytest in pytest: tests/test_docs.py looks whether its files are there",
    "tail": "does not end",
    "tensorboard": "does not end",
}


@dataclass(frozen=True)
class Try:
    """What came of a command."""

    place: str
    text: str
    seconds: float
    problem: str
    """Empty where it went well."""


def type_pages(paths: list[Path], folder: Path) -> dict[str, list[Try]]:
    """Types every command of the pages, the README first; its tree is where the others begin."""
    distributed.initialize(60)  # once: DeepSpeed cannot be started again in a process that has left its group
    start = folder / "start"
    plant(start)
    results = {}
    for page in paths:
        here = start
        if page != paths[0]:
            here = folder / page.stem
            shutil.copytree(start, here)
        os.chdir(here)
        results[called(page)] = [attempt(command) for command in commands(page)]
    return results


def plant(root: Path) -> None:
    """A few words in each LMDB; the first of OCR-CC is also in a benchmark. Masks of OCR-CC, images, a recogniser."""
    words: Iterator[Word] = (render(3, index, ()) for index in count())
    leaked = next(words)
    for leaf in [*LEAVES, LABELLED]:
        with LmdbWriter(root / leaf) as writer:
            first = leaked if leaf.endswith(("OCR-CC", "SVT")) else next(words)
            rest = [next(words) for _ in range(ENOUGH if leaf == LABELLED else 5)]
            for word in (first, *rest):
                writer.add(word.image, None if "URD" in leaf else word.label)
    with (
        LmdbReader(root / "data_lmdb/training/URD/OCR-CC") as images,
        LmdbWriter(root / "data_lmdb/Mask/URD/OCR-CC") as writer,
    ):
        for number in range(1, len(images) + 1):
            writer.add(images.image(number) or b"", mask=leaked.mask)
    write_release(root / "TextSeg", {"train": 2, "val": 1, "test": 1})
    for part in ("train1", "train2", "test/easy"):
        with LmdbWriter(root / "TextZoom" / part) as writer:
            for word in (next(words) for _ in range(12)):
                writer.add_pair(word.image, word.image, word.label)
    write_recognizer(root / "runs/recognizer/export")
    (root / "runs/recognizer/checkpoints").mkdir()
    (root / "photos").mkdir()
    for picture in ("word.png", "photos/word.png"):
        (root / picture).write_bytes(leaked.image)


def attempt(command: Command) -> Try:
    began, said, problem = time.monotonic(), io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = rule(command)(list(command.words))
        assert code == 0, f"ended with {code}"
    except (Exception, SystemExit):
        problem = f"{said.getvalue()[-1500:]}\n{traceback.format_exc(limit=-4)}"
    return Try(command.place, command.text, time.monotonic() - began, problem)


def rule(command: Command) -> Callable[[list[str]], int]:
    """How the command is tried. AssertionError with what to do where nobody has said."""
    if command.name in NOT_HERE:
        return lambda words: 0
    if command.name.startswith("python tests/benchmarks/"):
        return benchmark
    if command.text.startswith("cat "):
        return lambda words: subprocess.run(["bash", "-c", command.text], check=False).returncode
    general = {"ccd-data": data_tool, "ccd-train": verb, "ccd-submit": submission}.get(command.words[0])
    found = TRIED.get(command.name, general)
    assert found is not None, (
        f"{command.place}: nobody has said how `{command.name}` is tried; add it to TRIED in tests/tried.py, or to "
        "NOT_HERE with the reason"
    )
    return found


def data_tool(words: list[str]) -> int:
    name, arguments = words[1], words[2:]
    if name == "synth":
        arguments[arguments.index("--num-samples") + 1] = str(min(ENOUGH, int(value_of(arguments, "--num-samples"))))
        shutil.rmtree(value_of(arguments, "--out"), ignore_errors=True)
        arguments += [] if "--fonts" in arguments else ["--fonts", "pillow"]
    if name == "convert" and "--slice" in arguments:
        arguments += ["--samples-per-shard", "1"]
        arguments[arguments.index("--out") + 1] += "_sliced"
    if name == "merge" and Path(f"{arguments[0]}_sliced").is_dir():
        arguments = [f"{arguments[0]}_sliced"]
    if name in ("synth", "convert", "overlap", "crops"):
        arguments += ["--workers", "1"]
    return int(importlib.import_module(f"data_tools.{name}").main(arguments))


def verb(words: list[str]) -> int:
    """Any verb of ccd-train."""
    if "onnx" in words:
        return FINISHED  # an extra, and slow: tests/test_evaluation_page.py has it
    return int(importlib.import_module(f"ccd_train.commands.{words[1]}").main(words[2:]))


def doctor(words: list[str]) -> int:
    """In a process of its own, whose group it leaves at its end."""
    config = miniature(parse(Config, words, "test"))
    Path("miniature.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name not in distributed.RANK_VARIABLES}
    command = [sys.executable, "-m", "ccd_train", "doctor", "--config", "miniature.yaml"]
    return subprocess.run(command, env=clean, timeout=120, check=False).returncode


def pretraining(words: list[str]) -> int:
    """`ccd-train pretrain …` or a launcher's script: the settings as typed, then some steps of a miniature."""
    if "--print_config" in words:
        return ends(lambda: pretrain.main(words))
    typed = parse(Config, words, "test")
    typed.check()
    config = miniature(typed)
    stage = None if config.data.stage is None else Path("stage").resolve()
    config = replace(config, data=replace(config.data, stage=stage))
    return lived(config, *live(task_of(config)))


def finetuning(words: list[str]) -> int:
    if "--print_config" in words:
        return ends(lambda: finetune.main(words))
    typed = parse(FineTuning, words, "test", Segmenting, Upscaling)
    typed.check()
    config = miniature(typed)
    return lived(config, *live(task_of(config)))


def lived(config: RunConfig, code: int, message: str) -> int:
    """What a run does at its end, but for leaving its process group."""
    write_outcome(config.run_dir, code, message)
    return code


def miniature(config: Any) -> Any:
    """The same run with a network of a few thousand weights, on single samples, for a few steps."""
    assert isinstance(config, RunConfig)
    for section, values in MINIATURE.items():
        if hasattr(config, section):
            known = {name: value for name, value in values.items() if hasattr(getattr(config, section), name)}
            config = replace(config, **{section: replace(getattr(config, section), **known)})  # type: ignore[arg-type]
    train = config.train
    micro = max(1, train.micro_batch_size // 16)
    whole = train.global_batch_size and micro * max(1, min(2, train.global_batch_size // train.micro_batch_size))
    train = replace(train, micro_batch_size=micro, global_batch_size=whole, threads=1, compile=False)
    return replace(config, train=train, max_steps=min(config.max_steps or 2, 12))


def submission(words: list[str]) -> int:
    """ccd-submit prints its script; it refuses to go on with a run that is a miniature of what it is told."""
    own, rest = (words[1 : words.index("--")], words[words.index("--") :]) if "--" in words else (words[1:], [])
    if own[0] != "status":
        own.append("--dry-run")
        rest += ["--resume.allow_change", "--checkpoint.keep", "1"] if rest else []
    if own[0] == "finetune":
        rest[rest.index("--init") + 1] = "scratch"  # the weights here are a miniature's
    arguments, settings = submit.read([*own, *rest])
    code = int(arguments.verb(arguments, settings))
    if "run_dir" in arguments:
        arguments.run_dir.mkdir(parents=True, exist_ok=True)  # as the submission would
    return code


def with_hostfile(words: list[str]) -> int:
    """HOSTFILE and settings: ssh is not here (tests/test_launch.py has two nodes), so the settings are tried."""
    return pretraining(words[1:])


def sbatch(words: list[str]) -> int:
    """An array of jobs: each of its tasks, one after the other."""
    inner = shlex.split(words[words.index("--wrap") + 1])
    for number in range(SLICES):
        assert data_tool([word.replace("$SLURM_ARRAY_TASK_ID", str(number)) for word in inner]) == 0
    return 0


def benchmark(words: list[str]) -> int:
    """Minutes each, and figures of a machine that does nothing else: the file must be there and know the options."""
    source = (CHECKOUT / words[1]).read_text(encoding="utf-8")
    unknown = [option for option in OPTION.findall(" ".join(words[2:])) if f'"--{option}"' not in source]
    assert not unknown, f"{words[1]} has no --{', --'.join(unknown)}"
    return 0


def ends(work: Callable[[], int]) -> int:
    """The code of what ends the program by itself."""
    try:
        return work()
    except SystemExit as end:
        return int(end.code or 0)


def value_of(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


TRIED: dict[str, Callable[[list[str]], int]] = {
    "ccd-train pretrain": lambda words: pretraining(words[2:]),
    "ccd-train doctor": lambda words: doctor(words[2:]),
    "ccd-train finetune": lambda words: finetuning(words[2:]),
    "bash launch/torchrun_finetune.sh": lambda words: finetuning(words[2:]),
    "bash launch/torchrun_pretrain.sh": lambda words: pretraining(words[2:]),
    "bash launch/deepspeed_pretrain.sh": lambda words: with_hostfile(words[2:]),
    "sbatch": sbatch,
}


def help_of(program: str, name: str, *recipe: str) -> str:
    """What a verb prints on --help, after `--config NAME` where a recipe is given."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if program == "ccd-submit":
            ends(lambda: submit.read([name, "--help"]) and 0)
        else:
            package = "ccd_train.commands" if program == "ccd-train" else "data_tools"
            ends(lambda: int(importlib.import_module(f"{package}.{name}").main([*recipe, "--help"])))
    return said.getvalue()


def helps(verbs: dict[str, list[str]]) -> dict[str, str]:
    """The helps of all verbs by "program verb"."""
    os.environ["COLUMNS"] = "300"
    found = {f"{program} {name}": help_of(program, name) for program, names in verbs.items() for name in names}
    for recipe in ("segmenter_nano", "upscaler_nano"):  # tasks with options of their own
        found[f"ccd-train finetune --config {recipe}"] = help_of("ccd-train", "finetune", "--config", recipe)
    return found
