"""The variance of Z within groups of rows that share what it is conditioned on.

    v_i = m/(m-1) |z_i - mean of i's group|^2      m rows in i's group, of all ranks; rows alone in theirs are left out
    dv/dz_i = 2 m/(m-1) (z_i - mean)               exactly, summed over a group: its deviations sum to 0

The mean of v over a group is the unbiased trace of its Cov(Z), so the mean over rows is E tr Cov(Z | group).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.collectives import gather
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.losses.targets import Groups
from cibr_kernels.numerics import promote


def variance_in_groups(
    z: Tensor,  # (n, d)
    group_ids: Tensor,  # (n,) int64
    noise_std: float,
    shards: Shards | None,
) -> Tensor:
    """The mean of v / 2 noise_std^2 over rows that are not alone -> () nats, the same on every rank; 0 without such."""
    groups = Groups.of(group_ids, shards)
    assert groups is not None
    with torch.no_grad():
        columns = promote(z) if shards is None else promote(gather(z, shards))
        sums, size = groups.sums(columns)
        shared = size > 1
        mean = sums / size[:, None]
        weight = torch.where(shared, size / (size - 1).clamp(min=1), 0.0).to(mean.dtype)
    scatter = (weight * (promote(z) - mean).square().sum(1)).sum()
    total = torch.stack([scatter / (2 * noise_std**2), shared.sum().to(scatter.dtype)])
    if shards is not None:
        total = merge.vector_total(total, shards)
    return total[0] / total[1].clamp(min=1)
