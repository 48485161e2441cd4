"""What embeddings can carry about their inputs at most, in closed form.

    I(Z + s e; X) <= 1/2 log det(I + Cov(Z) / s^2) nats          equal for a Gaussian Z

Of all variables with one covariance the Gaussian has the largest entropy.  A critic in batches of n rows tells at most
about log(n) - 1 nats: where the capacity is above, what critics estimate is less than what there is, and says nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.numerics import promote


@torch.no_grad()
def covariance(
    z: Tensor,  # (n, d)
    shards: Shards | None = None,
) -> Tensor:
    """-> (d, d) float32 (float64), over the rows of all ranks, divided by their number.  O(n d^2), no wait."""
    z = promote(z.detach())
    with torch.autocast(z.device.type, enabled=False):
        if shards is None:
            z = z - z.mean(0)
            return z.T @ z / z.shape[0]
        mean = merge.sum_of_ranks(z.sum(0), shards) / shards.total
        return merge.sum_of_ranks((z - mean).T @ (z - mean), shards) / shards.total


@torch.no_grad()
def capacity(
    covariance: Tensor,  # (d, d)
    noise_std: float,
) -> Tensor:
    """1/2 log det(I + covariance / noise_std^2) -> () nats; without a wait for the device."""
    inside = covariance / noise_std**2
    inside.diagonal().add_(1.0)
    return torch.linalg.cholesky_ex(inside).L.diagonal().log().sum()


@torch.no_grad()
def noise_for(
    covariance: Tensor,  # (d, d)
    nats: float,
) -> float:
    """The noise_std at which the capacity is `nats`; infinite for nats <= 0, 0 for a covariance of zeros.

    Waits for the device and takes O(d^3): for a message, not for a step.
    """
    variances = [v for v in torch.linalg.eigvalsh(covariance.double().cpu()).tolist() if v > 0]
    if nats <= 0:
        return math.inf
    if not variances:
        return 0.0

    def carried(log_noise: float) -> float:
        return sum(math.log1p(v * math.exp(-2 * log_noise)) for v in variances) / 2

    low, high = -20.0, math.log(sum(variances)) / 2 - math.log(nats) / 2 + 1.0  # carried <= trace / 2 s^2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if carried(middle) > nats else (low, middle)
    return math.exp(high)
