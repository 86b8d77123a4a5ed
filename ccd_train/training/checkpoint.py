"""Checkpoints: complete or not there; found again, checked, thinned out, and read at any number of ranks.

    RUN/checkpoints/
        step_00010000/     DeepSpeed's files, one set per rank
                           NAME.safetensors      what the task keeps beside them
                           state.json            step, position, settings, corpus, …
                           layout.json           which rank's file holds which piece of which parameter
                           COMPLETE              size and sha256 of every file; written last
        latest             names the newest complete one
        writing_step_…     a save that goes on behind the steps, or that was killed; removed by the next one
        removing_step_…    an old one on its way out, or left by a kill; likewise
        step_….damaged     a checkpoint whose hashes did not hold

A checkpoint is written under its temporary name by all ranks, then COMPLETE, then the folder gets its name. A kill at
any moment leaves the ones before as they were.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ccd_train import distributed
from ccd_train.errors import UserError
from ccd_train.files import Digest, digest, replace_file, sync_folder, write_file
from ccd_train.training.engine import Engine
from ccd_train.training.library import read_file

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
Content = memoryview | bytes | dict[str, Tensor]  # of a file, in memory


class Save:
    """A checkpoint on its way to the disk: a snapshot of one step, written and hashed behind the next ones."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        beside: Callable[[], dict[str, dict[str, Tensor]]],
        state: dict[str, Any],
    ) -> None:
        """Takes the snapshot of state["step"] (all ranks together) and begins to write it.

        `beside` makes the content of the files that are kept beside the engine's: tensors by file and name, copies.
        """
        began = time.monotonic()
        self.step: int = state["step"]
        self._folder = run_dir / "checkpoints"
        self._temporary = self._folder / f"writing_{step_name(self.step)}"
        self._written: dict[str, Digest] = {}
        self._problem = _on_rank_0(lambda: _make_room(self._folder, self._temporary))
        contents = {} if self._problem else _snapshot(engine, beside, state)
        self.seconds = time.monotonic() - began
        """What the save took of this rank, so far."""
        whole = self._problem is None
        self._problem = self._problem or "its writing ended with an error, which is in the log"
        self._thread = threading.Thread(target=self._write, args=(contents, whole), name="save")
        self._thread.start()

    def written(self) -> bool:
        """Whether this rank has nothing more to write."""
        return not self._thread.is_alive()

    def finish(self) -> str | None:
        """Waits for all ranks and makes it a checkpoint (all ranks together); None, or why it is none."""
        self._thread.join()
        outcomes = distributed.gather_objects((self._written, self._problem))
        problem = next((f"rank {rank}: {found}" for rank, (_, found) in enumerate(outcomes) if found), None)
        if problem is None:
            files = {name: digest for written, _ in outcomes for name, digest in written.items()}
            problem = _on_rank_0(lambda: _complete(self._temporary, self._folder / step_name(self.step), files))
        if problem and distributed.rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        return problem

    def _write(self, contents: dict[str, Content], whole: bool) -> None:
        """Writes and hashes the files; only at its end there is no problem any more, if they are the `whole`."""
        began = time.monotonic()
        try:
            while contents:
                name, content = contents.popitem()
                data = safetensors.torch.save(content) if isinstance(content, dict) else content
                self._written[name] = write_file(self._temporary / name, data)
            if whole:
                self._problem = None
        except OSError as error:
            self._problem = str(error)
        self.seconds += time.monotonic() - began


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint whose hashes hold, the same on all ranks; damaged ones are renamed and named."""
    while True:
        candidate = distributed.broadcast_object(_newest_complete(run_dir) if distributed.rank() == 0 else None)
        if candidate is None:
            return None
        damage = next((found for found in distributed.gather_objects(_damage(candidate)) if found), None)
        if damage is None:
            return candidate  # type: ignore[no-any-return]
        log.warning("checkpoint %s is damaged (%s); taking the one before it", candidate, damage)
        if distributed.rank() == 0:
            _set_aside(candidate)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json holds: step, position, settings, …"""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf8"))  # type: ignore[no-any-return]


def load(checkpoint: Path, engine: Engine) -> dict[str, Any]:
    """Restores the engine from a checkpoint that `newest` found (all ranks together); returns its state."""
    state = read_state(checkpoint)
    alike = state["world_size"] == distributed.world_size() and state["deepspeed"] == engine.description
    if alike:
        engine.load(checkpoint.parent, checkpoint.name)
    else:
        whole, module = read_whole(checkpoint)
        engine.load_whole(whole, module, state["loss_scale"])
    return state


def locate(path: Path) -> Path | None:
    """The checkpoint that a path names: a run folder (its newest complete one) or the checkpoint itself; None if it is
    neither. Raises UserError if there is nothing, or nothing whole.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run folder, an export, or an official .pth")
    if (path / "checkpoints").is_dir():
        found = newest(path)
        if found is None:
            raise UserError(f"{path}: this run has no complete checkpoint yet; let it write one")
        path = found
    if not (path / COMPLETE).is_file():
        return None
    if damage := _damage(path, share=slice(None)):
        raise UserError(f"{path}: damaged ({damage}); name the run folder, and the newest whole one is taken")
    return path


def read_network(checkpoint: Path) -> dict[str, Tensor]:
    """fp32 weights and buffers of the trained network by name, from any ZeRO stage and number of ranks."""
    whole, module = read_whole(checkpoint)
    network = {name: value.float() for name, value in module.items()}
    return network | {name: parts["fp32"].view(module[name].shape) for name, parts in whole.items()}


def read_whole(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The student put together from the files of all ranks: {parameter: {"fp32", "exp_avg", "exp_avg_sq" flattened,
    "step"}}, and DeepSpeed's own weights and buffers by name, of which those in `whole` are good for their shape only.
    """
    stage = read_state(checkpoint)["deepspeed"]["stage"]
    layout = json.loads((checkpoint / "layout.json").read_text(encoding="utf8"))
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    main = _read(checkpoint / f"{prefix}mp_rank_00_model_states.pt")
    module: dict[str, Tensor] = main["module"]
    whole: dict[str, dict[str, Tensor]] = {}
    for rank, fragments in enumerate(layout if stage else layout[:1]):
        weights, states = _optimizer_of(checkpoint, stage, rank, main)
        for name, start, size, flat, flat_start in fragments:
            master = weights(name, flat)
            state = states.get(flat) or _fresh(master)  # none where no step was applied yet
            flats = {"fp32": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            length = max(s + n for other in layout for key, s, n, _, _ in other if key == name)
            parts = whole.setdefault(name, {key: torch.empty(length) for key in flats})
            for key, value in flats.items():
                parts[key][start : start + size] = value.view(-1)[flat_start : flat_start + size]
            parts["step"] = state["step"]
    if stage == 3:  # it saves its parameters as empty tensors
        shapes = {name: shape for group in main["param_shapes"] for name, shape in group.items()}
        module |= {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        module |= _frozen(checkpoint, len(layout), main["frozen_param_shapes"])
    return whole, module


def thin(run_dir: Path, keep: int, keep_every: int) -> None:
    """Removes all but the newest `keep` checkpoints and those whose step is a multiple of keep_every (rank 0)."""
    if distributed.rank() != 0:
        return
    complete = [path for path in _steps(run_dir) if (path / COMPLETE).exists()]
    for path in complete[:-keep]:
        if not keep_every or step_of(path) % keep_every:
            doomed = path.with_name(f"removing_{path.name}")
            try:
                os.replace(path, doomed)  # first it stops being a checkpoint, then its files go
            except OSError as error:
                log.warning("the old checkpoint %s stays: %s", path, error)
            shutil.rmtree(doomed, ignore_errors=True)


def step_name(step: int) -> str:
    """The name of a step's folder: step_00010000."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a folder that `step_name` named."""
    return int(path.name.removeprefix("step_"))


def _steps(run_dir: Path) -> list[Path]:
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.glob("step_*") if path.name[5:].isdigit()) if folder.is_dir() else []


def _newest_complete(run_dir: Path) -> Path | None:
    return next((path for path in reversed(_steps(run_dir)) if (path / COMPLETE).exists()), None)


def _damage(checkpoint: Path, share: slice | None = None) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or with another share."""
    share = share or slice(distributed.rank(), None, distributed.world_size())
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf8"))
        for name in sorted(files)[share]:
            if digest(checkpoint / name) != Digest(*files[name]):
                return f"{name} has changed"
    except (OSError, json.JSONDecodeError) as error:
        return str(error)
    return None


def _make_room(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("writing_*", "removing_*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)
    for left in folder.glob(".latest.*"):
        left.unlink()
    temporary.mkdir()


def _snapshot(
    engine: Engine, beside: Callable[[], dict[str, dict[str, Tensor]]], state: dict[str, Any]
) -> dict[str, Content]:
    """This rank's files by name, in memory."""
    contents: dict[str, Content] = {**engine.snapshot()}
    files = beside()
    layout = distributed.gather_objects(
        [(f.name, f.start, len(f.master), f.flat, f.flat_start) for f in engine.fragments]
    )
    if distributed.rank() == 0:
        contents |= files  # copies already: they become a file's bytes behind the steps
        contents["state.json"] = json.dumps(state, indent=2).encode()
        contents["layout.json"] = json.dumps(layout).encode()
    return contents


def _complete(temporary: Path, final: Path, files: dict[str, Digest]) -> None:
    write_file(temporary / COMPLETE, json.dumps(files, indent=2).encode())
    sync_folder(temporary)
    if final.exists():  # half of one, from a copy by hand, say
        log.warning("%s was there already, but not complete: it is %s now", final, _set_aside(final).name)
    os.replace(temporary, final)
    replace_file(final.with_name("latest"), f"{final.name}\n".encode())


def _set_aside(folder: Path) -> Path:
    """Gives a folder that is no whole checkpoint a name that nothing else has; returns that."""
    names = (f"{folder.name}.damaged{f'.{number}' if number > 1 else ''}" for number in itertools.count(1))
    free = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, free)
    return free


def _on_rank_0(work: Callable[[], None]) -> str | None:
    """Does it on rank 0; None, or on every rank the error of the file system that rank 0 met."""
    error = None
    if distributed.rank() == 0:
        try:
            work()
        except OSError as problem:
            error = str(problem)
    return distributed.broadcast_object(error)  # type: ignore[no-any-return]


def _optimizer_of(
    checkpoint: Path, stage: int, rank: int, main: dict[str, Any]
) -> tuple[Callable[[str, int], Tensor], dict[int, dict[str, Tensor]]]:
    """A rank's fp32 weights (by parameter or flat group) and AdamW states, as DeepSpeed stores them in each stage."""
    if stage == 0:
        return lambda name, flat: main["module"][name], main["optimizer"]["state"]
    (path,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    states = _read(path)["optimizer_state_dict"]
    if stage == 3:
        return lambda name, flat: states["fp32_flat_groups"][flat], states["optimizer_state_dict"]["state"]
    return lambda name, flat: states["single_partition_of_fp32_groups"][flat], states["base_optimizer_state"]["state"]


def _fresh(master: Tensor) -> dict[str, Tensor]:
    """AdamW's state before its first step."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}


def _frozen(checkpoint: Path, ranks: int, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The parameters that are in no optimiser, which stage 3 cuts into equal parts, the last padded."""
    if not shapes:
        return {}
    files = [_read(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt") for rank in range(ranks)]
    pieces = {name: [file["frozen_param_fragments"][name] for file in files] for name in shapes}
    return {name: torch.cat(pieces[name])[: shape.numel()].view(shape) for name, shape in shapes.items()}


def _read(path: Path) -> dict[str, Any]:
    """One of DeepSpeed's files, mapped rather than read."""
    return read_file(path, "cpu", mmap=True)  # type: ignore[no-any-return]
