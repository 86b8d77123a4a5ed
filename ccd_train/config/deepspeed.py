"""The DeepSpeed files of a run: ZeRO, precision and communication, out of ds_configs/ or the user's own."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from ccd_train.errors import UserError

# DeepSpeed's keys that our configuration owns, and the field to set instead.
OURS = {
    "train_batch_size": "--train.global_batch_size",
    "train_micro_batch_size_per_gpu": "--train.micro_batch_size",
    "gradient_accumulation_steps": "--train.global_batch_size (accumulation follows from it)",
    "gradient_clipping": "--optimizer.clip_gradient",
    "optimizer": "--optimizer.*",
    "scheduler": "--optimizer.*",
    "steps_per_print": "--log.every_steps",
    "tensorboard": "--log.every_steps",
    "activation_checkpointing": "--train.activation_checkpointing",
}
# What else a file may hold. DeepSpeed passes over a key that it does not know, so a slip would train something else.
SECTIONS = {
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "comms_logger",
    "flops_profiler",
    "aio",
}
VALUES = {
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather", "dump_state",
    "wall_clock_breakdown", "memory_breakdown", "zero_allow_untested_optimizer",
}  # fmt: skip


def read_deepspeed_file(name: str | None, gpus: bool) -> tuple[str, dict[str, Any]]:
    """The name and the content of a file of ds_configs/ (by name) or of the user's (by path).

    `gpus`: whether the run has any. Raises UserError where there is no such file, where it is no JSON, or where it sets
    what our configuration owns.
    """
    if name is None:
        name = "zero1_bf16" if gpus else "zero1_fp32"
    folder = resources.files("ds_configs")
    known = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
    try:
        text = (folder / f"{name}.json" if name in known else Path(name)).read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except OSError as error:
        raise UserError(
            f"--deepspeed {name}: {error.strerror}; there are {', '.join(known)}, or a .json file"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed {name}: not JSON ({error})") from None
    _check_keys(name, content)
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage == 0 and any(content.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        # its optimiser there takes a step of its own, with zero gradients, before the first one
        raise UserError(
            f"--deepspeed {name}: bf16 and fp16 need ZeRO stage 1 or more; set zero_optimization.stage, "
            "or take zero0_autocast_bf16"
        )
    offloads = {"offload_optimizer", "offload_param"} & set(content.get("zero_optimization", {}))
    if stage == 3 and offloads:
        raise UserError(f"--deepspeed {name}: {offloads.pop()} goes with stage 2 only here; take zero2_bf16_offload")
    if content.get("fp16", {}).get("enabled") and not gpus:
        raise UserError(f"--deepspeed {name}: fp16 needs a GPU; on CPUs take zero1_fp32 or zero1_bf16")
    return name, content


def _check_keys(name: str, content: Any) -> None:
    """Refuses what is no mapping of sections, what our configuration owns, and names that mean nothing here."""
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed {name}: holds a {type(content).__name__}; it must be an object of settings")
    for key, value in content.items():
        if key in OURS:
            raise UserError(f"--deepspeed {name}: {key} does not belong there; remove it and set {OURS[key]}")
        if key not in SECTIONS | VALUES:
            close = difflib.get_close_matches(key, SECTIONS | VALUES, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(SECTIONS | VALUES))}"
            raise UserError(f"--deepspeed {name}: unknown key {key}; {remedy}")
        if key in SECTIONS and not isinstance(value, dict):
            raise UserError(f"--deepspeed {name}: {key} = {value!r}: must be an object of settings")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed {name}: zero_optimization.stage = {stage!r}: must be 0, 1, 2 or 3")
