"""What `ccd-train doctor` looks at: packages, GPUs, limits, disks, the network, and one real step."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path

import torch

from ccd_train import distributed
from ccd_train.config.pretraining import Config
from ccd_train.config.run import Resume
from ccd_train.data.shards import Corpus
from ccd_train.errors import TrainingError, UserError
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.train import live

MEGABYTE = 10**6
SHARED_MEMORY_PER_RANK = 64 * MEGABYTE  # NCCL's buffers between the GPUs of a node; Docker gives 64 MB in all
OPEN_FILES = 1024  # shards of a window, workers, checkpoints, sockets
DISK_BYTES = 64 * MEGABYTE
SLOW_DISK = 50  # MB/s: fewer than 10,000 crops of 5 KB
ALL_REDUCE_BYTES = 64 * MEGABYTE
PACKAGES = {name: name for name in ("torch", "deepspeed", "numpy", "webdataset", "lmdb", "safetensors")}
PACKAGES |= {"opencv-python": "cv2"}
"""Those that matter, and the module of each."""


@dataclass(frozen=True)
class Finding:
    """A line of the table; a remedy is given where something is wrong, `fatal` where a run would fail."""

    check: str
    result: str
    remedy: str = ""
    fatal: bool = False


def versions(packages: Mapping[str, str] = PACKAGES) -> list[Finding]:
    """Of Python and of packages, given with their modules; some come under another name (opencv-python-headless)."""
    found, missing = [], []
    for package, module in packages.items():
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            if util.find_spec(module):
                found.append(f"{package} as another package")
            else:
                missing.append(package)
    lacking = [
        Finding("packages", f"{package} is missing", f"pip install -c launch/constraints.txt {package}", fatal=True)
        for package in missing
    ]
    return [
        Finding("Python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("packages", ", ".join(found)),
        *lacking,
        Finding("operators", "none of DeepSpeed's is needed, so none is compiled: AdamW and attention are torch's"),
    ]


def accelerators() -> list[Finding]:
    """GPUs and NCCL, or why there are none although the machine has some."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        gpus = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        return [Finding("GPUs", f"{gpus}; CUDA {torch.version.cuda}, NCCL {version}")]
    if shutil.which("nvidia-smi"):
        remedy = "install a torch for CUDA, or ask the scheduler for GPUs"
        return [
            Finding("GPUs", "nvidia-smi is here, but torch sees no GPU", remedy, fatal=torch.version.cuda is not None)
        ]
    return [Finding("GPUs", "none; a run uses the CPU and gloo")]


def limits() -> list[Finding]:
    """Shared memory and open files."""
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    needed = SHARED_MEMORY_PER_RANK * distributed.local_world_size()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < OPEN_FILES
    return [
        Finding(
            "shared memory",
            f"{free / MEGABYTE:.0f} MB free in /dev/shm",
            "give the container more: --shm-size=8g, or apptainer's --bind /dev/shm" if free < needed else "",
            fatal=free < needed and torch.cuda.is_available(),
        ),
        Finding("open files", str(files), f"ulimit -n {OPEN_FILES * 4}" if few else "", fatal=files < 256),
    ]


def disks(config: Config) -> list[Finding]:
    """How fast shards are read and the run folder is written; a first reading, the page cache may help."""
    findings = []
    if config.data.shards:
        try:
            corpus = Corpus.open(config.data.shards, config.data.exclude)
        except UserError as error:
            return [Finding("shards", str(error), "see there", fatal=True)]
        rate = read_rate(corpus.paths)
        slow = "stage them on the nodes' own disks: --data.stage" if rate < SLOW_DISK else ""
        findings.append(Finding("shards", f"{corpus.num_samples:,} samples, read at {rate:.0f} MB/s", slow))
    if config.run_dir is not None:
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            rate = write_rate(config.run_dir)
        except OSError as error:
            return [*findings, Finding("run folder", str(error), "name one that you may write to", fatal=True)]
        slow = "checkpoints will take long; name a run folder on a faster disk" if rate < SLOW_DISK else ""
        free = shutil.disk_usage(config.run_dir).free
        findings.append(Finding("run folder", f"written at {rate:.0f} MB/s, {free / 1e9:.0f} GB free", slow))
    return findings


def read_rate(paths: list[Path]) -> float:
    """MB/s of reading the beginnings of files."""
    began, count = time.monotonic(), 0
    for path in paths:
        with path.open("rb") as file:
            count += len(file.read(DISK_BYTES // 8))
        if count >= DISK_BYTES:
            break
    return count / MEGABYTE / (time.monotonic() - began)


def write_rate(folder: Path) -> float:
    """MB/s of writing a file through to the disk."""
    block = os.urandom(MEGABYTE)
    began = time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(DISK_BYTES // MEGABYTE):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return DISK_BYTES / MEGABYTE / (time.monotonic() - began)


def all_reduce() -> list[Finding]:
    """64 MB between all ranks, five times; the bandwidth is that of a ring, 2 (n - 1) / n of the bytes per rank."""
    ranks = distributed.world_size()
    if ranks == 1:
        return [Finding("all-reduce", "one rank only", "")]
    tensor = torch.ones(ALL_REDUCE_BYTES // 4, device=distributed.device())
    distributed.all_reduce_sum(tensor)
    seconds = []
    for _ in range(5):
        distributed.barrier()
        tensor.fill_(1)
        began = time.monotonic()
        right = float(distributed.all_reduce_sum(tensor)[-1]) == ranks
        seconds.append(time.monotonic() - began)
    rate = 2 * (ranks - 1) / ranks * ALL_REDUCE_BYTES / min(seconds) / 1e9
    text = f"64 MB between {ranks} ranks in {min(seconds) * 1000:.0f} ms, {rate:.2f} GB/s"
    return [
        Finding("all-reduce", text if right else "the sum is wrong", "" if right else "look at the network", not right)
    ]


def one_step(config: Config) -> list[Finding]:
    """A real step of this run and its checkpoint, in a folder that is removed."""
    if config.run_dir is None or not config.data.shards:
        return [Finding("one step", "not tried: give --config, --run_dir and --data.shards")]
    folder = config.run_dir / "doctor"
    remove(folder)  # a doctor that was killed left it
    began = time.monotonic()
    try:
        # whatever the run folder holds
        live(Pretraining(replace(config, run_dir=folder, max_steps=1, resume=Resume())))
    except (UserError, TrainingError) as error:
        return [Finding("one step", str(error), "see there", fatal=True)]
    finally:
        remove(folder)
    return [Finding("one step", f"done, with a checkpoint, in {time.monotonic() - began:.0f} s from the start")]


def remove(folder: Path) -> None:
    """Removes a folder that no rank uses any more (all ranks together)."""
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()


def table(host: str, findings: list[Finding]) -> str:
    """Check, result and remedy, below the host's name."""
    marks = {(False, False): "ok", (True, False): "look", (True, True): "FAIL", (False, True): "FAIL"}
    lines = [host]
    for finding in findings:
        lines.append(f"  {marks[bool(finding.remedy), finding.fatal]:5}{finding.check:15}{finding.result}")
        if finding.remedy:
            lines.append(f"       {'':15}→ {finding.remedy}")
    return "\n".join(lines)
