"""Sums over ranks, merged exactly: a log-sum-exp carries its maximum and its sum, a log-mean-exp its count as well."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from cibr_kernels.distributed.collectives import all_gather, all_reduce, exchange, gather
from cibr_kernels.distributed.shards import Shards


def columns(partial: Tensor, shards: Shards) -> Tensor:
    """partial (total,), this rank's log-sum-exp of every column -> (local,), that of its own columns over all ranks.

    One all-to-all of O(total) numbers each way: a column's owner gets its world partial sums and adds them in the order
    of the ranks; in the backward every rank gets its part of the owner's gradient.
    """
    if shards.world == 1:
        return partial
    parts = exchange(partial, shards.rows, (shards.local,) * shards.world, shards.group)
    return parts.view(shards.world, shards.local).logsumexp(0)


def largest(partial: Tensor, shards: Shards) -> Tensor:
    """partial (total,), this rank's largest number of every column -> (local,), that of its own columns over all ranks.

    Without gradient.
    """
    if shards.world == 1:
        return partial
    parts = exchange(partial.detach(), shards.rows, (shards.local,) * shards.world, shards.group)
    return parts.view(shards.world, shards.local).amax(0)


def moments(j: Tensor, el: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """A mean j () and a log-mean-exp el () over this rank's rows -> those over the rows of all ranks.

    A row has the same number of scores on every rank.  Every rank gets the same bits.  In float64: L is often near 0,
    where the logarithms of sum and count cancel.
    """
    if shards.world == 1:
        return j, el
    weight = shards.local / shards.total
    parts = _of_all_ranks(torch.stack([j.double() * weight, el.double() + math.log(weight)]), shards)  # (world, 2)
    return parts[:, 0].sum().to(j.dtype), parts[:, 1].logsumexp(0).to(el.dtype)


def mean(values: Tensor, shards: Shards) -> Tensor:
    """values (local,) -> (), the mean over the rows of all ranks, the same bits on each."""
    if shards.world == 1:
        return values.mean()
    own = values.double().sum() / shards.total
    return _of_all_ranks(own[None], shards).sum().to(values.dtype)


def total(value: Tensor, shards: Shards) -> Tensor:
    """A number () of this rank -> the sum over ranks, the same bits on each; differentiable."""
    return vector_total(value[None], shards)[0]


def vector_total(values: Tensor, shards: Shards) -> Tensor:
    """values (d,) of this rank -> the sum over ranks, the same bits on each; differentiable."""
    if shards.world == 1:
        return values
    return _of_all_ranks(values.double(), shards).sum(0).to(values.dtype)


def sum_of_ranks(t: Tensor, shards: Shards) -> Tensor:
    """t of one shape on every rank -> its sum over ranks, without gradient: for what is too large to gather."""
    return t if shards.world == 1 else all_reduce(t.detach().clone(), shards.group)


def gather_rows(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """t (1, ...) of one shape on every rank -> (world, ...), differentiable: for statistics of one's own."""
    world = dist.get_world_size(group)
    return gather(t, Shards(group, dist.get_rank(group), (1,) * world))


def mean_of_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean of a number over ranks, without gradient."""
    return all_gather(value[None], group).double().mean().to(value.dtype)


def statistics(mean: Tensor, var: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """This rank's mean and (biased) variance of its rows, (d,) each -> those of the rows of all ranks."""
    if shards.world == 1:
        return mean, var
    weight = shards.local / shards.total
    sums = _of_all_ranks(torch.cat([mean.double() * weight, (var.double() + mean.double().square()) * weight]), shards)
    first, second = sums.sum(0).chunk(2)
    return first.to(mean.dtype), (second - first.square()).clamp(min=0).to(var.dtype)


def _of_all_ranks(numbers: Tensor, shards: Shards) -> Tensor:
    """numbers (k,) -> (world, k)."""
    return gather_rows(numbers[None], shards.group)
