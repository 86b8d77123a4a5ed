"""Greedy decoding: from images to tokens, the likeliest one after the other.

Shapes: B images, T tokens of a word at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ccd_train.models.recognizer import Decoder, Recognizer


class DecodedWords(NamedTuple):
    tokens: Tensor
    """int64 [B, T]: characters, the end, then padding. A word may have no end: it is T tokens long."""
    confidences: Tensor
    """float32 [B, T]: the probability of each token, given those before it; 1 after the end."""


@torch.inference_mode()
def read(recognizer: Recognizer, images: Tensor) -> DecodedWords:
    """Reads normalised images [B, 3, 32, 128]; the recogniser must be in evaluation mode."""
    assert not recognizer.training, "dropout would spoil the words"
    return decode(recognizer.decoder, recognizer.encode(images))


def decode(decoder: Decoder, memory: Tensor, stop_early: bool = True) -> DecodedWords:
    """Memory [B, S, E] → words. stop_early ends when all words have ended; without it the work is always the same."""
    padding, end = decoder.classes, decoder.classes - 1
    state = decoder.begin(memory)
    token = torch.full_like(memory[:, 0, 0], end, dtype=torch.int64)  # exporters see no number in it
    ended = torch.zeros_like(token, dtype=torch.bool)
    tokens, confidences = [], []
    for _ in range(decoder.length):
        logits, state = decoder.step(state, token)
        confidence, token = logits.float().softmax(dim=-1).max(dim=-1)
        token = torch.where(ended, padding, token)
        tokens.append(token)
        confidences.append(torch.where(ended, 1.0, confidence))
        ended = ended | (token == end)
        if stop_early and bool(ended.all()):
            break
    missing = decoder.length - len(tokens)
    if missing:
        tokens += [torch.full_like(token, padding)] * missing
        confidences += [torch.ones_like(confidences[0])] * missing
    return DecodedWords(torch.stack(tokens, dim=1), torch.stack(confidences, dim=1))
