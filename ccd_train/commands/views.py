"""What a model sees in pretraining, as a picture.

ccd-train views --data.shards DIR --out sheet.png            samples: crop, views, pseudo-mask, regions, characters
ccd-train views --data.shards DIR --out sheet.png --each     every operation by name, at three strengths

Nothing is trained, and no run is needed: the same seed, chain and position show what a run would draw there.
"""

from __future__ import annotations

from ccd_train.config.options import parse
from ccd_train.config.verbs import ViewsSettings
from ccd_train.errors import FINISHED, UserError


def main(argv: list[str]) -> int:
    settings = parse(ViewsSettings, argv, "ccd-train views")  # before torch is imported: --help is quick
    settings.check()
    from PIL import Image

    from ccd_train.tasks.pretrain import sheets

    assert settings.out is not None
    batch = sheets.read(settings)
    sheet = sheets.operations_sheet if settings.each else sheets.samples_sheet
    picture = sheet(batch, settings)
    try:
        Image.fromarray(picture).save(settings.out, "PNG", optimize=True)
    except OSError as error:
        raise UserError(f"{settings.out}: cannot be written ({error.strerror}); choose another --out") from None
    print(f"{settings.out}: {picture.shape[1]} × {picture.shape[0]} pixels")
    return FINISHED
