"""J and L of a critic, the two numbers that DV, MINE, NWJ, TUBA and ReMINE are functions of.

    J = mean of T(x_i, z_i) over the positives        L = log-mean-exp of T(x_i, z_j) over the product of marginals

A concat critic becomes `additive_moments` of its two projections, or `additive_shifts` for k cyclic shifts; a separable
one `dot_moments` of its embeddings, or k n dot products in plain PyTorch.  The projections are ordinary matmuls.  Other
critics are called on panels of rows (`critics.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.information import group_device
from cibr_kernels.information.critics import Additive, Dot
from cibr_kernels.information.dot_moments import dot_moments, sharded_dot_moments
from cibr_kernels.information.group import Group, grouped_moments, known_moments, weights_of_all
from cibr_kernels.information.negatives import Negatives, derangement, permutation, shifts
from cibr_kernels.information.negatives import Shifts as Shifts
from cibr_kernels.information.pairs import DIAGONALS, Pairs, agree
from cibr_kernels.information.panels import general_sums
from cibr_kernels.information.sampled import sampled_scores
from cibr_kernels.numerics import WIDE, log_mean_exp_of_rows, promote
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.log_mean_exp.op import log_mean_exp

__all__ = ["Negatives", "Shifts", "critic_moments", "derangement", "permutation", "shifts"]


def critic_moments(
    x: Tensor,  # (n, dx)
    z: Tensor,  # (n, dz)
    critic: Any,
    *,
    negatives: Negatives = "all",
    diagonal: str = "exclude",
    marginals: Tensor | None = None,  # (q, dz)
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) in nats: mean critic on the n positives, log-mean-exp over the marginal pairs.  float32 scalars.

    Args:
        x, z: (n, dx) and (n, dz), row i of one with row i of the other; bfloat16 and float16 are computed in float32.
        critic: `nn.ConcatCritic`, `nn.SeparableCritic`, or a module with their `additive_parts` or `dot_parts`: O(n)
            memory.  Or, slower, a module with `pairwise(x (p, dx), z (m, dz)) -> (p, m)`, or any callable
            (x (p, dx), z (p, dz)) -> (p,): panels of rows of the n x n scores, computed again in the backward; a panel
            is as large as `stash_budget()` allows for `critic.pair_width` numbers per pair (dx + dz by default).
        negatives: "all" n^2 pairs; `shifts(k)`, `derangement(k)` or `permutation(k)`: k n pairs, O(k n) scores.
        diagonal: "exclude" the positives from the n^2 pairs (unbiased, unbounded) or "include" them (caps J - L at
            log n, biased by e^2I / n).
        marginals: further rows of z that are nobody's positive, such as a queue of earlier batches: every row of x has
            n + q columns.  For "all" only.  On many ranks each pairs its rows with its own, as many on every rank.
        process_group: ranks whose rows make one batch, as in `clip_loss`.  Every rank gets the (J, L) of all rows, the
            same bits; gradients that DDP or FSDP average are the single-process ones.
        strategy: "gather", or "ring" for a critic with `dot_parts`, as in `clip_loss`.  Shifts need neither: the rows
            that follow this rank's in the order of the ranks come from their owners.

    Gradients reach x, z, marginals and the critic's parameters for any gradient of (J, L).  Autocast is off inside.  A
    NaN or an infinity in the input makes J a NaN.
    Raises ValueError for shapes, one row (there is no negative), k >= n, random orders on many ranks; TypeError for
    dtypes, for what is no critic, and for a critic that returns another shape.
    Source: MINE (1801.04062), equation 5; all n^2 - n pairs make its second term a degenerate U-statistic, whose
    error is e^I / n where k shuffles have e^I / sqrt(n k).
    """
    alone = process_group is None and marginals is None and negatives == "all" and strategy == "gather"
    if alone and diagonal in DIAGONALS:
        known = known_moments(x, z, critic, diagonal == "include", backend)
        if known is not None:
            return known
    pairs = agree(
        "critic_moments",
        x,
        z,
        critic,
        negatives=negatives,
        diagonal=diagonal,
        marginals=marginals,
        process_group=process_group,
        strategy=strategy,
        backend=backend,
    )
    with torch.autocast(pairs.x.device.type, enabled=False):
        return moments(pairs)


def moments(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(J, L) of all ranks' rows.  No checks; outside of autocast."""
    if pairs.strategy == "ring" and pairs.shards is not None and pairs.negatives == "all":
        f, g = pairs.embedded()
        return sharded_dot_moments(
            f, g, pairs.shards, strategy="ring", include_diagonal=pairs.include, backend=pairs.backend
        )
    j, el, looked = _moments(pairs)
    if not looked:
        j = j * pairs.nan_if_not_finite()
    return (j, el) if pairs.shards is None else merge.moments(j, el, pairs.shards)


def _moments(pairs: Pairs) -> tuple[Tensor, Tensor, bool]:
    """(J, L) of this rank's rows, and whether numbers that are not finite have made them NaN."""
    if pairs.negatives != "all":
        scores = sampled_scores(pairs)
        return scores[0].mean(), log_mean_exp(scores[1:], backend=pairs.backend), False
    alone = pairs.shards is pairs.marginals is None
    together = _of_one_node(pairs) if alone and group_device.serves(pairs.x, pairs.backend) else None
    if together is not None:
        return *together, True
    scored = pairs.scored()
    right, first_positive = scored.right, 0
    if pairs.shards is not None:
        right, first_positive = pairs.all_columns(right), pairs.first_positive
    common: dict[str, Any] = {
        "first_positive": first_positive,
        "include_diagonal": pairs.include,
        "backend": pairs.backend,
    }
    if isinstance(scored, Additive):
        bias = scored.bias if scored.bias.dtype in WIDE else promote(scored.bias)
        j, el = additive_moments(
            scored.left, right, scored.w, bias, activation=scored.activation, slope=scored.slope, **common
        )
        return j, el, True
    if isinstance(scored, Dot):
        return *dot_moments(scored.left, right, **common), False
    positives, rows, _ = general_sums(scored, right, "lse", first_positive=first_positive, include=pairs.include)
    return positives.mean(), log_mean_exp_of_rows(rows, pairs.per_row), False


def _of_one_node(pairs: Pairs) -> tuple[Tensor, Tensor] | None:
    """(J, L) of a concat critic on a GPU whose parameters are all there is to it; None for any other."""
    x, z, critic = pairs.x, pairs.z, pairs.critic
    weights = weights_of_all([critic], x, z)
    if weights is None or z.shape[0] != x.shape[0]:
        return None
    inner = critic.inner
    return grouped_moments(
        [x.contiguous()],
        [z.contiguous()],
        weights,
        Group((0,), (1.0,), inner.activation, inner.slope, pairs.include, pairs.backend, alone=True),
    )
