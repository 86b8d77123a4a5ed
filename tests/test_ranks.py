"""Two ranks with unequal numbers of characters compute what one process computes with both batches.

Real processes over gloo run student, teacher, both losses, backward pass and centre on their halves of a batch; their
gradients are averaged, as the engine does it. Float32; tolerance 1e-4 of each gradient's largest magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from ccd_train import distributed
from ccd_train.augment.affine import Affine
from ccd_train.augment.geometry import sample_theta, warp_masks
from ccd_train.config.pretraining import Model
from ccd_train.models.ccd import Student, Teacher
from ccd_train.models.losses import Center, distillation_loss, segmentation_loss, teacher_statistics

MODEL = Model(
    width=16, depth=3, heads=2, drop_path=0.3, taps=(1, 2, 3), segmentation_width=8,
    head_hidden=24, head_bottleneck=12, prototypes=40,
)  # fmt: skip
BATCH, RANKS = 4, 2
# Characters in each image of the global batch; rank 0 has the first two images.
SCENARIOS = {"unequal": (5, 1, 2, 0), "none on one rank": (3, 4, 0, 0), "none at all": (0, 0, 0, 0)}
TOLERANCE = 1e-4
# Batch normalisation follows and takes their effect away: their gradients are rounding errors about zero.
CANCELLED = {"gradient segmentation.upsampling.0.bias", "gradient segmentation.upsampling.3.bias"}

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    regular: Tensor
    irregular: Tensor
    theta: Tensor
    masks: Tensor
    keys: Tensor


def inputs_of(scenario: str) -> Inputs:
    random = torch.Generator().manual_seed(5)
    regular, irregular = torch.randn(2, BATCH, 3, 32, 128, generator=random)
    masks = torch.zeros(BATCH, 32, 128)
    for image, characters in enumerate(SCENARIOS[scenario]):
        for number in range(characters):
            masks[image, 6:26, 10 + 22 * number : 18 + 22 * number + image] = 1
    keys = torch.arange(BATCH) * 104_729 + 3
    theta = sample_theta(keys, torch.tensor([[40, 150]]).expand(BATCH, -1), Affine(shear_x=10.0))
    return Inputs(regular, irregular, theta, masks, keys)


def networks() -> tuple[Student, Teacher]:
    torch.manual_seed(0)
    student, teacher = Student(MODEL).train(), Teacher(MODEL)
    for parameter in student.parameters():  # initial biases are zero, and a zero hides mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return student, teacher


def step(inputs: Inputs, images: slice) -> Result:
    """One forward and backward pass on this rank's images: gradients (not yet averaged), losses, centre, statistics."""
    student, teacher = networks()
    theta, masks = inputs.theta[images], inputs.masks[images]
    output = student(inputs.regular[images], inputs.irregular[images], theta, masks, inputs.keys[images])
    targets = teacher(inputs.regular[images], inputs.irregular[images], output.regions)
    pairs = torch.tensor(float(output.regions.characters()))
    center = Center(MODEL.prototypes)
    center.value.copy_(torch.linspace(-0.2, 0.2, MODEL.prototypes)[None])
    distillation = distillation_loss(
        output.projections, targets, center.value, student_temperature=0.1, teacher_temperature=0.04,
        pairs_global=distributed.all_reduce_sum(pairs.clone()),
    )  # fmt: skip
    segmentation = segmentation_loss(output.segmentation_logits, torch.cat([masks.bool(), warp_masks(masks, theta)]))
    (distillation + segmentation).backward()
    statistics = teacher_statistics(targets, center.value, 0.04)
    center.update(targets, 0.9)
    balanced = Center(MODEL.prototypes)
    balanced.balance(targets, 0.04, 3)
    without = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient: {without}"
    gradients = {f"gradient {name}": parameter.grad for name, parameter in student.named_parameters()}
    buffers = {f"buffer {name}": buffer for name, buffer in student.named_buffers()}
    losses = {"distillation": distillation.detach(), "segmentation": segmentation.detach(), "pairs": pairs}
    return {**gradients, **buffers, **losses, **statistics, "center": center.value, "balanced": balanced.value}


def steps() -> dict[str, Result]:
    """Every scenario on this rank's share of the batch."""
    size = BATCH // RANKS
    share = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    return {scenario: step(inputs_of(scenario), share) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[Result]]:
    found = run_ranks(RANKS, steps)
    return {scenario: [results[scenario] for results in found] for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    return {scenario: step(inputs_of(scenario), slice(None)) for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_averaged_gradients_are_those_of_one_process(
    scenario: str, ranks: dict[str, list[Result]], alone: dict[str, Result]
) -> None:
    names = {name for name in alone[scenario] if name.startswith("gradient ")} - CANCELLED
    assert len(names) > 50
    for name in names:
        average = sum(result[name] for result in ranks[scenario]) / RANKS
        expected = alone[scenario][name]
        difference = (average - expected).abs().max()
        assert difference <= TOLERANCE * expected.abs().max() + 1e-9, f"{name}: {difference:.3g}"


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("loss", ["distillation", "segmentation"])
def test_averaged_losses_are_those_of_one_process(
    loss: str, scenario: str, ranks: dict[str, list[Result]], alone: dict[str, Result]
) -> None:
    average = sum(result[loss] for result in ranks[scenario]) / RANKS
    torch.testing.assert_close(average, alone[scenario][loss], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_center_statistics_and_running_means_are_equal_on_all_ranks(
    scenario: str, ranks: dict[str, list[Result]], alone: dict[str, Result]
) -> None:
    shared = [name for name in alone[scenario] if name.startswith("buffer ")]
    assert shared
    for name in [*shared, "center", "balanced", "teacher_entropy", "prototypes_used"]:
        first, second = (result[name] for result in ranks[scenario])
        assert torch.equal(first, second), name
        torch.testing.assert_close(first, alone[scenario][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_scenarios_are_what_they_say(ranks: dict[str, list[Result]]) -> None:
    pairs = {scenario: [int(result["pairs"]) for result in results] for scenario, results in ranks.items()}
    assert pairs["unequal"][0] > pairs["unequal"][1] > 0
    assert pairs["none on one rank"][0] > 0
    assert pairs["none on one rank"][1] == 0
    assert pairs["none at all"] == [0, 0]


def test_without_any_character_only_the_segmentation_moves(alone: dict[str, Result]) -> None:
    result = alone["none at all"]
    assert result["distillation"] == 0
    for name, gradient in result.items():
        if name.startswith("gradient projection."):
            assert not gradient.any(), name
        if name.startswith(("gradient segmentation.", "gradient vit.blocks.")):
            assert gradient.isfinite().all()
    assert result["gradient segmentation.classifier.weight"].any()
