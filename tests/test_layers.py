"""The house keeps its shape: imports point downward, and each secret has one module that knows it.

Read from the source by ast, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import Tiny

from ccd_train import __version__
from ccd_train.__main__ import VERBS
from ccd_train.config.options import describe, read_recipe
from ccd_train.config.pretraining import Config

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("ccd_train", "data_tools", "launch")
RANK_VARIABLES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip

FLOORS = (
    {"errors", "programs", "files", "durations", "draws", "distributed", "gpu"},
    {"config", "drawing", "augment"},
    {"data", "models"},
    {"weights"},
    {"training"},
    {"tasks"},
    {"reports"},
    {"commands"},
)
TASKS = ({"pretrain"}, {"recognize"}, {"pixels"}, {"choice"})  # in order: a later one may build on an earlier one
BESIDE_THE_ROOMS, LINES, FUNCTION_LINES = 8, 400, 60
# what DeepSpeed calls of `training.library.Files`
CALLED_BY_LIBRARIES = {"create", "makedirs", "is_data_parallel_writer", "is_decoupled", "preserves_storage_sharing"}

SLOW = ("torch", "deepspeed")  # seconds to import
DOORS = {"ccd-train": "ccd_train.__main__", "ccd-data": "data_tools.__main__", "ccd-submit": "launch.submit"}
HELPS = [(name, verb) for name, door in DOORS.items() for verb in ("", *importlib.import_module(door).VERBS)]


def modules() -> list[str]:
    """Every module of the three packages, as dotted names (packages without `.__init__`)."""
    paths = [path for package in PACKAGES for path in sorted((CHECKOUT / package).rglob("*.py"))]
    dotted = [".".join(path.relative_to(CHECKOUT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in dotted]


def source(module: str) -> Path:
    path = CHECKOUT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module).read_text(encoding="utf-8"))


def _named(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = module if source(module).name == "__init__.py" else module.rpartition(".")[0]
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    origin = ".".join(above + ([node.module] if node.module else []))
    yield origin
    yield from (f"{origin}.{alias.name}" for alias in node.names)


@cache
def imports(module: str) -> frozenset[str]:
    """Everything that the module imports; `from a import b` counts as `a` and as `a.b`."""
    nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return frozenset(name for node in nodes for name in _named(module, node))


def own_imports(module: str) -> set[str]:
    """The modules of this project among the imports; packages stand only for their own __init__."""
    known = set(modules())
    exact = imports(module) & known
    return {name for name in exact if not any(other.startswith(f"{name}.") for other in exact)} - {module}


def floor(module: str) -> int:
    """Of a module of ccd_train, counted from the ground; what stands outside is above everything."""
    package, _, rest = module.partition(".")
    room = rest.split(".")[0]
    if package != "ccd_train" or room == "__main__":
        return len(FLOORS)
    return 0 if not room else next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_a_floor() -> None:
    rooms = {module.split(".")[1] for module in modules() if module.startswith("ccd_train.")} - {"__main__"}
    assert rooms == set().union(*FLOORS)


def test_few_modules_lie_beside_the_rooms() -> None:
    assert len(list((CHECKOUT / "ccd_train").glob("*.py"))) <= BESIDE_THE_ROOMS


def test_imports_point_down_the_floors() -> None:
    upward = [
        f"{module} imports {name}"
        for module in modules()
        for name in own_imports(module)
        if name.startswith("ccd_train") and floor(name) > floor(module)
    ]
    assert not upward, "\n".join(upward)


def test_tasks_build_on_earlier_tasks_only() -> None:
    order = {task: number for number, tasks in enumerate(TASKS) for task in tasks}
    tasks = [module for module in modules() if module.startswith("ccd_train.tasks.")]
    assert {module.split(".")[2] for module in tasks} == set(order)
    for module in tasks:
        named = [name.split(".")[2] for name in own_imports(module) if name.startswith("ccd_train.tasks.")]
        assert all(order[name] <= order[module.split(".")[2]] for name in named), module


def test_training_names_no_head_of_a_network() -> None:
    """What is trained tells the loop and the engine what it needs: they ask nobody which task runs."""
    for module in (module for module in modules() if module.startswith("ccd_train.training")):
        text = source(module).read_text(encoding="utf-8").lower()
        found = [word for word in ("prototype", "segmentation", "recogni", "teacher", "center") if word in text]
        assert not found, f"{module}: {found}"


def test_the_verbs_are_the_files_of_commands() -> None:
    files = {path.stem for path in (CHECKOUT / "ccd_train/commands").glob("*.py")} - {"__init__"}
    assert files == set(VERBS)


@pytest.mark.parametrize("module", [module for module in modules() if module.startswith("ccd_train")])
def test_a_module_is_not_long(module: str) -> None:
    assert len(source(module).read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("module", modules())
def test_a_function_fits_on_a_screen(module: str) -> None:
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES]
    assert not long


def test_no_two_public_classes_bear_one_name() -> None:
    places: dict[str, list[str]] = {}
    for module in (module for module in modules() if module.startswith("ccd_train")):
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def public(module: str) -> Iterator[str]:
    """The names that a module offers: its functions, classes, constants, and the methods of its classes."""
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (part.name for part in node.body if isinstance(part, ast.FunctionDef))
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@cache
def mentioned() -> frozenset[str]:
    """Every name that the packages use, and every word in the pages for users."""
    names: set[str] = set()
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.alias):
                names.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                names.add(node.value)
    pages = [CHECKOUT / "README.md", CHECKOUT / "setup.py", *(CHECKOUT / "docs").glob("*.md")]
    return frozenset(names | {word for page in pages for word in re.findall(r"\w+", page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("module", modules())
def test_nothing_public_is_there_for_tests_only(module: str) -> None:
    used = mentioned() | CALLED_BY_LIBRARIES
    assert not [name for name in public(module) if not name.startswith("_") and name not in used]


def test_imports_have_no_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "cycle: " + " → ".join((*path, module))
        if module not in done:
            for name in sorted(own_imports(module)):
                visit(name, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())
    assert done == set(modules())


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("deepspeed", {"ccd_train.training.library"}),
        ("lmdb", {"ccd_train.data.records"}),
        ("tensorboard", {"ccd_train.training.metrics"}),
        ("torch.utils.tensorboard", {"ccd_train.training.metrics"}),
        ("multiprocessing.pool", set()),
    ],
)
def test_one_module_knows_the_library(library: str, allowed: set[str]) -> None:
    users = {m for m in modules() if any(n == library or n.startswith(f"{library}.") for n in imports(m))}
    assert users <= allowed


def test_of_pickle_only_the_error_is_known() -> None:
    for module in modules():
        names = {name for name in imports(module) if name.split(".")[0] == "pickle"}
        assert names in (set(), {"pickle", "pickle.UnpicklingError"}), module


def test_only_distributed_reads_rank_variables() -> None:
    users = {
        module
        for module in modules()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant) and node.value in RANK_VARIABLES
    }
    assert users <= {"ccd_train.distributed"}


def test_data_knows_nothing_of_models() -> None:
    data = [module for module in modules() if module.startswith("ccd_train.data")]
    allowed = ("ccd_train.data", "ccd_train.config", *(f"ccd_train.{module}" for module in FLOORS[0]))
    assert data
    for module in data:
        assert all(name.startswith(allowed) for name in own_imports(module)), module


def test_the_method_knows_nothing_of_files() -> None:
    rooms = ("ccd_train.augment", "ccd_train.models", "ccd_train.drawing")
    method = [module for module in modules() if module.startswith(rooms)]
    assert method
    for module in method:
        assert not imports(module) & {"pathlib", "os", "io", "shutil", "json", "yaml"}, module
        calls = [n.func.id for n in ast.walk(tree(module)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert "open" not in calls, module


def test_the_backbone_is_built_in_one_place() -> None:
    """Else a run could pretrain one and fine-tune another."""
    calls = {
        module
        for module in modules()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "VisionTransformer"
    }
    assert calls == {"ccd_train.models.vit"}


def test_no_drawer_for_everything() -> None:
    assert not {name.rpartition(".")[2] for name in modules()} & {"utils", "util", "helpers", "common", "misc"}


def test_nothing_catches_everything() -> None:
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ExceptHandler):
                caught = [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else ["anything"]
                assert not {"anything", "Exception", "BaseException"} & set(caught), f"{module}:{node.lineno}"


def imported(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python, then ends with the slow libraries that it has imported as an error."""
    program = f"import sys\ntry:\n    {program}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    program += f"sys.exit(', '.join(set({SLOW}) & set(sys.modules)) or 0)"
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


def quick(name: str, *words: str) -> str:
    """What a program prints that ends well, and needs no slow library for it."""
    result = imported(f"from {DOORS[name]} import verb; assert verb() == 0", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("verb", ["convert", "verify", "merge", "index"])
def test_shards_are_made_without_torch(verb: str) -> None:
    """A conversion runs on data machines: importing torch would cost seconds per worker, and may not be installed."""
    result = imported(f"import data_tools.{verb}")
    assert result.returncode == 0, result.stderr


def test_settings_are_read_without_torch() -> None:
    config = [module for module in modules() if module.startswith("ccd_train.config")]
    assert not [module for module in config if {name.split(".")[0] for name in imports(module)} & set(SLOW)]
    result = imported(f"import {', '.join(config)}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("name", "verb"), HELPS)
def test_help_needs_no_torch(name: str, verb: str) -> None:
    """Whoever asks for help does not wait for libraries that train."""
    assert f"{name} {verb}" in quick(name, *([verb] if verb else []), "--help")


@pytest.mark.parametrize("name", DOORS)
def test_a_program_says_its_version_and_what_a_misspelt_verb_may_mean(name: str) -> None:
    assert quick(name, "--version") == f"{name} {__version__}\n"
    verb = next(verb for program, verb in HELPS if program == name and verb)
    result = imported(f"from {DOORS[name]} import main; main()", verb[:-1])
    assert f"error: {name} {verb[:-1]}: no such verb; did you mean {verb}?\n" in result.stderr


def test_an_estimate_needs_no_torch() -> None:
    assert "GFLOP" in quick("ccd-train", "estimate", "--config", "vit_small")


def test_how_a_run_stands_and_its_report_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(describe(read_recipe("vit_nano", Config)))
    rows = [
        {"step": step, "samples": 64 * step, "samples_per_second": 9.0, "epoch": 0.1, "data_wait": 0.1, "loss": 1.0}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "identity.json").write_text('{"train.global_batch_size": 64}')
    (tmp_path / "environment.txt").write_text("started 2026-01-01 00:00:00 +0000\nhosts one × 1\n")
    assert "step          2" in quick("ccd-submit", "status", str(tmp_path))
    quick("ccd-train", "report", str(tmp_path))
    assert (tmp_path / "report.html").is_file()


def test_a_dry_run_needs_no_torch(tiny: Tiny, tmp_path: Path) -> None:
    run = ["--run_dir", str(tmp_path / "run"), "--gpus-per-node", "1", "--dry-run", "--"]
    pretrain = ["--config", "vit_nano", "--data.shards", str(tiny.shards), "--checkpoint.keep", "1"]
    words = ["--data.train", str(tiny.lmdb), "--data.valid", str(tiny.shards), "--train.global_batch_size", "None"]
    finetune = ["--config", "recognizer_nano", "--init", "scratch", *words]
    for verb, settings in (("pretrain", pretrain), ("finetune", finetune)):
        assert f"verb={verb}" in quick("ccd-submit", verb, *run, *settings)
    shard = ["shard", "--src", str(tiny.lmdb), "--out", str(tmp_path / "out"), "--name", "x", "--dry-run"]
    assert "#SBATCH" in quick("ccd-submit", *shard)
