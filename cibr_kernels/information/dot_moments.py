"""The two moments of a separable critic over all pairs; the (n, m) scores are never stored.

    S_ij = <f_i, g_j>        J = mean_i S_i,first_positive+i        L = log mean_(i,j) in P exp S_ij

One global log-sum-exp of the rows of `dot_lse`: 1 + 3 matmul passes, O((n + m) k) memory.
"""

from __future__ import annotations

from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.lse import sharded_dot_lse
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.numerics import log_mean_exp_of_rows, sum_dtype
from cibr_kernels.primitives.dot.lse.op import dot_lse


def dot_moments(
    f: Tensor,  # (n, k)
    g: Tensor,  # (m, k)
    *,
    first_positive: int = 0,
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of S = f g^T: 0-d tensors, float32 (float64 for float64), differentiable in f and g.  No checks."""
    rows, _, positives = dot_lse(
        f,
        g,
        f.new_ones((), dtype=sum_dtype(f)),
        first_positive=first_positive,
        mask_positives=not include_diagonal,
        need_cols=False,
        backend=backend,
    )
    return positives.mean(), log_mean_exp_of_rows(rows, g.shape[0] - (0 if include_diagonal else 1))


def sharded_dot_moments(
    f: Tensor,  # (n, k)
    g: Tensor,  # (n, k)
    shards: Shards,
    *,
    strategy: str = "gather",
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of the rows of all ranks, the same on each, from this rank's rows.  No checks."""
    rows, _, positives = sharded_dot_lse(
        f,
        g,
        f.new_ones((), dtype=sum_dtype(f)),
        shards,
        strategy=strategy,
        mask_positives=not include_diagonal,
        need_cols=False,
        backend=backend,
    )
    el = log_mean_exp_of_rows(rows, shards.total - (0 if include_diagonal else 1))
    return merge.moments(positives.mean(), el, shards)
