"""The weights that a new recogniser starts from: a pretraining's, another recogniser's, or none."""

from __future__ import annotations

import logging
from pathlib import Path

from ccd_train import distributed
from ccd_train.config.options import to_dict
from ccd_train.config.recognition import SCRATCH, FineTuning
from ccd_train.config.run import refuse_other
from ccd_train.data.charset import Charset
from ccd_train.models.recognizer import Recognizer
from ccd_train.tasks.pretrain.weights import of_backbone, open_backbone, remedy_of, take_backbone
from ccd_train.weights import recognizer
from ccd_train.weights.tensors import is_torch, load

log = logging.getLogger(__name__)

OF_THE_CHARSET = ("decoder.embedding.", "decoder.classifier.")


def start_from(config: FineTuning, charset: Charset, student: Recognizer) -> None:
    """Gives a new run the weights that --init names. Raises UserError if they do not fit."""
    path = config.init
    assert path is not None
    if distributed.rank() == 0:
        log.info("weights: %s", "random" if path == SCRATCH else path)
    if path == SCRATCH:
        return
    if path.exists() and recognizer.is_recognizer(path):
        _start_from_recognizer(path, config, charset, student)
        return
    take_backbone(path, open_backbone(path, config.model.heads), config, student.vit)


def _start_from_recognizer(path: Path, config: FineTuning, charset: Charset, student: Recognizer) -> None:
    """Everything that fits. Another charset begins its letters anew; the length of words is in no tensor."""
    sizes = config.recognizer
    trained = recognizer.read(path, _charset_of(path, charset), config.model.heads, sizes.heads, sizes.length)
    free = ("dropout", "length")
    theirs = of_backbone(to_dict(trained.model))
    remedy = remedy_of(theirs, FineTuning)
    refuse_other("recognizer", path, to_dict(trained.sizes), to_dict(config.recognizer), remedy, except_for=free)
    refuse_other("model", path, theirs, of_backbone(to_dict(config.model)), remedy)
    state = trained.state
    if trained.charset.characters != charset.characters:
        fresh = {name: value for name, value in student.state_dict().items() if name.startswith(OF_THE_CHARSET)}
        state = {**state, **fresh}
        if distributed.rank() == 0:
            log.warning(
                "--init %s reads charset %s, this run %s: %s begin at random, the rest is kept",
                path, trained.charset.name or "?", charset.name, ", ".join(fresh),
            )  # fmt: skip
    load(student, state, trained.origin)


def _charset_of(path: Path, charset: Charset) -> Charset | None:
    """This run's charset if an official file has as many classes; else None: the file, or its classes, say which."""
    if not is_torch(path):
        return None
    return charset if recognizer.official_classes(path) == charset.classes else None
