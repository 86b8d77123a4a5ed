"""Agreement with the official implementation, whose outputs were recorded once in float32 (tests/golden/README.md).

CCD_GOLDEN_DIR names another set of the same form, CCD_TEST_DEVICE the device. Every size is read from its meta.json.
Tolerance: 2e-5 of the largest magnitude of the recorded tensor, and equality for everything that is not a float.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ccd_train.augment.geometry import WARPED, warp_masks
from ccd_train.data.charset import UNKNOWN, Charset
from ccd_train.models.ccd import Student, StudentOutput, Teacher
from ccd_train.models.decoding import read
from ccd_train.models.losses import Center, distillation_loss, segmentation_loss
from ccd_train.models.recognizer import Recognizer, recognition_loss
from ccd_train.models.regions import MIN_PIXELS, SLOTS, label_regions, pool
from ccd_train.training import schedules
from ccd_train.weights.backbone import read as read_official
from ccd_train.weights.recognizer import read_official as read_recognizer
from ccd_train.weights.tensors import load

FOLDER = Path(os.environ.get("CCD_GOLDEN_DIR", Path(__file__).parent / "golden"))
DEVICE = torch.device(os.environ.get("CCD_TEST_DEVICE", "cpu"))
torch.backends.cudnn.allow_tf32 = False  # torch rounds the inputs of convolutions to 10 bits otherwise
TOLERANCE = 2e-5
NETWORKS = ("student", "teacher")


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    return json.loads((FOLDER / "meta.json").read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FOLDER / "expected.safetensors", device=str(DEVICE))


@pytest.fixture(scope="module")
def networks(meta: dict[str, Any]) -> SimpleNamespace:
    """Student and teacher of the official checkpoint, in evaluation mode."""
    weights = read_official(FOLDER / "official_layout.pth", heads=meta["num_heads"])
    student, teacher = Student(weights.model).eval(), Teacher(weights.model)
    load(student, weights.student, "official student")
    load(teacher, weights.teacher, "official teacher")
    return SimpleNamespace(student=student.to(DEVICE), teacher=teacher.to(DEVICE), model=weights.model)


@pytest.fixture(scope="module")
def views(meta: dict[str, Any], recorded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    regular, irregular = recorded["images"].float().split(meta["batch"])
    return regular, irregular


@pytest.fixture(scope="module")
def output(meta: dict[str, Any], recorded: dict[str, Tensor], networks: Any, views: Any) -> StudentOutput:
    """The student's whole forward pass over both views."""
    with torch.no_grad():
        return networks.student(*views, recorded["theta"], recorded["masks"][: meta["batch"]])


@pytest.fixture(scope="module")
def targets(networks: Any, views: Any, output: StudentOutput) -> Tensor:
    return networks.teacher(*views, output.regions)


def assert_close(ours: Tensor, recorded: Tensor) -> None:
    assert ours.shape == recorded.shape
    difference = (ours.double().cpu() - recorded.double().cpu()).abs().max()
    assert difference <= TOLERANCE * recorded.double().abs().max(), f"off by {difference:.3g}"


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Bit-packed [B, K, H·W/8] → bool [B, K, H, W]."""
    bits = np.unpackbits(packed.cpu().numpy(), axis=-1, count=height * width)
    return torch.from_numpy(bits).bool().unflatten(-1, (height, width))


def as_masks(ids: Tensor) -> Tensor:
    """Region ids [B, H, W] → the official masks, one per slot: bool [B, K, H, W]."""
    return ids.cpu()[:, None] == torch.arange(1, SLOTS + 1)[:, None, None]


def per_step(meta: dict[str, Any], value: Any) -> Tensor:
    """A schedule of ours at every step of a run whose batch has 256 samples."""
    samples = [step * schedules.OFFICIAL_BATCH for step in range(meta["schedules"]["steps"])]
    return torch.tensor([value(seen) for seen in samples], dtype=torch.float64)


def test_the_sizes_are_read_from_the_checkpoint(meta: dict[str, Any], networks: Any) -> None:
    model = networks.model
    assert (model.width, model.depth, model.heads) == (meta["embed_dim"], meta["depth"], meta["num_heads"])
    assert (model.head_hidden, model.head_bottleneck) == (meta["head_hidden"], meta["head_bottleneck"])
    assert model.prototypes == meta["out_dim"]
    assert list(model.taps) == meta["out_indices"]


def test_our_constants_are_the_recorded_ones(meta: dict[str, Any]) -> None:
    assert (meta["max_regions"], meta["min_region_pixels"], meta["region_threshold"]) == (SLOTS, MIN_PIXELS, WARPED)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_backbone_tokens(name: str, recorded: dict[str, Tensor], networks: Any, views: Any) -> None:
    tokens, _ = getattr(networks, name).vit(torch.cat(views))
    assert_close(tokens, recorded[f"{name}.tokens"])


@pytest.mark.parametrize("tap", range(3))
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_tapped_features(name: str, tap: int, recorded: dict[str, Tensor], networks: Any, views: Any) -> None:
    _, taps = getattr(networks, name).vit(torch.cat(views))
    assert len(taps) == 3
    assert_close(taps[tap][:1], recorded[f"{name}.seg_feature.{tap}"])


def test_segmentation_logits(recorded: dict[str, Tensor], output: StudentOutput) -> None:
    assert_close(output.segmentation_logits, recorded["student.seg_logits"])


def test_regions_of_the_masks(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    """All but the noise mask, where the official code keeps the first 26 components in reading order."""
    masks = recorded["masks"]
    kept = [index for index in range(len(masks)) if index != meta["noise_mask_index"]]
    expected = unpack(recorded["regions"], *meta["image"])[kept]
    assert expected.any(), "an empty record would prove nothing"
    assert torch.equal(as_masks(label_regions(masks[kept])), expected)


def test_regions_of_both_views(meta: dict[str, Any], recorded: dict[str, Tensor], output: StudentOutput) -> None:
    assert torch.equal(as_masks(output.regions.ids), unpack(recorded["regions_two_views"], *meta["image"]))


@torch.no_grad()
def test_pooled_features(recorded: dict[str, Tensor], networks: Any, views: Any, output: StudentOutput) -> None:
    tokens, _ = networks.student.vit(torch.cat(views))
    features, _ = pool(tokens, output.regions.ids)
    assert_close(features, recorded["pooled"])


def test_which_regions_have_features(recorded: dict[str, Tensor], output: StudentOutput) -> None:
    tokens = torch.zeros(*recorded["student.tokens"].shape[:2], 1, device=DEVICE)
    _, valid = pool(tokens, output.regions.ids)
    assert torch.equal(valid, recorded["pooled_valid"])


def test_characters_that_both_views_hold(recorded: dict[str, Tensor], output: StudentOutput) -> None:
    expected = recorded["pairs_valid"].nonzero()
    assert torch.equal(torch.stack([output.regions.image, output.regions.slot], dim=1), expected)


def test_projections_of_the_student(recorded: dict[str, Tensor], output: StudentOutput) -> None:
    assert_close(output.projections, recorded["student.head_logits"])


def test_projections_of_the_teacher(recorded: dict[str, Tensor], targets: Tensor) -> None:
    assert_close(targets, recorded["teacher.head_logits"])


def test_distillation_loss(
    meta: dict[str, Any], recorded: dict[str, Tensor], output: StudentOutput, targets: Tensor
) -> None:
    loss = distillation_loss(
        output.projections,
        targets,
        recorded["center_before"],
        student_temperature=meta["student_temp"],
        teacher_temperature=meta["teacher_temp"],
        pairs_global=torch.tensor(output.regions.characters(), device=DEVICE),
    )
    assert_close(loss.reshape(1), recorded["loss.distillation"])


def test_center_after_the_update(meta: dict[str, Any], recorded: dict[str, Tensor], targets: Tensor) -> None:
    center = Center(meta["out_dim"], DEVICE)
    center.value.copy_(recorded["center_before"])
    center.update(targets, meta["center_momentum"])
    assert_close(center.value, recorded["center_after"])


def test_segmentation_cross_entropy(meta: dict[str, Any], recorded: dict[str, Tensor], output: StudentOutput) -> None:
    masks = recorded["masks"][: meta["batch"]]
    both = torch.cat([masks.bool(), warp_masks(masks, recorded["theta"])])
    loss = segmentation_loss(output.segmentation_logits, both)
    assert_close(loss.reshape(1), recorded["loss.segmentation_cross_entropy"])


def test_learning_rate_schedule(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    constants, steps, batch = meta["schedules"]["lr"], meta["schedules"]["steps"], schedules.OFFICIAL_BATCH
    assert constants["warmup_start"] == 0
    warmup, total = constants["warmup_steps"] * batch, steps * batch
    ours = per_step(
        meta, lambda seen: schedules.warmup_cosine(seen, batch, constants["base"], constants["final"], warmup, total)
    )
    assert_close(ours, recorded["schedule.lr"])


@pytest.mark.parametrize("name", ["weight_decay", "momentum"])
def test_cosine_schedules(name: str, meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    constants, total = meta["schedules"][name], meta["schedules"]["steps"] * schedules.OFFICIAL_BATCH
    ours = per_step(meta, lambda seen: schedules.cosine(seen, constants["start"], constants["end"], total))
    assert_close(ours, recorded[f"schedule.{name}"])


@pytest.fixture(scope="module")
def words() -> dict[str, Any]:
    """The fine-tuned recogniser's meta.json."""
    return json.loads((FOLDER / "recognizer_meta.json").read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def read_record() -> dict[str, Tensor]:
    return load_file(FOLDER / "recognizer_expected.safetensors", device=str(DEVICE))


@pytest.fixture(scope="module")
def charset(words: dict[str, Any]) -> Charset:
    return Charset("".join(words["charset"][: words["unknown_idx"]]))


@pytest.fixture(scope="module")
def recognizer(words: dict[str, Any], charset: Charset) -> Recognizer:
    path = FOLDER / "recognizer_official_layout.pth"
    return (
        read_recognizer(path, charset, words["num_heads"], words["n_head"], words["max_seq_len"]).network().to(DEVICE)
    )


@pytest.fixture(scope="module")
def memory(recognizer: Recognizer, read_record: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return recognizer.encode(read_record["images"].float())


def test_the_sizes_of_the_recognizer_are_read_from_its_checkpoint(words: dict[str, Any], charset: Charset) -> None:
    path = FOLDER / "recognizer_official_layout.pth"
    trained = read_recognizer(path, charset, words["num_heads"], words["n_head"], words["max_seq_len"])
    assert (trained.model.width, trained.model.depth) == (words["embed_dim"], words["depth"])
    ours = (trained.sizes.layers, trained.sizes.width, trained.sizes.hidden, trained.sizes.encoder_hidden)
    assert ours == (words["decoder_layers"], words["d_model"], words["d_inner"], words["encoder_hidden"])


def test_tokens_of_the_charset(words: dict[str, Any], charset: Charset) -> None:
    ours = (charset.unknown, charset.end, charset.padding)
    assert ours == (words["unknown_idx"], words["start_idx"], words["padding_idx"])


def test_targets_of_labels(words: dict[str, Any], read_record: dict[str, Tensor], charset: Charset) -> None:
    ours = torch.tensor([charset.encode(text, words["max_seq_len"]) for text in words["texts"]])
    assert torch.equal(ours, read_record["targets"].cpu())


def test_encoder_of_the_recognizer(read_record: dict[str, Tensor], memory: Tensor) -> None:
    assert_close(memory, read_record["encoded"])


@torch.no_grad()
def test_teacher_forced_logits(read_record: dict[str, Tensor], recognizer: Recognizer, memory: Tensor) -> None:
    assert_close(recognizer.decoder(memory, read_record["targets"]), read_record["train_logits"])


@torch.no_grad()
def test_recognition_loss(read_record: dict[str, Tensor], recognizer: Recognizer) -> None:
    targets = read_record["targets"]
    loss = recognition_loss(recognizer(read_record["images"].float(), targets), targets)
    assert_close(loss.reshape(1), read_record["loss"])


@torch.no_grad()
def test_greedy_probabilities(read_record: dict[str, Tensor], recognizer: Recognizer, memory: Tensor) -> None:
    """Step by step with keys and values kept, beyond the end of words as the official code does it."""
    recorded = read_record["greedy_probabilities"]
    decoder, state = recognizer.decoder, recognizer.decoder.begin(memory)
    token = torch.full((len(memory),), decoder.classes - 1, device=DEVICE)
    steps = []
    for _ in range(recorded.shape[1]):
        logits, state = decoder.step(state, token)
        steps.append(logits.softmax(dim=-1))
        token = steps[-1].argmax(dim=-1)
    assert_close(torch.stack(steps, dim=1), recorded)


def test_decoded_strings(
    words: dict[str, Any], read_record: dict[str, Tensor], recognizer: Recognizer, charset: Charset
) -> None:
    tokens, _ = read(recognizer, read_record["images"].float())
    unknown = words["charset"][words["unknown_idx"]]
    assert [charset.decode(row) for row in tokens.tolist()] == [
        text.replace(unknown, UNKNOWN) for text in words["decoded"]
    ]
