"""Several processes, one training: every step's batch is shared out, and gradients are averaged.

torchrun starts the processes and names them to each other. All draw the same permutations and the same noise, and use
their own part: as many processes as there are, the run is the same up to rounding. Gradients are averaged here and not
by ``DistributedDataParallel``, whose hooks see only ``model(x)``: certified bounds use the weights without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """This process among all that train together: its number and their count."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """Return the group of torch.distributed if it was set up, else that of one process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    @property
    def mine(self) -> slice:
        """The part of every step's batch that this process computes."""
        return slice(self.rank, None, self.size)

    def average(self, model: nn.Module) -> None:
        """Replace the gradients by their mean over all processes; one that a process lacks counts as zero."""
        if self.size == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's buffers: running statistics, of which each has seen its own part."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def launched() -> Iterator[Group]:
    """Join the processes that torchrun started, for a while; without torchrun there is one.

    nccl on GPUs, one each; gloo on CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Group.current()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Group.current()
    finally:
        dist.destroy_process_group()
