"""Agreement with the public code of the two pixel tasks, recorded once in float32 (tests/golden/downstream/README.md).

CCD_GOLDEN_DOWNSTREAM names another set of the same form. Every size and name is read from its meta.json.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ccd_train.augment.views import MEAN, STD
from ccd_train.config.pixels import MaskHead, PictureHead
from ccd_train.config.pretraining import Model
from ccd_train.data.pixels import by_route, decode_codes, labels_of, open_rgb, resize_bicubic
from ccd_train.models import scores
from ccd_train.models.pixels import PixelDecoder, PixelNetwork, pixel_loss, position_table
from ccd_train.training import schedules
from ccd_train.training.engine import parameter_groups
from ccd_train.weights.official import official_name

FOLDER = Path(os.environ.get("CCD_GOLDEN_DOWNSTREAM", Path(__file__).parent / "golden" / "downstream"))
TASKS = ("segment", "superresolve")
HEADS: dict[str, Any] = {"segment": MaskHead, "superresolve": partial(PictureHead, residual=False)}
TO_OURS = (("decoder_blocks.", "blocks."), ("decoder_norm.", "norm."), ("decoder_pred.", "prediction."))
PARTS = (
    (".norm1.", ".attention_norm."), (".norm2.", ".mlp_norm."), (".attn.proj.", ".attention.projection."),
    (".attn.", ".attention."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.2."),
)  # fmt: skip


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    return json.loads((FOLDER / "meta.json").read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def ours(name: str) -> str:
    """The decoder's name of a tensor."""
    for theirs, mine in (*TO_OURS, *PARTS):
        name = name.replace(theirs, mine)
    return name


def head_of(meta: dict[str, Any], task: str) -> Any:
    return HEADS[task](layers=meta["depth"], heads=meta["num_heads"])


def decoder(meta: dict[str, Any], recorded: dict[str, Tensor], task: str) -> PixelDecoder:
    found = PixelDecoder(meta["embed_dim"], head_of(meta, task))
    names = [name for name in meta[f"{task}.parameters"] if name != "decoder_pos_embed"]
    found.load_state_dict({ours(name): recorded[f"{task}.decoder.{name}"].float() for name in names})
    return found


def patches_of(pictures: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, N, 16·C], the channel fastest."""
    cut = pictures.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C h p w q
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def pictures_of(patches: Tensor, meta: dict[str, Any]) -> Tensor:
    patch, (height, width) = meta["patch_size"], meta["image"]
    cells = patches.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, -1))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    largest = float(expected.float().abs().max())
    assert float((found.detach().float() - expected.float()).abs().max()) <= tolerance * largest


def mean_loss(output: Tensor, target: Tensor, kept: Tensor | None = None, logits: bool = False) -> Tensor:
    kept = torch.ones_like(target, dtype=torch.bool) if kept is None else kept
    return pixel_loss(output, target, kept, kept.sum().clamp(min=1), logits)


@pytest.mark.parametrize("task", TASKS)
def test_decoder(meta: dict[str, Any], recorded: dict[str, Tensor], task: str) -> None:
    """The table, the patches, their order, the loss, and gradients of it."""
    network, tokens = decoder(meta, recorded, task), recorded[f"{task}.tokens"].float().requires_grad_()
    assert_close(network.table, recorded[f"{task}.decoder.decoder_pos_embed"])
    output = network(tokens)
    expected = recorded[f"{task}.predicted_patches"]
    assert_close(patches_of(output, meta["patch_size"]), expected)
    assert_close(output[:1], recorded[f"{task}.predicted_image"])
    loss = mean_loss(output, recorded[f"{task}.target"].float())
    assert loss.item() == pytest.approx(float(recorded[f"{task}.mse"]), rel=1e-5)
    loss.backward()
    parameters = dict(network.named_parameters())
    names = [name.removeprefix(f"{task}.grad.") for name in recorded if name.startswith(f"{task}.grad.")]
    assert len(names) >= 6
    for name in names:
        gradient = tokens.grad[:1] if name == "tokens" else parameters[ours(name)].grad  # type: ignore[index]
        assert_close(gradient, recorded[f"{task}.grad.{name}"], 1e-4)  # type: ignore[arg-type]
    network.table.zero_()
    quiet = patches_of(network(recorded[f"{task}.tokens"][:1].float() * 0.01), meta["patch_size"])
    assert_close(quiet, recorded[f"{task}.quiet.predicted_patches"])


@pytest.mark.parametrize("task", TASKS)
def test_six_steps(meta: dict[str, Any], recorded: dict[str, Tensor], task: str) -> None:
    """The recipe in small: rates, groups with and without decay, AdamW, losses."""
    steps, network = meta[f"{task}.steps"], decoder(meta, recorded, task)
    network.part = lambda name: "decoder"  # type: ignore[assignment]
    groups = parameter_groups(network)
    named = {id(parameter): name for name, parameter in network.named_parameters()}
    for key, decays in (("with_decay", True), ("without_decay", False)):
        found = {named[id(one)] for group in groups if group["decays"] is decays for one in group["params"]}
        assert found == {ours(name) for name in steps[key]}
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(steps["betas"]), eps=steps["eps"])
    tokens, target = recorded[f"{task}.tokens"].float(), recorded[f"{task}.target"].float()
    for epoch, (rate, expected) in enumerate(zip(steps["rates"], steps["losses"], strict=True)):
        lr = schedules.warmup_cosine(epoch, 0, steps["lr"], 0.0, steps["warmup_epochs"], steps["epochs"])
        assert lr == pytest.approx(rate, abs=1e-12)
        for group in optimizer.param_groups:
            group |= {"lr": lr, "weight_decay": steps["weight_decay"] if group["decays"] else 0.0}
        optimizer.zero_grad()
        loss = mean_loss(network(tokens), target)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        optimizer.step()
    for name in ("decoder_pred.weight", "decoder_norm.weight"):
        assert_close(network.state_dict()[ours(name)], recorded[f"{task}.steps.{name}"], 1e-5)


def test_own_losses(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    """Cross-entropy over what is not ignored, and the residual."""
    logits = pictures_of(recorded["segment.predicted_patches"], meta).requires_grad_()
    target, ignored = recorded["segment.target"].float(), recorded["ours.segment.ignored"]
    loss = mean_loss(logits, target, ~ignored, logits=True)
    assert loss.item() == pytest.approx(float(recorded["ours.segment.bce"]), rel=1e-5)
    loss.backward()
    assert_close(logits.grad, recorded["ours.segment.grad.predicted_image"], 1e-4)  # type: ignore[arg-type]
    assert mean_loss(logits, target, torch.zeros_like(ignored), logits=True).item() == 0.0
    output = pictures_of(recorded["superresolve.predicted_patches"], meta).requires_grad_()
    loss = mean_loss(recorded["ours.superresolve.input"].float() + output, recorded["superresolve.target"].float())
    assert loss.item() == pytest.approx(float(recorded["ours.superresolve.residual_mse"]), rel=1e-5)
    loss.backward()
    assert_close(output.grad[:1], recorded["ours.superresolve.grad.predicted_image"], 1e-4)  # type: ignore[index]


def test_table(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    (name,) = (name for name in recorded if name.startswith("sincos_"))
    rows = meta[f"{name}_rows"]
    assert_close(position_table(recorded[name].shape[1])[0, rows], recorded[name])


@pytest.mark.parametrize("task", TASKS)
def test_whole_network(meta: dict[str, Any], recorded: dict[str, Tensor], task: str) -> None:
    """Ours takes off ImageNet's mean, SSM does not: it is put on before."""
    depth = meta["encoder_depth"]
    model = Model(width=meta["embed_dim"], depth=depth, heads=meta["num_heads"], drop_path=0.0)
    network = PixelNetwork(model, head_of(meta, task))
    stored = torch.load(FOLDER / f"ssm_{task}.pth", weights_only=True)["model"]

    def theirs(name: str) -> str:
        if name.startswith("vit."):
            return official_name(name).removeprefix("backbone.")
        return next(one for one in stored if one.startswith("decoder_") and ours(one) == name.removeprefix("decoder."))

    network.load_state_dict({name: stored[theirs(name)].float() for name in network.state_dict()})
    network.decoder.table.copy_(stored["decoder_pos_embed"].float())  # theirs went through float16
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    given = recorded[f"whole.{task}.input_u8"].float() / 255 * std + mean
    output = network(given)
    assert_close(patches_of(output, meta["patch_size"]), recorded[f"whole.{task}.predicted_patches"])
    tokens, _ = network.vit((given - mean) / std)
    assert_close(tokens, recorded[f"whole.{task}.latent"], 1e-3)  # float16
    loss = mean_loss(output, recorded[f"whole.{task}.target_u8"].float() / 255)
    assert loss.item() == pytest.approx(float(recorded[f"whole.{task}.loss"]), rel=1e-5)
    loss.backward()
    parameters = {theirs(name): parameter for name, parameter in network.named_parameters()}
    for name in (name for name in recorded if name.startswith(f"whole.{task}.grad.")):
        gradient = parameters[name.removeprefix(f"whole.{task}.grad.")].grad
        assert_close(gradient, recorded[name], 1e-4)  # type: ignore[arg-type]


def test_preparation(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    """Exact bytes with the Pillow that made them, else one grey level."""
    off = 0 if meta["made_with"]["pillow"] == PIL.__version__ else 1

    def same(found: np.ndarray, expected: Tensor) -> None:
        wanted = expected.movedim(0, -1).numpy().astype(int)
        assert np.abs(found.reshape(wanted.shape).astype(int) - wanted).max() <= off

    height, width = meta["image"]
    for number in range(len(meta["textzoom.words"])):
        hr, lr = (open_rgb((FOLDER / "pairs" / f"{number}_{kind}.png").read_bytes()) for kind in ("hr", "lr"))
        small = resize_bicubic(lr, (width // 2, height // 2))
        same(np.asarray(resize_bicubic(hr)), recorded["textzoom.hr_u8"][number])
        same(np.asarray(small), recorded["textzoom.lr_u8"][number])
        same(by_route(lr, "stored"), recorded["textzoom.lr_resized_u8"][number])
        same(by_route(lr, "x2"), torch.tensor(np.asarray(resize_bicubic(small))).movedim(-1, 0))
    upsampled = scores.bicubic(recorded["textzoom.lr_u8"][:1].float() / 255)
    assert_close(upsampled, recorded["textzoom.bicubic"], 1e-6)
    for number, name in enumerate(meta["textseg.names"]):
        image = open_rgb((FOLDER / "textseg" / "image" / f"{name}.jpg").read_bytes())
        same(np.asarray(resize_bicubic(image)), recorded["textseg.ssm_image_u8"][number])
        mask = (FOLDER / "textseg" / "semantic_label" / f"{name}_maskfg.png").read_bytes()
        codes = decode_codes(mask)
        for ending, effects in (("bg", "background"), ("fg", "text"), ("ig", "ignored")):
            labels = labels_of(codes, effects).astype(np.int16)  # type: ignore[arg-type]
            labels[labels == 255] = meta["textseg.ignore"]
            assert np.array_equal(labels, recorded[f"textseg.{name}.effects_to_{ending}"].numpy())


def test_scores_of_pictures(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    truth = recorded["textzoom.hr_u8"]
    enlarged = scores.bicubic(recorded["textzoom.lr_u8"].float() / 255)
    errors = scores.squared_errors(enlarged, truth)
    levels = truth.float() / 255
    alike = scores.ssim(enlarged, levels)
    assert scores.psnr_of_batches(errors) == pytest.approx(meta["textzoom.psnr_of_batch"], abs=1e-3)
    singles = [scores.psnr_of_batches(one) for one in errors.split(1)]
    assert singles == pytest.approx(meta["textzoom.psnr_of_images"], abs=1e-3)
    assert alike.tolist() == pytest.approx(meta["textzoom.ssim_of_images"], abs=1e-5)
    assert float(alike.mean()) == pytest.approx(meta["textzoom.ssim_of_batch"], abs=1e-5)
    assert scores.psnr_ssm(errors) == pytest.approx(meta["textzoom.ssm_psnr_mean"], abs=1e-3)
    for key in (key for key in meta if key.startswith("textzoom.set_by_batches_of_")):
        size = int(key.rpartition("_")[2])
        assert scores.psnr_of_batches(errors, size) == pytest.approx(meta[key]["psnr_avg"], abs=1e-3)
    assert scores.psnr(enlarged, truth).tolist() == pytest.approx(meta["textzoom.ours_psnr_of_images"], abs=1e-6)
    on_8_bits = scores.ssim(scores.seen(enlarged) / 255, levels)
    assert on_8_bits.tolist() == pytest.approx(meta["textzoom.ours_ssim_of_images"], abs=1e-5)
    subsets = meta["textzoom.subsets"]
    for name, members in subsets["members"].items():
        assert scores.psnr_of_batches(errors[members]) == pytest.approx(subsets["psnr"][name], abs=1e-3)


def test_scores_of_strange_pictures(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    images, truth = recorded["quality.predicted"].float(), recorded["quality.truth_u8"]
    errors = scores.squared_errors(images, truth)
    for number, expected in enumerate(meta["quality.psnr"]):
        found = scores.psnr_of_batches(errors[number : number + 1])
        flat = meta["quality.names"][number] == "two flat greys"
        assert found == (
            float("inf") if expected == "infinite" else pytest.approx(expected, abs=2e-3 if flat else 1e-3)
        )
        assert scores.psnr_ssm(errors[number : number + 1]) == pytest.approx(meta["quality.ssm_psnr"][number], abs=2e-3)
    assert scores.ssim(images, truth.float() / 255).tolist() == pytest.approx(meta["quality.ssim"], abs=1e-5)
    assert scores.psnr(images, truth).tolist() == pytest.approx(meta["quality.ours_psnr"], abs=1e-6)
    stored = scores.ssim(scores.seen(images) / 255, truth.float() / 255)
    assert stored.tolist() == pytest.approx(meta["quality.ours_ssim"], abs=1e-5)


def test_scores_of_masks(meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    predicted, truth = (recorded[f"scores.{name}"].bool() for name in ("predicted", "truth"))
    ignored = recorded["scores.ignored"]
    for key in ("scores.textseg", "scores.textseg_texts_only"):
        expected = meta[key]
        members = expected["members"]
        counts = scores.count(predicted[members], truth[members], ignored[members])
        for one, row in zip(expected["of_images"], counts.tolist(), strict=True):
            tp, fp, fn, _ = row
            assert (tp, tp + fp + fn, tp + fp, tp + fn) == tuple(
                one[name] for name in ("tp", "union", "predicted", "truth")
            )
        assert scores.fg_iou(counts) == pytest.approx(expected["fg_iou"], abs=1e-6)
        assert scores.miou(counts) == pytest.approx(expected["miou"], abs=1e-6)
        assert scores.f_score(counts) == pytest.approx(expected["f_score"], abs=1e-6)
    counts = scores.count(predicted, truth, ignored)
    over_set = meta["scores.set_counts_without_ignored"]
    assert counts.sum(0).tolist()[:3] == [over_set[name] for name in ("tp", "fp", "fn")]
    for found, expected in zip(scores.f_of_images(counts).tolist(), meta["scores.ours_f_of_images"], strict=True):
        assert found != found if expected is None else found == pytest.approx(expected, abs=1e-6)
    everything = scores.count(predicted, truth, torch.zeros_like(ignored))
    whole = scores.iou_of_images(everything)
    assert whole.tolist() == pytest.approx(meta["scores.ssm_of_images"], abs=1e-6)
    assert float(whole.mean()) == pytest.approx(meta["scores.ssm_mean_of_images"], abs=1e-6)
    for found, theirs in zip(whole.tolist(), meta["scores.ccd_fore_iu"], strict=True):
        assert theirs is None or found == pytest.approx(theirs, abs=1e-6)


def test_scores_of_nothing() -> None:
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    counts = scores.count(nothing, nothing, nothing)
    assert scores.fg_iou(counts) is None and scores.miou(counts) is None and scores.f_score(counts) == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_schedule(meta: dict[str, Any], task: str) -> None:
    expected, unit = meta["schedule"][task], 10_000
    rates = [
        schedules.warmup_cosine(
            epoch * unit, 0, expected["lr"], expected["min_lr"], expected["warmup_epochs"] * unit,
            expected["epochs"] * unit,
        )
        for epoch in expected["at"]
    ]  # fmt: skip
    assert rates == pytest.approx(expected["value"], abs=1e-12)
