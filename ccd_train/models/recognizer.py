"""The text recogniser of the official fine-tuning: ViT → MLP → an autoregressive transformer decoder.

Shapes: B images, D width of the ViT, E width of the decoder, S = 256 patches, T tokens of a target, C classes.

    memory = encoder(vit(images))                          # [B, S, E]
    logits = decoder(memory, targets without the last)     # [B, T-1, C]: each token from those before it
    loss   = cross_entropy(logits, targets without the first)

The decoder is NRTR's (Sheng et al., ICDAR 2019) with the norms before each part and no biases in the attention, as the
official code takes it from MMOCR. `Decoder.step` does the same one token at a time, with keys and values kept. With
`place_codes` the memory says where its tokens lie, which a short run has no time to learn. In training all dropout is
drawn from a key per image (int64 [B]), as stochastic depth is: neither the batch nor the number of ranks nor a restart
changes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccd_train import distributed, draws
from ccd_train.config import pretraining, recognition
from ccd_train.models.vit import GRID, build_backbone

EPS = 1e-6  # of the decoder's last LayerNorm; those of its layers have torch's own
PERIOD = 10000.0  # of the slowest sinusoid (Vaswani et al. 2017)
SHORTEST_PERIOD = 2.5  # patches, of the place codes


class Pair(NamedTuple):
    """Keys and values of some tokens, each [B, heads, tokens, E / heads]."""

    keys: Tensor
    values: Tensor

    def followed_by(self, other: Pair) -> Pair:
        return Pair(torch.cat([self.keys, other.keys], dim=2), torch.cat([self.values, other.values], dim=2))


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose draws are a pure function of the images' keys and of its name."""

    def __init__(self, probability: float, name: str) -> None:
        super().__init__()
        self.probability, self.name = probability, name

    def active(self) -> bool:
        return self.training and self.probability > 0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """[B, …] and keys int64 [B] (training only)."""
        if not self.active():
            return x
        assert keys is not None, "dropout in training needs the images' draw keys"
        kept = draws.field(keys, f"dropout.{self.name}", x[0].numel()).view(x.shape) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)


class DecoderAttention(nn.Module):
    """Multi-head attention without biases; dropout of its weights and of its result."""

    def __init__(self, width: int, heads: int, dropout: float, name: str) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.weight_dropout = Dropout(dropout, f"{name}.weights")
        self.dropout = Dropout(dropout, name)

    def pair(self, tokens: Tensor) -> Pair:
        """What [B, N, E] offers to those who attend to it."""
        return Pair(self._split(self.key(tokens)), self._split(self.value(tokens)))

    def forward(self, tokens: Tensor, pair: Pair, mask: Tensor | None, keys: Tensor | None) -> Tensor:
        """[B, N, E] attends to the pair; mask bool, broadcast to [B, heads, N, tokens of the pair], true: may look."""
        query = self._split(self.query(tokens))
        if self.weight_dropout.active():
            scores = query @ pair.keys.transpose(2, 3) * query.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            mixed = self.weight_dropout(scores.softmax(dim=-1), keys) @ pair.values
        else:
            mixed = F.scaled_dot_product_attention(query, *pair, mask)
        return self.dropout(self.projection(mixed.transpose(1, 2).flatten(2)), keys)  # type: ignore[no-any-return]

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with a GELU between; dropout of the result, and where hidden_dropout is set of that too."""

    def __init__(self, sizes: tuple[int, int, int], dropout: float, name: str, hidden_dropout: float = 0.0) -> None:
        super().__init__()
        width, hidden, out = sizes
        self.first = nn.Linear(width, hidden)
        self.hidden_dropout = Dropout(hidden_dropout, f"{name}.hidden")
        self.second = nn.Linear(hidden, out)
        self.dropout = Dropout(dropout, name)

    def forward(self, tokens: Tensor, keys: Tensor | None) -> Tensor:
        hidden = self.hidden_dropout(F.gelu(self.first(tokens)), keys)
        return self.dropout(self.second(hidden), keys)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention to the tokens before, attention to the image, an MLP; each normed before and added to its input."""

    def __init__(self, sizes: recognition.ReadingHead, name: str) -> None:
        super().__init__()
        self.text_norm = nn.LayerNorm(sizes.width)
        self.text = DecoderAttention(sizes.width, sizes.heads, sizes.dropout, f"{name}.text")
        self.image_norm = nn.LayerNorm(sizes.width)
        self.image = DecoderAttention(sizes.width, sizes.heads, sizes.dropout, f"{name}.image")
        self.mlp_norm = nn.LayerNorm(sizes.width)
        self.mlp = Mlp((sizes.width, sizes.hidden, sizes.width), sizes.dropout, f"{name}.mlp")

    def forward(
        self,
        tokens: Tensor,
        memory: Pair,
        past: Pair | None = None,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Pair]:
        """Tokens [B, N, E] after those of `past` → [B, N, E], and past and tokens as one pair."""
        normed = self.text_norm(tokens)
        text = self.text.pair(normed)
        if past is not None:
            text = past.followed_by(text)
        tokens = tokens + self.text(normed, text, mask, keys)
        tokens = tokens + self.image(self.image_norm(tokens), memory, None, keys)
        return tokens + self.mlp(self.mlp_norm(tokens), keys), text


class State(NamedTuple):
    """A word half written: what every layer keeps, so that the next token costs no more than itself."""

    memory: list[Pair]
    """The image, per layer."""
    past: list[Pair]
    """The tokens so far, per layer; empty at the beginning."""


class Decoder(nn.Module):
    positions: Tensor
    """float32 whatever the weights are: DeepSpeed turns parameters into bf16 or fp16, but not buffers."""

    def __init__(self, sizes: recognition.ReadingHead, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding = nn.Embedding(classes + 1, sizes.width, padding_idx=classes)
        self.register_buffer("positions", sinusoids(sizes.length, sizes.width), persistent=False)
        self.dropout = Dropout(sizes.dropout, "embedding")
        self.layers = nn.ModuleList(Layer(sizes, f"layer.{number}") for number in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=EPS)
        self.classifier = nn.Linear(sizes.width, classes)

    @property
    def length(self) -> int:
        """The most tokens that a word has."""
        return self.positions.shape[1]

    def forward(self, memory: Tensor, tokens: Tensor, keys: Tensor | None = None) -> Tensor:
        """Memory [B, S, E], tokens [B, T] that begin with the beginning → logits [B, T, C] of the token after each."""
        count = tokens.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        mask = causal & (tokens != self.classes)[:, None, None, :]  # padding is looked at by nobody
        x = self.dropout(self._embed(tokens, 0), keys)
        for layer, pair in zip(self.layers, self._look(memory), strict=True):
            x, _ = layer(x, pair, mask=mask, keys=keys)
        return self.classifier(self.norm(x))  # type: ignore[no-any-return]

    def begin(self, memory: Tensor) -> State:
        """Memory [B, S, E] → a word without tokens."""
        return State(self._look(memory), [])

    def step(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        """The next token of each word, [B] → logits [B, C] of the one after it, and the word with it."""
        place = state.past[0].keys.shape[2] if state.past else 0
        x = self._embed(tokens[:, None], place)
        past = []
        for number, layer in enumerate(self.layers):
            x, pair = layer(x, state.memory[number], state.past[number] if state.past else None)
            past.append(pair)
        return self.classifier(self.norm(x[:, 0])), State(state.memory, past)

    def _look(self, memory: Tensor) -> list[Pair]:
        """What the image offers to each layer."""
        return [layer.image.pair(memory) for layer in cast(Iterable[Layer], self.layers)]

    def _embed(self, tokens: Tensor, place: int) -> Tensor:
        embedded: Tensor = self.embedding(tokens)
        return (embedded + self.positions[:, place : place + tokens.shape[1]]).to(embedded.dtype)


class Recognizer(nn.Module):
    places: Tensor | None

    def __init__(
        self,
        model: pretraining.Model,
        sizes: recognition.ReadingHead,
        classes: int,
        activation_checkpointing: bool = False,
    ) -> None:
        """classes: of the charset, padding not among them. Initial weights come from torch's global generator."""
        super().__init__()
        self.vit = build_backbone(
            model, taps=(), drop_path=model.drop_path, activation_checkpointing=activation_checkpointing
        )
        self.encoder = Mlp(
            (model.width, sizes.encoder_hidden, sizes.width), sizes.dropout, "encoder", hidden_dropout=sizes.dropout
        )
        self.register_buffer("places", grid_sinusoids(sizes.width) if sizes.place_codes else None, persistent=False)
        self.decoder = Decoder(sizes, classes)

    def part(self, name: str) -> str:
        """Of a parameter: the backbone, or what stands behind it by its name."""
        first = name.partition(".")[0]
        return "shared" if first == "vit" else first

    def encode(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Normalised images [B, 3, 32, 128] → memory [B, S, E]; keys int64 [B] in training."""
        tokens, _ = self.vit(images, keys)
        memory: Tensor = self.encoder(tokens, keys)
        return memory if self.places is None else (memory + self.places).to(memory.dtype)

    def forward(self, images: Tensor, targets: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images [B, 3, 32, 128], targets int64 [B, T] → logits [B, T-1, C] of targets[:, 1:]."""
        return self.decoder(self.encode(images, keys), targets[:, :-1], keys)  # type: ignore[no-any-return]


def recognition_loss(logits: Tensor, targets: Tensor, tokens_global: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits [B, T-1, C] against targets [B, T] without their first, a mean over all but padding (C).

    tokens_global, a tensor of one element: the targets of all ranks that are not padding. With it this is the rank's
    sum × ranks / tokens_global, so that gradients averaged over ranks are those of one process with all the words.
    """
    expected, padding = targets[:, 1:].flatten(), logits.shape[-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), expected, ignore_index=padding, reduction="sum")
    if tokens_global is None:
        return loss / (expected != padding).sum().clamp(min=1)
    return loss * distributed.world_size() / tokens_global.clamp(min=1).reshape(())


def sinusoids(length: int, width: int) -> Tensor:
    """Position codes [1, length, width]: sines in even channels, cosines in odd ones (Vaswani et al. 2017)."""
    channel = torch.arange(width, dtype=torch.float64)
    rate = PERIOD ** (-2 * torch.div(channel, 2, rounding_mode="floor") / width)
    angle = torch.arange(length).float()[:, None] * rate.float()
    return torch.where(channel.long() % 2 == 0, angle.sin(), angle.cos())[None]


def grid_sinusoids(width: int) -> Tensor:
    """Place codes [1, S, width] of the patches in reading order: of the row in one half of the channels, of the column
    in the other (the halves after Carion et al. 2020).

    Their periods go from twice the grid's side down to SHORTEST_PERIOD patches: all of them differ between neighbours,
    or at least between the ends. With Vaswani's periods most channels would be the same all over so small a grid.
    """
    rows, columns = (waves(side, width // 4) for side in GRID)
    codes = torch.cat([rows[:, None].expand(-1, GRID[1], -1), columns[None].expand(GRID[0], -1, -1)], dim=-1)
    return codes.flatten(0, 1)[None]


def waves(side: int, pairs: int) -> Tensor:
    """Sines, then cosines, of places in 0 … side - 1: [side, 2 · pairs]."""
    periods = torch.logspace(math.log2(2 * side), math.log2(SHORTEST_PERIOD), pairs, base=2)
    angles = 2 * math.pi * torch.arange(side)[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
