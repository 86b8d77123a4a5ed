"""What a task is: everything in which two kinds of training differ. `train.py` trains any of them and names none.

A task's members in the order in which a run calls them:

    open, network, start, copy, batches, restore            building: data, networks, where to go on
    begin_step, losses, end_step, figures, operations       each step
    validate, pictures, alarms                              now and then
    state, tensors                                          each checkpoint
    over, remarks                                           the end
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ccd_train.config.run import RunConfig
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Batches, Share
from ccd_train.training.ahead import Ahead
from ccd_train.training.average import Average
from ccd_train.training.engine import Engine
from ccd_train.training.home import Home, Progress
from ccd_train.training.metrics import Alarm
from ccd_train.training.watch import Watch


class Task(ABC):
    """Base of all tasks. What has a body here may be left as it is."""

    home: Home
    """The run folder. This attribute and the next four are set by the run, each as soon as it exists."""
    engine: Engine
    """The network that is trained, and its optimiser."""
    average: Average[Any]
    """The network of `copy`, fed from the engine's weights."""
    progress: Progress
    watch: Watch
    """Told of every piece of work between collectives, so that a rank that hangs is noticed."""
    samples_per_epoch: int
    """Set by `open`."""
    validate_every: int = 0
    """Steps between two validations; one more is made at the end. 0: none."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    # Building

    @abstractmethod
    def open(self) -> dict[str, str]:
        """Opens the data (all ranks together). Returns the facts that tell this run from others: hashes of its data.

        What is behind such a fact may be said in words, under its name with TOLD: those are not compared. Raises
        UserError on all ranks.
        """

    @abstractmethod
    def network(self) -> nn.Module:
        """The network to train, with fresh weights from torch's global generator.

        Its method `part(name)` puts each parameter into a named group, for `Engine.set_rates` and `forget_moments`.
        """

    def start(self, network: nn.Module) -> None:  # noqa: B027
        """Loads the weights that --init names into a new run's network. Raises UserError if they do not fit."""

    @abstractmethod
    def copy(self, network: nn.Module) -> nn.Module:
        """A second network with the same weights and parameter names: one that lags behind, or one that validates."""

    @abstractmethod
    def batches(self, share: Share) -> Batches | Ahead:
        """The samples of this rank, in the order of the run."""

    def restore(self, state: dict[str, Any], folder: Path) -> None:  # noqa: B027
        """Takes back what `state` and `tensors` gave to the checkpoint in `folder`."""

    # Each step

    @abstractmethod
    def begin_step(self, logged: bool) -> None:
        """Sets the rates of the step. In a `logged` one, `figures` may hold what costs something to measure."""

    @abstractmethod
    def losses(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each micro-batch of the step: its loss [], and figures [n] to be summed.

        The loss is averaged over ranks and micro-batches. Its backward pass is done before the next is asked for.
        """

    def end_step(self, applied: bool) -> None:  # noqa: B027
        """Moves what moves beside the optimiser; undoes what `losses` changed if the step was skipped."""

    @abstractmethod
    def figures(self, sums: list[float]) -> dict[str, float]:
        """What metrics.jsonl says of the step: `loss`, `lr`, and more.

        `sums`: the figures [n] of `losses`, summed over the `home.micro_batches` of all ranks.
        """

    def operations(self, figures: dict[str, float]) -> float | None:
        """Floating-point operations of the step with these figures, on all ranks; None: not counted."""
        return None

    # Now and then

    def validate(self) -> dict[str, float]:
        """Figures of a validation (all ranks together)."""
        return {}

    def pictures(self) -> dict[str, np.ndarray]:
        """Sheets by name, uint8 RGB [H, W, 3] (rank 0)."""
        return {}

    def alarms(self, figures: dict[str, float]) -> Iterable[Alarm]:
        """What is wrong, judging from a logged step's figures; the same on all ranks.

        May raise TrainingError after the alarm that ends the run.
        """
        return ()

    # Each checkpoint

    def state(self) -> dict[str, Any]:
        """Plain values for state.json."""
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Safetensors files to be kept beside the engine's, by file and name: copies (all ranks together)."""
        return {}

    # The end

    @property
    def over(self) -> bool:
        """Whether the task has nothing more to learn, before the last step."""
        return False

    def remarks(self) -> str:
        """What to say about the run at its end; it follows the common line."""
        return ""
