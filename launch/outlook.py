"""What a job will do, in six lines, for a dry run. No torch is imported."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping

from ccd_train.config.pretraining import Config
from ccd_train.config.run import RunConfig
from ccd_train.durations import times
from launch.lives import newest_step
from launch.preflight import Size, checkpoint_bytes, existing


def outlook(
    config: RunConfig, size: Size, batch: int | None, arguments: Namespace, options: Mapping[str, str | None]
) -> list[tuple[str, str]]:
    """Name and text of each line: batch, steps, disk, time, logs, and what comes next.

    `batch`: the global one, None where micro-batch and ranks make it. `options`: those of sbatch.
    """
    assert config.run_dir is not None
    ranks = arguments.nodes * (arguments.gpus_per_node or arguments.processes_per_node)
    micro = config.train.micro_batch_size
    batch = batch or micro * ranks
    waves = batch // (micro * ranks)
    several = f" × {waves} micro-batches" if waves > 1 else ""
    keep, each = config.checkpoint.keep, checkpoint_bytes(size.parameters)
    free = shutil.disk_usage(existing(config.run_dir)).free
    again = "one job after another" if arguments.chain else f"started again up to {arguments.max_requeues} times"
    return [
        ("batch", f"{batch:,} samples a step: {ranks} ranks × {micro}{several}"),
        ("steps", _steps(config, size.samples, batch)),
        ("disk", f"{keep} checkpoints and one being written, {each / 1e9:.2g} GB each; {free / 1e9:.0f} GB are free"),
        (
            "time",
            f"{options['time']} a life, saving {arguments.save_seconds} s before; {again}"
            + _how_long(config, ranks, arguments),
        ),
        ("log", f"{config.run_dir}/{str(options['output']).replace('%j', 'JOB')}"),
        (
            "next",
            "without --dry-run data and --init are read, sbatch is asked, it is submitted; | less shows the script",
        ),
    ]


def _steps(config: RunConfig, samples: int | None, batch: int) -> str:
    assert config.run_dir is not None
    whole = -(-config.train.total_samples // batch)
    last = min(config.max_steps or whole, whole)
    begun = newest_step(config.run_dir)
    origin = f", from {begun:,} on" if begun else ""
    stopped = f" of {whole:,} (--max-steps)" if last < whole else ""
    if samples is None:
        return f"{last:,}{stopped}{origin}"
    return f"{last:,}{stopped}{origin}: each of {samples:,} samples is seen {times(last * batch / samples)}"


def _how_long(config: RunConfig, ranks: int, arguments: Namespace) -> str:
    """The command that estimates it, where there is one: for pretraining on GPUs."""
    if not isinstance(config, Config) or not arguments.gpus_per_node:
        return ""
    return f". How long in all: ccd-train estimate --gpus {ranks} --gpus-per-node {arguments.gpus_per_node}"
