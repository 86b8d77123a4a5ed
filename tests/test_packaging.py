"""A built wheel, installed in another folder, has everything: packages, commands and data files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


def installed(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where only `folder`, not the checkout, provides the packages."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy and unpacked by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("packaging")
    tracked = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "ccd_train", "data_tools", "launch", "ds_configs"]
    (folder / "source").mkdir()
    subprocess.run(["cp", "-r", *tracked, folder / "source"], cwd=CHECKOUT, check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), "./source"]
    subprocess.run([*pip, *build], cwd=folder, check=True)
    (built,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(built)], check=True)
    return target


def test_every_module_and_data_file_is_in_the_wheel(wheel: Path) -> None:
    patterns = {
        "ccd_train": ("**/*.py", "config/recipes/*.yaml", "reports/*.css"),
        "data_tools": ("**/*.py",),
        "ds_configs": ("*.py", "*.json"),
        "launch": ("*.py", "*.sh", "*.sbatch", "constraints.txt"),
    }
    wanted = {
        path.relative_to(CHECKOUT)
        for package, globs in patterns.items()
        for pattern in globs
        for path in (CHECKOUT / package).glob(pattern)
    }
    assert len(wanted) > 30
    assert not {path for path in wanted if not (wheel / path).exists()}


def test_data_files_are_found_where_they_were_installed(wheel: Path) -> None:
    program = "import importlib.resources as r; print(r.files('ds_configs'), r.files('ccd_train.config') / 'recipes')"
    result = installed(wheel, sys.executable, "-c", program)
    assert result.stdout.split() == [str(wheel / "ds_configs"), str(wheel / "ccd_train/config/recipes")], result.stderr


@pytest.mark.parametrize("command", ["ccd-train", "ccd-data", "ccd-submit"])
def test_the_commands_answer(wheel: Path, command: str) -> None:
    result = installed(wheel, str(wheel / "bin" / command), "--help")
    assert result.returncode == 0, result.stderr
    assert command in result.stdout
