"""The processes that torchrun started, or the one there is: who has which rows, and what they agree on.

Every rank draws the whole batch's random numbers and works on its rows, so a run depends on the batch size and not on
the number of ranks, which may change at a resume.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cibr.errors import UsageError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, which talk through `group`; None without torchrun."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes: checkpoints, the log, the terminal."""
        return self.rank == 0

    def part(self, total: int) -> slice:
        """This rank's rows of a batch; earlier ranks have one more where they do not divide it."""
        each, more = divmod(total, self.world)
        begin = self.rank * each + min(self.rank, more)
        return slice(begin, begin + each + (self.rank < more))

    def share(self, players: M) -> M | DistributedDataParallel:
        """`players` with every loss and batch norm over all ranks, and gradients that are averaged over them."""
        if self.group is None:
            return players
        for module in players.modules():
            if hasattr(module, "process_group"):
                module.process_group = self.group  # type: ignore[assignment]
        return DistributedDataParallel(players, process_group=self.group, broadcast_buffers=False)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Numbers () by name -> their means over ranks."""
        if self.group is None:
            return values
        sums = torch.stack([value.double() for value in values.values()])
        dist.all_reduce(sums, group=self.group)
        return {n: (s / self.world).to(v.dtype) for (n, v), s in zip(values.items(), sums, strict=True)}

    def largest(self, *values: float) -> list[float]:
        """Each number's largest value among ranks."""
        if self.group is None:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def require_same(self, what: str, value: int) -> None:
        """Raises UsageError on every rank if they have found different values."""
        low, high = self.largest(-float(value), float(value))
        if -low != high:
            raise UsageError(f"ranks found different {what}, of steps {-low:.0f} and {high:.0f}: is --out on one disk?")


@contextmanager
def joined(device: str, batch_size: int) -> Iterator[Ranks]:
    """The ranks that torchrun started, over gloo on the CPU and NCCL beside it for CUDA; alone without torchrun.

    Raises UsageError for a batch with fewer pairs than ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if batch_size < world:
        raise UsageError(f"--batch-size is {batch_size}, but there are {world} ranks and each needs a pair")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
