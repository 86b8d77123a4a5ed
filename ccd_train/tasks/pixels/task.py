"""What the two pixel tasks share: a network from pictures to pictures, learnt from pictures with their truth.

    ccd-train finetune --config segmenter_small --run_dir RUN --init PRETRAINED --data.train CROPS
    ccd-train finetune --config upscaler_small --run_dir RUN --init PRETRAINED \\
        --data.train TextZoom/train1 TextZoom/train2

The same command again goes on where the run stopped. RUN/export holds the weights that did best on the pictures held
out, for `ccd-train evaluate`, `segment`, `upscale` and `export`. The network is in `models/pixels.py`.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ccd_train import distributed, draws
from ccd_train.config.pixels import PixelTuning
from ccd_train.config.stored import CONTENT, TOLD
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Batches, Share, loader
from ccd_train.data.order import Order
from ccd_train.data.pairs import open_pairs
from ccd_train.durations import times
from ccd_train.files import write_json
from ccd_train.models.pixels import PixelNetwork, pixel_loss
from ccd_train.tasks.pixels import sheets
from ccd_train.tasks.pixels.start import start_from
from ccd_train.training import schedules
from ccd_train.training.ahead import Ahead
from ccd_train.training.tuning import Tuning
from ccd_train.weights import pixels
from ccd_train.weights.pixels import TrainedPixels

log = logging.getLogger(__name__)

VALIDATED_AT_ONCE = 128  # pictures, by each rank
SHOWN = 8  # rows of a sheet


class PixelTask(Tuning):
    config: PixelTuning
    kept_at: ClassVar[str] = f"export/{pixels.FILE}"
    score_key: ClassVar[str] = "score"
    headline: ClassVar[str]
    """The score that decides which weights are kept."""
    form: ClassVar[str]
    """How it is written."""

    # What the two differ in

    reading: str
    """What effects count as, or the route: a score depends on it."""
    logits: bool
    """Whether the network says logits."""

    @abstractmethod
    def target(self, targets_u8: Tensor) -> tuple[Tensor, Tensor]:
        """What is wanted of uint8 [B, C, 32, 128], float32 in [0, 1], and which values count, bool."""

    @abstractmethod
    def output_u8(self, output: Tensor) -> Tensor:
        """The network's output as uint8 [B, C, 32, 128]: a mask of 0 and 1, or a picture."""

    @abstractmethod
    def measure(self, given: Tensor, output: Tensor, targets_u8: Tensor) -> Tensor:
        """What scores need of each picture, float64 [B, n]."""

    @abstractmethod
    def scores(self, rows: Tensor) -> dict[str, float]:
        """Scores by name of all rows [N, n] of `measure`."""

    # Building

    def open(self) -> dict[str, str]:
        config = self.config
        self.train, self.valid, self.left_out = open_pairs(config.data, config.seed)
        self.samples_per_epoch, self.validate_every = self.train.num_samples, config.valid.every_steps
        self.sheet = dict[str, np.ndarray]()
        self.begin_choosing(config.valid, {"valid": self.valid.hash})
        return {
            "corpus": self.train.hash, f"corpus{CONTENT}": self.train.content, f"corpus{TOLD}": self.train.told,
            "valid": self.valid.hash, f"valid{CONTENT}": self.valid.content, f"valid{TOLD}": self.valid.told,
        }  # fmt: skip

    def network(self) -> PixelNetwork:
        return PixelNetwork(self.config.model, self.config.head, self.config.train.activation_checkpointing)

    def start(self, network: nn.Module) -> None:
        assert isinstance(network, PixelNetwork)
        start_from(self.config, network)

    def copy(self, network: nn.Module) -> PixelNetwork:
        """For validation: whole and in evaluation mode on every rank, whatever the ZeRO stage."""
        second = PixelNetwork(self.config.model, self.config.head).eval().requires_grad_(False)
        second.load_state_dict(network.state_dict())
        return second

    def batches(self, share: Share) -> Batches | Ahead:
        settings = self.config.data
        if distributed.rank() == 0:
            samples = self.config.train.total_samples
            log.info(
                "%d pictures to learn from, %d held out; %s samples: each is seen %s", self.train.num_samples,
                self.valid.num_samples, f"{samples:,}", times(samples / self.train.num_samples),
            )  # fmt: skip
            counts = {"train": self.train.num_samples, "valid": self.valid.num_samples, "left_out": self.left_out}
            write_json(self.home.run_dir / "pictures.json", counts)
        # the smaller the share of the pictures, the more ranges are shuffled together
        order = Order(self.train.shard_samples, self.config.seed, round(settings.window_shards / settings.fraction))
        return loader(
            self.train, order, share, workers=settings.workers, mask_mode=None, max_damaged=settings.max_damaged
        )

    # Each step

    def begin_step(self, logged: bool) -> None:
        optimizer, total = self.config.optimizer, self.config.train.total_samples
        self.lr = schedules.warmup_cosine(
            self.progress.samples, 0, optimizer.lr, optimizer.final_lr, optimizer.warmup_samples, total
        )
        self.engine.set_rates(self.lr, optimizer.weight_decay)

    def losses(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """The mean over all values of the step that count, however it is cut into ranks and micro-batches."""
        device, whole = distributed.device(), list(batches)
        wanted = [self.target(_targets(batch).to(device, non_blocking=True)) for batch in whole]
        kept_here = torch.stack([kept.sum() for _, kept in wanted]).sum().double()
        share = distributed.all_reduce_sum(kept_here).clamp(min=1) / self.home.micro_batches
        for batch, (target, kept) in zip(whole, wanted, strict=True):
            keys = draws.sample_keys(self.config.seed, batch.epochs, batch.sample_ids).to(device, non_blocking=True)
            output = self.engine.forward(_given(batch), keys)
            loss = pixel_loss(output, target, kept, share.float(), self.logits)
            yield loss, loss.detach()[None]

    def figures(self, sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / self.home.micro_batches, "lr": self.lr}

    # Now and then

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Has the ranks share the pictures held out, scores them, and keeps the weights if they are the best so far."""
        count, ranks = self.valid.num_samples, distributed.world_size()
        self.average.update(0.0)
        network: PixelNetwork = self.average.ready()
        batch_size = min(VALIDATED_AT_ONCE, -(-count // ranks))
        rows: list[Tensor] = []
        shown: list[tuple[np.ndarray, ...]] = []
        with loader(
            self.valid, Order(self.valid.shard_samples, 0, self.config.data.window_shards),
            Share(0, count, batch_size * ranks, batch_size, distributed.rank(), ranks),
            workers=self.config.data.workers, mask_mode=None, max_damaged=1.0,
        ) as batches:  # fmt: skip
            for batch in batches:
                self.watch.at(self.progress.step, "validation")
                given, truth = _given(batch), _targets(batch).to(distributed.device())
                output = network(given)
                target, kept = self.target(truth)
                errors = [
                    pixel_loss(*one, torch.ones(()), self.logits) for one in zip(output, target, kept, strict=True)
                ]
                error = torch.stack([torch.stack(errors).double(), kept.flatten(1).sum(1).double()], dim=1).cpu()
                # scored where `evaluate` scores: a GPU rounds the inputs of convolutions
                found = torch.cat([error, self.measure(given.cpu(), output.cpu(), truth.cpu())], dim=1)
                mine = batch.epochs == 0  # the last batch goes on at the beginning
                mine[list(batch.replaced)] = False  # another picture stands in its place
                rows.append(found[mine.cpu()])
                if not shown:
                    parts = (batch.images_u8, self.output_u8(output), truth)
                    shown = list(zip(*(part[:SHOWN].permute(0, 2, 3, 1).cpu().numpy() for part in parts), strict=True))
        whole = torch.cat([part for gathered in distributed.gather_objects(rows) for part in gathered])
        self.sheet = {"validation": sheets.draw(shown)}
        return self.judged(whole)

    def judged(self, rows: Tensor) -> dict[str, float]:
        """The figures of all pictures' rows [N, 2 + n]; keeps the weights if they are the best (all ranks together)."""
        scores = self.scores(rows[:, 2:])
        self.judge(scores[self.headline])
        error, kept = rows[:, :2].sum(0).tolist()
        return {
            **{f"valid_{name}": value for name, value in scores.items()},
            "valid_best": max(self.best.score, scores[self.headline]),
            "valid_loss": error / max(kept, 1),
            "valid_unreadable": self.valid.num_samples - len(rows),
        }

    def pictures(self) -> dict[str, np.ndarray]:
        """The newest validation of this life: the first pictures held out, what becomes of them, and the truth."""
        return self.sheet

    def write(self, path: Path, state: dict[str, Tensor], score: float) -> None:
        config = self.config
        about = {"score": score, "score_name": self.headline, "student": config.student}
        about |= self.told(config.data.fraction)
        run_dir = str(self.home.run_dir)
        pixels.write(path, TrainedPixels(config.task, config.model, config.head, self.reading, state, about, run_dir))

    def read_told(self, path: Path) -> Mapping[str, Any]:
        return pixels.read(path).about

    # The end

    def remarks(self) -> str:
        return self.best.remarks(f"{self.headline} on the pictures held out", self.form)


def _given(batch: Batch) -> Tensor:
    """The network's input, float32 [B, 3, 32, 128] in [0, 1], on the device."""
    return batch.images_u8.to(distributed.device(), non_blocking=True).float() / 255


def _targets(batch: Batch) -> Tensor:
    assert batch.targets_u8 is not None, "pairs have targets"
    return batch.targets_u8
