"""Recognisers in files: our exports, and official fine-tuned checkpoints.

An export is one file, `recognizer.safetensors`, whose metadata hold the sizes and the charset; a fine-tuning run keeps
its best one in the folder `export`. An official checkpoint is a `.pth` whose key `net` holds the weights. Whatever does
not fit is listed by name and refused. Nothing read here can run code.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccd_train.config import pretraining, recognition
from ccd_train.config.options import to_dict
from ccd_train.config.run import require
from ccd_train.config.stored import from_stored
from ccd_train.data.charset import NAMED, Charset, read_charset
from ccd_train.errors import UserError
from ccd_train.models.recognizer import Recognizer
from ccd_train.weights.official import OFFICIAL_HEAD_WIDTH, from_official, official_name
from ccd_train.weights.tensors import (
    State,
    is_named,
    is_safetensors,
    is_torch,
    load,
    read_safetensors,
    read_tensors,
    refuse_infinite,
    refuse_misfits,
    refuse_strange,
    shapes_of,
    some,
    unwrapped,
)
from ccd_train.weights.writing import serialize, write_whole

FILE = "recognizer.safetensors"
FORMAT = "ccd_train recognizer 1"
PLACES = (FILE, f"export/{FILE}")  # in an export and in a run folder
_FINE_TUNE = "of a pretraining make one with ccd-train finetune --init EXPORT_OR_RUN"

# Ours → official, for all that is not the backbone.
OFFICIAL_NAMES = (
    (r"^encoder\.first\.", "encoder.fc1."),
    (r"^encoder\.second\.", "encoder.fc2."),
    (r"^decoder\.embedding\.", "decoder.trg_word_emb."),
    (r"^decoder\.norm\.", "decoder.layer_norm."),
    (r"^decoder\.layers\.", "decoder.layer_stack."),
    (r"\.text_norm\.", ".norm1."),
    (r"\.image_norm\.", ".norm2."),
    (r"\.mlp_norm\.", ".norm3."),
    (r"\.text\.", ".self_attn."),
    (r"\.image\.", ".enc_attn."),
    (r"\.(query|key|value)\.", lambda match: f".linear_{match[1][0]}."),
    (r"\.projection\.", ".fc."),
    (r"\.mlp\.first\.", ".mlp.w_1."),
    (r"\.mlp\.second\.", ".mlp.w_2."),
)
# In official checkpoints, but without effect (the first two) or the same in all of them (the sinusoids).
OFFICIAL_UNUSED = re.compile(r"^backbone\.(cls_token$|norm_seg\.)|^decoder\.position_enc\.")


@dataclass(frozen=True)
class Trained:
    """A recogniser's weights, on the CPU in float32, and what is needed to use them."""

    model: pretraining.Model
    """Only the backbone's sizes in it count."""
    sizes: recognition.ReadingHead
    charset: Charset
    state: State
    about: dict[str, Any]
    """Plain values: step, samples and the like."""
    origin: str
    """Where it comes from, for messages."""

    def __post_init__(self) -> None:
        refuse_infinite(self.state, self.origin)

    def network(self) -> Recognizer:
        """The network with these weights, in evaluation mode. UserError lists what does not fit."""
        network = Recognizer(self.model, self.sizes, self.charset.classes)
        load(network, self.state, self.origin)
        return network.eval()


def write(path: Path, trained: Trained) -> None:
    """Writes an export, whole or not at all. Raises UserError where it cannot be written."""
    metadata = {
        "format": FORMAT,
        "model": json.dumps(to_dict(trained.model)),
        "recognizer": json.dumps(to_dict(trained.sizes)),
        "charset": json.dumps([trained.charset.name, trained.charset.characters]),
        "about": json.dumps(trained.about),
    }
    write_whole(path, serialize(trained.state, metadata))


def read(
    path: Path,
    charset: Charset | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    length: int = recognition.ReadingHead.length,
) -> Trained:
    """A recogniser from a run folder (its best), an export (file or folder) or an official .pth. Raises UserError.

    The rest is for official checkpoints, whose tensors do not tell it: the charset where it is none of the named ones,
    the attention heads of backbone and decoder where they are not 64 wide, the tokens of a word. With an export, the
    charset must be its own.
    """
    if is_torch(path):
        return read_official(path, charset, heads, decoder_heads, length)
    trained = read_export(find(path))
    if charset is not None and charset.characters != trained.charset.characters:
        raise UserError(
            f"{trained.origin}: reads {_named(trained.charset)}, not {_named(charset)}; leave out --charset, or "
            "fine-tune with the other one"
        )
    return trained


def find(path: Path) -> Path:
    """The file that `read` reads: of an export, of its folder or of a run folder. UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a fine-tuning run, an export of one or an official .pth")
    if path.is_file():
        return path
    found = next((path / place for place in PLACES if (path / place).is_file()), None)
    if found is not None:
        return found
    raise UserError(
        f"{path}: no recogniser here ({FILE}): a fine-tuning has one from its first validation on; {_FINE_TUNE}"
    )


def is_recognizer(path: Path) -> bool:
    """Whether there is a recogniser here, rather than a pretraining or nothing. UserError for a damaged file."""
    if is_torch(path):
        return "net" in read_tensors(path)
    if is_safetensors(path):
        return read_safetensors(path, "copy it again, or export it again")[1].get("format") == FORMAT
    if path.is_file():
        raise refuse_strange(path)
    return any((path / place).is_file() for place in PLACES)


def read_export(path: Path) -> Trained:
    """What write wrote. Raises UserError."""
    state, metadata = read_safetensors(path, "export the recogniser again")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: no recogniser (its format is {metadata.get('format')!r}); {_FINE_TUNE}")
    values = _values(path, metadata)
    model = from_stored(pretraining.Model, values["model"], str(path), "model.")
    sizes = from_stored(recognition.ReadingHead, values["recognizer"], str(path), "recognizer.")
    require(
        model.heads >= 1 and model.width % model.heads == 0,
        "model.heads",
        model.heads,
        f"no divisor of the width in {path}",
    )
    sizes.check()
    name, characters = values["charset"]
    charset = Charset(characters, name)
    refuse_misfits(_shapes(model, sizes, charset), state, str(path))
    return Trained(model, sizes, charset, state, values["about"], str(path))


def read_official(
    path: Path,
    charset: Charset | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    length: int = recognition.ReadingHead.length,
) -> Trained:
    """An official fine-tuned checkpoint as ours. Raises UserError."""
    checkpoint = read_tensors(path)
    net = checkpoint.get("net")
    if not isinstance(net, dict) or not all(is_named(name, item) for name, item in net.items()):
        held = some(list(map(str, checkpoint))) or "nothing"
        raise UserError(f"{path}: no 'net' of tensors in it (it holds {held}), so no official recogniser; {_FINE_TUNE}")
    official = unwrapped(net, str(path))
    model, sizes, classes = _official_sizes(official, heads, decoder_heads, length, path)
    if charset is None:
        charset = next((found for found in map(read_charset, NAMED) if found.classes == classes), None)
        if charset is None:
            raise UserError(f"{path}: {classes} classes, like none of {', '.join(NAMED)}; name it: --charset FILE")
    if charset.classes != classes:
        raise UserError(
            f"{path}: {classes} classes, but {_named(charset)} has {charset.classes}; give another --charset"
        )
    wanted = _shapes(model, sizes, charset)
    state = from_official(official, wanted, _official_name, OFFICIAL_UNUSED, str(path))
    return Trained(model, sizes, charset, state, {}, str(path))


def official_classes(path: Path) -> int:
    """The classes of an official recogniser: its characters and three more. Raises UserError."""
    classifier = unwrapped(read_tensors(path)["net"], str(path)).get("decoder.classifier.weight")
    if classifier is None or classifier.dim() != 2:
        raise UserError(f"{path}: no decoder.classifier.weight in it; not an official recogniser")
    return len(classifier)


def _values(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What an export's metadata say: plain values by name, with a charset that is one. Raises UserError."""
    try:
        values = {name: json.loads(metadata[name]) for name in ("model", "recognizer", "charset", "about")}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its description is damaged ({error}); export the recogniser again") from None
    match values["charset"]:
        case [str(), str(characters)] if characters and len(set(characters)) == len(characters):
            pass
        case other:
            raise UserError(
                f"{path}: its description is damaged (charset {other!r}: neither a name nor characters that occur "
                "once each); export the recogniser again"
            )
    if not isinstance(values["about"], dict):
        raise UserError(f"{path}: its description is damaged (about {values['about']!r}); export the recogniser again")
    return values


def _named(charset: Charset) -> str:
    return f"charset {charset.name or '?'} ({len(charset.characters)} characters)"


def _official_name(name: str) -> str:
    if name.startswith("vit."):
        return official_name(name)
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)  # type: ignore[call-overload]
    return name


def _official_sizes(
    official: State, heads: int | None, decoder_heads: int | None, length: int, path: Path
) -> tuple[pretraining.Model, recognition.ReadingHead, int]:
    """What the shapes of an official recogniser tell, and its classes."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        tensor = official.get(name)
        if tensor is None or tensor.dim() != dimensions:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UserError(f"{path}: net's {name} {found}; not an official recogniser")
        return tuple(tensor.shape)

    def counted(pattern: str) -> int:
        return max((int(match[1]) + 1 for name in official if (match := re.match(pattern, name))), default=0)

    def divided(width: int, given: int | None, what: str, option: str) -> int:
        if given and width % given:
            raise UserError(f"{path}: {option} {given} does not divide its {what}'s width {width}; give a divisor")
        number = given or width // OFFICIAL_HEAD_WIDTH
        if number < 1 or width % number or (given is None and width % OFFICIAL_HEAD_WIDTH):
            raise UserError(f"{path}: its {what} has width {width}; say how many attention heads share it: {option} N")
        return number

    width = shape("backbone.pos_embed", 3)[2]
    classes, channels = shape("decoder.classifier.weight", 2)
    model = pretraining.Model(
        width=width,
        depth=counted(r"backbone\.blocks\.(\d+)\."),
        heads=divided(width, heads, "backbone", "--heads"),
    )
    sizes = recognition.ReadingHead(
        layers=counted(r"decoder\.layer_stack\.(\d+)\."),
        width=channels,
        heads=divided(channels, decoder_heads, "decoder", "--decoder_heads"),
        hidden=shape("decoder.layer_stack.0.mlp.w_1.weight", 2)[0],
        encoder_hidden=shape("encoder.fc1.weight", 2)[0],
        length=length,
    )
    return model, sizes, classes


def _shapes(model: pretraining.Model, sizes: recognition.ReadingHead, charset: Charset) -> dict[str, tuple[int, ...]]:
    return shapes_of(lambda: Recognizer(model, sizes, charset.classes))
