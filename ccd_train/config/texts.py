"""Help for settings: the string below each field of a dataclass, read from its source."""

from __future__ import annotations

import ast
import dataclasses
import inspect


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
