"""The arithmetic of a training step: parameters, floating-point operations, bytes, and how long they take on a GPU.

Shapes: D width, P prototypes, M characters of an image, W ranks; an operation is a multiplication or an addition.
Parameters and operations are exact (tests/test_estimate.py counts them); memory is within 15 % of what was measured on
CPUs; times are a model, whose assumptions are the constants below. They were fitted to one H200.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from ccd_train.config.pixels import MaskHead, PictureHead
from ccd_train.config.pretraining import Model
from ccd_train.config.recognition import ReadingHead

TOKENS = 256  # 8 × 32 patches
PATCH = 4 * 4 * 3
SLOTS = 26
BLOCK_TENSORS = 17  # of [tokens, D], kept by a block for its backward pass
VIEWS = 2
Precision = Literal["bf16", "fp32"]

# Assumptions about time; those of one GPU were fitted to an H200 (docs/performance.md).
MATRIX_SHARE = 0.5  # of the peak that products of these sizes reach; large square ones reach 0.8 on an H200
TOUCHES = 18.0  # times that a kept activation passes through memory, in eager PyTorch
LAUNCH_SECONDS = 28e-6  # of the host for an operation of eager PyTorch, on a virtual machine
# Operations of a step, counted: views, heads, losses, optimiser; blocks. CUDA graphs launch most of the views' and the
# teacher's together since the time was fitted, so that small batches are faster than this says.
LAUNCHES_FIXED, LAUNCHES_PER_BLOCK = 2600, 85
EXPOSED = 0.1  # of the host's time nothing hides, as the device stands idle then: the end of a step
SMALL_COLLECTIVES = 20  # of a step: batch norms forward and backward, counts, centre, norms
SMALL_SECONDS = 20e-6  # of one of them within a node; as much again for every doubling of the nodes
RING_SHARE = 0.8  # of a link's speed that large collectives reach


@dataclass(frozen=True)
class Gpu:
    name: str
    """A word or two of what CUDA calls it."""
    matrix_flops: float
    """Dense bf16 products with fp32 sums, per second; fp16 where there is no bf16 (V100, T4)."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes per second."""
    link: float
    """To the other GPUs of its node, bytes per second in one direction."""


# NVIDIA's data sheets: DGX B200 (2024), H200 (2024), H100 SXM (2023), A100 80GB SXM (2021), L40S (2023), A10 (2021), T4
# (2018), V100 SXM2 32GB (2017); Ada and GA102 whitepapers (2022, 2021). Without NVLink: PCIe 4.0 × 16, the T4's 3.0.
GPUS = {
    "b200": Gpu("B200", 2250e12, 180e9, 8.0e12, 900e9),
    "h200": Gpu("H200", 989e12, 141e9, 4.8e12, 450e9),
    "h100": Gpu("H100", 989e12, 80e9, 3.35e12, 450e9),
    "a100": Gpu("A100", 312e12, 80e9, 2.04e12, 300e9),
    "l40s": Gpu("L40S", 362e12, 48e9, 0.864e12, 32e9),
    "a10": Gpu("A10", 125e12, 24e9, 0.6e12, 32e9),
    "v100": Gpu("V100", 125e12, 32e9, 0.9e12, 150e9),
    "t4": Gpu("T4", 65e12, 16e9, 0.32e12, 16e9),
    "4090": Gpu("RTX 4090", 165e12, 24e9, 1.008e12, 32e9),
    "3090": Gpu("RTX 3090", 71e12, 24e9, 0.936e12, 32e9),
}


def gpu_called(device: str) -> Gpu | None:
    """The GPU that CUDA calls so, such as "NVIDIA H100 80GB HBM3"; None for others (A10G, RTX 3090 Ti)."""
    return next((gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.name}\b(?! (Ti|D|Laptop)\b)", device)), None)


def parameters(model: Model) -> dict[str, int]:
    """Of the student's parts; the teacher has all but the segmentation head."""
    d, c, h, b = model.width, model.segmentation_width, model.head_hidden, model.head_bottleneck
    half = c // 2
    branch = 9 * d * c + 2 * c + c * half + 2 * half
    upsampling = 16 * 3 * half * c + 3 * c + 16 * c * c + 3 * c
    return {
        "vit": _backbone(model) + 3 * 2 * d,
        "segmentation": 3 * branch + upsampling + 9 * c * 2 + 2,
        "projection": d * h + h + h * h + h + h * b + b + model.prototypes * (b + 1),
    }


def recognizer_parameters(model: Model, sizes: ReadingHead, classes: int) -> int:
    """Of a recogniser for a charset of so many classes."""
    d, e = model.width, sizes.width
    layer = 3 * 2 * e + 8 * e * e + 2 * e * sizes.hidden + sizes.hidden + e
    encoder = d * sizes.encoder_hidden + sizes.encoder_hidden + sizes.encoder_hidden * e + e
    return _backbone(model) + encoder + (classes + 1) * e + sizes.layers * layer + 2 * e + (e + 1) * classes


def pixel_parameters(model: Model, head: MaskHead | PictureHead) -> int:
    """Parameters of a network for masks or pictures."""
    d = model.width
    return _backbone(model) + head.layers * (12 * d * d + 13 * d) + 2 * d + (d + 1) * 16 * head.channels


def _backbone(model: Model) -> int:
    d = model.width
    return PATCH * d + d + TOKENS * d + model.depth * (12 * d * d + 13 * d) + 2 * d


def vit_flops(model: Model) -> int:
    """Forward, for one view."""
    d = model.width
    return 2 * TOKENS * PATCH * d + model.depth * (2 * TOKENS * 12 * d * d + 4 * TOKENS * TOKENS * d)


def segmentation_flops(model: Model) -> int:
    """Forward, for one view."""
    d, c = model.width, model.segmentation_width
    half = c // 2
    branches = 3 * 2 * TOKENS * (9 * d * c + c * half)
    return branches + 2 * TOKENS * 16 * 3 * half * c + 2 * 4 * TOKENS * 16 * c * c + 2 * 16 * TOKENS * 9 * c * 2


def projection_flops(model: Model) -> int:
    """Forward, for one character in one view."""
    h, b = model.head_hidden, model.head_bottleneck
    return 2 * (model.width * h + h * h + h * b + b * model.prototypes)


def pooling_flops(model: Model) -> int:
    """Forward, for one view."""
    return 2 * SLOTS * TOKENS * model.width


def training_flops(model: Model, characters: float) -> float:
    """Of one image: student forward and backward, teacher forward, both views; `characters` M matched in both.

    A backward pass has twice the operations of its forward pass, but for the patch embedding, whose images need no
    gradient, and the pooling, whose weights need none. Recomputation of activations is not counted.
    """
    patches = 2 * TOKENS * PATCH * model.width
    heads = characters * projection_flops(model)
    student = 3 * (vit_flops(model) + segmentation_flops(model) + heads) - patches + 2 * pooling_flops(model)
    teacher = vit_flops(model) + pooling_flops(model) + heads
    return VIEWS * (student + teacher)


def state_bytes(model: Model, stage: int, ranks: int, precision: Precision, bucket: int = 0) -> dict[str, float]:
    """What a rank keeps when it is about to update the weights, in bytes, by what it is.

    bucket: numbers in zero_optimization.reduce_bucket_size; 0: as many as there are parameters, which is our default.
    """
    parts = parameters(model)
    whole = sum(parts.values())
    moved = whole - (model.prototypes if model.freeze_gain else 0)
    shared = parts["vit"] + parts["projection"]
    size = 2 if precision == "bf16" else 4
    share = 1 / ranks if stage else 1.0
    return {
        "weights": size * whole / (ranks if stage == 3 else 1),
        "gradients": size * moved / (ranks if stage >= 2 else 1) + (4 * moved * share if stage else 0),
        "fp32 masters": 4 * moved * share if stage else 0.0,
        "Adam's moments": 8 * moved * share,
        "teacher": 2 * size * shared + 4 * shared * share,  # its weights, the row they are gathered into, the average
        "buckets": {0: 0.0, 3: float(size)}.get(stage, 8.0) * (bucket or whole),  # stages 1 and 2: two, in fp32
    }


def activation_bytes(model: Model, characters: float, precision: Precision) -> dict[str, float]:
    """What is kept for the backward pass of one image, and the fp32 logits of its characters."""
    size = 2 if precision == "bf16" else 4
    d, c = model.width, model.segmentation_width
    half = c // 2
    # a block: its input, two norms' outputs, q k v, attention's output twice (its heads are put together), the sum,
    # and the MLP's inner width twice
    block = BLOCK_TENSORS * TOKENS * d * size + 4 * TOKENS * model.heads
    outside = (4 * d + PATCH) * TOKENS * size  # the final norm, the taps' norms, the patches
    branches = 3 * TOKENS * (d + 2 * c + 2 * half)
    upsampling = TOKENS * (3 * half + 4 * 2 * c + 16 * 2 * c + 16 * 2)
    head = model.width + 4 * model.head_hidden + model.head_bottleneck
    return {
        "blocks": VIEWS * model.depth * block,
        "segmentation": VIEWS * (size * (branches + upsampling) + outside),
        "characters": VIEWS * characters * (size * head + 4 * (model.head_bottleneck + 3 * model.prototypes)),
    }


def fixed_bytes(model: Model) -> float:
    """Of a step, whatever its batch: the prototypes in float32, as they are, normalised, and scaled."""
    return 3.0 * 4 * model.prototypes * model.head_bottleneck


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    reduced: float
    """Gradients, while the backward pass runs."""
    gathered: float
    """Weights, while nothing else runs."""
    teacher: float
    """The teacher's weights, while the next batch goes forward."""


def traffic(model: Model, stage: int, ranks: int, precision: Precision) -> Traffic:
    """Rings: a reduce-scatter or an all-gather of n bytes sends n · (W − 1) / W, an all-reduce both."""
    parts = parameters(model)
    size = 2 if precision == "bf16" else 4
    whole = size * sum(parts.values()) * (ranks - 1) / ranks
    teacher = size * (parts["vit"] + parts["projection"]) * (ranks - 1) / ranks
    return Traffic(
        reduced=2 * whole if stage == 0 else whole,
        gathered={0: 0.0, 3: 2 * whole}.get(stage, whole),
        teacher=teacher if stage else 0.0,
    )


@dataclass(frozen=True)
class Seconds:
    """Of one step."""

    matrix: float
    memory: float
    launches: float
    network: float
    """What of the traffic nothing hides."""

    @property
    def step(self) -> float:
        """The device multiplies and moves in turn, the host launches mostly beside it; the network comes on top."""
        return max(self.matrix + self.memory + EXPOSED * self.launches, self.launches) + self.network

    @property
    def bottleneck(self) -> str:
        if self.network > 0.5 * self.step:
            return "network"
        if (1 - EXPOSED) * self.launches > self.matrix + self.memory:
            return "launches"
        return "matrix units" if self.matrix > self.memory else "memory"


def step_seconds(
    model: Model, gpu: Gpu, *, batch: int, accumulation: int, characters: float, stage: int, ranks: int,
    ranks_per_node: int, network: float, checkpointing: bool = False,
) -> Seconds:  # fmt: skip
    """Of `accumulation` micro-batches of `batch` images per rank in bf16; `network`: bytes a second sent by a rank."""
    images = batch * accumulation
    flops = training_flops(model, characters) + (VIEWS * vit_flops(model) if checkpointing else 0)
    kept = sum(activation_bytes(model, characters, "bf16").values())
    states = sum(state_bytes(model, stage, ranks, "bf16").values())
    matrix = images * flops / (gpu.matrix_flops * MATRIX_SHARE)
    memory = (images * kept * TOUCHES + 2 * states) / gpu.bandwidth
    launches = LAUNCH_SECONDS * (LAUNCHES_FIXED + LAUNCHES_PER_BLOCK * model.depth) * accumulation
    nodes = math.ceil(ranks / ranks_per_node)
    speed = RING_SHARE * (gpu.link if nodes == 1 else network)
    sent = traffic(model, stage, ranks, "bf16")
    busy = max(matrix + memory, launches) / accumulation
    exposed = (
        max(sent.reduced / speed - busy / 2, 0.0) + sent.gathered / speed + max(sent.teacher / speed - busy / 4, 0)
    )
    small = SMALL_COLLECTIVES * accumulation * SMALL_SECONDS * (1 + math.log2(nodes)) if ranks > 1 else 0.0
    return Seconds(matrix, memory, launches, exposed + small)
