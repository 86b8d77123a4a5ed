"""Whether a run is well: figures that tell a living distillation from a collapsed one, and who raises the alarm.

Shapes: B images, D width, M characters on this rank, P prototypes; [2M, ·] holds the regular view's rows first.

Self-distillation can satisfy its loss without learning anything, in two ways (DINO, Caron et al. 2021, section 5.3).
Uniform collapse: every target is the same flat distribution, so the teacher's entropy and the loss are both ln P.
Constant collapse: every character falls onto the same prototypes, so the entropy is 0 and one prototype is in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train import distributed
from ccd_train.config.pretraining import Config
from ccd_train.models.losses import teacher_statistics
from ccd_train.training.metrics import Alarm

EMPTY_STEPS = 20  # for so long no image may have a character: there is nothing to learn from, warm-up or not
FEWEST_ROWS = 16  # of fewer characters no target's spread can be judged

UNIFORM, CONSTANT, EMPTY = "uniform collapse", "constant collapse", "no characters"
REMEDIES = {
    UNIFORM: "lower --distillation.teacher_temperature or --optimizer.lr",
    CONSTANT: "lower --distillation.center_momentum, so that the centre follows, "
    "or raise --distillation.teacher_temperature",
    EMPTY: "look at RUN/pictures and `ccd-train views`: the pseudo-masks, or the student's own segmentation, are wrong",
}
NEXT = "then go on from a checkpoint before it; docs/health.md says how"


@torch.no_grad()
def statistics(
    targets: Tensor, center: Tensor, temperature: float, distillation: Tensor, features: Tensor, has_regions: Tensor
) -> dict[str, Tensor]:
    """Figures of a micro-batch over all ranks, each a tensor [] on the device; two collectives, no wait for the device.

    targets [2M, P] and center [1, P]: the teacher's; temperature: its; distillation []: the loss on this rank, as it is
    averaged over ranks; features [2M, D]: the characters'; has_regions bool [B]: images with a character in both views.

    kl: KL(teacher ‖ student) = cross-entropy − the teacher's entropy, in nats.
    feature_rank: how many directions the features share out, 1 … D: 1 / Σ λ² over the eigenvalues λ of the mean of
    x xᵀ / ‖x‖² (the participation ratio: the effective rank of order 2, which needs no eigenvalues).
    feature_std: √(1 − ‖mean of x / ‖x‖‖²), from 0 (one direction for all) to 1 (the deviation that Chen and He, 2021,
    section 4.1, watch, times √D).
    """
    width = features.shape[1]
    unit = F.normalize(features.float(), dim=1)
    rows, images = (unit.new_full((1,), len(part)) for part in (unit, has_regions))  # fills: the device is not awaited
    own = [(unit.t() @ unit).flatten(), unit.sum(dim=0), rows, images, has_regions.sum()[None], distillation[None]]
    sums = distributed.all_reduce_sum(torch.cat([part.float() for part in own]))
    rows, images, with_regions, loss = sums[-4:].unbind()
    second, mean = (part / rows.clamp(min=1) for part in (sums[: width * width], sums[width * width : -4]))
    figures = teacher_statistics(targets, center, temperature)
    cross_entropy = loss / distributed.world_size()
    return figures | {
        "kl": cross_entropy - figures["teacher_entropy"],
        "loss_over_ln_p": cross_entropy / math.log(targets.shape[1]),
        "feature_rank": rows.sign() / second.square().sum().clamp(min=1 / width),
        "feature_std": rows.sign() * (1 - mean.square().sum()).clamp(min=0).sqrt(),
        "images_without_regions": 1 - with_regions / images,
    }


class Guard:
    """Looks at every logged step's figures; raises an alarm once a state of collapse has lasted."""

    def __init__(self, config: Config, global_batch: int) -> None:
        self._settings = config.health
        self._prototypes = config.model.prototypes
        self._batch = global_batch
        first = min(config.optimizer.warmup_samples, config.optimizer.freeze_last_layer_samples)
        self._after = first if config.health.after_samples is None else config.health.after_samples
        self._since: dict[str, int] = {}
        self._raised: set[str] = set()

    def look(self, figures: Mapping[str, float]) -> list[Alarm]:
        """What is new with this step: an alarm, or the end of one."""
        step, found = int(figures["step"]), self._conditions(figures)
        news = []
        for kind, holds in found.items():
            if not holds:
                self._since.pop(kind, None)
                if kind in self._raised:
                    self._raised.remove(kind)
                    news.append(Alarm(step, kind, f"{kind} is over at step {step}", over=True))
                continue
            since = self._since.setdefault(kind, step)
            patience = self._settings.patience_steps
            patience = min(patience, EMPTY_STEPS) if kind == EMPTY else patience
            if kind not in self._raised and step - since >= patience:
                self._raised.add(kind)
                news.append(Alarm(step, kind, self._message(kind, since, figures)))
        return news

    def _conditions(self, figures: Mapping[str, float]) -> dict[str, bool]:
        empty = figures["images_without_regions"] > 0.95
        if figures["samples"] < self._after:
            return {EMPTY: empty}
        if 2 * figures["characters"] * self._batch < FEWEST_ROWS:
            return {UNIFORM: False, CONSTANT: False, EMPTY: empty}
        flat = math.log(self._prototypes) - self._settings.uniform_nats
        few = min(self._settings.constant_prototypes, self._prototypes / 2)
        return {
            UNIFORM: figures["teacher_entropy"] > flat and figures["loss_distillation"] > flat,
            CONSTANT: figures["prototypes_used"] < few and figures["teacher_entropy"] < math.log(few) / 2,
            EMPTY: empty,
        }

    def _message(self, kind: str, since: int, figures: Mapping[str, float]) -> str:
        return (
            f"{kind} since step {since}: teacher entropy {figures['teacher_entropy']:.3g} and distillation loss "
            f"{figures['loss_distillation']:.3g} of ln P = {math.log(self._prototypes):.3g}, "
            f"{figures['prototypes_used']:.3g} of {self._prototypes} prototypes in use, feature rank "
            f"{figures['feature_rank']:.3g}, feature std {figures['feature_std']:.2g}, "
            f"{figures['characters']:.3g} characters per image; {REMEDIES[kind]}; {NEXT}"
        )
