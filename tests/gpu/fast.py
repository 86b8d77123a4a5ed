"""How fast it is: images/s, share of the peak, milliseconds by phase, launches, waits, memory; and the estimate beside.

In one process, one after the other, in order of worth; what there is no time for is named in a row of its own.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rows import Part, arguments, shards
from torch import Tensor

from ccd_train import distributed
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.data.batches import Batch
from ccd_train.models import budget, ccd, regions
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.ahead import ahead
from ccd_train.training.run import Run, begin
from ccd_train.training.train import train_step

WARM, TIMED, FED = 4, 12, 30
OPERATORS = 60  # that take most of the device's time, with the shapes of their inputs
COMPILE_SECONDS = 45  # that must be left for a compiled row


class Fixed(Iterator[Batch]):
    """The same batch again and again, in the place of the loader; its views are made each time."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.damaged = Batch(**{one.name: getattr(batch, one.name) for one in fields(Batch)}), 0

    def __next__(self) -> Batch:
        return self.batch

    def close(self) -> None:
        """Nothing to end."""


def fix(run: Run[Pretraining]) -> Any:
    """Gives the run its next batch for ever; returns the batches that it had."""
    before = run.batches
    run.batches = ahead(Fixed(next(before)), run.task.look, run.config)  # type: ignore[arg-type]
    return before


class Phases:
    """Milliseconds between the begin and the end of calls, by name: of the device where there is one."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = self._moment()
            result = inner(*arguments, **named)
            self.spans[name].append((began, self._moment()))
            return result

        setattr(owner, method, timed)

    def milliseconds(self) -> dict[str, float]:
        wait_for_device()
        return {name: statistics.median(map(self._between, spans)) for name, spans in self.spans.items()}

    @staticmethod
    def _moment() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(span: tuple[Any, Any]) -> float:
        began, ended = span
        return float((ended - began) * 1e3 if isinstance(began, float) else began.elapsed_time(ended))


def settings(part: Part, recipe: str, batch: int, deepspeed: str, **train: Any) -> Config:
    config, run_dir = read_recipe(recipe, Config), part.out / "fast"
    shutil.rmtree(run_dir, ignore_errors=True)
    return replace(
        config,
        run_dir=run_dir,
        deepspeed=deepspeed,
        data=replace(config.data, shards=(part.out / "words" / "few",), workers=2 if part.rehearse else 8),
        train=replace(config.train, micro_batch_size=batch, global_batch_size=None, threads=4, **train),
    )


@contextmanager
def running(config: Config) -> Iterator[Run[Pretraining]]:
    run = begin(Pretraining(config))
    try:
        yield run
    finally:
        run.close()
        del run
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Run[Pretraining], steps: int) -> float:
    """Of a step, the mean of so many."""
    wait_for_device()
    began = time.perf_counter()
    for _ in range(steps):
        train_step(run, logged=False)
    wait_for_device()
    return (time.perf_counter() - began) / steps


def matrix_rate(rehearse: bool) -> float:
    """FLOP/s of a large square product in bf16 on random values."""
    size = 512 if rehearse else 8192
    device = "cpu" if rehearse else "cuda"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        wait_for_device()
        began = time.perf_counter()
        a @ b
        wait_for_device()
        times.append(time.perf_counter() - began)
    return float(2 * size**3 / statistics.median(times[3:]))


def peak_of_sheet() -> float:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = budget.gpu_called(name)
    return gpu.matrix_flops if gpu else float("nan")


def estimated(config: Config, characters: float) -> float:
    """Images per second of the model in budget.py."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H200"
    gpu = budget.gpu_called(name)
    assert gpu is not None, name
    batch = config.train.micro_batch_size
    took = budget.step_seconds(config.model, gpu, batch=batch, accumulation=1, characters=characters, stage=1, ranks=1,
                               ranks_per_node=8, network=25e9)  # fmt: skip
    return batch / took.step


def speed(part: Part, recipe: str, batch: int, compiled: bool, rate: float, deepspeed: str = "zero1_bf16") -> None:
    """A row of images/s with a fixed batch."""
    config = settings(part, recipe, batch, deepspeed, compile=compiled)
    with running(config) as run:
        fix(run).close()
        seconds_of(run, 1 if part.rehearse else WARM)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        took = seconds_of(run, 2 if part.rehearse else TIMED)
        characters = train_step(run, logged=False).figures["characters"]
        achieved = budget.training_flops(config.model, characters) * batch / took
        memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        part.add("images per second, one fixed batch", recipe=recipe, batch=batch, file=deepspeed, compiled=compiled,
                 images_per_second=batch / took, ms=took * 1e3, tflops=achieved / 1e12, of_measured=achieved / rate,
                 of_sheet=achieved / peak_of_sheet(), peak_gb=memory, characters=characters)  # fmt: skip
        if deepspeed == "zero1_bf16" and not compiled:
            said = estimated(config, characters)
            part.add("the estimate", recipe=recipe, batch=batch, estimated=said, measured=batch / took,
                     ratio=said * took / batch)  # fmt: skip


def wrap_phases(run: Run[Pretraining]) -> Phases:
    phases = Phases()
    phases.wrap(run.task, "augmentation", "views")
    phases.wrap(run.engine, "forward", "student and regions")
    phases.wrap(run.task.teacher, "network", "teacher")
    phases.wrap(run.engine, "backward", "backward")
    phases.wrap(run.engine, "gradient_norms", "norms")
    phases.wrap(run.engine, "clip", "clipping")
    phases.wrap(run.engine, "step", "optimiser")
    phases.wrap(run.task.teacher, "update", "EMA")
    return phases


def anatomy(part: Part, recipe: str, batch: int, compiled: bool) -> None:
    """Of a step: phases, launches and waits; what a logged step and a checkpoint cost; and the loader."""
    config = settings(part, recipe, batch, "zero1_bf16", compile=compiled)
    recipe = f"{recipe}{', compiled' * compiled}"
    with running(config) as run:
        for _ in range(2 if part.rehearse else WARM):
            train_step(run, logged=False)
        wait_for_device()
        began, waited = time.perf_counter(), 0.0
        steps = 2 if part.rehearse else FED
        for _ in range(steps):
            waited += train_step(run, logged=False).waited
        wait_for_device()
        took = time.perf_counter() - began
        part.add("fed by the loader", recipe=recipe, batch=batch, workers=run.config.data.workers,
                 images_per_second=steps * batch / took, data_wait=waited / took)  # fmt: skip
        fed = fix(run)
        plain = seconds_of(run, 3 if part.rehearse else TIMED)
        began = time.perf_counter()
        train_step(run, logged=True)
        wait_for_device()
        logged = time.perf_counter() - began
        began = time.perf_counter()
        run.save(wait=False)
        blocked = time.perf_counter() - began
        run.finish_save()
        part.add("beside the step", recipe=recipe, batch=batch, step_ms=plain * 1e3, logged_step_ms=logged * 1e3,
                 save_blocks_s=blocked, save_in_all_s=time.perf_counter() - began)  # fmt: skip
        launches(part, run, recipe, batch)
        phases = wrap_phases(run)
        for _ in range(2 if part.rehearse else 8):
            train_step(run, logged=False)
        part.add("milliseconds by phase", recipe=recipe, batch=batch, **phases.milliseconds(), step=plain * 1e3)
        fed.close()


def launches(part: Part, run: Run[Pretraining], recipe: str, batch: int) -> None:
    """Kernels that one step launches, and where the host waits for the device."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profiler:
        train_step(run, logged=False)
        wait_for_device()
    profiler.export_chrome_trace(str(part.out / f"step_{recipe.replace(', ', '_')}.json.gz"))  # for ui.perfetto.dev
    with warnings.catch_warnings(record=True) as places:
        warnings.simplefilter("always")
        with awaited():
            train_step(run, logged=False)
    counts = {event.key: event.count for event in profiler.key_averages()}
    launched = sum(count for name, count in counts.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    waits = len(places)
    copies = sum(count for name, count in counts.items() if name == "cudaMemcpyAsync")
    part.add("launches of a step", recipe=recipe, batch=batch, kernels=launched, waits=waits, copies=copies)
    for place in dict.fromkeys(f"{Path(one.filename).name}:{one.lineno}" for one in places):
        part.add("waits of a step", recipe=recipe, batch=batch, place=place)
    ran = [event for event in profiler.key_averages() if event.device_type != torch.autograd.DeviceType.CPU]
    total = sum(event.self_device_time_total for event in ran)
    part.add("kernels by time", recipe=recipe, batch=batch, name="all", calls=sum(event.count for event in ran),
             ms=total / 1e3)  # fmt: skip
    for event in sorted(ran, key=lambda event: -event.self_device_time_total)[:20]:
        part.add("kernels by time", recipe=recipe, batch=batch, name=event.key[:90].replace("|", "/"),
                 calls=event.count, ms=event.self_device_time_total / 1e3)  # fmt: skip
    by_shape = [one for one in profiler.key_averages(group_by_input_shape=True) if one.self_device_time_total > 0]
    for event in sorted(by_shape, key=lambda event: -event.self_device_time_total)[:OPERATORS]:
        name, shapes = event.key[:60].replace("|", "/"), str(event.input_shapes)[:120]
        part.add("operators by time", recipe=recipe, batch=batch, name=name, shapes=shapes,
                 calls=event.count, ms=event.self_device_time_total / 1e3)  # fmt: skip


@contextmanager
def awaited() -> Iterator[None]:
    """torch warns of every place where the host waits for the device."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def label_on_host(masks: Tensor, min_pixels: int = regions.MIN_PIXELS) -> Tensor:
    """Regions image by image with OpenCV on the host, from left to right: how the official code finds them."""
    ids = np.zeros(tuple(masks.shape), np.int64)
    for row, mask in enumerate(masks.cpu().numpy().astype(np.uint8)):
        _, labels, stats, centers = cv2.connectedComponentsWithStats(mask, connectivity=8)
        large = [one for one in range(1, len(stats)) if stats[one, cv2.CC_STAT_AREA] >= min_pixels]
        for slot, one in enumerate(sorted(large, key=lambda one: centers[one, 0])[: regions.SLOTS], start=1):
            ids[row][labels == one] = slot
    return torch.from_numpy(ids.astype(np.uint8)).to(masks.device)


@contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def main() -> int:
    part = arguments()
    logging.basicConfig(level=logging.WARNING)
    shards(part, "few")
    distributed.initialize(600)
    rate = matrix_rate(part.rehearse)
    part.add("matrix products", size=8192, dtype="bf16", tflops=rate / 1e12, of_sheet=rate / peak_of_sheet())
    small, tiny, base = ("vit_nano",) * 3 if part.rehearse else ("vit_small", "vit_tiny", "vit_base")
    least, usual, most = (4, 8, 16) if part.rehearse else (64, 256, 512)

    def official() -> None:
        with replaced(ccd, "label_regions", label_on_host):
            speed(part, small, least, False, rate, "zero0_fp32")

    jobs: list[tuple[float, Callable[[], None]]] = [
        (10, lambda: speed(part, small, usual, False, rate)),
        (15, lambda: anatomy(part, small, usual, False)),
        (COMPILE_SECONDS, lambda: anatomy(part, small, usual, True)),
        (10, lambda: speed(part, small, least, False, rate)),
        (10, official),
        (COMPILE_SECONDS, lambda: speed(part, small, usual, True, rate)),
        (COMPILE_SECONDS, lambda: speed(part, small, least, True, rate)),
        (10, lambda: speed(part, small, most, False, rate)),
        (10, lambda: speed(part, tiny, usual, False, rate)),
        (10, lambda: speed(part, base, usual, False, rate)),
        (COMPILE_SECONDS, lambda: speed(part, small, most, True, rate)),
        (COMPILE_SECONDS, lambda: speed(part, base, usual, True, rate)),
        (10, lambda: speed(part, tiny, most, False, rate)),
        (10, lambda: speed(part, tiny, least, False, rate)),
        (10, lambda: speed(part, base, least, False, rate)),
        (10, lambda: speed(part, base, most, False, rate)),
        (COMPILE_SECONDS, lambda: speed(part, tiny, usual, True, rate)),
    ]
    left_out = 0
    for needed, job in jobs[:7] if part.rehearse else jobs:
        if part.left() < needed and not part.rehearse:
            left_out += 1
            continue
        job()
    if left_out:
        part.add("no time for", rows=left_out)
    distributed.finalize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
