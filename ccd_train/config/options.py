"""Reading settings: defaults < recipe or file (YAML) < command line; and writing them down again."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from ccd_train.config import arguments
from ccd_train.config.texts import help_texts
from ccd_train.errors import UserError, did_you_mean

Settings = TypeVar("Settings")

OFFICIAL = {"global", "dataset"}  # sections of the official code's YAML files
OFFICIAL_HINT = (
    "; this is a file of the official code: take a recipe (vit_small), docs/configuration.md has our settings"
)


def parse(kind: type[Settings], argv: Sequence[str], program: str, *others: type[Settings]) -> Settings:
    """The settings that the command line describes; prints them and ends the program on --print_config and --help.

    A recipe of another task chooses the one of `others` whose task that is. Raises UserError for an unknown recipe, key
    or option and for a value of the wrong type; what is impossible for other reasons is left to the settings' own
    `check`.
    """
    kinds = (kind, *others)
    layers, show, rest = _own_options(kinds, argv)
    base = read_layers(layers, *kinds)
    _refuse_unknown_options(type(base), rest)
    names = ", ".join(recipes(*kinds))
    source = f"A recipe ({names}) or a .yaml file" if names else "A .yaml file"
    taken = f"{source}; given again, the later one goes first, and options go before both."
    known = (  # what `_own_options` has taken out
        ("--config", "NAME", taken),
        ("--print_config", "", "Print every setting in force, with its help, and end."),
    )
    about = inspect.getdoc(type(base)) or ""
    settings: Settings = _replaced(base, arguments.read(base, rest, program, about, known))
    if show:
        print(describe(settings), end="")
        raise SystemExit(0)
    return settings


def _replaced(base: Any, values: dict[str, Any]) -> Any:
    """`base` with other values, in its sections as well."""
    inner = {name: _replaced(getattr(base, name), value) for name, value in values.items() if isinstance(value, dict)}
    return dataclasses.replace(base, **values | inner)


def read_recipe(name: str, *kinds: type[Settings]) -> Settings:
    """Settings from a recipe of this package by name, or from a YAML file by path, for the kind whose task it is."""
    return read_layers([name], *kinds)


def read_layers(names: Sequence[str], *kinds: type[Settings]) -> Settings:
    """The defaults, changed by each recipe or file in turn. The kind is the one whose task they are, else the first."""
    layers = [layer for name in names for layer in _layers(name, kinds)]
    tasks = [(where, values.pop("task")) for where, values in layers if isinstance(values, dict) and "task" in values]
    kind = kinds[0]
    for where, task in tasks:
        fitting = [one for one in kinds if _task(one) == task]
        if not fitting or task != tasks[0][1]:
            raise UserError(f"--config {where}: a recipe of another task ({task}); {_known(kinds)}")
        kind = fitting[0]
    settings = kind()
    for where, values in layers:
        settings = from_dict(kind, values, where, base=settings)
    return settings


def _layers(name: str, kinds: Sequence[type]) -> list[tuple[str, Any]]:
    """The values of a recipe or file, with its name; before it the one that its key `recipe` builds on."""
    path = arguments.path(name, "--config")
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"--config {name}: no such file; {_known(kinds)}")
        text = path.read_text(encoding="utf8")
    elif name in _tasks():
        text = resources.files("ccd_train.config").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf8")
    else:
        raise UserError(f"--config {name}: no such recipe; {_known(kinds)}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    recipe = values.pop("recipe", None) if isinstance(values, dict) else None
    if recipe is None:
        return [(name, values)]
    if recipe not in _tasks():
        raise UserError(f"{name}: recipe = {recipe}: no such recipe; {_known(kinds)}")
    return [*_layers(recipe, kinds), (name, values)]


def recipes(*kinds: type) -> list[str]:
    """The names of this package's recipes of the tasks that such settings are for; none if they are for no task."""
    return sorted(name for name, task in _tasks().items() if task in map(_task, kinds))


def _task(kind: type) -> str | None:
    return getattr(kind, "task", None)


def _tasks() -> dict[str, str]:
    """The recipes of this package by name, with their tasks."""
    folder = resources.files("ccd_train.config").joinpath("recipes")
    texts = {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf8") for entry in folder.iterdir()}
    return {name: yaml.safe_load(text)["task"] for name, text in texts.items()}


def _known(kinds: Sequence[type]) -> str:
    """What --config may name, for an error."""
    names = recipes(*kinds)
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
            hint = OFFICIAL_HINT if name in OFFICIAL and not prefix else did_you_mean(str(name), known)
            raise UserError(f"{where}: unknown setting {prefix}{name}{hint}")
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


def option_names(kind: type, prefix: str = "") -> list[str]:
    """Every option of a command line that these settings give, without the dashes: "train.micro_batch_size"."""
    hints = get_type_hints(kind)
    names: list[str] = []
    for item in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(hints[item.name])
        names += option_names(hints[item.name], f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return names


def _own_options(kinds: Sequence[type], argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """Takes every --config NAME_OR_FILE, and --print_config, out of the command line."""
    layers, show, rest = [], False, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--config":
            layer = value if equals else next(arguments, None)
            if layer is None:
                raise UserError(f"--config: a recipe or a file must follow; {_known(kinds)}")
            layers.append(layer)
        elif argument.replace("-", "_") == "__print_config":
            show = True
        else:
            rest.append(argument)
    return layers, show, rest


def _refuse_unknown_options(kind: type, argv: Sequence[str]) -> None:
    known = option_names(kind)
    for argument in argv:
        if not argument.startswith("--") or argument in ("--", "--help"):
            continue
        name = argument[2:].partition("=")[0].replace("-", "_")
        section, dot, last = name.rpartition(".")
        if name not in known and f"{section}{dot}{last.removeprefix('no_')}" not in known:
            raise UserError(f"unknown option --{name}{did_you_mean(name, known)}; --help lists all")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A YAML value as the field's type, by the same rules as on the command line."""
    several = isinstance(value, (list, tuple))
    return arguments.convert(hint, [str(item) for item in value] if several else [str(value)], where)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
