"""Runs a chain of operations over a batch: what each image draws, and in which order that is done.

What an image draws is a pure function of its key, so the host works it out while the device is still busy, and neither
waits for the other: the device gets one table of indices and seeds, and one of parameters. For each group the images
are brought into the order of the operations they drew, so that each operation works on one slice of the batch in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.augment.photometric import blur, clahe, color, contrast, filters, jpeg, noise, weather
from ccd_train.augment.severities import RANGES, WHOLE, Chain, Group
from ccd_train.draws import field, mix, operation_word, uniform
from ccd_train.gpu.replay import Replayed

BLOCK = 16  # on a GPU an operation works on whole multiples of so many images, so that few shapes are recorded

Operation = Callable[..., Tensor]
OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        noise.add_elementwise,
        noise.gaussian_noise,
        noise.laplace_noise,
        noise.poisson_noise,
        noise.multiply,
        noise.multiply_elementwise,
        noise.dropout,
        noise.coarse_dropout,
        noise.drop_channels,
        noise.impulse_noise,
        noise.salt_and_pepper,
        noise.salt,
        noise.pepper,
        noise.invert,
        noise.solarize,
        jpeg.jpeg,
        filters.emboss,
        filters.edge_detect,
        filters.directed_edge_detect,
        filters.edge_enhance_more,
        filters.contour,
        color.hue,
        color.hue_far,
        color.brightness,
        color.multiply_brightness,
        color.multiply_hue_saturation,
        color.add_hue_saturation,
        color.grey_blend,
        color.kmeans_colors,
        color.uniform_colors,
        color.temperature,
        color.channel_shuffle,
        filters.sharpen,
        blur.gaussian_blur,
        blur.average_blur,
        blur.median_blur_3,
        blur.median_blur_5,
        blur.median_blur_7,
        blur.motion_blur,
        blur.bilateral_blur,
        contrast.gamma,
        contrast.linear_contrast,
        contrast.sigmoid_contrast,
        contrast.log_contrast,
        contrast.equalize,
        contrast.equalize_channels,
        clahe.clahe,
        clahe.clahe_channels,
        weather.fog,
        weather.clouds,
        weather.snow,
        weather.rain,
    )
}


def _replayed(operation: Operation) -> Replayed:
    """On images [n, 3, H, W], seeds [n] and parameters [n, columns]."""
    return Replayed(lambda images, seeds, columns: operation(images, seeds, *columns[:, :, None, None, None].unbind(1)))


REPLAYED = {name: _replayed(operation) for name, operation in OPERATIONS.items()}


def parameters(operation: str) -> list[str]:
    """The names of what an operation draws per image."""
    return list(inspect.signature(OPERATIONS[operation]).parameters)[2:]


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a group's order drew `operation`, which takes the first `parameters` columns."""

    operation: str
    start: int
    stop: int
    parameters: int


@dataclass(frozen=True)
class ChainStage:
    """One group of a chain for one batch of N images, on the host."""

    order: Tensor  # int64 [M]: which image stands where; those that draw nothing stand last
    places: Tensor  # int64 [N]: where each image stands; what stands elsewhere are copies that fill up a block
    seeds: Tensor  # int64 [M], in that order: what draws per pixel are made from
    parameters: Tensor  # float32 [M, columns], in that order
    slices: list[Slice]

    def apply(self, images: Tensor, seeds: Tensor, columns: Tensor) -> None:
        """Changes images [M, 3, H, W] in place; they, seeds [M] and parameters [M, columns] stand in the order."""
        for part in self.slices:
            rows = slice(part.start, part.stop)
            result = REPLAYED[part.operation](images[rows], seeds[rows], columns[rows, : part.parameters])
            in_place = images.device.type == "cpu" and result.data_ptr() == images[rows].data_ptr()
            if not in_place:
                images[rows] = result
        if self.slices:
            images[: self.slices[-1].stop].clamp_(0, 255).round_()


class Table:
    """A group of a chain as tensors: what turns uniform draws into operations and their parameters."""

    def __init__(self, chain: Chain, group: Group) -> None:
        self.name, self.probability, self.operations = group.name, group.probability, list(group.operations)
        weights = torch.tensor(list(group.operations.values()), dtype=torch.float64)
        self.bounds = weights.cumsum(0) / weights.sum()
        self.counts = [len(parameters(operation)) for operation in self.operations]
        self.words = torch.tensor([operation_word(operation) for operation in [*self.operations, "none"]])
        # one row more for "none"; a parameter without a range is a draw from [0, 1) as it is
        self.low = torch.zeros(len(self.operations) + 1, max(self.counts))
        self.span = torch.ones_like(self.low)
        self.whole = torch.zeros_like(self.low, dtype=torch.bool)
        for row, operation in enumerate(self.operations):
            for column, parameter in enumerate(parameters(operation)):
                name, place = f"{operation}.{parameter}", (row, column)
                if name in RANGES:
                    low, high = chain.range(name)
                    self.low[place], self.span[place], self.whole[place] = low, high - low, name in WHOLE
        self.span += self.whole  # both ends are possible: the floor of a draw from [low, high + 1)

    def stage(self, keys: Tensor, skip: Tensor, block: int = 1) -> ChainStage:
        """What images with these keys [N] draw; none where skip [N]. Operations take multiples of `block` images."""
        draws = field(keys, self.name, 2 + self.low.shape[1])
        chosen = torch.bucketize(draws[:, 1].double(), self.bounds[:-1], right=True)
        none = skip | (draws[:, 0] >= self.probability)
        chosen = chosen.masked_fill(none, len(self.operations))
        drawn = torch.addcmul(self.low[chosen], self.span[chosen], draws[:, 2:])
        drawn = torch.where(self.whole[chosen], drawn.floor(), drawn)
        seeds = mix(keys, self.words[chosen])
        members = chosen.argsort(stable=True).split(chosen.bincount(minlength=len(self.operations) + 1).tolist())
        order, slices, start = [], [], 0
        for operation, count, images in zip(self.operations, self.counts, members, strict=False):
            if len(images):
                whole = torch.cat([images, images[-1:].expand(-len(images) % block)])
                order.append(whole)
                slices.append(Slice(operation, start, start + len(whole), count))
                start += len(whole)
        rows = torch.cat([*order, members[-1]])
        places = torch.empty_like(keys)
        places[rows] = torch.arange(len(rows))  # of an image and its copies any will do
        return ChainStage(rows, places, seeds[rows], drawn[rows], slices)


class Runner:
    """A chain, ready to run on batches. Has no state, and consumes no generator."""

    def __init__(self, chain: Chain) -> None:
        self.identity = chain.identity
        self.tables = [Table(chain, group) for group in chain.groups]

    def __call__(self, images_u8: Tensor, keys: Tensor, skip: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] through the chain, with keys [N] on the host; float32, whole levels 0–255.

        Images with skip [N] (on the host) keep out of it, besides those that draw the identity.
        """
        skip = skip | (uniform(keys, "identity") < self.identity)
        block = 1 if images_u8.device.type == "cpu" else BLOCK
        stages = [table.stage(keys, skip, block) for table in self.tables]
        moves, places = [], torch.arange(len(keys))  # places[i]: where image i stands
        for stage in stages:
            moves.append(places[stage.order])
            places = stage.places
        indices = _uploaded([*moves, *(stage.seeds for stage in stages), places], images_u8.device)
        columns = _uploaded([stage.parameters for stage in stages], images_u8.device)
        images = images_u8.float()
        for number, stage in enumerate(stages):
            images = images.index_select(0, indices[number])
            stage.apply(images, indices[len(stages) + number], columns[number])
        return images.index_select(0, indices[-1])


def _uploaded(tables: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one type on the device, sent together."""
    whole = distributed.upload(torch.cat([table.flatten() for table in tables]), device)
    parts = whole.split([table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
