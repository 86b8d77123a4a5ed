"""From a picture to a picture: the network of text segmentation (C = 1) and of super-resolution (C = 3).

Shapes: B images, D width of the ViT, N = 256 patches of 4×4, C channels of the output.

    tokens = vit(images)                                   # [B, N, D], after the final norm
    tokens = norm(blocks(tokens + table))                  # pre-norm blocks, the table fixed
    output = pictures(linear(tokens))                      # [B, N, 16·C] → [B, C, 32, 128]

It is the decoder of TongkunGuan/CCD (Dino/decoder/seg_decoder.py) with the table that its comment describes and that
FaltingsA/SSM fills in (util/pos_embed.py). The last layer, and what follows it, is computed in float32 whatever the
weights are: near 1.0 a step of bf16 is a grey level.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccd_train.augment.views import MEAN, STD
from ccd_train.config.pixels import MaskHead, PictureHead
from ccd_train.config.pretraining import Model
from ccd_train.models.vit import EPS, GRID, PATCH, Block, build_backbone

PERIOD = 10000.0  # of the slowest sinusoid


class ExactLinear(nn.Linear):
    """A linear layer whose arithmetic is float32."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens.float(), self.weight.float(), self.bias.float())


class PixelDecoder(nn.Module):
    """Tokens of the backbone → pictures."""

    table: Tensor
    """[1, N, D]: where each token lies."""

    def __init__(self, width: int, head: MaskHead | PictureHead) -> None:
        super().__init__()
        self.channels = head.channels
        self.register_buffer("table", position_table(width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, head.heads) for _ in range(head.layers))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.prediction = ExactLinear(width, PATCH**2 * head.channels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)  # queries, keys and values as one matrix
                nn.init.zeros_(layer.bias)
        if head.residual:  # the first output is the input
            nn.init.zeros_(self.prediction.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] → float32 [B, C, 32, 128]."""
        tokens = tokens + self.table.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        patches = self.prediction(self.norm(tokens)).unflatten(1, GRID)
        # [B, h, w, rows · columns · C]: in a patch the channel runs fastest
        pixels = patches.unflatten(-1, (PATCH, PATCH, self.channels)).permute(0, 5, 1, 3, 2, 4)
        return pixels.flatten(2, 3).flatten(3, 4)  # type: ignore[no-any-return]


class PixelNetwork(nn.Module):
    def __init__(self, model: Model, head: MaskHead | PictureHead, activation_checkpointing: bool = False) -> None:
        """Initial weights come from torch's global generator."""
        super().__init__()
        self.vit = build_backbone(
            model, taps=(), drop_path=model.drop_path, activation_checkpointing=activation_checkpointing
        )
        self.decoder = PixelDecoder(model.width, head)
        self.residual = head.residual

    def part(self, name: str) -> str:
        """Where a parameter belongs: to the backbone, or to what stands behind it."""
        return "shared" if name.startswith("vit.") else "decoder"

    def forward(self, pixels: Tensor, keys: Tensor | None = None) -> Tensor:
        """Float32 [B, 3, 32, 128] in [0, 1] → float32 [B, C, 32, 128]: logits or a mask of text, or a picture.

        keys int64 [B] draw stochastic depth; needed in training only, and only where drop_path > 0.
        """
        # by numbers: a tensor of constants would be sent to the device in every step
        channels = zip(pixels.unbind(1), MEAN, STD, strict=True)
        images = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        output = cast(Tensor, self.decoder(self.vit(images, keys)[0]))
        return pixels + output if self.residual else output


def text_share(output: Tensor, logits: bool) -> Tensor:
    """How surely each pixel is text, in [0, 1], from the output of a network for masks."""
    return output.sigmoid() if logits else output.clamp(0, 1)


def position_table(width: int) -> Tensor:
    """MAE's sine-cosine table [1, N, D]: the column in the first half of the channels, the row in the second, each
    first sines, then cosines (He et al. 2022, util/pos_embed.py)."""
    rates = PERIOD ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in GRID), indexing="ij")
    halves = [place.flatten()[:, None] * rates for place in (column, row)]
    return torch.cat([wave for angle in halves for wave in (angle.sin(), angle.cos())], dim=1)[None].float()


def pixel_loss(output: Tensor, target: Tensor, kept: Tensor, kept_share: Tensor, logits: bool) -> Tensor:
    """Squared error, or cross-entropy of `logits`, of [B, C, 32, 128]: the sum over what is `kept` / kept_share.

    `kept_share` is a tensor of one element, the kept values over ranks and micro-batches divided by their number: then
    the mean over these is the mean over all kept values of the step. Nothing kept anywhere: 0.
    """
    if logits:
        error = F.binary_cross_entropy_with_logits(output, target, reduction="none")
    else:
        error = (output - target).square()
    return torch.where(kept, error, 0.0).sum() / kept_share.reshape(())
