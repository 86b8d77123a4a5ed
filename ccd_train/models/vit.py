"""The vision transformer that student and teacher share.

Shapes: B images, H W pixels (32×128), h w patch grid (8×32), D width. There is no class token.

Differences from a textbook ViT: three blocks are tapped for the segmentation head, each through a LayerNorm of its own,
and stochastic depth is a pure function of a key per image and of the layer, not of a generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ccd_train import draws
from ccd_train.config.pretraining import Model

IMAGE = (32, 128)
PATCH = 4
GRID = (IMAGE[0] // PATCH, IMAGE[1] // PATCH)
MLP_RATIO = 4
EPS = 1e-6  # of all LayerNorms
INITIAL_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        # split before the heads move: so the backward pass writes one gradient [B, N, 3 D], and turns nothing around
        query, key, value = (
            part.transpose(1, 2) for part in self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, N, D / heads]
        return self.projection(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and an MLP, each normed before and added to its input; either may be dropped for an image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, N, D]. kept [2, B]: what attention and MLP are multiplied with, by image; None: with 1."""
        attended = self.attention(self.attention_norm(tokens))
        tokens = tokens + (attended if kept is None else attended * kept[0, :, None, None])
        passed: Tensor = self.mlp(self.mlp_norm(tokens))
        return tokens + (passed if kept is None else passed * kept[1, :, None, None])


class StochasticDepth:
    """Which branches vanish for which images (Huang et al. 2016); the others are scaled up. Draws all at once."""

    def __init__(self, rates: Sequence[float]) -> None:
        """rates: how probably each block's branches are dropped."""
        self.rates = tuple(rates)

    def __call__(self, keys: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """For every block [2, B] from draw keys [B], or None where nothing is ever dropped."""
        words, rates = _operations(self.rates, keys.device)
        drawn = draws.uniforms(keys, words)
        kept = ((drawn >= rates) / (1 - rates)).to(dtype).unflatten(0, (-1, 2)).unbind()
        dropping = iter(kept)
        return [next(dropping) if rate else None for rate in self.rates]


@cache
def _operations(rates: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The words of the draws, int64 [n], and their rates, float32 [n, 1]: sent to a device once."""
    dropping = {layer: rate for layer, rate in enumerate(rates) if rate}
    names = [f"drop_path.{layer}.{branch}" for layer in dropping for branch in ("attention", "mlp")]
    words = torch.tensor([draws.operation_word(name) for name in names], device=device)
    return words, torch.tensor([[rate] for rate in dropping.values() for _ in range(2)], device=device)


class VisionTransformer(nn.Module):
    """Patches of 4×4 pixels, a learned position embedding on their 8×32 grid, `depth` blocks, a final LayerNorm.

    drop_path is the last block's probability of being dropped, rising linearly from 0 at the first. taps count blocks
    from 1. Initial weights come from torch's global generator: the caller seeds it.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        taps: Sequence[int] = (2, 4, 6),
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        initial_std: float = INITIAL_STD,
        contrast_std: float | None = None,
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.activation_checkpointing = activation_checkpointing
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)
        self.position_embedding = nn.Parameter(torch.empty(1, GRID[0] * GRID[1], width))
        rates = [drop_path * layer / max(depth - 1, 1) for layer in range(depth)]
        self.stochastic_depth = StochasticDepth(rates) if any(rates) else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in rates)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.tap_norms = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for _ in self.taps)
        nn.init.trunc_normal_(self.position_embedding, std=INITIAL_STD)
        initialize_linear_layers(self, initial_std)
        if contrast_std is not None:
            initialize_contrasts(self.patch_embedding.weight, contrast_std)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Images [B, 3, 32, 128] → tokens [B, h·w, D] after the final norm, and the taps, each [B, D, h, w].

        keys int64 [B] draw stochastic depth; needed in training only, and only where drop_path > 0.
        """
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))
        # contiguous: the residual stream keeps its layout through all blocks, and every layer would turn it around
        tokens = patches.flatten(2).transpose(1, 2).contiguous() + self.position_embedding
        taps: list[Tensor] = []
        kept: list[Tensor | None] = [None] * len(self.blocks)
        if self.training and self.stochastic_depth is not None:
            assert keys is not None, "stochastic depth in training needs the images' draw keys"
            kept = self.stochastic_depth(keys, tokens.dtype)
        for number, block in enumerate(self.blocks, start=1):
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, kept[number - 1], use_reentrant=False)
            else:
                tokens = block(tokens, kept[number - 1])
            if number in self.taps:
                tapped = self.tap_norms[len(taps)](tokens)
                taps.append(tapped.transpose(1, 2).unflatten(2, GRID))
        return self.norm(tokens), taps


def initialize_linear_layers(module: nn.Module, std: float) -> None:
    """Official initial weights: truncated normal, σ 0.02, and zero biases in linear layers; torch's own elsewhere."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialize_contrasts(filters: Tensor, std: float) -> None:
    """Random filters [D, 3, 4, 4] of mean 0 over each channel of a patch: an evenly coloured patch gives nothing.

    What an untrained network says of a character is otherwise its colour, and that is all its targets then teach.
    """
    nn.init.normal_(filters)
    filters -= filters.mean(dim=(2, 3), keepdim=True)
    filters *= std / filters.std()


def build_backbone(
    model: Model, *, taps: Sequence[int], drop_path: float = 0.0, activation_checkpointing: bool = False
) -> VisionTransformer:
    """The backbone that the settings describe. Pretraining, fine-tuning, exports: all build it here."""
    return VisionTransformer(
        model.width,
        model.depth,
        model.heads,
        taps=taps,
        drop_path=drop_path,
        activation_checkpointing=activation_checkpointing,
        initial_std=model.initial_std,
        contrast_std=model.contrast_std,
    )
