"""It learns: the whole method, as `pretrain` runs it, on 64 fixed words with true glyph masks.

The words are those on which Otsu's threshold finds the glyphs: the pseudo-mask is all that the method is given, and
where it is wrong the network is right to follow it.
"""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.augment.views import normalize
from ccd_train.config.options import from_dict
from ccd_train.config.pretraining import Config
from ccd_train.data.masks import decode_mask, decode_rgb, pseudo_mask, resize_image, resize_mask
from ccd_train.data.records import LmdbWriter
from ccd_train.models.ccd import Student
from ccd_train.models.regions import label_regions, pool
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.run import Run, begin
from ccd_train.training.train import train_step
from data_tools import convert
from data_tools.words import render

WORDS, STEPS, LAST = 64, 240, 20
PROTOTYPES = 128
SETTINGS: dict[str, Any] = {
    "model": {
        "width": 32, "depth": 3, "heads": 2, "taps": [1, 2, 3], "segmentation_width": 32, "drop_path": 0.0,
        "head_hidden": 64, "head_bottleneck": 32, "prototypes": PROTOTYPES, "freeze_gain": True,
        "initial_std": 0.1,
    },
    "distillation": {"teacher_momentum": 0.9, "center_momentum": 0.2, "teacher_temperature": 0.05},
    "optimizer": {"lr": 0.04, "warmup_samples": 320, "freeze_last_layer_samples": 100_000},
    "train": {"total_samples": 16 * STEPS, "micro_batch_size": 16, "threads": 1},
    "data": {"workers": 0},
    "augment": {"chain": "severity_2"},
    "affine": {"probability": 0.4},
}  # fmt: skip


@dataclass(frozen=True)
class ProbeWords:
    """Fixed words, and what is true of them."""

    images_u8: Tensor
    """uint8 [64, 3, 32, 128]."""
    pseudo: Tensor
    """uint8 [64, 32, 128]: what the method is given."""
    truth: Tensor
    """bool [64, 32, 128]."""


@dataclass(frozen=True)
class State:
    """Of a network on the words as they are, without views."""

    overlap: float
    """Mean IoU of its segmentation with the true masks."""
    rank: float
    """Effective rank of the teacher's pooled features: exp of the entropy of their principal variances."""


@dataclass(frozen=True)
class Learnt:
    before: State
    after: State
    figures: list[dict[str, float]]


def overlaps(masks: Tensor, truth: Tensor) -> Tensor:
    """IoU of each of bool masks [B, H, W]."""
    return (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)).clamp(min=1)


pytestmark = pytest.mark.slow  # about two minutes


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProbeWords, Path]:
    """The first 64 rendered words whose pseudo-mask has an IoU of 0.85 with the truth, and their shards."""
    folder = tmp_path_factory.mktemp("words")
    images: list[np.ndarray] = []
    pseudo: list[np.ndarray] = []
    truth: list[np.ndarray] = []
    with LmdbWriter(folder / "lmdb") as writer:
        index = 0
        while len(images) < WORDS:
            word = render(7, index, fonts=())  # Pillow's own font: the same words on every machine
            index += 1
            image = decode_rgb(word.image)
            found, true = resize_mask(pseudo_mask(image)), resize_mask(decode_mask(word.mask))
            if (found & true).sum() >= 0.85 * (found | true).sum():
                writer.add(word.image, None, None)
                images.append(resize_image(image))
                pseudo.append(found)
                truth.append(true)
    assert (
        convert.main(
            ["--src", str(folder / "lmdb"), "--out", str(folder / "shards"), "--name", "words", "--workers", "1"]
        )
        == 0
    )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    stacked = (torch.from_numpy(np.stack(masks)) for masks in (pseudo, truth))
    return ProbeWords(pixels, next(stacked), next(stacked).bool()), folder / "shards"


@torch.no_grad()
def state(run: Run[Pretraining], words: ProbeWords) -> State:
    inputs = words.images_u8.float()
    normalize(inputs)
    student, teacher = run.engine.student, run.task.teacher.ready()
    student.eval()
    _, taps = student.vit(inputs)  # type: ignore[operator]
    background, text = student.segmentation(taps).unbind(dim=1)  # type: ignore[operator]
    student.train()
    features, valid = pool(teacher.vit(inputs)[0], label_regions(words.pseudo))  # type: ignore[operator]
    pooled = features[valid] - features[valid].mean(dim=0)
    variances = torch.linalg.svdvals(pooled).square()
    rank = torch.special.entr(variances / variances.sum()).sum().exp()
    return State(overlaps(text > background, words.truth).mean().item(), rank.item())


def learn(config: Config, words: ProbeWords) -> Learnt:
    """In a process of its own: DeepSpeed and the process group stay there."""
    distributed.initialize(config.distributed.timeout)
    run = begin(Pretraining(config))
    before = state(run, words)
    figures = [train_step(run, logged=True).figures for _ in range(STEPS)]
    after = state(run, words)
    run.close()
    distributed.finalize()
    return Learnt(before, after, figures)


@pytest.fixture(scope="module")
def learnt(words: tuple[ProbeWords, Path], tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    config = from_dict(Config, SETTINGS, "test")
    config = replace(config, run_dir=tmp_path_factory.mktemp("run"), data=replace(config.data, shards=(words[1],)))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(learn, config, words[0]).result()


def mean(figures: list[dict[str, float]], name: str) -> float:
    return sum(figure[name] for figure in figures) / len(figures)


def divergence(figures: list[dict[str, float]]) -> float:
    """KL(teacher ‖ student) in nats: the cross-entropy less the teacher's own entropy."""
    return mean(figures, "loss_distillation") - mean(figures, "teacher_entropy")


def test_the_initial_scale_is_that_of_the_recipe() -> None:
    """On it hangs whether a narrow network learns: see docs/learning.md."""
    torch.manual_seed(0)
    student = Student(from_dict(Config, SETTINGS, "test").model)
    for part in (student.vit.blocks, student.projection.mlp):
        for layer in (module for module in part.modules() if isinstance(module, torch.nn.Linear)):
            assert layer.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_the_segmentation_finds_the_true_glyphs(learnt: Learnt) -> None:
    assert learnt.before.overlap < 0.5
    assert learnt.after.overlap > 0.8


def test_the_student_comes_to_agree_with_the_teacher(learnt: Learnt) -> None:
    early, late = divergence(learnt.figures[:LAST]), divergence(learnt.figures[-LAST:])
    assert late < 0.8
    assert late < 0.6 * early


def test_nothing_collapses(learnt: Learnt) -> None:
    """Neither to the same target for all characters, nor to one without preference, nor features to a line."""
    late = learnt.figures[-LAST:]
    assert 0.1 * math.log(PROTOTYPES) < mean(late, "teacher_entropy") < 0.9 * math.log(PROTOTYPES)
    assert mean(late, "prototypes_used") > PROTOTYPES / 8
    assert learnt.after.rank > max(4.0, 0.8 * learnt.before.rank)
