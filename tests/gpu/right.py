"""Is it right on this device: parity with the official outputs, views, every precision and ZeRO stage, kill and resume.

Everything here is about values, not time, so the runs share the device and run at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rows import Part, arguments, metrics, shards, start, train

from ccd_train.augment.views import Augmentation
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.data.batches import Batch
from ccd_train.data.loader import Share, loader, sample_order
from ccd_train.data.shards import Corpus
from ccd_train.draws import sample_keys
from ccd_train.models.regions import label_regions

TESTS = Path(__file__).parents[1]
STAGES = {  # DeepSpeed files and the share by which their losses may leave those of fp32 in the first steps
    "zero1_fp32": 2e-3,
    "zero0_autocast_bf16": 0.03,
    "zero1_bf16": 0.03,
    "zero2_bf16": 0.03,
    "zero3_bf16": 0.03,
    "zero2_bf16_offload": 0.03,
    "zero1_fp16": 0.03,
}
STEPS = 8
KILLED_AFTER, RESUMED_STEPS = 7, 12


def a_batch(folder: Path, count: int) -> Batch:
    """The first words of a corpus."""
    config, corpus = read_recipe("vit_nano", Config), Corpus.open((folder,))
    order = sample_order(corpus, config.data, 0)
    share = Share(0, count, count, count, 0, 1)
    with loader(corpus, order, share, workers=0, mask_mode="otsu", max_damaged=0.1) as batches:
        return next(batches)


def compare_views(part: Part, words: Path) -> bool:
    """The views of this device beside the CPU's, and the regions of their pseudo-masks."""
    device = torch.device("cpu" if part.rehearse else "cuda")
    host, held = a_batch(words, 32 if part.rehearse else 256), True
    keys = sample_keys(0, host.epochs, host.sample_ids)
    there = host.to(device)
    ids = torch.equal(label_regions(host.pseudo_mask), label_regions(there.pseudo_mask).cpu())
    part.add("views and regions against the CPU", what="regions of pseudo-masks", images=len(keys), equal=ids)
    for severity in ("vit_small", "vit_nano"):
        config = read_recipe(severity, Config)
        augmentation = Augmentation(config.augment, config.affine)
        ours, theirs = augmentation(host.images_u8, host.native_size, keys), None
        theirs = augmentation(there.images_u8, there.native_size.cpu(), keys)
        for name in ("regular", "irregular"):
            off = (getattr(ours, name) - getattr(theirs, name).cpu()).abs()
            share = (off > 1 / 64).float().mean().item()
            row: dict[str, Any] = {"what": f"{severity}, {name} view", "images": len(keys), "equal": not off.any()}
            part.add("views and regions against the CPU", **row, largest=off.max().item(), over_one_level=share)
            held &= share < 1e-3
    return held and ids


def stages(part: Part, words: Path) -> dict[str, subprocess.Popen[bytes]]:
    """Starts a few steps with every DeepSpeed file, and a fine-tuning that validates."""
    recipe, micro = ("nano", 8) if part.rehearse else ("small", 32)
    common = ["--max_steps", STEPS, "--log.every_steps", 1, "--train.micro_batch_size", micro, "--data.workers", 1]
    common += ["--train.threads", 1 if part.rehearse else 2]
    pretraining = ["--config", f"vit_{recipe}", "--data.shards", words, *common, "--log.pictures_every_steps", 4]
    runs = {}
    for name in STAGES:
        if part.rehearse and name in ("zero1_fp16", "zero2_bf16_offload"):
            continue  # a CPU has no fp16 products, and nothing to take off it
        runs[name] = train("pretrain", part.out / "right" / name, *pretraining, "--deepspeed", name)
    runs["compiled"] = train("pretrain", part.out / "right" / "compiled", *pretraining, "--deepspeed", "zero1_bf16",
                             "--train.compile")  # fmt: skip
    reading = ["--config", f"recognizer_{recipe}", "--init", "scratch", "--data.train", words, *common]
    reading += ["--data.valid", part.out / "words" / "valid", "--valid.every_steps", 4]
    runs["recognizer"] = train("finetune", part.out / "right" / "recognizer", *reading)
    return runs


def judge_stages(part: Part, runs: dict[str, subprocess.Popen[bytes]]) -> bool:
    held, losses = True, {}
    for name, run in runs.items():
        code = run.wait(max(1.0, part.left()))
        lines = metrics(part.out / "right" / name)
        losses[name] = [line["loss"] for line in lines]
        skipped, off = lines[-1].get("skipped_steps", 0) if lines else 0, None
        if code == 0 and name not in ("recognizer", "compiled") and not skipped:
            reference = losses["zero1_fp32"]
            off = max(abs(mine - theirs) / theirs for mine, theirs in zip(losses[name], reference, strict=True))
        tolerance = STAGES.get(name, 0.0)
        fine = code == 0 and len(lines) >= STEPS and (off is None or off <= tolerance)
        held &= fine
        last = losses[name][-1] if lines else float("nan")
        part.add("precision and stages", run=name, exit_code=code, last_loss=last, skipped=skipped,
                 off_fp32="" if off is None else off, tolerance=tolerance, held=fine)  # fmt: skip
    return held


def kill_and_resume(part: Part, words: Path) -> bool:
    """A run that is killed and resumed beside one that is not, with --train.deterministic: losses equal to the bit."""
    recipe, micro = ("vit_nano", 8) if part.rehearse else ("vit_small", 32)
    options = ["--config", recipe, "--data.shards", words, "--max_steps", RESUMED_STEPS, "--log.every_steps", 1,
               "--train.micro_batch_size", micro, "--checkpoint.every_steps", 3, "--train.deterministic",
               "--data.workers", 1, "--train.threads", 1 if part.rehearse else 2]  # fmt: skip
    calm, hunted = part.out / "right" / "calm", part.out / "right" / "hunted"
    one, other = train("pretrain", calm, *options), train("pretrain", hunted, *options)
    while other.poll() is None and not any(line["step"] >= KILLED_AFTER for line in metrics(hunted)):
        time.sleep(0.01)
    killed = other.poll() is None
    if killed:
        os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    again = train("pretrain", hunted, *options)
    codes = [run.wait(max(1.0, part.left())) for run in (again, one)]
    losses = [{line["step"]: line["loss"] for line in metrics(run)} for run in (calm, hunted)]
    equal = losses[0] == losses[1] and len(losses[0]) == RESUMED_STEPS
    part.add("kill and resume", killed=killed, exit_codes=str(codes), steps=len(losses[1]), equal_to_the_bit=equal)
    return killed and equal


def parity(part: Part) -> subprocess.Popen[bytes]:
    os.environ["CCD_TEST_DEVICE"] = "cuda"
    return start(part.out / "right" / "parity.log", "-m", "pytest", "-q", "-p", "no:cacheprovider",
                 TESTS / "test_reference_parity.py")  # fmt: skip


def main() -> int:
    part = arguments()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    words = shards(part, "few")
    shards(part, "valid")
    golden = None if part.rehearse else parity(part)  # on a CPU they are among the tests anyway
    runs = stages(part, words)
    held = [compare_views(part, words), kill_and_resume(part, words), judge_stages(part, runs)]
    if golden is not None:
        code = golden.wait(max(1.0, part.left()))
        summary = (part.out / "right" / "parity.log").read_text().splitlines()[-1]
        part.add("parity with the official outputs", tests=summary, exit_code=code, tolerance=2e-5)
        held.append(code == 0)
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
