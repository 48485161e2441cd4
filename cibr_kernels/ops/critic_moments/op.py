"""J and L of a critic, the two numbers that DV, MINE, NWJ, TUBA and ReMINE are functions of.

    J = mean of T(x_i, z_i) over the positives        L = log-mean-exp of T(x_i, z_j) over the product of marginals

A concat critic becomes `additive_moments` of its two projections, or `additive_shifts` for K cyclic shifts; a separable
one `dot_moments` of its embeddings, or K n dot products in plain PyTorch.  The projections are ordinary matmuls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.collectives import gather, halo
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.ops import checks
from cibr_kernels.ops.additive_moments.op import additive_moments
from cibr_kernels.ops.additive_shifts.op import additive_shifts
from cibr_kernels.ops.dot_moments.op import dot_moments, sharded_dot_moments
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
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) in nats: mean critic on the n positives, log-mean-exp over the marginal pairs.  float32 scalars.

    Args:
        x, z: (n, dx) and (n, dz), row i of one with row i of the other; bfloat16 and float16 are computed in float32.
        critic: `nn.ConcatCritic`, `nn.SeparableCritic`, or a module with their `additive_parts` or `dot_parts`.
        negatives: "all" n^2 pairs in O(n) memory, or `shifts(k)`, in O(k n) for a concat critic.
        diagonal: "exclude" the positives from the n^2 pairs (unbiased, unbounded) or "include" them (caps J - L at
            log n, biased by e^2I / n).
        process_group: ranks whose rows make one batch, as in `clip_loss`.  Every rank gets the (J, L) of all rows, the
            same bits; gradients that DDP or FSDP average are the single-process ones.
        strategy: "gather", or "ring" for a critic with `dot_parts`, as in `clip_loss`.  Shifts need neither: the rows
            that follow this rank's in the order of the ranks come from their owners.

    Gradients reach x, z and the critic's parameters for any gradient of (J, L).  Autocast is off inside.
    Raises ValueError for shapes, one row (there is no negative), k >= n; TypeError for dtypes or an unknown critic.
    Source: MINE (1801.04062), equation 5; all n^2 - n pairs make its second term a degenerate U-statistic, whose
    error is e^I / n where k shuffles have e^I / sqrt(n k).
    """
    checks.choice("strategy", strategy, STRATEGIES)
    options = {"negatives": negatives, "diagonal": diagonal, "strategy": strategy}
    with Agreement("critic_moments", process_group, **options) as agreement:
        checks.matrix("x", x)
        checks.matrix("z", z)
        checks.same_rows(x=x, z=z)
        checks.choice("diagonal", diagonal, ("exclude", "include"))
        if negatives != "all" and not isinstance(negatives, Shifts):
            raise ValueError(f"negatives is {negatives!r}; known are 'all' and shifts(k)")
        if strategy == "ring" and not hasattr(critic, "dot_parts"):
            raise ValueError("strategy 'ring' is for critics with dot_parts (nn.SeparableCritic); others use 'gather'")
        x, z = (t if t.dtype == torch.float64 else t.float() for t in (x, z))
        checks.same_place(x=x, z=z)
        agreement.describe(x=x, z=z)
    shards = agreement.shards
    n = x.shape[0] if shards is None else shards.total
    if n < 2:
        raise ValueError("critic_moments needs at least 2 rows: one pair has no negatives, got 1")
    if isinstance(negatives, Shifts) and negatives.k >= n:
        raise ValueError(f"shifts({negatives.k}) needs more than {negatives.k} rows, got {n}")
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(negatives, Shifts):
            return _shifted_moments(x, z, critic, negatives.k, shards, backend)
        include = diagonal == "include"
        if hasattr(critic, "additive_parts"):
            a, b, w, bias, activation, slope = critic.additive_parts(x, z)
            j, el = additive_moments(
                a, b if shards is None else gather(b, shards), w, activation=activation, slope=slope,
                offset=0 if shards is None else shards.offset, include_diagonal=include, backend=backend,
            )  # fmt: skip
            j, el = (j, el) if shards is None else merge.moments(j, el, shards)
            return j + bias, el + bias
        if hasattr(critic, "dot_parts"):
            f, g = critic.dot_parts(x, z)
            if shards is None:
                return dot_moments(f, g, include_diagonal=include, backend=backend)
            return sharded_dot_moments(f, g, shards, strategy=strategy, include_diagonal=include, backend=backend)
    raise TypeError(f"critic must have additive_parts or dot_parts (nn.ConcatCritic, nn.SeparableCritic), got {critic}")


def _shifted_moments(
    x: Tensor, z: Tensor, critic: Any, k: int, shards: Shards | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Row i's partners are the k rows after it in the cyclic order of the whole batch; the positives are shift 0."""
    n = x.shape[0]
    following = z if shards is None else torch.cat([z, halo(z, k, shards)])  # (n, dz), cyclic; (n + k, dz)
    if hasattr(critic, "additive_parts"):
        a, b, w, bias, activation, slope = critic.additive_parts(x, following)
        scores = additive_shifts(a, b, w, k + 1, first=0, activation=activation, slope=slope, backend=backend) + bias
    else:
        scores = torch.stack([critic.paired(x, following.roll(-s, 0)[:n]) for s in range(k + 1)])  # (k + 1, n)
    j, el = scores[0].mean(), log_mean_exp(scores[1:], backend=backend)
    return (j, el) if shards is None else merge.moments(j, el, shards)
