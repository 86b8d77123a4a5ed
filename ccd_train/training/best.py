"""The best validation of a run so far, whose weights RUN/export keeps."""

from __future__ import annotations

from typing import Any

from ccd_train.config.run import Valid


class Best:
    """Which validations count, and whether the weights of one are the best so far."""

    def __init__(self, settings: Valid) -> None:
        self._settings = settings
        self.score = -1.0
        """The best score so far."""
        self.step = 0
        """The step that reached it; 0 if none has."""
        self.stale = 0
        """Validations since then."""
        self.kept = -1.0
        """The score of the weights in RUN/export."""

    def judge(self, score: float, step: int, last: bool) -> bool:
        """Takes note of a validation, the schedule's `last` or not; whether its weights are as good as any so far.

        One that only --max-steps has brought about is not noted: the run goes on as if it had not been.
        """
        noted = step % self._settings.every_steps == 0 or last
        if noted:
            self.stale = 0 if score > self.score else self.stale + 1
        if score < self.score:
            return False
        if noted:
            self.score, self.step = score, step  # among equals the last: it has seen more
        return True

    @property
    def patience_is_over(self) -> bool:
        return 0 < self._settings.patience <= self.stale

    def remarks(self, what: str, form: str = "{:.2%}") -> str:
        """For the end of a run: `what` has the best score, written in this form."""
        patience = self._settings.patience
        text = f"; no better validation in {patience} (--valid.patience)" if self.patience_is_over else ""
        return text + (f"; {form.format(self.score)} {what} at best, after step {self.step}" if self.step else "")

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.score, "best_step": self.step, "stale": self.stale}

    def restore(self, state: dict[str, Any]) -> None:
        self.score, self.step, self.stale = state["best"], state["best_step"], state["stale"]
