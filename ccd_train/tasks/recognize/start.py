"""The weights that a new recogniser starts from: a pretraining's, another recogniser's, or none."""

from __future__ import annotations

import logging

from ccd_train import distributed
from ccd_train.config.options import to_dict
from ccd_train.config.recognition import SCRATCH, FineTuning
from ccd_train.config.run import refuse_other
from ccd_train.data.charset import Charset
from ccd_train.errors import UserError
from ccd_train.models.recognizer import Recognizer
from ccd_train.tasks.pretrain.weights import open_weights
from ccd_train.weights import backbone, recognizer

log = logging.getLogger(__name__)

BACKBONE = ("width", "depth", "heads")  # settings of the model that a recogniser has in common with a pretraining
REMEDY = "take the recipe of its size"


def start_from(config: FineTuning, charset: Charset, student: Recognizer) -> None:
    """Gives a new run the weights that --init names; UserError where they do not fit."""
    path = config.init
    assert path is not None
    if distributed.rank() == 0:
        log.info("weights: %s", "random" if path == SCRATCH else path)
    if path == SCRATCH:
        return
    if recognizer.is_recognizer(path):
        sizes = config.recognizer
        named = charset if path.suffix in (".pth", ".pt") else None  # our own exports say which they have
        trained = recognizer.read(path, named, config.model.heads, sizes.heads, sizes.length)
        if trained.charset.characters != charset.characters:
            theirs = trained.charset.name or "another"
            raise UserError(
                f"--init {path}: its charset is {theirs}, this run's {charset.name}; set --data.charset {theirs}, or "
                "start from a pretraining"
            )
        refuse_other(
            "recognizer", path, to_dict(trained.sizes), to_dict(config.recognizer), REMEDY, except_for=("dropout",)
        )
        refuse_other("model", path, of_backbone(to_dict(trained.model)), of_backbone(to_dict(config.model)), REMEDY)
        backbone.load(student, trained.state, trained.origin)
        return
    found = open_weights(path, config.model.heads)
    refuse_other("model", path, of_backbone(to_dict(found.model)), of_backbone(to_dict(config.model)), REMEDY)
    teacher = {name.removeprefix("vit."): tensor for name, tensor in found.teacher.items() if name.startswith("vit.")}
    # the norms of the taps belong to the segmentation head
    used = {name: tensor for name, tensor in teacher.items() if not name.startswith("tap_norms.")}
    backbone.load(student.vit, used, found.origin)


def of_backbone(model: dict[str, object]) -> dict[str, object]:
    """The settings of a model that a recogniser shares with a pretraining."""
    return {name: model[name] for name in BACKBONE}
