"""The recogniser: which token sees what, what its dropout depends on, and what its loss counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ccd_train import draws
from ccd_train.config import pretraining as config
from ccd_train.config import recognition as finetuning
from ccd_train.data.charset import read_charset
from ccd_train.errors import UserError
from ccd_train.models.recognizer import Recognizer, grid_sinusoids, recognition_loss, sinusoids, waves

CHARSET = read_charset("DICT90")
MODEL = config.Model(width=16, depth=2, heads=2, drop_path=0.2)
SIZES = finetuning.ReadingHead(layers=2, width=16, heads=2, hidden=8, encoder_hidden=12, dropout=0.2)
WORDS = ("Street", "a", "12:30", "")


@pytest.fixture()
def recognizer() -> Recognizer:
    torch.manual_seed(3)
    return Recognizer(MODEL, SIZES, CHARSET.classes).eval()


def targets() -> Tensor:
    return torch.tensor([CHARSET.encode(word) for word in WORDS])


def images() -> Tensor:
    return torch.randn(len(WORDS), 3, 32, 128, generator=torch.Generator().manual_seed(1))


def keys() -> Tensor:
    return draws.sample_keys(7, torch.zeros(len(WORDS), dtype=torch.int64), torch.arange(len(WORDS)))


def test_shapes(recognizer: Recognizer) -> None:
    assert recognizer.encode(images()).shape == (4, 256, SIZES.width)
    assert recognizer(images(), targets()).shape == (4, 24, CHARSET.classes)


@pytest.mark.parametrize("place_codes", [False, True])
def test_no_layer_gets_another_type_than_its_weights(place_codes: bool) -> None:
    """A GPU refuses that where a CPU does not. Buffers stay float32, as DeepSpeed leaves them."""
    network = Recognizer(MODEL, replace(SIZES, place_codes=place_codes), CHARSET.classes).train()
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm | nn.Linear):
            layer.register_forward_pre_hook(lambda one, given: seen.append((given[0].dtype, one.weight.dtype)))
    logits = network(images().bfloat16(), targets(), keys())
    decoder = network.eval().decoder
    decoder.step(decoder.begin(network.encode(images().bfloat16())), torch.zeros(len(WORDS), dtype=torch.int64))
    assert logits.dtype == torch.bfloat16
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@torch.no_grad()
def test_a_token_sees_those_before_it_and_none_after(recognizer: Recognizer) -> None:
    other = targets()
    other[:, 3] = 5
    before, after = recognizer(images(), targets()), recognizer(images(), other)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[0, 3], after[0, 3])


@torch.no_grad()
def test_padding_is_seen_by_nobody(recognizer: Recognizer) -> None:
    longer = recognizer(images(), targets())
    assert torch.allclose(recognizer(images(), targets()[:, :8]), longer[:, :7], atol=1e-6)


@torch.no_grad()
def test_the_tokens_one_by_one_are_the_tokens_at_once(recognizer: Recognizer) -> None:
    state = recognizer.decoder.begin(recognizer.encode(images()))
    rows = []
    for token in targets()[:1, :7].expand(4, -1).unbind(dim=1):  # the first word: no padding so far
        logits, state = recognizer.decoder.step(state, token)
        rows.append(logits)
    whole = recognizer(images(), targets()[:1, :8].expand(4, -1))
    assert torch.allclose(torch.stack(rows, dim=1), whole, atol=1e-5)


def test_dropout_depends_on_the_keys_and_not_on_the_batch(recognizer: Recognizer) -> None:
    recognizer.train()
    whole = recognizer(images(), targets(), keys())
    torch.manual_seed(99)
    halves = [recognizer(images()[half], targets()[half], keys()[half]) for half in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-6)
    assert not torch.allclose(recognizer(images(), targets(), keys() + 1), whole, atol=1e-2)
    assert not torch.allclose(recognizer.eval()(images(), targets()), whole, atol=1e-2)


def test_without_dropout_training_is_evaluation() -> None:
    """So the attention that is written out for dropout is the fused one."""
    model, sizes = (
        config.Model(width=16, depth=1, heads=2, drop_path=0.0),
        finetuning.ReadingHead(2, 16, 2, 8, 12, 1e-9),
    )
    torch.manual_seed(0)
    recognizer = Recognizer(model, sizes, CHARSET.classes)
    trained = recognizer(images(), targets(), keys())
    assert torch.allclose(trained, recognizer.eval()(images(), targets()), atol=1e-5)


def test_every_parameter_learns(recognizer: Recognizer) -> None:
    recognition_loss(recognizer.train()(images(), targets(), keys()), targets()).backward()
    assert not [name for name, parameter in recognizer.named_parameters() if parameter.grad is None]
    assert recognizer.decoder.embedding.weight.grad is not None
    assert not recognizer.decoder.embedding.weight.grad[CHARSET.padding].any()


def test_the_loss_is_a_mean_over_tokens_without_padding(recognizer: Recognizer) -> None:
    logits = recognizer(images(), targets())
    picked = logits.log_softmax(dim=-1)
    expected = [
        -picked[word, place, token]
        for word, row in enumerate(targets()[:, 1:].tolist())
        for place, token in enumerate(row)
        if token != CHARSET.padding
    ]
    assert len(expected) == sum(len(word) + 1 for word in WORDS)
    assert torch.allclose(recognition_loss(logits, targets()), torch.stack(expected).mean())


def test_parts_of_a_batch_add_up_by_the_global_count(recognizer: Recognizer) -> None:
    logits, count = recognizer(images(), targets()), torch.tensor([sum(len(word) + 1 for word in WORDS)])
    parts = [recognition_loss(logits[rows], targets()[rows], count) for rows in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(parts[0] + parts[1], recognition_loss(logits, targets()))


def test_a_batch_of_padding_costs_nothing() -> None:
    nothing = torch.full((1, 5), CHARSET.padding)
    assert recognition_loss(torch.zeros(1, 4, CHARSET.classes), nothing) == 0


def test_positions_are_sines_and_cosines() -> None:
    codes = sinusoids(3, 4)[0]
    angle = torch.tensor([0.0, 1.0, 2.0])
    assert torch.allclose(codes[:, 0], angle.sin())
    assert torch.allclose(codes[:, 1], angle.cos())
    assert torch.allclose(codes[:, 2], (angle / 100).sin())


def test_every_place_has_a_code_of_its_own() -> None:
    codes = grid_sinusoids(16)[0].unflatten(0, (8, 32))
    assert torch.equal(codes[3, :, :8], waves(8, 4)[3].expand(32, 8))
    assert torch.equal(codes[:, 5, 8:], waves(32, 4)[5].expand(8, 8))
    assert torch.cdist(codes.flatten(0, 1), codes.flatten(0, 1)).fill_diagonal_(9).min() > 0.5


def test_place_codes_are_waves_from_twice_the_side_to_two_and_a_half_patches() -> None:
    places = torch.arange(32.0)
    assert torch.allclose(waves(32, 3)[:, 0], (2 * torch.pi * places / 64).sin(), atol=1e-6)
    assert torch.allclose(waves(32, 3)[:, 5], (2 * torch.pi * places / 2.5).cos(), atol=1e-4)


@torch.no_grad()
def test_place_codes_are_added_to_what_the_decoder_sees_of_the_image(recognizer: Recognizer) -> None:
    assert recognizer.places is None  # as in the official code
    placed = Recognizer(MODEL, replace(SIZES, place_codes=True), CHARSET.classes).eval()
    placed.load_state_dict(recognizer.state_dict())
    assert torch.equal(placed.encode(images()), recognizer.encode(images()) + grid_sinusoids(SIZES.width))


@pytest.mark.parametrize("place_codes", [False, True])
def test_nothing_but_parameters_is_saved(place_codes: bool) -> None:
    recognizer = Recognizer(MODEL, replace(SIZES, place_codes=place_codes), CHARSET.classes)
    assert set(recognizer.state_dict()) == {name for name, _ in recognizer.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "recognizer.width = 512"),
        ({"dropout": 1.0}, "recognizer.dropout"),
        ({"length": 2}, "length"),
        ({"heads": 3, "width": 27, "place_codes": True}, "width = 27: must be a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetuning.ReadingHead(**changes).check()  # type: ignore[arg-type]
