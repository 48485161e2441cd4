"""The collectives of the losses, with their gradients, and `traffic`, which counts what they move.

The gradients are those of the sum of all ranks' losses: of an all-gather, a reduce-scatter; of an all-to-all, the
all-to-all back.  Half precision gradients are summed over ranks in float32, and the sum is rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

if TYPE_CHECKING:
    from cibr_kernels.distributed.shards import Shards

# torch 2.14 renamed them
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ------------------------------------------------------------------------------------------------ counting
@dataclass
class Traffic:
    """Calls, and bytes between this rank and the others, of each kind of collective.

    Bytes are those of the best algorithm: an all-gather receives every other rank's part, a reduce-scatter sends one
    part to every other rank, an all-to-all and a send and receive take the larger direction.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


_meters: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts the collectives that this process's losses issue inside, in forward and in backward."""
    meter = Traffic()
    _meters.append(meter)
    try:
        yield meter
    finally:
        _meters.remove(meter)


def count(kind: str, size: int) -> None:
    """Tells every open `traffic` of one call that moves `size` bytes."""
    for meter in _meters:
        meter.calls[kind] += 1
        meter.bytes[kind] += size


# ------------------------------------------------------------------------------------------------ without gradients
def all_gather(t: Tensor, group: dist.ProcessGroup, kind: str = "all-gather") -> Tensor:
    """t (n, ...) of one shape on every rank -> (world n, ...), in the order of the ranks."""
    world = dist.get_world_size(group)
    out = t.new_empty((world * t.shape[0], *t.shape[1:]))
    _all_gather(out, t.contiguous(), group=group)
    count(kind, (world - 1) * t.numel() * t.itemsize)
    return out


def all_reduce(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of t, of one shape on every rank, in place."""
    dist.all_reduce(t, group=group)
    count("all-reduce", 2 * (dist.get_world_size(group) - 1) * t.numel() * t.itemsize // dist.get_world_size(group))
    return t


def _padded(t: Tensor, shards: Shards) -> Tensor:
    """The shards of t (total, ...) at equal distances, zeros between them: (world, most rows, ...)."""
    most = max(shards.rows)
    out = t.new_zeros((shards.world, most, *t.shape[1:]))
    for part, slot in zip(t.split(shards.rows), out, strict=True):
        slot[: len(part)] = part
    return out


def _gather_rows(t: Tensor, shards: Shards) -> Tensor:
    """t (local, ...) -> (total, ...).  Uneven shards are padded to the longest on the way."""
    most = max(shards.rows)
    if len(set(shards.rows)) == 1:
        return all_gather(t, shards.group)
    mine = t.new_zeros((most, *t.shape[1:]))
    mine[: shards.local] = t
    parts = all_gather(mine, shards.group).split(most)
    return torch.cat([part[:rows] for part, rows in zip(parts, shards.rows, strict=True)])


def _reduce_scatter_rows(t: Tensor, shards: Shards) -> Tensor:
    """t (total, ...) -> (local, ...): this rank's rows of the sum over ranks."""
    most = max(shards.rows)
    whole = t.contiguous() if len(set(shards.rows)) == 1 else _padded(t, shards).flatten(0, 1)
    out = t.new_empty((most, *t.shape[1:]))
    _reduce_scatter(out, whole, group=shards.group)
    count("reduce-scatter", (shards.world - 1) * out.numel() * out.itemsize)
    return out[: shards.local]


def _exchange_rows(t: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """t (sum sent, ...) -> (sum received, ...): sent[r] rows go to rank r, received[r] come from it."""
    out = t.new_empty((sum(received), *t.shape[1:]))
    dist.all_to_all_single(out, t.contiguous(), list(received), list(sent), group=group)
    rank, row = dist.get_rank(group), t[:1].numel() * t.itemsize
    count("all-to-all", row * max(sum(sent) - sent[rank], sum(received) - received[rank]))
    return out


# ------------------------------------------------------------------------------------------------ with gradients
class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return _gather_rows(t, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = grad if grad.itemsize >= 4 else grad.float()
        return _reduce_scatter_rows(wide, ctx.shards).to(grad.dtype), None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange_rows(t, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def gather(t: Tensor, shards: Shards) -> Tensor:
    """t (local, ...) -> (total, ...) in the order of the ranks; backward is a reduce-scatter of the sum."""
    return t if shards.world == 1 else _Gather.apply(t, shards)


def exchange(t: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """t (sum sent, ...) -> (sum received, ...): sent[r] rows go to rank r; backward sends the gradients back."""
    return _Exchange.apply(t, sent, received, group)


def halo(t: Tensor, k: int, shards: Shards) -> Tensor:
    """t (local, ...) -> (k, ...): the k < total rows that follow this rank's in the cyclic order of all rows."""
    if shards.world == 1:
        return t[:k]
    world, rank = shards.world, shards.rank

    def parts(reader: int) -> list[tuple[int, int]]:
        """(owner, rows) of what follows `reader`'s rows: the first rows of the ranks after it."""
        found, left = [], k
        for step in range(1, world + 1):
            owner = (reader + step) % world
            found.append((owner, min(left, shards.rows[owner])))
            left -= found[-1][1]
        return found

    received = parts(rank)
    sent = [dict(parts(reader))[rank] for reader in range(world)]
    per_owner = dict(received)
    rows = exchange(torch.cat([t[:n] for n in sent]), sent, [per_owner[r] for r in range(world)], shards.group)
    by_owner = rows.split([per_owner[r] for r in range(world)])
    return torch.cat([by_owner[owner] for owner, _ in received])
