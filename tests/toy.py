"""A task that is no part of the product: a network learns the mean colour of a crop. It shows what a task costs.

python tests/toy.py RUN SHARDS [options of RunConfig]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ccd_train import distributed
from ccd_train.config.options import parse
from ccd_train.config.pretraining import Data
from ccd_train.config.run import RunConfig, Train
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Batches, Share, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.training.task import Task
from ccd_train.training.train import conclude, live
from ccd_train.weights.writing import serialize, write_whole

BATCH = 16


@dataclass(frozen=True)
class Toy(RunConfig):
    """Learns the mean colour of a crop."""

    data: Data = field(default_factory=lambda: Data(workers=0))
    train: Train = field(default_factory=lambda: Train(total_samples=BATCH * 24, micro_batch_size=BATCH // 2))


class Colour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 8, stride=8)

    def part(self, name: str) -> str:
        return "all"

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean(dim=(2, 3))


class MeanColour(Task):
    config: Toy
    validate_every = 8

    def open(self) -> dict[str, str]:
        with distributed.together():
            self.corpus = Corpus.open(self.config.data.shards)
        self.samples_per_epoch = self.corpus.num_samples
        return {"corpus": self.corpus.hash}

    def network(self) -> Colour:
        return Colour()

    def copy(self, network: nn.Module) -> Colour:
        second = Colour()
        second.load_state_dict(network.state_dict())
        return second

    def batches(self, share: Share) -> Batches:
        order = sample_order(self.corpus, self.config.data, self.config.seed)
        return loader(self.corpus, order, share, workers=self.config.data.workers)

    def begin_step(self, logged: bool) -> None:
        self.engine.set_rates(self.config.optimizer.lr, 0.0)

    def losses(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            loss = self.error(self.engine.forward, batch)
            yield loss, loss.detach()[None]

    def error(self, network: object, batch: Batch) -> Tensor:
        images = batch.images_u8.float() / 255
        return (network(images) - images.mean(dim=(2, 3))).square().mean()  # type: ignore[operator,no-any-return]

    def end_step(self, applied: bool) -> None:
        self.average.update(0.0)

    def figures(self, sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / self.home.micro_batches, "lr": self.config.optimizer.lr}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        share = Share(0, 64, 64, 64 // distributed.world_size(), distributed.rank(), distributed.world_size())
        with self.batches(share) as batches:
            error = self.error(self.average.ready(), next(batches))
        state = self.average.state_dict()  # all ranks together
        if distributed.rank() == 0:
            write_whole(self.home.run_dir / "export" / "colour.safetensors", serialize(state, {}))
        return {"valid_error": float(distributed.all_reduce_sum(error)) / distributed.world_size()}


if __name__ == "__main__":
    run_dir, shards, *options = sys.argv[1:]
    config = parse(Toy, ["--run_dir", run_dir, "--data.shards", shards, *options], "toy")
    sys.exit(conclude(Path(run_dir), lambda: live(MeanColour(config))))
