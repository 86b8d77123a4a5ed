"""The official layout of CCD's tensors (TongkunGuan/CCD) and ours, from one to the other.

The position embedding is the one tensor that the two do not share. The official code stores a 16×16 grid and resizes
it to 8×32 on every forward pass; ours is the 8×32 grid itself. In: the resize is done once, exactly. Out: a 16×16 grid
whose resize comes closest, because the resize maps onto a space half as large.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.config.pretraining import Model
from ccd_train.errors import UserError
from ccd_train.models.vit import GRID
from ccd_train.weights.tensors import State, refuse_misfits

OFFICIAL_TAPS = (2, 4, 6)
OFFICIAL_HEAD_WIDTH = 64  # width / heads of the official tiny, small and base
OFFICIAL_GRID = 16
EMBEDDING = "vit.position_embedding"

# Ours → official, in this order. The digits in nn.Sequential stand for the layers at these places.
OFFICIAL_NAMES = (
    (r"^vit\.patch_embedding\.", "backbone.patch_embed.proj."),
    (r"^vit\.position_embedding$", "backbone.pos_embed"),
    (r"^vit\.tap_norms\.", "backbone.norm_seg."),
    (r"^vit\.", "backbone."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.projection\.", ".attn.proj."),
    (r"(\.blocks\.\d+\.mlp)\.0\.", r"\1.fc1."),
    (r"(\.blocks\.\d+\.mlp)\.2\.", r"\1.fc2."),
    (r"^projection\.prototypes\.direction$", "head.last_layer.weight_v"),
    (r"^projection\.prototypes\.gain$", "head.last_layer.weight_g"),
    (r"^projection\.", "head."),
    (r"^segmentation\.branches\.0\.", "segmentation.mlahead.head2."),
    (r"^segmentation\.branches\.1\.", "segmentation.mlahead.head3."),
    (r"^segmentation\.branches\.2\.", "segmentation.mlahead.head4."),
    (r"^segmentation\.upsampling\.([01])\.", r"segmentation.unpool1.\1."),
    (r"^segmentation\.upsampling\.3\.", "segmentation.unpool2.0."),
    (r"^segmentation\.upsampling\.4\.", "segmentation.unpool2.1."),
    (r"^segmentation\.classifier\.", "segmentation.cls."),
    (r"\.running_variance$", ".running_var"),
)
# In official checkpoints, but without effect on any output of the official code.
OFFICIAL_UNUSED = re.compile(r"^backbone\.cls_token$|^segmentation\.conv_mla\.|\.num_batches_tracked$")


def official_name(name: str) -> str:
    """The official name, without `module.`, of a tensor of ours."""
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def from_official(
    official: State,
    wanted: dict[str, tuple[int, ...]],
    name_of: Callable[[str], str],
    unused: re.Pattern[str],
    origin: str,
) -> State:
    """A network's official tensors, without those that are unused, as ours; `wanted` are our names and shapes."""
    used = {name: tensor for name, tensor in official.items() if not unused.search(name)}
    refuse_misfits({name_of(name): shape for name, shape in wanted.items()}, used, origin)
    state = {name: used[name_of(name)].float() for name in wanted}
    state[EMBEDDING] = resize_embedding(state[EMBEDDING])
    return state


def to_official(state: State, width: int) -> tuple[State, float]:
    """A network's tensors under official names, with the ones that only the official code has; and the residual of the
    position embedding, relative to its length.
    """
    state = dict(state)
    state[EMBEDDING], residual = official_embedding(state[EMBEDDING])
    official = {official_name(name): tensor for name, tensor in state.items()}
    official["backbone.cls_token"] = torch.zeros(1, 1, width)
    for name in [name for name in official if name.endswith(".running_mean")]:
        official[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return official, residual


def resize_embedding(official: Tensor) -> Tensor:
    """[1, 256, D] on a 16×16 grid → [1, 256, D] on the 8×32 grid, as the official forward pass does it.

    Bicubic, with DINO's 0.1 added to the wanted sizes before the scale factors are computed, which torch then uses.
    """
    factors = [(size + 0.1) / OFFICIAL_GRID for size in GRID]
    square = official.float().unflatten(1, (OFFICIAL_GRID, OFFICIAL_GRID)).permute(0, 3, 1, 2)
    return F.interpolate(square, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)


def official_embedding(ours: Tensor) -> tuple[Tensor, float]:
    """The shortest least-squares inverse of `resize_embedding`, and what is lost: ‖resize(it) − ours‖ / ‖ours‖."""
    cells = OFFICIAL_GRID**2
    resize = resize_embedding(torch.eye(cells)[None])[0].double()  # linear: its columns are the resized unit grids
    official = (torch.linalg.pinv(resize, rtol=1e-6) @ ours[0].double())[None].float()
    lost = (resize_embedding(official) - ours).norm() / ours.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return official, float(lost)


def official_sizes(student: State, heads: int | None, origin: str) -> Model:
    """The sizes that the shapes of an official student tell."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        tensor = student.get(name)
        if tensor is None or tensor.dim() != dimensions:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UserError(f"{origin}: student's {name} {found}; not an official CCD checkpoint")
        return tuple(tensor.shape)

    width = shape("backbone.pos_embed", 3)[2]
    prototypes, bottleneck = shape("head.last_layer.weight_v", 2)
    gain = student.get("head.last_layer.weight_g")
    return Model(
        width=width,
        depth=depth_of(student),
        heads=heads_of(width, heads, origin),
        taps=OFFICIAL_TAPS,
        segmentation_width=shape("segmentation.mlahead.head2.0.weight", 4)[0],
        head_hidden=shape("head.mlp.0.weight", 2)[0],
        head_bottleneck=bottleneck,
        prototypes=prototypes,
        freeze_gain=gain is not None and bool((gain == 1).all()),
    )


def heads_of(width: int, heads: int | None, origin: str) -> int:
    """The attention heads: as said, or those of the official sizes. UserError if the width does not tell."""
    if heads is None and width % OFFICIAL_HEAD_WIDTH:
        raise UserError(f"{origin}: its width {width} is not 64 a head; say how many attention heads it has: --heads N")
    return heads or width // OFFICIAL_HEAD_WIDTH


def depth_of(state: State) -> int:
    """The number of transformer blocks, from the names of their tensors in any layout."""
    blocks = {int(match[1]) for name in state if (match := re.match(r"(?:backbone\.|vit\.)?blocks\.(\d+)\.", name))}
    return max(blocks, default=-1) + 1
