"""The weights that a new network of a pixel task starts from: a pretraining's, another such network's, or none."""

from __future__ import annotations

import logging
from pathlib import Path

from ccd_train import distributed
from ccd_train.config.options import to_dict
from ccd_train.config.pixels import PixelTuning
from ccd_train.config.recognition import SCRATCH
from ccd_train.config.run import refuse_other
from ccd_train.errors import UserError
from ccd_train.models.pixels import PixelNetwork
from ccd_train.tasks.pretrain.weights import of_backbone, open_backbone, open_weights, remedy_of, take_backbone
from ccd_train.weights import pixels
from ccd_train.weights.backbone import Backbone, backbone_of
from ccd_train.weights.tensors import load

log = logging.getLogger(__name__)


def start_from(config: PixelTuning, network: PixelNetwork) -> None:
    """Gives a new run the weights that --init names. Raises UserError if they do not fit."""
    path = config.init
    assert path is not None
    if distributed.rank() == 0:
        whose = "the student's" if config.student else "the teacher's"
        log.info("weights: %s", "random" if path == SCRATCH else f"{whose} of {path}")
    if path == SCRATCH:
        return
    if path.exists() and pixels.is_pixels(path):
        trained = pixels.read(path)
        if trained.task != config.task:
            raise UserError(f"--init {path}: learnt another task ({trained.task}); give what was pretrained")
        theirs = of_backbone(to_dict(trained.model))
        remedy = remedy_of(theirs, type(config))
        refuse_other("model", path, theirs, of_backbone(to_dict(config.model)), remedy)
        refuse_other(config.section, path, to_dict(trained.head), to_dict(config.head), remedy, except_for=("loss",))
        load(network, trained.state, trained.origin)
        return
    found = _of_student(path, config.model.heads) if config.student else open_backbone(path, config.model.heads)
    take_backbone(path, found, config, network.vit)


def _of_student(path: Path, heads: int) -> Backbone:
    found = open_weights(path, heads)
    return backbone_of(found.student, found.model.heads, found.origin)
