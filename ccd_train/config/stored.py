"""Settings that another version may have written: those of run folders and checkpoints.

A setting that came later has its default there: the version that wrote the file behaved so. One that this version does
not know is left out and named, for the reader to say so.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from ccd_train.config.options import from_dict, to_dict
from ccd_train.config.pixels import Segmenting, Upscaling
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import FineTuning
from ccd_train.config.run import RunConfig, flatten, identity
from ccd_train.errors import UserError

log = logging.getLogger(__name__)

Settings = TypeVar("Settings")
CONTENT, TOLD = ".content", ".told"  # behind a fact's name: a closer look at the same, and the same in words
MARKS: dict[str, type[RunConfig]] = {  # a section that only one has
    "recognizer": FineTuning,
    "distillation": Config,
    "segmenter": Segmenting,
    "upscaler": Upscaling,
}


def from_stored(kind: type[Settings], values: Any, where: str, prefix: str = "") -> Settings:
    """The settings; the log names those that this version does not know. UserError for values of another type."""
    unknown: list[str] = []
    known = _known(kind, values, unknown, prefix) if isinstance(values, dict) else values
    if unknown:
        log.warning("%s: another version wrote it; left out, as they are unknown here: %s", where, ", ".join(unknown))
    return from_dict(kind, known, where, prefix)


def read_settings(run_dir: Path) -> RunConfig:
    """A run's config.yaml, of whatever task. Raises UserError."""
    path = run_dir / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run that has begun") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"{path}: not readable as YAML; give the folder of a run") from None
    found = [kind for mark, kind in MARKS.items() if isinstance(values, dict) and mark in values]
    if not found:
        raise UserError(f"{path}: the settings of no task that this version knows; give the folder of a run")
    return from_stored(found[0], values, str(path))


def differences(known: dict[str, Any], mine: dict[str, Any], kind: type[RunConfig]) -> list[str]:
    """Where a run's identity is not this one: "name: there → here". What it lacks counts as the setting's default."""
    defaults = identity(to_dict(kind()))
    filled = {name: defaults[name] for name in mine if name not in known and name in defaults} | known
    names = [name for name in sorted(filled | mine) if filled.get(name) != mine.get(name)]
    strange = "unknown to this version"
    return [f"{name}: {filled.get(name)} → {mine.get(name, strange)}" for name in names]


def claim(run_dir: Path, config: RunConfig, facts: dict[str, str] | None, global_batch: int | None) -> int | None:
    """Makes sure that this configuration and these facts, such as the hash of its corpus, are those of the run folder;
    returns the run's global batch.

    `facts` None: they are not known yet, and not compared. `global_batch` None takes what the first life fixed, and is
    None where there was none. UserError with the differences where it is another run, unless --resume.allow_change.
    """
    mine = identity(to_dict(config)) | {"train.global_batch_size": global_batch}
    try:
        known = json.loads((run_dir / "identity.json").read_text(encoding="utf8"))
    except FileNotFoundError:
        return global_batch
    if global_batch is None:
        mine["train.global_batch_size"] = global_batch = known["train.global_batch_size"]
    if facts is None:
        known = {name: known[name] for name in known if name in mine}
    if found := _unlike(known, mine | (facts or {}), facts or {}, type(config)):
        said = ", ".join(found)
        if not config.resume.allow_change:
            raise UserError(
                f"{run_dir} belongs to another run ({said}); take another --run_dir, "
                "the run's own settings, or --resume.allow_change"
            )
        log.info("going on with changes, as --resume.allow_change says: %s", said)  # of all ranks the first one says so
    return global_batch


def _unlike(known: dict[str, Any], mine: dict[str, Any], facts: dict[str, str], kind: type[RunConfig]) -> list[str]:
    """Where a run's identity is not this one. A fact that an earlier version did not note is not compared."""
    there = {name: value for name, value in known.items() if not name.endswith(TOLD)}
    here = {name: value for name, value in mine.items() if name in there or name not in facts}
    return [_in_words(line, known, mine) for line in differences(there, here, kind)]


def _in_words(difference: str, known: dict[str, Any], mine: dict[str, Any]) -> str:
    """The same with what is behind two hashes, where both lives have noted it."""
    name = difference.partition(":")[0]
    told = name.removesuffix(CONTENT) + TOLD
    if told not in known or told not in mine:
        return difference
    return f"{name}: {known[told]} → {mine[told]}" + (", with other contents" if known[told] == mine[told] else "")


def _known(kind: type, values: dict[Any, Any], unknown: list[str], prefix: str) -> dict[Any, Any]:
    hints = get_type_hints(kind)
    names = {item.name for item in dataclasses.fields(kind)}
    kept = {}
    for name, value in values.items():
        if name not in names:
            unknown += flatten({name: value}, prefix) if isinstance(value, dict) else [f"{prefix}{name}"]
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            kept[name] = _known(hints[name], value, unknown, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            kept[name] = value
    return kept
