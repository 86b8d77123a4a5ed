"""A moving average of the trained network's fp32 masters, itself in fp32, and the same in every ZeRO stage.

Each rank averages the fragments that its optimiser holds, so the average is sharded where the masters are and costs no
collective. One all-gather, in the type of the forward pass, then brings every rank's part into a second network;
it runs while the next batch is augmented and goes through the student. An average kept in bf16 would stall: at a
momentum of 0.9995 a step is mostly smaller than half the distance to the next bf16 number.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccd_train import distributed
from ccd_train.training.engine import Engine

Network = TypeVar("Network", bound=nn.Module)


class Average(Generic[Network]):
    """Keeps `network` at the average of the student's masters; their parameters bear the same names."""

    def __init__(self, engine: Engine, network: Network) -> None:
        """`network` has the student's weights; it is cast to the student's type and moved to this rank's device."""
        self.network = network.to(distributed.device(), engine.dtype)
        parameters = dict(self.network.named_parameters())
        fragments = [fragment for fragment in engine.fragments if fragment.name in parameters]
        self._masters = [fragment.master for fragment in fragments]
        sizes = [len(master) for master in self._masters]
        flat = torch.zeros(sum(sizes), device=self._masters[0].device if sizes else distributed.device())
        self._averages = list(flat.split(sizes)) if sizes else []
        self._flat = flat
        self._sharded = engine.sharded and distributed.world_size() > 1
        mine = [(fragment.name, fragment.start, size) for fragment, size in zip(fragments, sizes, strict=True)]
        self._places = distributed.gather_objects(mine) if self._sharded else [mine]
        longest = max(sum(size for _, _, size in row) for row in self._places)
        self._rows = torch.zeros(len(self._places), longest, dtype=engine.dtype, device=distributed.device())
        self._arrived = self._cut(self._rows)
        self._targets = [
            parameters[name].data.view(-1)[start : start + size] for row in self._places for name, start, size in row
        ]
        self._gather: dist.Work | None = None
        self.update(0.0)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average ← momentum · average + (1 − momentum) · student; starts bringing it into the network.

        A momentum of 0 makes the network a copy of the student, whole on every rank.
        """
        torch._foreach_lerp_(self._averages, self._masters, 1.0 - momentum)
        self._send()

    def ready(self) -> Network:
        """The network with its newest weights; waits for the all-gather."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None
            torch._foreach_copy_(self._targets, self._arrived)
        return self.network

    def state_dict(self) -> dict[str, Tensor]:
        """The whole average in fp32 by parameter name, on the CPU of every rank (a collective)."""
        rows = torch.zeros(self._rows.shape, device=self._rows.device)
        rows[distributed.rank() if self._sharded else 0, : len(self._flat)] = self._flat
        if self._sharded:
            dist.all_gather_into_tensor(rows.view(-1), rows[distributed.rank()].clone())
        # What is not averaged is frozen: it comes from the network as it is.
        whole = {name: value.detach().float().cpu().clone() for name, value in self.network.named_parameters()}
        places = [place for row in self._places for place in row]
        for (name, start, size), piece in zip(places, self._cut(rows.cpu()), strict=True):
            whole[name].view(-1)[start : start + size] = piece
        return whole

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes this rank's part of a whole average, whatever the number of ranks that wrote it."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(state[name])
        mine = self._places[distributed.rank() if self._sharded else 0]
        for average, (name, start, size) in zip(self._averages, mine, strict=True):
            average.copy_(state[name].view(-1)[start : start + size])
        self._send()

    def _send(self) -> None:
        if self._sharded:
            mine = torch.zeros_like(self._rows[0])
            mine[: len(self._flat)] = self._flat
            self._gather = dist.all_gather_into_tensor(self._rows.view(-1), mine, async_op=True)
        else:
            torch._foreach_copy_(self._targets, self._averages)

    def _cut(self, rows: Tensor) -> list[Tensor]:
        """Each rank's row, cut into the pieces that it holds."""
        pieces: list[Tensor] = []
        for row, places in zip(rows, self._places, strict=True):
            sizes = [size for _, _, size in places]
            pieces += row[: sum(sizes)].split(sizes) if sizes else []
        return pieces
