"""The student under DeepSpeed: one interface for every ZeRO stage. The only module that knows DeepSpeed.

DeepSpeed keeps fp32 masters and gradients in another way in every stage. Here they are all `Fragment`s: pieces of
flattened parameters that this rank holds. Clipping, averages and checkpoints work on them and know of no stages.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccd_train import distributed
from ccd_train.config.deepspeed import read_deepspeed_file
from ccd_train.config.run import RunConfig
from ccd_train.errors import UserError
from ccd_train.training.library import Files, start

EPS = 1e-6  # DINO's, added to a gradient's norm before dividing


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter, flattened, as this rank's optimiser holds it."""

    name: str
    """The parameter's name in the student."""
    start: int
    """Index of the first element in the flattened parameter."""
    master: Tensor
    """float32 [n]: a view of the optimiser's own weights."""
    flat: int
    """Which of the optimiser's parameters `master` is a view of, in the order of its groups."""
    flat_start: int
    """Index of the first element in that parameter."""


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """AdamW's groups, by `student.part(name)` and decay: none on biases and 1-D parameters (DINO, utils.py)."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            groups.setdefault((student.part(name), decays), []).append(parameter)  # type: ignore[operator]
    return [{"params": members, "part": part, "decays": decays} for (part, decays), members in groups.items()]


class Engine:
    """The student, its gradients and its optimiser."""

    def __init__(self, student: nn.Module, config: RunConfig, accumulation: int) -> None:
        """`student` on this rank's device, with the same weights on every rank."""
        self.name, content = read_deepspeed_file(config.deepspeed, torch.cuda.is_available())
        self._offload = "offload_optimizer" in content.get("zero_optimization", {})
        self._fused = torch.cuda.is_available() and not self._offload  # one kernel for all that a step of AdamW does
        optimizer = torch.optim.AdamW(
            parameter_groups(student), lr=0.0, betas=config.optimizer.betas, fused=self._fused
        )
        content |= {
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,  # left out, it would be a global norm of 1
            "steps_per_print": 1 << 62,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.stage = int(content.get("zero_optimization", {}).get("stage", 0))
        if self.stage:  # as large as there are gradients: DeepSpeed's default takes 4 GB for a network of any size
            content["zero_optimization"].setdefault("reduce_bucket_size", sum(p.numel() for p in student.parameters()))
        if self.stage == 3:
            # DeepSpeed's own linear layer, which takes torch's place, rounds before it adds the bias: bf16 would differ
            # from the other stages. What it saves, whole weights kept for the backward pass, is little here.
            content["zero_optimization"].setdefault("memory_efficient_linear", False)
        self._names = {id(parameter): name for name, parameter in student.named_parameters()}
        self._engine, self._optimizer = start(student, optimizer, content, self.name, config.log.verbose)
        self._finite = True
        if self.stage in (1, 2):
            # Ours is the verdict on a step. DeepSpeed's own takes some sixteen small operations for every parameter.
            self._optimizer.check_grad_overflow = True
            self._optimizer.has_overflow = lambda partition_gradients=True: not self._finite
            self._optimizer.compute_grad_norm = self._offload  # it insists on one there
        if hasattr(self._optimizer, "loss_scaler"):
            self._optimizer.loss_scaler.raise_error_at_min_scale = False  # max_bad_steps ends such a run, in a line
        self._base = getattr(self._optimizer, "optimizer", self._optimizer)
        self._flats = self._find_flats()
        self.fragments = self._find_fragments()
        self._indices = {name: index for index, name in enumerate(self._names.values())}
        self._sent: dict[tuple[str, ...], Tensor] = {}
        self._files = self._engine.checkpoint_engine = Files()
        self._engine._copy_recovery_script = lambda folder: None  # a script of DeepSpeed's, which nobody here runs

    @property
    def student(self) -> nn.Module:
        return self._engine.module  # type: ignore[no-any-return]

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only its own part of the masters."""
        return self.stage > 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights in the forward pass."""
        return next(self.student.parameters()).dtype

    @property
    def description(self) -> dict[str, Any]:
        """What must be the same for DeepSpeed to load its own files."""
        return {"stage": self.stage, "dtype": str(self.dtype), "offload": self._offload}

    @property
    def loss_scale(self) -> float:
        return float(getattr(self._optimizer, "loss_scale", 1.0))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self._engine(*arguments, **named)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of loss / accumulation; after a step's last micro-batch it is the average over ranks."""
        assert last == self._engine.is_gradient_accumulation_boundary()
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # only counts

    def set_rates(self, lr: float, weight_decay: float, frozen: Collection[str] = ()) -> None:
        """Of the step to come. A frozen part has rate 0: its weights then stay as they are, to the bit."""
        for group in self._base.param_groups:
            group["lr"] = 0.0 if group["part"] in frozen else lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

    def forget_moments(self, part: str) -> None:
        """Starts the optimiser of a part afresh: what it gathered while the part was frozen would make its first
        steps several times the learning rate.
        """
        for one, flat in self._flats:
            if one == part:
                for value in self._base.state.get(flat, {}).values():
                    value.zero_()

    def gradient_norms(self) -> Tensor:
        """The L2 norm of every parameter's whole gradient, float32 [number of parameters]; one collective in all."""
        squares = torch.zeros(len(self._names), device=distributed.device())
        pieces = self._gradients()
        index = self._index_of(tuple(name for name, _ in pieces))
        if pieces:
            norms = torch._foreach_norm([piece for _, piece in pieces], 2, dtype=torch.float32)
            squares.index_add_(0, index, torch.stack([norm.to(squares.device) for norm in norms]).square())
        if self.sharded:
            distributed.all_reduce_sum(squares)
        return squares.sqrt() / self.loss_scale

    def _index_of(self, names: tuple[str, ...]) -> Tensor:
        """The numbers of parameters, on the device; sent once, because sending them waits for what is under way."""
        if names not in self._sent:
            self._sent[names] = torch.tensor([self._indices[name] for name in names], device=distributed.device())
        return self._sent[names]

    def clip(self, norms: Tensor, largest: float) -> None:
        """Scales each parameter's gradient down to the norm `largest` (DINO's rule: each tensor by itself).

        norms: those of `gradient_norms`, on the host.
        """
        factors = (largest / (norms + EPS)).clamp(max=1.0).tolist()
        factored = [(piece, factors[self._indices[name]]) for name, piece in self._gradients()]
        long = [(piece, factor) for piece, factor in factored if factor < 1.0]
        if long and long[0][0].is_cuda:
            torch._foreach_mul_([piece for piece, _ in long], [factor for _, factor in long])
            return
        for piece, factor in long:  # on a CPU, foreach would round the factor to bf16 first
            piece.mul_(factor)

    def step(self, finite: bool) -> bool:
        """Updates the weights; False where the step was skipped, on all ranks alike: nothing has changed then."""
        self._finite = finite
        if self.sharded or finite:
            if not finite and self.stage == 3:
                self._poison()  # a loss may be infinite while its gradient is not
            self._engine.step()
            return bool(self._engine.was_step_applied())
        self._engine.zero_grad()
        self._engine.micro_steps += 1
        return False

    def snapshot(self) -> dict[str, memoryview]:
        """This rank's files of a DeepSpeed checkpoint, by name, in memory (all ranks together)."""
        state: dict[str, Any] = {"universal_checkpoint_info": {}}  # DeepSpeed's own conversion wants that key
        self._engine.save_checkpoint("memory", tag="snapshot", client_state=state, save_latest=False)
        contents, self._files.contents = self._files.contents, {}
        return contents

    def load(self, folder: Path, tag: str) -> None:
        """Restores weights, buffers, optimiser and loss scale, from as many ranks and the same description."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        assert path is not None, f"DeepSpeed found nothing to load in {folder / tag}"
        for state in filter(None, self._base.state.values()):  # only a fused AdamW counts on the device
            state["step"] = state["step"].to(state["exp_avg"].device if self._fused else "cpu")

    @torch.no_grad()
    def load_whole(self, whole: dict[str, dict[str, Tensor]], module: dict[str, Tensor], loss_scale: float) -> None:
        """Takes this rank's part of whole fp32 weights and moments, whatever ranks and stage they come from.

        whole: {parameter: {"fp32", "exp_avg", "exp_avg_sq": flattened, "step": scalar}}; module: what is in no
        optimiser, buffers and frozen parameters.
        """
        for fragment in self.fragments:
            part = slice(fragment.start, fragment.start + len(fragment.master))
            fragment.master.copy_(whole[fragment.name]["fp32"][part])
            state = self._state(fragment.flat)
            for key in ("exp_avg", "exp_avg_sq"):
                target = state[key].view(-1)[fragment.flat_start : fragment.flat_start + len(fragment.master)]
                target.copy_(whole[fragment.name][key][part])
            state["step"].copy_(whole[fragment.name]["step"])
        targets = dict(self.student.named_buffers()) | dict(self.student.named_parameters())
        for name, value in module.items():
            if name in whole:
                continue
            held = getattr(targets[name], "ds_tensor", None)  # stage 3: this rank's part of a frozen parameter
            if held is None:
                targets[name].copy_(value)
            else:
                mine = value.flatten()[distributed.rank() * held.ds_numel :][: held.ds_numel]
                held.data[: len(mine)].copy_(mine)
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for group, flat in zip(
                self._optimizer.fp16_groups, self._optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                for parameter, piece in zip(group, flat.split([p.ds_tensor.ds_numel for p in group]), strict=True):
                    parameter.ds_tensor.data.copy_(piece)
        if hasattr(self._optimizer, "loss_scaler"):
            self._optimizer.loss_scaler.cur_scale = loss_scale

    def _state(self, flat: int) -> dict[str, Tensor]:
        """AdamW's state of one of its parameters; made where there was no step yet."""
        _, parameter = self._flats[flat]
        if not self._base.state.get(parameter):
            self._base.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device if self._fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self._base.state[parameter]  # type: ignore[no-any-return]

    def _find_flats(self) -> list[tuple[str, Tensor]]:
        """The tensors that AdamW updates, with their group's part, in the order of its state's indices."""
        groups = self._base.param_groups
        if self.stage == 3:  # its groups are empty between steps
            flats = self._optimizer.fp32_partitioned_groups_flat
            if len(flats) != len(groups):
                raise UserError(f"--deepspeed {self.name}: zero_optimization.sub_group_size is too small; leave it out")
            return [(group["part"], flat) for group, flat in zip(groups, flats, strict=True)]
        return [(group["part"], flat) for group in groups for flat in group["params"]]

    def _find_fragments(self) -> list[Fragment]:
        if self.stage == 0:
            return [
                Fragment(self._names[id(parameter)], 0, parameter.data.view(-1), index, 0)
                for index, (_, parameter) in enumerate(self._flats)
            ]
        return self._fragments_of_flat_groups() if self.stage < 3 else self._fragments_of_parameters()

    def _fragments_of_flat_groups(self) -> list[Fragment]:
        """Stages 1 and 2: a group is one flat tensor, cut into equal parts regardless of the parameters' borders."""
        fragments: list[Fragment] = []
        for index, group in enumerate(self._optimizer.bit16_groups):
            assert self._flats[index][1] is self._optimizer.single_partition_of_fp32_groups[index]
            for parameter in group:
                here = parameter._hp_mapping
                if here is not None:
                    name, master = self._names[id(parameter)], here.hp_fragment.view(-1)
                    start, flat_start = here.lp_fragment_address.start, here.hp_fragment_address.start
                    fragments.append(Fragment(name, start, master, index, flat_start))
        return fragments

    def _fragments_of_parameters(self) -> list[Fragment]:
        """Stage 3: every parameter is cut into equal parts, the last padded; a group's parts lie behind each other."""
        fragments: list[Fragment] = []
        for index, group in enumerate(self._optimizer.fp16_groups):
            (_, flat), offset = self._flats[index], 0
            for parameter in group:
                size = parameter.ds_tensor.ds_numel
                start = distributed.rank() * size
                held = max(0, min(size, parameter.ds_numel - start))
                if held:
                    master = flat.data.narrow(0, offset, held)
                    fragments.append(Fragment(self._names[id(parameter)], start, master, index, offset))
                offset += size
        return fragments

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """This rank's pieces of the averaged gradients, between backward and step; writing to them counts."""
        pieces: list[tuple[str, Tensor]] = []
        if self._offload:
            self._optimizer._wait_for_offload_copies()
        if self.stage == 3:
            for index, group in enumerate(self._optimizer.fp16_groups):
                gradients = self._optimizer.averaged_gradients[index]
                pieces += [(self._names[id(p)], piece) for p, piece in zip(group, gradients, strict=True)]
            return pieces
        for parameter in self.student.parameters():
            name = self._names[id(parameter)]
            if self.stage == 0:
                if parameter.grad is not None:
                    pieces.append((name, parameter.grad))
            elif (here := getattr(parameter, "_hp_mapping", None)) is not None:
                pieces.append((name, here.get_lp_grad_fragment(parameter._index_in_param_group)))  # type: ignore[attr-defined]
        return pieces

    def _poison(self) -> None:
        """Has DeepSpeed find a gradient that is not finite, so that it skips the step."""
        for _, piece in self._gradients()[:1]:
            piece.view(-1)[:1] = torch.nan
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # it looks from another stream
