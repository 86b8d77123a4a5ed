"""What only the data and the networks themselves tell about a run that is to be submitted. Needs torch."""

from __future__ import annotations

from ccd_train.config.run import RunConfig
from ccd_train.tasks.choice import task_of
from launch.lives import newest_step


def rehearse(config: RunConfig, later: bool) -> dict[str, str]:
    """Opens the data, and tries the weights that a new run starts from, unless they come `later`; returns the facts
    that tell it from others.

    Raises UserError for whatever would refuse the run.
    """
    task = task_of(config)
    facts = task.open()
    assert config.run_dir is not None
    if config.init is not None and not later and not newest_step(config.run_dir):
        task.start(task.network())
    return facts
