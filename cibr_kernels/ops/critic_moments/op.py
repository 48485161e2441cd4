"""J and L of a critic, the two numbers that DV, MINE, NWJ, TUBA and ReMINE are functions of.

    J = mean of T(x_i, z_i) over the positives        L = log-mean-exp of T(x_i, z_j) over the product of marginals

A concat critic becomes `additive_moments` of its two projections, a separable one `dot_moments` of its embeddings; the
projections are ordinary matmuls and are left to PyTorch.  K cyclic shifts cost K n scores and stay in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.ops import checks
from cibr_kernels.ops.additive_moments.op import additive_moments
from cibr_kernels.ops.dot_moments.op import dot_moments
from cibr_kernels.ops.log_mean_exp.op import log_mean_exp


@dataclass(frozen=True)
class Shifts:
    """The marginal of k cyclic shifts of the batch: see `shifts`."""

    k: int


def shifts(k: int) -> Shifts:
    """k cyclic shifts of the batch as the product of marginals: pairs (i, (i + s) mod n) for s = 1 ... k.

    Derangements, all pairs distinct; the batch must be in random order.  k = 1 is MINE's single shuffle: cheap, but its
    estimate is so noisy that the CIBR penalty is slow or fails (`python bench/ toy`).  Raises ValueError for k < 1, and
    at use for k >= n.
    """
    if k < 1:
        raise ValueError(f"shifts needs k >= 1, got {k}")
    return Shifts(k)


def critic_moments(
    x: Tensor,  # (n, dx)
    z: Tensor,  # (n, dz)
    critic: Any,
    *,
    negatives: str | Shifts = "all",
    diagonal: str = "exclude",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) in nats: mean critic on the n positives, log-mean-exp over the marginal pairs.  float32 scalars.

    Args:
        x, z: (n, dx) and (n, dz), row i of one with row i of the other; bfloat16 and float16 are computed in float32.
        critic: `nn.ConcatCritic`, `nn.SeparableCritic`, or a module with their `additive_parts` or `dot_parts`.
        negatives: "all" n^2 pairs in O(n) memory, or `shifts(k)` in O(k n hidden).
        diagonal: "exclude" the positives from the n^2 pairs (unbiased, unbounded) or "include" them (caps J - L at
            log n, biased by e^2I / n).

    Gradients reach x, z and the critic's parameters for any gradient of (J, L).  Autocast is off inside.
    Raises ValueError for shapes, one row (there is no negative), k >= n; TypeError for dtypes or an unknown critic.
    Source: MINE (1801.04062), equation 5; all n^2 - n pairs make its second term a degenerate U-statistic, whose
    error is e^I / n where k shuffles have e^I / sqrt(n k).
    """
    checks.matrix("x", x)
    checks.matrix("z", z)
    checks.same_rows(x=x, z=z)
    checks.choice("diagonal", diagonal, ("exclude", "include"))
    n = x.shape[0]
    if n < 2:
        raise ValueError("critic_moments needs at least 2 rows: one pair has no negatives, got 1")
    if negatives != "all" and not isinstance(negatives, Shifts):
        raise ValueError(f"negatives is {negatives!r}; known are 'all' and shifts(k)")
    x, z = (t if t.dtype == torch.float64 else t.float() for t in (x, z))
    checks.same_place(x=x, z=z)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(negatives, Shifts):
            return _shifted_moments(x, z, critic, negatives.k)
        include = diagonal == "include"
        if hasattr(critic, "additive_parts"):
            a, b, w, bias, activation, slope = critic.additive_parts(x, z)
            j, el = additive_moments(
                a, b, w, activation=activation, slope=slope, include_diagonal=include, backend=backend
            )
            return j + bias, el + bias
        if hasattr(critic, "dot_parts"):
            return dot_moments(*critic.dot_parts(x, z), include_diagonal=include, backend=backend)
    raise TypeError(f"critic must have additive_parts or dot_parts (nn.ConcatCritic, nn.SeparableCritic), got {critic}")


def _shifted_moments(x: Tensor, z: Tensor, critic: Any, k: int) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    if k >= n:
        raise ValueError(f"shifts({k}) needs more than {k} rows, got {n}")
    scores = torch.stack([critic.paired(x, z.roll(-s, 0)) for s in range(1, k + 1)])  # (k, n)
    return critic.paired(x, z).mean(), log_mean_exp(scores)
