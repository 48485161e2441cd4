"""Estimates from a Gaussian model q of Z given another variable: CLUB, and the upper bounds CEB, alignment, variance.

q(. | x) = N(mean(x), diag exp(2 log_std(x))); a callable that returns only the mean has unit variance in CLUB, and
the noise's in CEB
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.information.pairs import Pairs
from cibr_kernels.information.wrappers import in_its_dtype
from cibr_kernels.numerics import promote


def gaussian_log_likelihood(
    x: Tensor,  # (n, dx)
    z: Tensor,  # (n, dz)
    q: Callable[[Tensor], Any],
    *,
    process_group: ProcessGroup | Shards | None = None,
) -> Tensor:
    """mean_i log q(z_i | x_i) in nats, a float32 scalar: what q is trained to *maximise* before CLUB means anything.

    q: x (n, dx) -> mean (n, dz), with unit variance, or (mean, log_std (n, dz)).  Detach x and z to train q alone.
    process_group: as in `mutual_information`.  Raises ValueError for shapes, TypeError for dtypes.
    """
    with Agreement("gaussian_log_likelihood", process_group) as agreement:
        checks.matrix("x", x)
        checks.matrix("z", z)
        checks.same_rows(x=x, z=z)
        checks.one_precision(x=x, z=z)
        agreement.describe(x=x, z=z)
    with torch.autocast(x.device.type, enabled=False):
        z = promote(z)
        mean, log_std = predicted("q(x)", q, promote(x), z, 0.0)
        nats = ((z - mean) * (-log_std).exp()).square() / 2 + log_std + 0.5 * math.log(2 * math.pi)
        value = -nats.sum(1)
        return value.mean() if agreement.shards is None else merge.mean(value, agreement.shards)


def club(pairs: Pairs) -> Tensor:
    """E log q(z_i | x_i) - mean_j E log q(z_j | x_i) in nats, (); over all pairs in O(n d).

    mean_j (z_j - mu)^2 = var z + (mean z - mu)^2, so only the columns' first two moments are needed.
    """
    if pairs.negatives != "all":
        raise ValueError(
            f"estimator 'club' has all pairs in closed form: negatives must be 'all', got {pairs.negatives!r}"
        )
    mean, log_std = predicted("critic(x)", pairs.critic.called, pairs.x, pairs.z, 0.0)
    var, centre = torch.var_mean(pairs.z, 0, unbiased=False)
    if pairs.shards is not None:
        centre, var = merge.statistics(centre, var, pairs.shards)
    columns = pairs.columns
    if pairs.marginals is not None:
        queue_var, queue_centre = torch.var_mean(pairs.marginals, 0, unbiased=False)
        share, moved = pairs.marginals.shape[0] / columns, queue_centre - centre
        var = (1 - share) * var + share * queue_var + share * (1 - share) * moved.square()
        centre = centre + share * moved
    half_precision = (-2 * log_std).exp() / 2
    apart = centre - pairs.z  # (centre - mean)^2 - (z - mean)^2 as a product: no cancellation
    values = ((var + apart * (centre + pairs.z - 2 * mean)) * half_precision).sum(1)
    if not pairs.include:
        values = values * (columns / (columns - 1))
    values = values * pairs.nan_if_not_finite()
    return values.mean() if pairs.shards is None else merge.mean(values, pairs.shards)


def align(z: Tensor, other: Tensor, noise_std: float) -> Tensor:
    """KL(N(z, s^2 I) || N(other, s^2 I)) -> (n,) nats."""
    return (promote(z) - promote(other)).square().sum(1) / (2 * noise_std**2)


def variance(z: Tensor, second: Tensor, noise_std: float) -> Tensor:
    """|z - z'|^2 / 4 s^2 -> (n,) nats, of two draws of z that share what it is conditioned on.

    In the mean the trace of Cov(Z | other) over 2 s^2, without bias: above 1/2 log det(I + Cov(Z | other) / s^2).
    """
    return (promote(z) - promote(second)).square().sum(1) / (4 * noise_std**2)


def ceb(z: Tensor, other: Tensor, q: Callable[[Tensor], Any], noise_std: float, name: str = "q(other)") -> Tensor:
    """KL(N(z, s^2 I) || q(. | other)) -> (n,) nats.  name: of q, for errors."""
    z = promote(z)
    mean, log_std = predicted(name, q, promote(other), z, math.log(noise_std))
    variance = noise_std**2 + (z - mean).square()
    return (log_std - math.log(noise_std) + variance / (2 * torch.exp(2 * log_std)) - 0.5).sum(1)


def predicted(name: str, q: Callable[[Tensor], Any], x: Tensor, z: Tensor, log_std: float) -> tuple[Tensor, Tensor]:
    """q(x) -> mean, log_std, both of z's shape, float32 (float64); `log_std` where q has none.

    A module q gets x in the dtype of its parameters.
    """
    out = q(in_its_dtype("x", x, q))
    parts = out if isinstance(out, tuple) else (out,)
    if len(parts) > 2 or not all(isinstance(part, Tensor) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{name} must be a mean, or a mean and a log_std, got {kinds}")
    for part in parts:
        if part.shape != z.shape:
            raise ValueError(f"{name} has shape {tuple(part.shape)} but z is {tuple(z.shape)}")
    mean = promote(parts[0])
    return mean, promote(parts[1]) if len(parts) == 2 else torch.full_like(mean, log_std)
