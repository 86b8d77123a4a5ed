"""ViT, heads, student and teacher: what they promise beyond agreeing with the official implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ccd_train import draws
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config, Model
from ccd_train.models.ccd import Student, StudentOutput, Teacher
from ccd_train.models.heads import ProjectionHead, PrototypeLayer
from ccd_train.models.losses import distillation_loss
from ccd_train.models.vit import StochasticDepth, VisionTransformer

NANO = Model(
    width=32, depth=4, heads=2, drop_path=0.0, taps=(1, 2, 3), segmentation_width=16,
    head_hidden=32, head_bottleneck=16, prototypes=64,
)  # fmt: skip
IDENTITY = torch.eye(2, 3)


def views(images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    regular, irregular = torch.randn(2, images, 3, 32, 128, generator=torch.Generator().manual_seed(seed))
    return regular, irregular


def bars(*counts: int) -> Tensor:
    """Masks with so many bars of 8×20 pixels: [len(counts), 32, 128]."""
    masks = torch.zeros(len(counts), 32, 128)
    for image, count in enumerate(counts):
        for number in range(count):
            masks[image, 6:26, 4 + 16 * number : 12 + 16 * number] = 1
    return masks


def student_of(model: Model = NANO, seed: int = 0, checkpointing: bool = False) -> Student:
    torch.manual_seed(seed)
    return Student(model, checkpointing)


def run(student: Student, masks: Tensor, **options: object) -> StudentOutput:
    theta = IDENTITY.expand(len(masks), -1, -1)
    keys = draws.sample_keys(0, torch.zeros(len(masks), dtype=torch.long), torch.arange(len(masks)))
    return student(*views(len(masks)), theta, masks, keys, **options)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = student_of(seed=1), student_of(seed=1), student_of(seed=2)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.vit.position_embedding, other.vit.position_embedding)


def test_initial_weights_are_those_of_the_recipe() -> None:
    torch.manual_seed(0)
    vit, head = VisionTransformer(192, 2, 3), ProjectionHead(192, 256, 64, 128)
    linear = [m for module in (vit, head.mlp) for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 2 * 4 + 3
    for layer in linear:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    assert float(vit.position_embedding.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert (head.prototypes.gain == 1).all()


def test_patch_filters_for_contrasts_see_no_levels() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(48, 3, 3, contrast_std=0.16)
    assert float(vit.patch_embedding.weight.detach().std()) == pytest.approx(0.16, rel=0.01)
    levels = torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 128)
    seen = vit.patch_embedding(levels) - vit.patch_embedding.bias.view(1, -1, 1, 1)
    assert float(seen.detach().abs().max()) < 1e-5
    assert float(vit.patch_embedding(torch.rand(4, 3, 32, 128)).detach().std()) > 0.2


def test_the_small_student_has_46_million_parameters() -> None:
    with torch.device("meta"):
        student, teacher = Student(Model()), Teacher(Model())
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in student.named_children()}
    assert millions["vit"] == pytest.approx(21.4, abs=0.1)
    assert millions["projection"] == pytest.approx(22.4, abs=0.1)
    assert sum(millions.values()) == pytest.approx(46, abs=1)
    assert {name for name, _ in teacher.named_parameters()} < {name for name, _ in student.named_parameters()}


@pytest.mark.parametrize(("recipe", "sizes"), [("vit_tiny", (192, 3)), ("vit_small", (384, 6)), ("vit_base", (512, 8))])
def test_recipes_build(recipe: str, sizes: tuple[int, int]) -> None:
    model = read_recipe(recipe, Config).model
    assert (model.width, model.heads) == sizes
    with torch.device("meta"):
        student = Student(model)
    assert student.projection.prototypes.gain.requires_grad == (recipe != "vit_base")


def test_the_prototype_layer_is_torchs_weight_norm() -> None:
    layer = PrototypeLayer(6, 10, freeze_gain=False)
    with torch.no_grad():
        layer.gain.uniform_(0.5, 2)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10, bias=False), dim=0)
    reference.parametrizations.weight.original0 = nn.Parameter(layer.gain.detach().clone())
    reference.parametrizations.weight.original1 = nn.Parameter(layer.direction.detach().clone())
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), reference(x))
    upstream = torch.randn(5, 10)
    ours = torch.autograd.grad((layer(x) * upstream).sum(), [layer.gain, layer.direction])
    theirs = torch.autograd.grad((reference(x) * upstream).sum(), list(reference.parameters()))
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)


def test_stochastic_depth_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(32, 6, 2, drop_path=0.5).train()
    images, keys = torch.randn(6, 3, 32, 128), torch.arange(6) * 977
    together, _ = vit(images, keys)
    turned, _ = vit(images.flip(0), keys.flip(0))
    torch.testing.assert_close(turned.flip(0), together, rtol=1e-4, atol=1e-5)
    other_keys, _ = vit(images, keys + 1)
    assert (other_keys - together).abs().amax(dim=(1, 2)).gt(1e-2).any()


def test_stochastic_depth_drops_its_share_and_keeps_the_mean() -> None:
    nothing, both = StochasticDepth((0.0, 0.25))(torch.arange(20_000), torch.float32)
    assert nothing is None
    assert both is not None
    assert set(both.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert both.mean(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=0.02)
    together = (both == 0).all(dim=0).float().mean()
    assert float(together) == pytest.approx(0.25**2, abs=0.01)  # the two branches are dropped independently


def test_stochastic_depth_draws_for_each_layer_and_branch_by_name() -> None:
    """All layers at once, bit for bit what a draw for each would give: older checkpoints go on as they were."""
    keys, rates = torch.arange(500) * 7919, (0.0, 0.05, 0.1)
    kept = StochasticDepth(rates)(keys, torch.bfloat16)
    for layer, rate in list(enumerate(rates))[1:]:
        for row, branch in enumerate(("attention", "mlp")):
            drawn = draws.uniform(keys, f"drop_path.{layer}.{branch}")
            assert torch.equal(kept[layer][row], ((drawn >= rate) / (1 - rate)).to(torch.bfloat16))  # type: ignore[index]


def test_drop_rates_rise_linearly_from_zero() -> None:
    vit = VisionTransformer(8, 5, 2, drop_path=0.1)
    assert vit.stochastic_depth is not None
    assert vit.stochastic_depth.rates == pytest.approx((0, 0.025, 0.05, 0.075, 0.1))
    assert Teacher(replace(NANO, drop_path=0.1)).vit.stochastic_depth is None


def test_the_two_views_are_dropped_independently() -> None:
    """The same image twice: equal tokens without stochastic depth, other tokens with it."""
    student = student_of(replace(NANO, drop_path=0.6)).train()
    image = views(8)[0]
    theta, keys, masks = IDENTITY.expand(8, -1, -1), torch.arange(8), bars(*[3] * 8)
    moved = student(image, image, theta, masks, keys).projections.chunk(2)
    assert not torch.allclose(*moved)
    still = student_of().train()(image, image, theta, masks, keys).projections.chunk(2)
    torch.testing.assert_close(*still, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        student = student_of(replace(NANO, drop_path=0.3), checkpointing=checkpointing).train()
        output = run(student, bars(3, 2))
        (output.projections.square().sum() + output.segmentation_logits.square().mean()).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_characters_are_those_that_both_views_hold() -> None:
    """The second image's view moves one of its two characters out of the picture."""
    student = student_of().eval()
    shifted = torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0]])  # reads 12.8 px further right: the first bar leaves
    theta = torch.stack([IDENTITY, shifted])
    output = student(*views(2), theta, bars(3, 2), None)
    assert output.regions.image.tolist() == [0, 0, 0, 1]
    assert output.regions.slot.tolist() == [0, 1, 2, 1]
    assert output.projections.shape == (8, NANO.prototypes)


def test_an_image_without_characters_adds_nothing() -> None:
    student, teacher = student_of().eval(), Teacher(NANO)
    losses = []
    for images in (2, 3):
        masks = bars(3, 2, 0)[:images]
        regular, irregular = (view[:images] for view in views(3))
        output = student(regular, irregular, IDENTITY.expand(images, -1, -1), masks)
        targets = teacher(regular, irregular, output.regions)
        losses.append(
            distillation_loss(
                output.projections, targets, torch.zeros(1, NANO.prototypes), student_temperature=0.1,
                teacher_temperature=0.04, pairs_global=torch.tensor(output.regions.characters()),
            )
        )  # fmt: skip
    torch.testing.assert_close(*losses)


def test_regions_from_the_student_follow_its_segmentation() -> None:
    student = student_of().eval()
    regular, irregular = views(2)
    theta = IDENTITY.expand(2, -1, -1)
    logits = student(regular, irregular, theta, bars(1, 1)).segmentation_logits
    output = student(regular, irregular, theta, bars(1, 1), regions_from_student=True)
    text = (logits.softmax(dim=1)[:2, 1] > 0.5).float()
    from_mask = student(regular, irregular, theta, text)
    assert torch.equal(output.regions.ids, from_mask.regions.ids)
    assert not torch.equal(output.regions.ids, student(regular, irregular, theta, bars(1, 1)).regions.ids)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_prototypes_and_logits_in_float32(autocast: bool) -> None:
    exact = run(student_of().train(), bars(3, 2))
    student = student_of().train()
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = run(student, bars(3, 2))
    else:
        output = run(student.bfloat16(), bars(3, 2))
    assert output.projections.dtype == torch.float32
    assert output.segmentation_logits.dtype == torch.bfloat16
    assert (output.projections - exact.projections).abs().max() < 0.05 * exact.projections.abs().max()
    prototypes = student.projection.prototypes
    unit = nn.functional.normalize(torch.randn(3, NANO.head_bottleneck), dim=1)
    expected = unit @ (prototypes.gain.float() * nn.functional.normalize(prototypes.direction.float(), dim=1)).t()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(prototypes(unit), expected)  # no rounding to bfloat16 on the way


def test_the_teacher_gives_no_gradients() -> None:
    teacher = Teacher(NANO).train()
    output = run(student_of().train(), bars(3, 2))
    targets = teacher(*views(2), output.regions)
    assert not targets.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
