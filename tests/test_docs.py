"""The README and docs/ say what is: commands are typed, links followed, options and messages looked up."""

from __future__ import annotations

import ast
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny
from pages import CHECKOUT, OPTION, anchors, called, commands, links, messages, options, pages
from tried import NOT_HERE, Try, helps, type_pages

from ccd_train.data.shards import read_manifest
from launch import submit

PAGES = pages()
# Options that pages name and that are not ours: whose they are.
# modules of other projects that the pages name
OTHERS_MODULES = {"create_lmdb_dataset.py", "dataset_pretrain.py", "augmentation_pipelines.py"}
FOREIGN = {
    "standalone": "torchrun", "run-path": "torchrun", "master-port": "torchrun",
    "exclude": "sbatch", "reservation": "sbatch", "array": "sbatch", "wrap": "sbatch", "requeue": "sbatch",
    "no-requeue": "sbatch", "signal": "sbatch", "dependency": "sbatch", "test-only": "sbatch", "mail-type": "sbatch",
    "mail-user": "sbatch", "container-image": "srun with pyxis", "mount": "enroot", "nv": "apptainer",
    "bind": "apptainer", "shm-size": "docker", "logdir": "tensorboard", "port": "tensorboard",
    "dereference": "tar", "hard-dereference": "tar",
}  # fmt: skip


def in_process(function: Any, *arguments: Any) -> Any:
    """What a function, importable by name, returns in a fresh process: it changes folders, threads and signals."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Try]], Path]:
    """What came of every command of every page, and the folder with a tree for each page."""
    folder = tmp_path_factory.mktemp("typed")
    return in_process(type_pages, PAGES, folder), folder


@cache
def verbs() -> dict[str, list[str]]:
    names = {
        program: list(importlib.import_module(f"{package}.__main__").VERBS)
        for program, package in (("ccd-train", "ccd_train"), ("ccd-data", "data_tools"))
    }
    return names | {"ccd-submit": list(submit.VERBS)}


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_every_command_works(page: Path, typed: tuple[dict[str, list[Try]], Path]) -> None:
    tries = typed[0][called(page)]
    problems = [f"{one.place}: {one.text}\n{one.problem}" for one in tries if one.problem]
    assert not problems, "\n\n".join(problems)


def test_the_commands_did_what_the_pages_say(typed: tuple[dict[str, list[Try]], Path]) -> None:
    results, folder = typed
    assert sum(map(len, results.values())) > 60
    data = folder / "data"
    assert read_manifest(data / "shards/mj").samples == 18 and read_manifest(data / "shards/openimages").samples == 30
    assert len((data / "overlap/exclude.jsonl").read_text().splitlines()) >= 1
    assert (folder / "start/runs/first/checkpoints/latest").read_text() == "step_00000002\n"
    assert (folder / "resuming/runs/nano/checkpoints/latest").read_text() == "step_00000012\n"
    assert (folder / "resuming/runs/first/export/teacher.safetensors").is_file()


@pytest.mark.slow
def test_the_page_on_resuming_as_it_stands(tiny: Tiny, tmp_path: Path) -> None:
    """Not on a miniature: two processes, then one with a quarter of their batch, under the launcher."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/ocr-cc").symlink_to(tiny.shards)
    (tmp_path / "launch").symlink_to(CHECKOUT / "launch")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    typed = [command for command in commands(CHECKOUT / "docs/resuming.md") if "torchrun" in command.text]
    assert len(typed) == 3
    for command in typed:
        result = subprocess.run(
            ["bash", "-c", command.text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command.place}: {result.stdout}{result.stderr}"
    lines = [json.loads(line) for line in (tmp_path / "runs/nano/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and lines[-1]["samples"] == 12 * 64


def test_what_cannot_be_tried_is_on_the_list_for_a_reason() -> None:
    names = {command.name for page in PAGES for command in commands(page)}
    assert NOT_HERE.keys() <= names, "no page names these any more; take them off NOT_HERE"
    scripts = {words[1] for page in PAGES for command in commands(page) if (words := command.words)[0] == "bash"}
    tests = {word for page in PAGES for c in commands(page) for word in c.words if word.startswith("tests/")}
    assert scripts and tests
    assert not {path for path in scripts | tests if not (CHECKOUT / path).is_file()}


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_links_and_pictures_resolve(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert not broken, f"{called(page)}: {', '.join(broken)}"


def test_the_readme_leads_to_every_page() -> None:
    named = {(CHECKOUT / target.partition("#")[0]).resolve() for target in links(PAGES[0])}
    unreachable = [called(page) for page in PAGES[1:] if page not in named]
    assert not unreachable, f"no link in README.md to {', '.join(unreachable)}"


def test_the_readme_is_a_door() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 120, "two screens; the rest belongs into docs/"


def test_every_verb_is_in_some_page() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [f"{program} {name}" for program, names in verbs().items() for name in names]
    missing = [name for name in missing if not re.search(rf"\b{name}\b", text)]
    assert not missing, f"no page says {', '.join(missing)}"


def test_every_option_that_a_page_names_exists() -> None:
    known = {
        name.rstrip(".").replace("_", "-")
        for text in in_process(helps, verbs()).values()
        for name in OPTION.findall(text)
    }
    for path in [*CHECKOUT.glob("launch/*.s*"), *CHECKOUT.glob("tests/benchmarks/*.py")]:
        known |= {name.replace("_", "-") for name in OPTION.findall(path.read_text())}
    known |= FOREIGN.keys() | {"help"}
    sections = {name.rpartition(".")[0] for name in known}
    unknown = {f"{called(page)}: --{name}" for page in PAGES for name in options(page) - known - sections}
    assert not unknown, "\n".join(sorted(unknown))


@pytest.mark.parametrize("page", [page for page in PAGES if messages(page)], ids=called)
def test_quoted_messages_are_what_the_programs_say(page: Path) -> None:
    known = said()
    unsaid = [piece for piece in messages(page) if piece not in known]
    assert not unsaid, f"{called(page)} quotes what nothing says: {unsaid}"


@cache
def said() -> str:
    """All string literals of the packages, those of f-strings with … for what is filled in, and the scripts."""
    parts = [path.read_text() for path in CHECKOUT.glob("launch/*.s*")]
    for package in ("ccd_train", "data_tools", "launch"):
        for path in (CHECKOUT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts.append(node.value)
    return "\n".join(parts)


def test_the_tree_of_the_architecture_is_the_tree() -> None:
    text = (CHECKOUT / "docs/architecture.md").read_text()
    named = set(re.findall(r"\b[a-z_]+\.(?:py|sh|sbatch)\b", text))
    there = {
        path.name
        for folder in ("ccd_train", "data_tools", "launch", "tests")
        for path in (CHECKOUT / folder).rglob("*.*")
    }
    assert not named - there, f"named, but not there: {sorted(named - there)}"
    grouped = ("commands", "photometric")  # folders whose files the page does not list
    paths = [path for path in CHECKOUT.glob("ccd_train/**/*.py") if path.parent.name not in grouped]
    modules = {path.name for path in paths if not path.name.startswith("__")}
    assert not modules - named, f"docs/architecture.md has no place for {sorted(modules - named)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_are_named_as_they_are(page: Path) -> None:
    """A page that names `models/vit.py` means a file that is there, in the repository or in `ccd_train`."""
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", page.read_text(encoding="utf-8")))
    places = (
        CHECKOUT,
        CHECKOUT / "ccd_train",
        CHECKOUT / "tests/benchmarks",
        CHECKOUT / "data_tools",
        CHECKOUT / "launch",
    )
    lost = [name for name in named if not any((place / name).exists() for place in places)]
    assert not set(lost) - OTHERS_MODULES


def test_public_functions_say_what_they_do() -> None:
    """All but `main` and `verb`, which their module describes."""
    silent = []
    for package in ("ccd_train", "data_tools", "launch"):
        for path in (CHECKOUT / package).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                own = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
                if own and node.name not in ("main", "verb") and not ast.get_docstring(node):  # type: ignore[union-attr]
                    silent.append(f"{path.relative_to(CHECKOUT)}:{node.lineno}")
    assert not silent, f"no docstring: {', '.join(silent)}"
