"""The processes that torchrun started, or the one there is: who has which rows, and what they agree on.

Every rank draws the whole batch's random numbers and works on its rows, so a run depends on the batch size and not on
the number of ranks, which may change at a resume.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cibr.errors import UsageError
from cibr_kernels.distributed import Shards

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


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
        rows = self.rows(total)
        begin = sum(rows[: self.rank])
        return slice(begin, begin + rows[self.rank])

    def rows(self, total: int) -> tuple[int, ...]:
        """How many rows of a batch each rank has."""
        each, more = divmod(total, self.world)
        return tuple(each + (rank < more) for rank in range(self.world))

    def shards(self, total: int) -> Shards | None:
        """The same for a loss over all ranks; None where there is one."""
        return None if self.group is None else Shards(self.group, self.rank, self.rows(total))

    def copies(self, model: M) -> M | DistributedDataParallel:
        """`model`, with gradients that are averaged over ranks while they are computed."""
        if self.group is None:
            return model
        return DistributedDataParallel(model, process_group=self.group, broadcast_buffers=False)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their means over ranks, in one message for each dtype."""
        if self.group is None:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if p.grad is not None:
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for gradients in by_dtype.values():
            message = torch.cat([g.flatten() for g in gradients]) / self.world
            dist.all_reduce(message, group=self.group)
            for g, mean in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))

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

    def union(self, items: set[T]) -> set[T]:
        """Of all ranks' sets, of what can be pickled."""
        if self.group is None:
            return items
        found: list[set[T]] = [set()] * self.world
        dist.all_gather_object(found, items, group=self.group)
        return set().union(*found)

    def require_same(self, what: str, value: int) -> None:
        """Raises UsageError on every rank if they have found different values."""
        low, high = self.largest(-float(value), float(value))
        if -low != high:
            raise UsageError(f"ranks found different {what}, {-low:.0f} and {high:.0f}: is --out on one disk?")


@contextmanager
def joined(device: str, batch_size: int, timeout: float) -> Iterator[Ranks]:
    """The ranks that torchrun started, over gloo on the CPU and NCCL beside it for CUDA; alone without torchrun.

    A collective that another rank does not join within `timeout` seconds raises.  Raises UsageError for a batch with
    fewer pairs than ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if batch_size < world:
        raise UsageError(f"--batch-size is {batch_size}, but there are {world} ranks and each needs a pair")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Ranks(dist.get_rank(), world, dist.group.WORLD)
    except RuntimeError as error:
        if re.search(r"[Tt]imed out|[Cc]onnection (closed|reset)|heartbeat", str(error)):
            first = str(error).splitlines()[0]
            raise UsageError(f"another rank ended, or did not answer within {timeout:g} s ({first})") from error
        raise
    finally:
        dist.destroy_process_group()
