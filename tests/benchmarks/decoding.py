"""Greedy decoding with kept keys and values, against decoding that computes everything anew for every token.

    python tests/benchmarks/decoding.py [--batch 256] [--layers 6] [--width 512] [--tokens 25] [--threads 1]

Both read the same encoded images with the same random weights, one after the other, to the last of --tokens tokens; the
words are compared. "anew" is what the official decoder does: at every step image and all tokens so far go through all
layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ccd_train.config import recognition as finetuning
from ccd_train.data.charset import read_charset
from ccd_train.models.decoding import decode
from ccd_train.models.recognizer import Decoder


def anew(decoder: Decoder, memory: Tensor) -> Tensor:
    """Tokens [B, T], each from a whole forward pass over image and text so far."""
    tokens = torch.full((len(memory), 1), decoder.classes - 1)
    for _ in range(decoder.length):
        tokens = torch.cat([tokens, decoder(memory, tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens[:, 1:]


def kept(decoder: Decoder, memory: Tensor) -> Tensor:
    return decode(decoder, memory, stop_early=False).tokens


def seconds(way: Callable[[Decoder, Tensor], Tensor], decoder: Decoder, memory: Tensor) -> tuple[float, Tensor]:
    began = time.perf_counter()
    tokens = way(decoder, memory)
    return time.perf_counter() - began, tokens


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layers", type=int, default=finetuning.ReadingHead.layers)
    parser.add_argument("--width", type=int, default=finetuning.ReadingHead.width)
    parser.add_argument("--tokens", type=int, default=finetuning.ReadingHead.length)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = finetuning.ReadingHead(layers=options.layers, width=options.width, length=options.tokens)
    decoder = Decoder(sizes, read_charset("DICT90").classes).eval()
    decoder.classifier.bias[-1] = -100.0  # no word ends: the same work for all
    memory = torch.randn(options.batch, 256, options.width)
    kept(decoder, memory[:2])
    (short, tokens), (long, expected) = seconds(kept, decoder, memory), seconds(anew, decoder, memory)
    equal = (tokens == expected).all(dim=1).float().mean()
    print(
        f"batch {options.batch}, {options.tokens} tokens, {options.layers} layers of width {options.width}, "
        f"{options.threads} threads: kept {short:.2f} s, anew {long:.2f} s: {long / short:.1f}×; "
        f"{equal:.1%} of the words are equal"
    )


if __name__ == "__main__":
    main()
