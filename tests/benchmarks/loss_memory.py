"""Memory of the distillation loss, in units of one [2M, P] float32 tensor, against the formula written naively.

    python tests/benchmarks/loss_memory.py [--pairs 512] [--prototypes 65536] [--naive]

kept: beyond what was there before the forward pass, once the caller has let go of the logits, until the backward pass.
peak: the most at any time, the logits of student and teacher (2) and the gradient of the student (1) included.
On a CUDA device by its allocator; on a CPU by the process's resident memory, which large tensors enter and leave whole.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ccd_train.models.losses import distillation_loss


def resident(field: str, device: torch.device) -> int:
    """Bytes: VmRSS (now) or VmHWM (highest so far)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def naive(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    target = F.softmax((teacher - center) / 0.04, dim=1).roll(len(student) // 2, dims=0)
    return -(target * F.log_softmax(student / 0.1, dim=1)).sum(dim=1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512, help="M")
    parser.add_argument("--prototypes", type=int, default=65536, help="P")
    parser.add_argument("--naive", action="store_true", help="measure the formula as it is written")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (2 * options.pairs, options.prototypes)
    unit = 4 * shape[0] * shape[1]
    # What the last layer does: its backward pass needs its input and its weight, not the logits.
    features = torch.randn(shape[0], 8, device=device, requires_grad=True)
    weight = torch.randn(shape[1], 8, device=device, requires_grad=True)
    center = torch.zeros(1, shape[1], device=device)
    small = distillation_loss(
        features[:2] @ weight.t(), (features[:2] @ weight.t()).detach(), center,
        student_temperature=0.1, teacher_temperature=0.04, pairs_global=torch.tensor(1, device=device),
    )  # fmt: skip
    small.backward()  # libraries are loaded, gradients of the leaves are there
    before = resident("VmRSS", device)
    student, teacher = features @ weight.t(), (features @ weight.t()).detach()
    if options.naive:
        loss = naive(student, teacher, center)
    else:
        loss = distillation_loss(
            student, teacher, center, student_temperature=0.1, teacher_temperature=0.04,
            pairs_global=torch.tensor(options.pairs, device=device),
        )  # fmt: skip
    del student, teacher
    kept = resident("VmRSS", device) - before
    loss.backward()
    peak = resident("VmHWM", device) - before
    print(f"one [2M, P] tensor: {unit / 2**20:.0f} MB on {device.type}")
    print(f"kept {kept / unit:.2f} for the backward pass")
    print(f"peak {peak / unit:.2f}")


if __name__ == "__main__":
    main()
