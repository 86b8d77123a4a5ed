"""The arithmetic of a step against what is counted and measured, and the page that is made of it."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny
from ranks import run_ranks
from test_engine import SMALL, small
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ccd_train.commands import estimate
from ccd_train.config.options import parse, read_recipe
from ccd_train.config.pretraining import Config, Model
from ccd_train.config.recognition import FineTuning
from ccd_train.config.verbs import EstimateSettings
from ccd_train.errors import UserError
from ccd_train.models import budget
from ccd_train.models.ccd import Student, Teacher
from ccd_train.models.recognizer import Recognizer
from ccd_train.reports import estimation
from ccd_train.tasks.pretrain.task import Pretraining
from ccd_train.training.run import begin
from ccd_train.training.train import train_step

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
ODD = Model(
    width=24, depth=4, heads=3, taps=(1, 2, 4), segmentation_width=10, head_hidden=20, head_bottleneck=12,
    prototypes=56, drop_path=0.0,
)  # fmt: skip
BATCH = 3


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base", "vit_nano", "odd"])
def test_parameters_are_exact(name: str) -> None:
    model = ODD if name == "odd" else read_recipe(name, Config).model
    with torch.device("meta"):
        student, teacher = Student(model), Teacher(model)
    parts = budget.parameters(model)
    for part, count in parts.items():
        assert count == sum(p.numel() for p in getattr(student, part).parameters())
    assert parts["vit"] + parts["projection"] == sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize("name", ["recognizer_small", "recognizer_nano"])
def test_parameters_of_recognizers_are_exact(name: str) -> None:
    config = read_recipe(name, FineTuning)
    with torch.device("meta"):
        network = Recognizer(config.model, config.recognizer, 92)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert budget.recognizer_parameters(config.model, config.recognizer, 92) == counted


def views(characters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views, θ and masks with so many characters in every image."""
    masks = torch.zeros(BATCH, 32, 128, dtype=torch.uint8)
    for index in range(characters):
        masks[:, 8:24, 4 + 20 * index : 16 + 20 * index] = 1
    images = torch.rand(2, BATCH, 3, 32, 128)
    return images[0], images[1], torch.eye(2, 3).expand(BATCH, -1, -1), masks


@pytest.mark.parametrize("characters", [0, 5])
def test_operations_are_exact(characters: int) -> None:
    """Attention as plain products, which is what is counted; fused kernels do the same with some of it twice."""
    torch.manual_seed(0)
    student, teacher = Student(ODD), Teacher(ODD)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = student(*views(characters))
        teacher(*views(characters)[:2], output.regions)
        (output.projections.square().sum() + output.segmentation_logits.square().sum()).backward()
    assert len(output.projections) == 2 * BATCH * characters
    assert counter.get_total_flops() == BATCH * budget.training_flops(ODD, characters)


@pytest.mark.parametrize("characters", [0, 5])
def test_kept_activations_are_near(characters: int) -> None:
    """Every storage that autograd keeps, less the parameters."""
    model = replace(ODD, width=96, depth=6, segmentation_width=32, prototypes=512)
    torch.manual_seed(0)
    student = Student(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = student(*views(characters))
    measured = sum(kept.values())
    parts = budget.activation_bytes(model, characters, "fp32")
    logits = 2 * characters * 3 * 4 * model.prototypes  # the loss keeps them, not the network
    expected = BATCH * (sum(parts.values()) - logits) + budget.fixed_bytes(model)
    assert output.segmentation_logits.requires_grad
    assert expected == pytest.approx(measured, rel=0.15)


def held(config: Config) -> int:
    """The most bytes that the floating-point tensors of this process take when the optimiser is about to step."""
    run, most = begin(Pretraining(config)), 0

    def look(*_: object) -> None:
        nonlocal most
        gc.collect()
        tensors = (found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter))
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.is_floating_point()
        }
        most = max(most, sum(storages.values()))

    train_step(run, logged=False)  # makes the optimiser's state
    run.engine._base.register_step_pre_hook(look)
    train_step(run, logged=False)
    run.close()
    return most


SLOW = [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), *SLOW])
def test_states_are_near(tiny: Tiny, tmp_path: Path, stage: int, ranks: int) -> None:
    """With a small bucket, or nothing else of stage 3 would be seen."""
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 4096}}))
    large = {**SMALL["model"], "head_hidden": 512, "prototypes": 4096}
    config = replace(small(tiny, tmp_path / "run", model=large), deepspeed=str(file))
    measured = max(run_ranks(ranks, held, config))
    expected = sum(budget.state_bytes(config.model, stage, ranks, "fp32", bucket=4096).values())
    assert expected == pytest.approx(measured, rel=0.15)


def test_launches_are_near(tiny: Tiny, tmp_path: Path) -> None:
    """Operations that a GPU would launch in a step, at two depths."""
    for depth, count in zip((3, 6), run_ranks(1, launches, tiny, tmp_path, (3, 6))[0], strict=True):
        assert budget.LAUNCHES_FIXED + depth * budget.LAUNCHES_PER_BLOCK == pytest.approx(count, rel=0.15)


VIEWS_OF_TENSORS = (
    "view", "transpose", "permute", "expand", "slice", "select", "unbind", "split", "detach", "alias", "squeeze",
    "empty", "aten.t.", "as_strided", "_local_scalar", "lift_fresh", "is_pinned",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that compute something."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.count += not any(name in str(function) for name in VIEWS_OF_TENSORS)
        return function(*arguments, **(named or {}))


def launches(tiny: Tiny, folder: Path, depths: tuple[int, ...]) -> list[int]:
    counts = []
    for depth in depths:
        run = begin(
            Pretraining(small(tiny, folder / str(depth), model={"depth": depth}, train={"micro_batch_size": 16}))
        )
        train_step(run, logged=False)
        train_step(run, logged=False)
        with Launches() as counter:
            train_step(run, logged=False)
        counts.append(counter.count)
        run.close()
    return counts


def settings(*arguments: str) -> EstimateSettings:
    return parse(EstimateSettings, ["--config", "vit_small", *arguments], "test")


def test_a_larger_batch_is_faster_per_image_and_more_gpus_never_slower() -> None:
    small_batch, large = settings(), settings("--train.micro_batch_size", "256")
    for gpus in estimation.SIZES:
        assert estimation.estimate(large, gpus).rate > estimation.estimate(small_batch, gpus).rate
    rates = [estimation.estimate(large, gpus).rate for gpus in estimation.SIZES]
    assert rates == sorted(rates)
    assert estimation.estimate(small_batch, 8).seconds.bottleneck == "launches"
    slow_network = settings("--network_gbit", "1", "--gpus_per_node", "1")
    assert estimation.estimate(slow_network, 8).seconds.bottleneck == "network"


def test_states_shrink_with_stages_and_ranks() -> None:
    model = settings().model
    totals = [sum(budget.state_bytes(model, stage, 8, "bf16", bucket=1).values()) for stage in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert budget.state_bytes(model, 1, 64, "bf16")["Adam's moments"] * 64 == pytest.approx(
        budget.state_bytes(model, 0, 64, "bf16")["Adam's moments"]
    )


def test_traffic_of_the_field_notes() -> None:
    """46 M parameters in bf16 are 92 MB; a ring over very many ranks sends them twice in an all-reduce."""
    model = settings().model
    sent = budget.traffic(model, 0, 10_000, "bf16")
    assert sent.reduced == pytest.approx(2 * 2 * 45_777_154, rel=1e-3)
    staged = budget.traffic(model, 1, 10_000, "bf16")
    assert staged.reduced + staged.gathered == pytest.approx(sent.reduced)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("cpu", None),
    ],
)
def test_a_gpu_is_known_by_what_cuda_calls_it(device: str, name: str | None) -> None:
    gpu = budget.gpu_called(device)
    assert (gpu.name if gpu else None) == name


def test_the_command_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate.main(["--config", "vit_base", "--gpus", "16", "--gpu", "a100"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "parameters",
        "operations",
        "memory",
        "ZeRO 3",
        "traffic",
        "images/s",
        "the run",
        "loader",
        "bound by",
    ):
        assert line in printed
    assert printed.splitlines()[-1].startswith("a model     fitted to one H200")
    assert re.search(r"^images/s    \d+,\d00, \d\d0 per GPU", printed, re.MULTILINE)
    assert "--data.workers 4 is enough" in printed
    assert estimate.main(["--core_rate", "100", "--gpus", "1"]) == 0
    assert "it needs --data.workers 7" in capsys.readouterr().out
    for gpu in budget.GPUS:
        assert estimate.main(["--gpu", gpu]) == 0
    with pytest.raises(UserError, match="gpus = 0"):
        estimate.main(["--gpus", "0"])


def test_the_tables_of_the_page_are_those_of_the_command() -> None:
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^    (ccd-train estimate .*--table)$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        options = parse(EstimateSettings, command.split()[2:], "test")
        assert estimation.table(options) in page, f"run {command} again and paste its table"
