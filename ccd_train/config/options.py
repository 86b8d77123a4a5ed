"""Reading settings: defaults < recipe or file (YAML) < command line; and writing them down again."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml

from ccd_train.errors import UserError

Settings = TypeVar("Settings")


def parse(kind: type[Settings], argv: Sequence[str], program: str) -> Settings:
    """The settings that the command line describes; prints them and ends the program on --print_config and --help.

    Raises UserError for an unknown recipe, key or option and for a value of the wrong type; what is impossible for
    other reasons is left to the settings' own `check`.
    """
    recipe, show, rest = _own_options(kind, argv)
    base = kind() if recipe is None else read_recipe(kind, recipe)
    _refuse_unknown_options(kind, rest)
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            settings = tyro.cli(kind, args=list(rest), default=base, prog=program, description=about(kind))
    except SystemExit as end:
        if end.code in (0, None):  # --help
            raise
        raise UserError(_one_line(complaints.getvalue())) from None
    if show:
        print(describe(settings), end="")
        raise SystemExit(0)
    return settings


def about(kind: type) -> str:
    """What --help says first: two options are read before all others, and so are not in its list."""
    names = ", ".join(recipes(kind))
    taken = f"--config NAME takes a recipe ({names}) or a .yaml file" if names else "--config FILE takes a .yaml file"
    return (
        f"{inspect.getdoc(kind)} {taken}, which the options below override; --print_config shows every setting in "
        "force, with its help, and ends."
    )


def read_recipe(kind: type[Settings], name: str) -> Settings:
    """Settings from a recipe of this package by name, or from a YAML file by path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"--config {name}: no such file; {_known(kind)}")
        text = path.read_text(encoding="utf8")
    elif name in _tasks():
        text = resources.files("ccd_train.config").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf8")
    else:
        raise UserError(f"--config {name}: no such recipe; {_known(kind)}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    task = values.pop("task", None) if isinstance(values, dict) else None
    if task is not None and task != _task(kind):
        raise UserError(f"--config {name}: a recipe of another task ({task}); {_known(kind)}")
    return from_dict(kind, values, where=name)


def recipes(kind: type) -> list[str]:
    """The names of this package's recipes of the task that such settings are for; none where they are for no task."""
    return sorted(name for name, task in _tasks().items() if task == _task(kind))


def _task(kind: type) -> str | None:
    return getattr(kind, "task", None)


def _tasks() -> dict[str, str]:
    """The recipes of this package by name, with their tasks."""
    folder = resources.files("ccd_train.config").joinpath("recipes")
    texts = {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf8") for entry in folder.iterdir()}
    return {name: yaml.safe_load(text)["task"] for name, text in texts.items()}


def _known(kind: type) -> str:
    """What --config may name, for an error."""
    names = recipes(kind)
    return f"there are {', '.join(names)}, or give a .yaml file" if names else "give a .yaml file"


def from_dict(
    kind: type[Settings], values: Any, where: str, prefix: str = "", base: Settings | None = None
) -> Settings:
    """Builds nested dataclasses from a nested mapping; refuses unknown keys and values of another type by name.

    What the mapping leaves out is as in `base`, or as it is by default.
    """
    base = kind() if base is None else base
    if not isinstance(values, dict):
        raise UserError(f"{where}: {prefix or 'the file'} must be a mapping of settings, not {values!r}")
    hints = get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where}: unknown setting {prefix}{name}{_nearest(str(name), known)}")
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = from_dict(hints[name], value, where, f"{prefix}{name}.", getattr(base, name))
        else:
            arguments[name] = _convert(hints[name], value, f"{where}: {prefix}{name}")
    return dataclasses.replace(base, **arguments)  # type: ignore[type-var]


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain values: what YAML and JSON can hold, and what `from_dict` reads back."""
    return {
        item.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for item in dataclasses.fields(settings)
        for value in (getattr(settings, item.name),)
    }


def describe(settings: Any, indent: str = "") -> str:
    """The settings as YAML, each with its help text as a comment."""
    texts = help_texts(type(settings))
    lines = []
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            lines += ["", f"{indent}{item.name}:", describe(value, indent + "  ").rstrip("\n")]
        else:
            if texts.get(item.name):
                lines.append(f"{indent}# {texts[item.name]}")
            plain = yaml.safe_dump(_plain(value), default_flow_style=True).replace("\n...\n", "").strip()
            lines.append(f"{indent}{item.name}: {plain}")
    return "\n".join(lines) + "\n"


def help_texts(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass and of those that it extends, as one line."""
    texts: dict[str, str] = {}
    for part in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        texts |= _own_help_texts(part)
    return texts


def _own_help_texts(kind: type) -> dict[str, str]:
    body = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts


def option_names(kind: type, prefix: str = "") -> list[str]:
    """Every option of a command line that these settings give, without the dashes: "train.micro_batch_size"."""
    hints = get_type_hints(kind)
    names: list[str] = []
    for item in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(hints[item.name])
        names += option_names(hints[item.name], f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return names


def _own_options(kind: type, argv: Sequence[str]) -> tuple[str | None, bool, list[str]]:
    """Takes --config NAME_OR_FILE and --print_config out of the command line."""
    recipe, show, rest = None, False, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--config":
            recipe = value if equals else next(arguments, None)
            if recipe is None:
                raise UserError(f"--config: a recipe or a file must follow; {_known(kind)}")
        elif argument.replace("-", "_") == "__print_config":
            show = True
        else:
            rest.append(argument)
    return recipe, show, rest


def _refuse_unknown_options(kind: type, argv: Sequence[str]) -> None:
    known = option_names(kind)
    for argument in argv:
        if not argument.startswith("--") or argument in ("--", "--help"):
            continue
        name = argument[2:].partition("=")[0].replace("-", "_")
        section, dot, last = name.rpartition(".")
        if name not in known and f"{section}{dot}{last.removeprefix('no_')}" not in known:
            raise UserError(f"unknown option --{name}{_nearest(name, known)}; --help lists all")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(box: str) -> str:
    """tyro draws its complaints in a box; this is the text between the title and the first rule inside it."""
    rows = [row.strip().strip("│").strip() for row in box.splitlines()]
    kept: list[str] = []
    for row in rows:
        if row.startswith("╭") or not row:
            continue
        if row.startswith(("─", "╰")):
            break
        kept.append(row)
    return " ".join(kept) or "the command line cannot be read; --help lists every option"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A YAML value as the field's type, by the same rules as on the command line."""
    if value is None:
        words = ["None"]
    elif isinstance(value, (list, tuple)):
        words = [str(item) for item in value]
    else:
        words = [str(value)]
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            return tyro.cli(hint, args=words, prog=where)
    except SystemExit:
        raise UserError(f"{where} = {value!r}: {_one_line(complaints.getvalue())}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
