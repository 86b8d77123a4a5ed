"""Settings as a command line: every field of nested dataclasses is an option, `--train.micro_batch_size 64`.

A tuple takes several words. A bool is switched on by its name and off by `no_` before it: `--train.no_compile`. Dashes
may stand for underscores. A field whose metadata say `positional` has no name; `alias` is a second, short one.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ccd_train.config.texts import help_texts
from ccd_train.errors import UserError

Known = tuple[str, str, str]  # an option that is not a setting: its name, the name of its value or "", its help
NAMES = {int: "a whole number", float: "a number", bool: "True or False"}


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of some settings."""

    name: str
    """With its sections: "train.micro_batch_size"."""
    hint: Any
    field: dataclasses.Field[Any]
    default: Any
    help: str
    group: str
    """The headline under which --help lists it."""

    @property
    def positional(self) -> bool:
        return bool(self.field.metadata.get("positional"))

    @property
    def shown(self) -> str:
        """Its name in a message."""
        return self.name if self.positional else f"--{self.name}"


def options(base: Any, prefix: str = "") -> Iterator[Option]:
    """All of some settings, which are the defaults. Those that a class adds come before those that it inherits."""
    kind = type(base)
    hints, texts = get_type_hints(kind), help_texts(kind)
    classes = [part for part in kind.__mro__ if dataclasses.is_dataclass(part)]
    origin = {
        item.name: part for part in classes for item in dataclasses.fields(part)
    }  # the last is the first to add it
    for item in sorted(dataclasses.fields(base), key=lambda item: classes.index(origin[item.name])):
        if not dataclasses.is_dataclass(hints[item.name]):
            value, group = getattr(base, item.name), f"{prefix.rstrip('.')} options".strip()
            yield Option(prefix + item.name, hints[item.name], item, value, texts.get(item.name, ""), group)
    for item in dataclasses.fields(base):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from options(getattr(base, item.name), f"{prefix}{item.name}.")


def read(base: Any, argv: Sequence[str], program: str, about: str, known: Sequence[Known]) -> dict[str, Any]:
    """What a command line says, as nested values for `dataclasses.replace`. Prints help and ends on --help.

    `known` options are listed by --help; somebody else has read them. Raises UserError.
    """
    every = list(options(base))
    given = vars(_parser(every, program, about, known).parse_intermixed_args([_underscored(word) for word in argv]))
    values: dict[str, Any] = {}
    for option in every:
        if option.name in given:
            words = given[option.name]
            place = values
            *sections, last = option.name.split(".")
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = words if isinstance(words, bool) else convert(option.hint, words, option.shown)
    return values


def convert(hint: Any, words: Sequence[str], where: str) -> Any:
    """Words as a value of the type of a field. Raises UserError, which begins with `where`."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) in (Union, types.UnionType):
        return None if list(words) == ["None"] else convert(inner[0], words, where)
    if get_origin(hint) is tuple:
        if inner[-1] is Ellipsis:
            return tuple(_one(inner[0], word, where) for word in words)
        if len(words) != len(inner):
            raise UserError(f"{where} = {' '.join(words)}: must be {len(inner)} values, not {len(words)}")
        return tuple(_one(kind, word, where) for kind, word in zip(inner, words, strict=True))
    if len(words) != 1:
        raise UserError(f"{where} = {' '.join(words)}: must be one value, not {len(words)}")
    return _one(hint, words[0], where)


def _one(kind: Any, word: str, where: str) -> Any:
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise UserError(f"{where} = {word}: must be one of {', '.join(get_args(kind))}")
        return word
    if kind is Path:
        return path(word, where)
    try:
        return {"True": True, "False": False}[word] if kind is bool else kind(word)
    except (ValueError, KeyError):
        raise UserError(f"{where} = {word}: must be {NAMES[kind]}") from None


def path(word: str, where: str) -> Path:
    """`~` is the home folder: shells leave it as it is in `--run_dir=~/runs`, and files hold it as well."""
    if not word:
        raise UserError(f"{where}: a path must not be empty")
    try:
        return Path(word).expanduser()
    except RuntimeError:
        raise UserError(f"{where} = {word}: there is no such home folder; write the path in full") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every option")


class _Switch(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, not (option or "").rpartition(".")[2].removeprefix("--").startswith("no_"))


def _parser(every: Sequence[Option], program: str, about: str, known: Sequence[Known]) -> argparse.ArgumentParser:
    unnamed = [
        f"[{_metavar(option.hint)}{' ...' * bool(_tuple(option.hint))}]" for option in every if option.positional
    ]
    usage = " ".join([program, *unnamed, "[options]"])
    parser = _Parser(prog=program, usage=usage, description=about, allow_abbrev=False, add_help=False)
    general = parser.add_argument_group("general options")
    general.add_argument("-h", "--help", action="help", help="Print this and end.")
    for name, metavar, text in known:
        if metavar:
            general.add_argument(name, metavar=metavar, help=text)
        else:
            general.add_argument(name, action="store_true", help=text)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in every:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group], option)
    return parser


def _add(group: Any, option: Option) -> None:
    alias = option.field.metadata.get("alias")
    names = [*([alias] if alias else []), f"--{option.name}"]
    shown = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
    said = "" if shown in (None, "", False) else f" (default: {shown})"
    about = (option.help + said).replace("%", "%%")
    section, dot, last = option.name.rpartition(".")
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": about}
    if option.hint is bool:
        group.add_argument(*names, f"--{section}{dot}no_{last}", dest=option.name, action=_Switch, nargs=0, **common)
        return
    common |= {"metavar": _metavar(option.hint)}
    several = _tuple(option.hint)
    if option.positional:
        group.add_argument(option.name, nargs="*", **common)
    elif several and several[-1] is Ellipsis:
        group.add_argument(*names, dest=option.name, nargs="*", action="extend", **common)
    else:
        group.add_argument(*names, dest=option.name, nargs=len(several) or 1, **common)


def _tuple(hint: Any) -> tuple[Any, ...]:
    """The types in a tuple, which may be optional; nothing for what is none."""
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for part in get_args(hint) if (found := _tuple(part))), ())
    return get_args(hint) if get_origin(hint) is tuple else ()


def _metavar(hint: Any) -> str:
    """What --help calls a value."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    parts = [part for part in get_args(hint) if part not in (type(None), Ellipsis)]
    return _metavar(parts[0]) if parts else {int: "N", float: "X", str: "TEXT", Path: "PATH"}[hint]


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word
