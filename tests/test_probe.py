"""The probe: which words it uses, that it finds what features hold and nothing else, and the verb."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import Tiny
from torch import Tensor

from ccd_train.commands import export
from ccd_train.commands import probe as command
from ccd_train.data.records import LmdbWriter
from ccd_train.errors import UserError
from ccd_train.models.ccd import Teacher
from ccd_train.models.regions import label_regions
from ccd_train.models.vit import VisionTransformer
from ccd_train.tasks.pretrain import probe
from ccd_train.tasks.pretrain.weights import open_weights
from ccd_train.weights.tensors import load

OFFICIAL = Path(__file__).parent / "golden" / "official_layout.pth"
COLORS = 8


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(32, 2, 2)


def painted(told: bool) -> probe.ProbeWords:
    """120 words of five bars; a bar's colour tells its letter, or (not told) has nothing to do with it."""
    random = np.random.default_rng(0)
    images, masks, labels = [], [], []
    for _ in range(120):
        image, mask = np.full((32, 128, 3), 20, np.uint8), np.zeros((32, 128), np.uint8)
        letters = random.integers(0, COLORS, 5)
        for place, letter in enumerate(letters):
            left = 6 + 24 * place + int(random.integers(0, 8))
            color = letter if told else random.integers(0, COLORS)
            image[6:26, left : left + 9] = (20 + 30 * color, 250 - 25 * color, 200 if color % 2 else 80)
            mask[6:26, left : left + 9] = 1
        images.append(image)
        masks.append(mask)
        labels.append("".join("ABDEFGHN"[letter] for letter in letters))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return probe.ProbeWords(pixels, label_regions(torch.from_numpy(np.stack(masks))), tuple(labels), 150)


def test_what_the_features_hold_is_found() -> None:
    score = probe.probe(vit(), painted(told=True))
    assert score.linear > 0.9
    assert score.knn > 0.9
    assert (score.characters, score.classes, score.usable) == (600, COLORS, 0.8)


def test_what_they_do_not_hold_is_not_found() -> None:
    score = probe.probe(vit(), painted(told=False))
    assert score.chance == pytest.approx(1 / COLORS, abs=0.06)
    assert score.linear < 0.3
    assert score.knn < 0.3


def test_the_score_repeats_and_the_network_stays_as_it_was() -> None:
    network, words = vit().train(), painted(told=False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert probe.probe(network, words) == probe.probe(network, words)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_half_precision_network_is_probed_too() -> None:
    assert probe.probe(vit().bfloat16(), painted(told=True)).linear > 0.9


def test_letters_go_with_their_own_regions() -> None:
    """Features that are the mean colour of a region: those of the letter's own bar."""

    class Colors(VisionTransformer):
        def forward(self, images: Tensor, keys: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
            return images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)).flatten(2).transpose(1, 2), []

    words = painted(told=True)
    features, classes, _ = probe.characters(Colors(8, 1, 1), words)
    mean = torch.stack([features[classes == number].mean(dim=0) for number in range(COLORS)])
    distance = torch.cdist(features, mean)
    assert torch.equal(distance.argmin(dim=1), classes)


def test_words_are_usable_if_regions_equal_letters(tmp_path: Path) -> None:
    def image(bars: int) -> bytes:
        pixels = np.full((32, 128, 3), 255, np.uint8)
        for bar in range(bars):
            pixels[6:26, 6 + 14 * bar : 13 + 14 * bar] = 0
        return cv2.imencode(".png", pixels)[1].tobytes()

    with LmdbWriter(tmp_path / "words") as writer:
        for number in range(10):
            writer.add(image(3), "A B" if number % 5 == 0 else "AB-")  # "A B" is two letters
        writer.add(image(4), "AB")
        writer.add(image(2), None)
        writer.add(b"no image", "AB")
    words = probe.read_words([tmp_path], limit=100)
    assert words.labels == ("AB-",) * 8
    assert words.read == 11
    assert words.ids.amax(dim=(1, 2)).tolist() == [3] * 8
    assert probe.characters(vit(), words)[1].tolist() == [0, 1] * 8  # the hyphen is a region, but no letter
    assert probe.read_words([tmp_path], limit=10).read == 10
    with pytest.raises(UserError, match="6 of 8 words"):
        probe.read_words([tmp_path], limit=8)


def test_both_cases_of_a_letter_are_one_class_where_they_look_alike() -> None:
    assert "cCoOxX".translate(probe.FOLD) == "CCOOXX"
    assert "aAbBgG".translate(probe.FOLD) == "aAbBgG"
    assert len({letter.translate(probe.FOLD) for letter in map(chr, range(128)) if letter.isalnum()}) == 47


def test_words_without_labels_are_refused(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path) as writer:
        writer.add(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    with pytest.raises(UserError, match="no labelled words"):
        probe.read_words([tmp_path], limit=10)


def test_the_verb_scores_a_network_beside_an_untrained_one(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--weights", str(OFFICIAL), "--heads", "2", "--data", str(tiny.lmdb), "--words", "120"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ letters of \d+ classes from \d+ usable words \(\d+\.\d% of 120\)", out)
    assert len(re.findall(r"linear +\d+\.\d%   5-NN +\d+\.\d%", out)) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "x"], "--weights"),
        (["--weights", "x"], "--data"),
        (["--weights", str(OFFICIAL), "--data", "/nowhere", "--heads", "2"], "/nowhere"),
        (["--weights", "/nowhere", "--data", "x"], "/nowhere"),
        (["--weights", "x", "--data", "x", "--words", "1"], "words"),
    ],
)
def test_the_verb_refuses_in_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        command.main(arguments)


def test_export_needs_no_run_to_be_opened_by_the_probe(tmp_path: Path) -> None:
    """An official checkpoint, and its export in our form, have the same features."""
    assert export.main(["--weights", str(OFFICIAL), "--heads", "2", "--out", str(tmp_path)]) == 0
    words = painted(told=True)
    scores = []
    for path, heads in ((OFFICIAL, 2), (tmp_path, None)):
        found = open_weights(path, heads)
        network = Teacher(found.model)
        load(network, found.teacher, found.origin)
        scores.append(probe.probe(network.vit, words))
    assert scores[0] == scores[1]
