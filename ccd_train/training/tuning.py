"""A task that starts from the weights of --init, and whose validations choose those that RUN/export keeps."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ccd_train import distributed
from ccd_train.config.run import Valid
from ccd_train.errors import UserError
from ccd_train.training.best import Best
from ccd_train.training.task import Task

log = logging.getLogger(__name__)


class Tuning(Task):
    """What fine-tunings have in common."""

    kept_at: ClassVar[str]
    """The file of the best weights, in the run folder."""
    score_key: ClassVar[str]
    """The name of their score in what stands beside them."""

    def begin_choosing(self, settings: Valid, measured_by: dict[str, str]) -> None:
        """For `open`. `measured_by`: what a score depends on beside the weights, such as the hash of the data."""
        self.best, self._measured_by = Best(settings), measured_by
        self.init = "/".join((self.config.init or Path()).parts[-2:])  # not where it lies on this machine

    @abstractmethod
    def write(self, path: Path, state: dict[str, Tensor], score: float) -> None:
        """Writes weights for others, with `told` of their score beside them. UserError where that fails (rank 0)."""

    @abstractmethod
    def read_told(self, path: Path) -> Mapping[str, Any]:
        """What stands beside the weights in a file that `write` wrote. UserError for a damaged one."""

    def told(self, fraction: float) -> dict[str, Any]:
        """How the weights of this step came about, from this share of the data: for what stands beside them."""
        return {
            "step": self.progress.step, "samples": self.progress.samples, "seed": self.config.seed,
            "fraction": fraction, "init": self.init, "global_batch_size": self.home.global_batch, **self.home.facts,
        }  # fmt: skip

    def judge(self, score: float) -> None:
        """Takes note of a validation of the copy, and keeps the best as RUN/export (all ranks together)."""
        step = self.progress.step
        if not self.best.judge(score, step, last=step == self.home.schedule_steps):
            return
        state = self.average.state_dict()
        with distributed.together():
            # a life before this one, on other ranks, may have been better by a rounding at a step that was lost
            if distributed.rank() == 0 and score >= self.best.kept:
                self._keep(state, score)

    def state(self) -> dict[str, Any]:
        return {"init": self.init, **self.best.state()}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        if distributed.rank() == 0:
            log.info("--init %s is ignored: the run goes on", self.config.init)
        self.init = state["init"]
        if self._measured_alike({**state["settings"]["valid"], "valid": state["valid"]}):
            self.best.restore(state)  # else it was measured by another measure
        path = self.home.run_dir / self.kept_at
        with distributed.together():
            if distributed.rank() == 0 and path.exists():
                self._find_kept(path)

    @property
    def over(self) -> bool:
        return self.best.patience_is_over

    def _keep(self, state: dict[str, Tensor], score: float) -> None:
        try:
            self.write(self.home.run_dir / self.kept_at, state, score)
            self.best.kept = score
        except UserError as error:  # a full disk, say: the checkpoints have the weights as well
            log.warning("step %d: the best weights so far are not exported (%s)", self.progress.step, error)

    def _find_kept(self, path: Path) -> None:
        """The score of what RUN/export holds from the lives before, if it was measured as it is now (rank 0)."""
        try:
            told = self.read_told(path)
        except UserError as error:
            log.warning("the next validation writes the best weights anew: %s", error)
            return
        if self._measured_alike(told):
            self.best.kept = float(told[self.score_key])

    def _measured_alike(self, told: Mapping[str, Any]) -> bool:
        return all(told.get(name) == value for name, value in self._measured_by.items())
