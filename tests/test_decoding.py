"""Greedy decoding keeps keys and values: the same words as without, each as if it were alone, and no step too many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ccd_train.config import pretraining as config
from ccd_train.config import recognition as finetuning
from ccd_train.data.charset import read_charset
from ccd_train.models.decoding import DecodedWords, decode, read
from ccd_train.models.recognizer import Decoder, Recognizer

CHARSET = read_charset("36")
END, PADDING = CHARSET.end, CHARSET.padding


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    torch.manual_seed(5)
    model = config.Model(width=16, depth=2, heads=2)
    sizes = finetuning.ReadingHead(layers=2, width=32, heads=4, hidden=16, encoder_hidden=16, length=12)
    return Recognizer(model, sizes, CHARSET.classes).eval()


@pytest.fixture(scope="module")
def decoder(recognizer: Recognizer) -> Decoder:
    """Untrained, but its words end sooner or later."""
    with torch.no_grad():
        recognizer.decoder.classifier.bias[END] += 0.8
    return recognizer.decoder


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """Images as the decoder sees them, so different that their words are."""
    generator = torch.Generator().manual_seed(1)
    return 8 * torch.randn(48, 1, 32, generator=generator) + torch.randn(48, 256, 32, generator=generator)


@pytest.fixture(scope="module")
def words(decoder: Decoder, memory: Tensor) -> DecodedWords:
    with torch.no_grad():
        return decode(decoder, memory)


@pytest.fixture(scope="module")
def lengths(words: DecodedWords) -> Tensor:
    """Tokens of each word, its end among them."""
    return (words.tokens != PADDING).sum(dim=1)


@torch.no_grad()
def without_cache(decoder: Decoder, memory: Tensor) -> DecodedWords:
    """Every token from the whole word so far, computed anew; no early end."""
    tokens = torch.full((len(memory), 1), END)
    confidences = torch.empty(len(memory), 0)
    ended = torch.zeros(len(memory), dtype=torch.bool)
    for _ in range(decoder.length):
        confidence, token = decoder(memory, tokens)[:, -1].softmax(dim=-1).max(dim=-1)
        token = torch.where(ended, PADDING, token)
        confidences = torch.cat([confidences, torch.where(ended, 1.0, confidence)[:, None]], dim=1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        ended |= token == END
    return DecodedWords(tokens[:, 1:], confidences)


def steps(decoder: Decoder, memory: Tensor) -> int:
    """How often the decoder is run."""
    counted: list[int] = []
    handle = decoder.norm.register_forward_hook(lambda *_: counted.append(1))
    with torch.no_grad():
        decode(decoder, memory)
    handle.remove()
    return len(counted)


def test_the_words_of_these_tests_differ(decoder: Decoder, lengths: Tensor) -> None:
    assert lengths.min() <= 4
    assert lengths.max() == decoder.length


def test_equal_to_decoding_without_a_cache(decoder: Decoder, memory: Tensor, words: DecodedWords) -> None:
    plain = without_cache(decoder, memory)
    assert torch.equal(words.tokens, plain.tokens)
    assert torch.allclose(words.confidences, plain.confidences, atol=1e-5)


def test_a_word_is_the_same_in_any_batch(decoder: Decoder, memory: Tensor, words: DecodedWords) -> None:
    for index in range(4):
        with torch.no_grad():
            alone = decode(decoder, memory[index : index + 1])
        assert torch.equal(alone.tokens[0], words.tokens[index])
        assert torch.allclose(alone.confidences[0], words.confidences[index], atol=1e-5)


def test_it_stops_when_every_word_has_ended(decoder: Decoder, memory: Tensor, lengths: Tensor) -> None:
    short = lengths <= 4
    assert steps(decoder, memory[short]) == lengths[short].max()
    assert steps(decoder, memory) == decoder.length


@torch.no_grad()
def test_stopping_early_changes_nothing(decoder: Decoder, memory: Tensor, lengths: Tensor) -> None:
    early, late = (decode(decoder, memory[lengths <= 4], stop) for stop in (True, False))
    assert torch.equal(early.tokens, late.tokens)
    assert torch.equal(early.confidences, late.confidences)


def test_confidences_are_probabilities_and_one_after_the_end(words: DecodedWords) -> None:
    assert ((words.confidences > 0) & (words.confidences <= 1)).all()
    assert (words.confidences[words.tokens == PADDING] == 1).all()
    assert (words.confidences[words.tokens != PADDING] < 1).all()


def test_nothing_follows_the_end_but_padding(words: DecodedWords) -> None:
    for row in words.tokens.tolist():
        after = row[row.index(END) + 1 :] if END in row else []
        assert set(after) <= {PADDING}


def test_images_are_encoded_and_decoded(recognizer: Recognizer) -> None:
    images = torch.randn(3, 3, 32, 128)
    with torch.no_grad():
        expected = decode(recognizer.decoder, recognizer.encode(images))
    assert torch.equal(read(recognizer, images).tokens, expected.tokens)
